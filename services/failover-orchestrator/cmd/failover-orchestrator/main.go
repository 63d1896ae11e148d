// Command failover-orchestrator brings protected machines up on a recovery target.
package main

import (
	"context"
	"os"

	"github.com/landfall-dr/landfall/libs/program"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

type settings struct {
	Program              program.Settings            `koanf:"program"`
	FailoverOrchestrator failoverorchestrator.Config `koanf:"failover_orchestrator"`
}

func main() {
	defaults := settings{Program: program.DefaultSettings(), FailoverOrchestrator: failoverorchestrator.Default()}
	os.Exit(program.Main("failover-orchestrator", defaults, func(s *settings) *program.Settings { return &s.Program }, build))
}

func build(ctx context.Context, e *program.Env, s *settings) (program.Service, error) {
	c := s.FailoverOrchestrator
	c.Site = e.Site
	scheduler, err := e.Peer("scheduler")
	if err != nil {
		return nil, err
	}
	return failoverorchestrator.New(ctx, c, failoverorchestrator.Deps{
		Clock: e.Clock, Logger: e.Logger, TracerProvider: e.Tracer, MeterProvider: e.Meter, Bus: e.Bus, Store: e.Store,
		Scheduler: schedulerv1.NewProtectionServiceClient(scheduler), Holder: e.Holder,
	})
}
