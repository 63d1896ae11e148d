// Command change-tracker serves disks to guests and records what changes on them.
package main

import (
	"context"
	"os"

	"github.com/landfall-dr/landfall/libs/program"
	changetracker "github.com/landfall-dr/landfall/services/change-tracker"
)

type settings struct {
	Program       program.Settings     `koanf:"program"`
	ChangeTracker changetracker.Config `koanf:"change_tracker"`
}

func main() {
	defaults := settings{Program: program.DefaultSettings(), ChangeTracker: changetracker.Default()}
	os.Exit(program.Main("change-tracker", defaults, func(s *settings) *program.Settings { return &s.Program }, build))
}

func build(ctx context.Context, e *program.Env, s *settings) (program.Service, error) {
	return changetracker.New(ctx, s.ChangeTracker, changetracker.Deps{Clock: e.Clock, Logger: e.Logger, MeterProvider: e.Meter})
}
