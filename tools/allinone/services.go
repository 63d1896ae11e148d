package allinone

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/landfall-dr/landfall/libs/program"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	changetracker "github.com/landfall-dr/landfall/services/change-tracker"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/imagedir"
	"github.com/landfall-dr/landfall/services/host-provider/qemu"
	resyncengine "github.com/landfall-dr/landfall/services/resync-engine"
	"github.com/landfall-dr/landfall/services/scheduler"
	"github.com/landfall-dr/landfall/services/uploader"
)

// build makes one service from its defaults and this run's options.
func (p *parts) build(ctx context.Context, name string) (program.Service, error) {
	e, err := p.env(ctx, name)
	if err != nil {
		return nil, err
	}
	o := p.options
	switch name {
	case changeTracker:
		c := changetracker.Default()
		if c.StateDir, err = filepath.Abs(filepath.Join(o.State, hostFolder)); err != nil {
			return nil, err
		}
		c.NBDAddress = o.NBDListen
		return changetracker.New(ctx, c, changetracker.Deps{Clock: e.Clock, Logger: e.Logger, MeterProvider: e.Meter})
	case hostProvider:
		c := hostprovider.Default()
		c.Site, c.Host, c.Images = o.Site, o.Host, o.Images
		c.Address, c.ChangeTrackerAddress = memoryPrefix+hostProvider, memoryPrefix+changeTracker
		conn, err := e.Peer(changeTracker)
		if err != nil {
			return nil, err
		}
		driver, err := p.driver(&c, changetrackerv1.NewChangeTrackerServiceClient(conn), e)
		if err != nil {
			return nil, err
		}
		return hostprovider.New(ctx, c, hostprovider.Deps{Clock: e.Clock, Logger: e.Logger, Bus: e.Bus, Driver: driver, Version: e.Version})
	case uploaderName:
		c := uploader.Default()
		c.Site, c.Apply.SoleApplier = o.Site, true
		return uploader.New(c, uploader.Deps{Bus: e.Bus, Store: e.Store, Hosts: e.Hosts, Clock: e.Clock, Logger: e.Logger, MeterProvider: e.Meter})
	case resyncEngine:
		c := resyncengine.Default()
		c.Site = o.Site
		return resyncengine.New(c, resyncengine.Deps{Bus: e.Bus, Store: e.Store, Hosts: e.Hosts, Clock: e.Clock, Logger: e.Logger, MeterProvider: e.Meter})
	case schedulerName:
		c := scheduler.Default()
		if o.RetryUnit > 0 {
			c.RetryUnit = o.RetryUnit
		}
		return scheduler.New(ctx, c, scheduler.Deps{
			Bus: e.Bus, Store: e.Store, Hosts: e.Hosts, Now: e.Clock, Logger: e.Logger, TracerProvider: e.Tracer, MeterProvider: e.Meter,
		})
	case orchestrator:
		c := failoverorchestrator.Default()
		c.Site = o.Site
		conn, err := e.Peer(schedulerName)
		if err != nil {
			return nil, err
		}
		return failoverorchestrator.New(ctx, c, failoverorchestrator.Deps{
			Clock: e.Clock, Logger: e.Logger, TracerProvider: e.Tracer, MeterProvider: e.Meter, Bus: e.Bus, Store: e.Store,
			Scheduler: schedulerv1.NewProtectionServiceClient(conn), Holder: e.Holder,
		})
	default:
		return nil, fmt.Errorf("no service is called %q", name)
	}
}

// driver makes the driver of this run's machines and completes its configuration.
func (p *parts) driver(c *hostprovider.Config, tracker changetrackerv1.ChangeTrackerServiceClient, e *program.Env) (hostprovider.Driver, error) {
	o := p.options
	if o.QEMU.Machines == "" {
		return imagedir.New(c.Images, c.Site, c.Host, tracker, e.Logger)
	}
	c.Driver = hostprovider.DriverQEMU
	c.QEMU = hostprovider.QEMUConfig{
		Machines: o.QEMU.Machines, StateDir: filepath.Join(o.State, qemuFolder), ScratchDir: o.QEMU.Scratch, SocketDir: o.QEMU.Sockets,
	}
	driver, end, err := qemu.Open(*c, tracker, e.Logger, e.Clock)
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, func(context.Context) error {
		end()
		return nil
	})
	return driver, nil
}
