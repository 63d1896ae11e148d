// Command resync-engine compares machines with their replicas and sends what differs.
package main

import (
	"context"
	"os"
	"runtime/debug"

	"github.com/landfall-dr/landfall/libs/program"
	resyncengine "github.com/landfall-dr/landfall/services/resync-engine"
)

type settings struct {
	Program      program.Settings    `koanf:"program"`
	ResyncEngine resyncengine.Config `koanf:"resync_engine"`
}

func main() {
	defaults := settings{Program: program.DefaultSettings(), ResyncEngine: resyncengine.Default()}
	defaults.ResyncEngine.Site = defaults.Program.Site
	os.Exit(program.Main("resync-engine", defaults, func(s *settings) *program.Settings { return &s.Program }, build))
}

func build(_ context.Context, e *program.Env, s *settings) (program.Service, error) {
	c := s.ResyncEngine
	c.Site = e.Site
	if c.MemoryLimitBytes > 0 {
		debug.SetMemoryLimit(c.MemoryLimitBytes)
	}
	return resyncengine.New(c, resyncengine.Deps{Bus: e.Bus, Store: e.Store, Hosts: e.Hosts, Clock: e.Clock, Logger: e.Logger, MeterProvider: e.Meter})
}
