package qemu

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/qmp"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

// Open makes the driver as a host is configured: with its inventory and its connections. close ends both.
func Open(c hostprovider.Config, tracker changetrackerv1.ChangeTrackerServiceClient, log *slog.Logger, clock func() time.Time) (d *Driver, end func(), err error) {
	state := c.QEMU.StateDir
	pool := qmp.NewPool()
	inv, err := inventory.New(inventory.Options{
		Folder: c.QEMU.Machines, StateDir: filepath.Join(state, "inventory"), Monitors: pool, Site: c.Site, Host: c.Host, Logger: log,
		Keep: func(id string) bool { return wanted(state, id) },
	})
	if err != nil {
		return nil, nil, fmt.Errorf("driver qemu: %w", err)
	}
	d, err = New(Config{StateDir: state, ScratchDir: c.QEMU.Scratch(), SocketDir: c.QEMU.Sockets()}, Deps{
		Inventory: inv, Pool: pool, Tracker: tracker, Log: log, Clock: clock,
	})
	if err != nil {
		return nil, nil, err
	}
	return d, func() {
		d.Close()
		pool.Close()
	}, nil
}

// wanted says whether a machine is protected or fenced, by its record. One that cannot be read is kept.
func wanted(state, id string) bool {
	r, err := loadRecord(state, strings.ToLower(id))
	return err != nil || r.Lineage != "" || r.Fence != ""
}
