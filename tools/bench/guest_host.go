package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	changetracker "github.com/landfall-dr/landfall/services/change-tracker"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/qemu"
)

// benchLineage is the protection of the rows that drive the host's services themselves.
const benchLineage = "0123456789abcdef0123456789abcdef"

// hostRig is what runs on a host, without a scheduler: the driver, and a change-tracker behind its own handlers on
// in-memory connections. Rows choose the moment and the number of cuts.
type hostRig struct {
	driver *qemu.Driver
	// reader is the change-tracker as an uploader sees it.
	reader changetrackerv1.ChangeTrackerServiceClient
	frozen *freezes
	source *sources
	last   uint64
	stop   func() error
}

// sources remembers where the newest point or pass is read.
type sources struct {
	changetrackerv1.ChangeTrackerServiceClient
	mu   sync.Mutex
	uris map[string]string
}

func (s *sources) AttachSource(ctx context.Context, r *changetrackerv1.AttachSourceRequest, o ...grpc.CallOption) (*changetrackerv1.AttachSourceResponse, error) {
	s.mu.Lock()
	s.uris = map[string]string{}
	for _, d := range r.GetDisks() {
		s.uris[d.GetDisk()] = d.GetUri()
	}
	s.mu.Unlock()
	return s.ChangeTrackerServiceClient.AttachSource(ctx, r, o...)
}

func (s *sources) uri(disk string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.uris[disk]
}

// freezes is a log that keeps how long the guest was frozen: the driver tells it there and nowhere else.
type freezes struct {
	mu   sync.Mutex
	list []time.Duration
}

func (f *freezes) Enabled(context.Context, slog.Level) bool { return true }
func (f *freezes) WithAttrs([]slog.Attr) slog.Handler       { return f }
func (f *freezes) WithGroup(string) slog.Handler            { return f }
func (f *freezes) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "frozen" && a.Value.Kind() == slog.KindDuration {
			f.mu.Lock()
			f.list = append(f.list, a.Value.Duration())
			f.mu.Unlock()
		}
		return true
	})
	return nil
}

func (f *freezes) take() []time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := f.list
	f.list = nil
	return list
}

// startHost starts the host's services for a guest and begins to track it: a pass is committed without being read.
func startHost(ctx context.Context, folder string, g *labGuest) (h *hostRig, err error) {
	if folder, err = filepath.Abs(folder); err != nil {
		return nil, err
	}
	h = &hostRig{frozen: &freezes{}, source: &sources{}}
	log := slog.New(h.frozen)
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	group, run := errgroup.WithContext(run)
	var closers []func() error
	h.stop = func() error {
		var errs []error
		for i := len(closers) - 1; i >= 0; i-- {
			errs = append(errs, closers[i]())
		}
		cancel()
		return errors.Join(append(errs, group.Wait())...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start host: %w", err), h.stop())
		}
	}()
	network := &rpc.Network{}
	server, err := rpc.NewServer(rpc.ServerOptions{Name: "host", Identity: rpc.Identity{Peer: pki.ServiceIdentity("change-tracker", "host-provider")}, Logger: log})
	if err != nil {
		return h, err
	}
	tracker, err := changetracker.New(ctx, changetracker.Config{
		StateDir: filepath.Join(folder, "tracker"), NBDAddress: "unix:" + filepath.Join(g.sockets, "n"), MaxLogEntries: changetracker.Default().MaxLogEntries,
	}, changetracker.Deps{Clock: time.Now, Logger: log})
	if err != nil {
		return h, err
	}
	tracker.Register(server)
	memory, err := network.Listen(ctx, "mem:host")
	if err != nil {
		return h, errors.Join(err, tracker.Close())
	}
	group.Go(func() error { return server.Run(run, memory) })
	group.Go(func() error { return tracker.Run(run) })
	as := func(name string) (changetrackerv1.ChangeTrackerServiceClient, error) {
		d := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: pki.ServiceIdentity(name)}, Network: network})
		closers = append(closers, d.Close)
		conn, err := d.Conn("mem:host")
		if err != nil {
			return nil, err
		}
		return changetrackerv1.NewChangeTrackerServiceClient(conn), nil
	}
	if h.source.ChangeTrackerServiceClient, err = as("host-provider"); err != nil {
		return h, err
	}
	if h.reader, err = as("uploader"); err != nil {
		return h, err
	}
	driver, end, err := qemu.Open(hostprovider.Config{Site: "lab", Host: "host-1", QEMU: hostprovider.QEMUConfig{
		Machines: g.machines, StateDir: filepath.Join(folder, "q"), SocketDir: filepath.Join(g.sockets, "q"),
	}}, h.source, log, time.Now)
	if err != nil {
		return h, err
	}
	closers = append(closers, func() error { end(); return nil })
	h.driver = driver
	if err := driver.Refresh(ctx); err != nil {
		return h, err
	}
	if _, err := driver.Establish(ctx, machineID, benchLineage, 1); err != nil {
		return h, err
	}
	if err := h.begin(ctx); err != nil {
		return h, err
	}
	return h, h.settlePass(ctx)
}

// begin opens a pass over everything.
func (h *hostRig) begin(ctx context.Context) error {
	h.last++
	_, err := h.driver.BeginPass(ctx, hostprovider.Pass{VM: machineID, Lineage: benchLineage, Pass: h.last, Epoch: 1, Scope: typesv1.PassScope_PASS_SCOPE_FULL})
	return err
}

func (h *hostRig) committed() hostprovider.Settle {
	return hostprovider.Settle{VM: machineID, Lineage: benchLineage, Point: h.last, Epoch: 1, Outcome: typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED}
}

func (h *hostRig) settlePass(ctx context.Context) error {
	_, err := h.driver.SettlePass(ctx, h.committed())
	return err
}

// cut opens a point.
func (h *hostRig) cut(ctx context.Context, c typesv1.Consistency) (hostprovider.CutResult, error) {
	h.last++
	return h.driver.Cut(ctx, hostprovider.Cut{VM: machineID, Lineage: benchLineage, Point: h.last, Epoch: 1, Consistency: c})
}

// settle ends the open point.
func (h *hostRig) settle(ctx context.Context) error {
	_, err := h.driver.Settle(ctx, h.committed())
	return err
}
