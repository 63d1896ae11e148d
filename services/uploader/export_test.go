package uploader

import "github.com/landfall-dr/landfall/libs/shipping"

// DamageRuns lets a test at every run between its receipt and the segment. Call it before Run; f is called by several
// streams at once.
func (s *Service) DamageRuns(f func(shipping.Run)) { s.shipper.damage = f }
