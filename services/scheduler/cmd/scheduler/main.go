// Command scheduler owns the records of protected machines and decides what happens when.
package main

import (
	"context"
	"os"

	"github.com/landfall-dr/landfall/libs/program"
	"github.com/landfall-dr/landfall/services/scheduler"
)

type settings struct {
	Program   program.Settings `koanf:"program"`
	Scheduler scheduler.Config `koanf:"scheduler"`
}

func main() {
	defaults := settings{Program: program.DefaultSettings(), Scheduler: scheduler.Default()}
	os.Exit(program.Main("scheduler", defaults, func(s *settings) *program.Settings { return &s.Program }, build))
}

func build(ctx context.Context, e *program.Env, s *settings) (program.Service, error) {
	return scheduler.New(ctx, s.Scheduler, scheduler.Deps{
		Bus: e.Bus, Store: e.Store, Hosts: e.Hosts, Now: e.Clock, Logger: e.Logger, TracerProvider: e.Tracer, MeterProvider: e.Meter,
	})
}
