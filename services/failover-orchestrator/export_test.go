package failoverorchestrator

import (
	"context"
	"time"
)

// Work does what is due for one failover without asking for the lease: an orchestrator that does not know yet that it is
// not the one any more.
func (s *Service) Work(ctx context.Context, failover string) { s.run(ctx, failoverKey(failover)) }

// RenewHolds sets how often the pin of a point that is being read is lengthened. Call it before Run.
func (s *Service) RenewHolds(every time.Duration) { s.holdRenew = every }
