// Command uploader makes cut points durable in the journal and turns the journal into disks.
package main

import (
	"context"
	"os"
	"runtime/debug"

	"github.com/landfall-dr/landfall/libs/program"
	"github.com/landfall-dr/landfall/services/uploader"
)

type settings struct {
	Program  program.Settings `koanf:"program"`
	Uploader uploader.Config  `koanf:"uploader"`
}

func main() {
	defaults := settings{Program: program.DefaultSettings(), Uploader: uploader.Default()}
	defaults.Uploader.Site = defaults.Program.Site
	os.Exit(program.Main("uploader", defaults, func(s *settings) *program.Settings { return &s.Program }, build))
}

func build(_ context.Context, e *program.Env, s *settings) (program.Service, error) {
	c := s.Uploader
	c.Site = e.Site
	if c.MemoryLimitBytes > 0 {
		debug.SetMemoryLimit(c.MemoryLimitBytes)
	}
	return uploader.New(c, uploader.Deps{Bus: e.Bus, Store: e.Store, Hosts: e.Hosts, Clock: e.Clock, Logger: e.Logger, MeterProvider: e.Meter})
}
