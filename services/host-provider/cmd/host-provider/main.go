// Command host-provider runs the hypervisor's side of one host.
package main

import (
	"context"
	"os"

	"github.com/landfall-dr/landfall/libs/program"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/imagedir"
	"github.com/landfall-dr/landfall/services/host-provider/qemu"
)

type settings struct {
	Program      program.Settings    `koanf:"program"`
	HostProvider hostprovider.Config `koanf:"host_provider"`
}

func main() {
	defaults := settings{Program: program.DefaultSettings(), HostProvider: hostprovider.Default()}
	os.Exit(program.Main("host-provider", defaults, func(s *settings) *program.Settings { return &s.Program }, build))
}

func build(ctx context.Context, e *program.Env, s *settings) (program.Service, error) {
	c := s.HostProvider
	c.Site = e.Site
	tracker, err := e.Peer(program.ChangeTracker)
	if err != nil {
		return nil, err
	}
	driver, err := open(c, changetrackerv1.NewChangeTrackerServiceClient(tracker), e)
	if err != nil {
		return nil, err
	}
	return hostprovider.New(ctx, c, hostprovider.Deps{Clock: e.Clock, Logger: e.Logger, Bus: e.Bus, Driver: driver, Version: e.Version})
}

// open makes the driver that the configuration names. What it holds ends with the process.
func open(c hostprovider.Config, tracker changetrackerv1.ChangeTrackerServiceClient, e *program.Env) (hostprovider.Driver, error) {
	if c.Driver == hostprovider.DriverQEMU {
		driver, _, err := qemu.Open(c, tracker, e.Logger, e.Clock)
		return driver, err
	}
	return imagedir.New(c.Images, c.Site, c.Host, tracker, e.Logger)
}
