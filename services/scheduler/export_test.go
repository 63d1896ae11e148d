package scheduler

import "context"

// RunWithoutLease works as the active scheduler does, whoever holds the lease.
func (s *Service) RunWithoutLease(ctx context.Context) error { return s.term(ctx) }
