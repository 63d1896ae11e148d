package failoverorchestrator

import "context"

// Work does what is due for one failover without asking for the lease: an orchestrator that does not know yet that it is
// not the one any more.
func (s *Service) Work(ctx context.Context, failover string) { s.run(ctx, failoverKey(failover)) }
