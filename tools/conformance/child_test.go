package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	changetracker "github.com/landfall-dr/landfall/services/change-tracker"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/imagedir"
	"github.com/landfall-dr/landfall/services/host-provider/qemu"
)

// childEnv holds the child's settings.
const childEnv = "LANDFALL_CONFORMANCE_CHILD"

// settings of a host in a process of its own.
type settings struct {
	Dir    string // certificates, state and, when it serves, the address
	Driver string // "imagedir" or "qemu"
	Images string // machines of the driver
	NBD    string // where imagedir's disks are exported
}

func TestMain(m *testing.M) {
	if raw := os.Getenv(childEnv); raw != "" {
		var s settings
		if err := json.Unmarshal([]byte(raw), &s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		if err := s.serve(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func (s settings) certificates() string { return filepath.Join(s.Dir, "certificates") }
func (s settings) address() string      { return filepath.Join(s.Dir, "address") }
func (s settings) sockets() string      { return filepath.Join(s.Dir, "s") }

// driver makes the driver that the settings name.
func (s settings) driver(tracker changetrackerv1.ChangeTrackerServiceClient, log *slog.Logger) (hostprovider.Driver, error) {
	c := hostprovider.Config{Site: "lab", Host: "host-1", Images: s.Images}
	switch s.Driver {
	case hostprovider.DriverImagedir:
		return imagedir.New(c.Images, c.Site, c.Host, tracker, log)
	case hostprovider.DriverQEMU:
		c.QEMU = hostprovider.QEMUConfig{Machines: s.Images, StateDir: filepath.Join(s.Dir, "q")}
		driver, _, err := qemu.Open(c, tracker, log, time.Now)
		return driver, err
	default:
		return nil, fmt.Errorf("no driver %q", s.Driver)
	}
}

// serve is the host: both services behind one TLS listener, until the process is killed.
func (s settings) serve(ctx context.Context) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	id, err := rpc.LoadIdentity(s.certificates(), time.Now)
	if err != nil {
		return err
	}
	network := &rpc.Network{}
	server, err := rpc.NewServer(rpc.ServerOptions{Name: "host", Identity: id, Logger: log})
	if err != nil {
		return err
	}
	tracker, err := changetracker.New(ctx, changetracker.Config{
		StateDir: filepath.Join(s.Dir, "tracker"), NBDAddress: s.NBD, MaxLogEntries: changetracker.Default().MaxLogEntries,
	}, changetracker.Deps{Clock: time.Now, Logger: log})
	if err != nil {
		return err
	}
	tracker.Register(server)
	self := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: pki.ServiceIdentity("host-provider").On("host-1")}, Network: network})
	conn, err := self.Conn("mem:host")
	if err != nil {
		return err
	}
	driver, err := s.driver(changetrackerv1.NewChangeTrackerServiceClient(conn), log)
	if err != nil {
		return err
	}
	events, err := bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: filepath.Join(s.Dir, "events"), Unsynced: true})
	if err != nil {
		return err
	}
	client, err := bus.Connect(ctx, bus.Options{Server: events, Name: "host-provider", Logger: log})
	if err != nil {
		return err
	}
	if err := client.Declare(ctx, bus.Declaration{}); err != nil {
		return err
	}
	c := hostprovider.Default()
	c.Images, c.Address, c.ChangeTrackerAddress, c.ScanInterval = s.Images, "x", "x", 300*time.Millisecond
	host, err := hostprovider.New(ctx, c, hostprovider.Deps{Clock: time.Now, Logger: log, Bus: client, Driver: driver})
	if err != nil {
		return err
	}
	host.Register(server)
	memory, err := network.Listen(ctx, "mem:host")
	if err != nil {
		return err
	}
	tcp, err := network.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.address()+".new", []byte(tcp.Addr().String()), 0o600); err != nil {
		return err
	}
	if err := os.Rename(s.address()+".new", s.address()); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Run(ctx, memory, tcp) })
	group.Go(func() error { return tracker.Run(ctx) })
	group.Go(func() error { return host.Run(ctx) })
	return group.Wait()
}
