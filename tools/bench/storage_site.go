package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	changetracker "github.com/landfall-dr/landfall/services/change-tracker"
	"github.com/landfall-dr/landfall/services/uploader"
)

const (
	benchSite = "lab"
	benchHost = "host-1"
	benchDisk = "os"
	// passWindow is the part of a disk that one task copies, as the scheduler cuts them.
	passWindow = 512 * mib
)

// siteMachine is a machine with one disk.
type siteMachine struct {
	VM      string
	Lineage replica.Lineage
	Image   string
	Size    int64
}

// siteTask: protect machines, all at once, and then perhaps change one of them.
type siteTask struct {
	Account  account
	Folder   string
	Machines []siteMachine
	// Compression, and the bounds of the uploader; zero takes its defaults.
	Compression                        string
	Concurrency, Buffers, SegmentBytes int
	// Apply lets the uploader apply as well, as in `landfall up`.
	Apply bool
	// Unsynced does without the event server's durability, for tests on slow disks.
	Unsynced bool
	// Churn is what the guest of the first machine does then; nil is nothing.
	Churn *churnTask
}

type siteResult struct {
	// Seconds until the bases of all machines were committed, and of each.
	Seconds float64
	Each    []float64
	// Stored bytes of segments.
	Stored int64
	Churn  *churnResult
}

// fact is what a machine's workers reported.
type fact struct {
	at     time.Time
	stored int64
	tasks  int
	failed string
}

// site is what runs where machines are, without a scheduler: the change-tracker and the uploader's roles in one process,
// joined as `landfall up` joins them.
type site struct {
	task    siteTask
	bus     *bus.Bus
	tracker changetrackerv1.ChangeTrackerServiceClient
	disks   [][]*typesv1.Disk

	mu      sync.Mutex
	facts   map[string]fact // by type, lineage, ordinal
	changed chan struct{}
	tasks   int
}

func runSite(ctx context.Context, t siteTask) (out siteResult, err error) {
	store, err := openStore(ctx, t.Account)
	if err != nil {
		return out, err
	}
	defer store.Close()
	for _, m := range t.Machines {
		if _, err := replica.Create(ctx, store, m.Lineage); err != nil {
			return out, err
		}
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	group, run := errgroup.WithContext(run)
	var closers []func() error
	defer func() {
		cancel()
		err = errors.Join(err, group.Wait())
		for i := len(closers) - 1; i >= 0; i-- {
			err = errors.Join(err, closers[i]())
		}
	}()
	server, err := bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: filepath.Join(t.Folder, "events"), Unsynced: t.Unsynced})
	if err != nil {
		return out, err
	}
	stopping := context.WithoutCancel(ctx)
	closers = append(closers, func() error { return server.Stop(stopping) })
	connect := func(name string) (*bus.Bus, error) {
		b, err := bus.Connect(ctx, bus.Options{Server: server, Name: name})
		if err == nil {
			closers = append(closers, func() error { return b.Close(stopping) })
		}
		return b, err
	}
	s := &site{task: t, facts: map[string]fact{}, changed: make(chan struct{})}
	if s.bus, err = connect("scheduler"); err != nil {
		return out, err
	}
	if err := s.bus.Declare(ctx, bus.Declaration{}); err != nil {
		return out, err
	}
	group.Go(func() error { return s.bus.Subscribe(run, bus.Subscription{Start: bus.FromFirst}, s.hear) })
	network := &rpc.Network{}
	host, err := rpc.NewServer(rpc.ServerOptions{Name: "host", Identity: rpc.Identity{Peer: pki.ServiceIdentity("change-tracker").On(benchHost)}})
	if err != nil {
		return out, err
	}
	tracker, err := changetracker.New(ctx, changetracker.Config{
		StateDir: filepath.Join(t.Folder, "tracker"), NBDAddress: "127.0.0.1:0", MaxLogEntries: changetracker.Default().MaxLogEntries,
	}, changetracker.Deps{Clock: time.Now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return out, err
	}
	tracker.Register(host)
	memory, err := network.Listen(ctx, "mem:host")
	if err != nil {
		return out, errors.Join(err, tracker.Close())
	}
	group.Go(func() error { return host.Run(run, memory) })
	group.Go(func() error { return tracker.Run(run) })
	dial := func(name string) *rpc.Dialer {
		d := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: pki.ServiceIdentity(name)}, Network: network})
		closers = append(closers, d.Close)
		return d
	}
	conn, err := dial("host-provider").Conn("mem:host")
	if err != nil {
		return out, err
	}
	s.tracker = changetrackerv1.NewChangeTrackerServiceClient(conn)
	c := t.uploader()
	work, err := connect("uploader")
	if err != nil {
		return out, err
	}
	hosts := rpc.NewHosts(dial("uploader"), func(context.Context, string, string) (string, error) { return "mem:host", nil }, time.Now)
	up, err := uploader.New(c, uploader.Deps{Bus: work, Store: store, Hosts: hosts})
	if err != nil {
		return out, err
	}
	group.Go(func() error { return up.Run(run) })
	if err := s.attach(ctx); err != nil {
		return out, err
	}
	out, err = s.protect(ctx)
	if err == nil && t.Churn != nil {
		out.Churn, err = s.churn(ctx, *t.Churn)
	}
	return out, err
}

func (t siteTask) uploader() uploader.Config {
	c := uploader.Default()
	c.Site, c.Apply.SoleApplier, c.Roles = benchSite, true, []uploader.Role{uploader.RoleShip}
	if t.Apply {
		c.Roles = append(c.Roles, uploader.RoleApply)
	}
	if t.Compression != "" {
		c.Ship.Compression = t.Compression
	}
	if t.Concurrency > 0 {
		c.Ship.Concurrency = t.Concurrency
	}
	if t.Buffers > 0 {
		c.Ship.Buffers = t.Buffers
	}
	if t.SegmentBytes > 0 {
		c.Ship.SegmentBytes = t.SegmentBytes
	}
	return c
}

// attach makes the machines known to the change-tracker and starts to track them.
func (s *site) attach(ctx context.Context) error {
	for i, m := range s.task.Machines {
		folder := filepath.Join(s.task.Folder, "machines", m.VM)
		if err := os.MkdirAll(folder, 0o750); err != nil {
			return err
		}
		image := filepath.Join(folder, "os.raw")
		if err := os.Link(m.Image, image); err != nil {
			return err
		}
		r, err := s.tracker.AttachMachine(ctx, &changetrackerv1.AttachMachineRequest{Vm: m.VM, StateDir: folder, Disks: []*typesv1.Disk{
			{Id: benchDisk, Path: image, Format: typesv1.DiskFormat_DISK_FORMAT_RAW, SizeBytes: m.Size, OsDisk: true},
		}})
		if err != nil {
			return err
		}
		s.disks = append(s.disks, r.GetDisks())
		if _, err := s.tracker.StartTracking(ctx, &changetrackerv1.StartTrackingRequest{Vm: m.VM, Lineage: string(m.Lineage), Epoch: 1}); err != nil {
			return fmt.Errorf("track machine %d: %w", i, err)
		}
	}
	return nil
}

// protect copies every machine as a whole, up to its base.
func (s *site) protect(ctx context.Context) (out siteResult, err error) {
	begin := time.Now()
	out.Each = make([]float64, len(s.task.Machines))
	stored := make([]int64, len(out.Each))
	g, ctx := errgroup.WithContext(ctx)
	for i, m := range s.task.Machines {
		g.Go(func() error {
			const pass, point = 1, 2
			if _, err := s.tracker.BeginPass(ctx, &changetrackerv1.BeginPassRequest{
				Vm: m.VM, Lineage: string(m.Lineage), Pass: pass, Epoch: 1, Scope: typesv1.PassScope_PASS_SCOPE_FULL,
			}); err != nil {
				return err
			}
			windows := int((m.Size + passWindow - 1) / passWindow)
			for w := range windows {
				t := s.shipTask(i, 0)
				off := int64(w) * passWindow
				t.Work = &uploaderv1.ShipTask_Pass{Pass: &uploaderv1.PassTask{
					Ordinal: pass, Index: int32(w + 1), Tasks: int32(windows), Scope: typesv1.PassScope_PASS_SCOPE_FULL, Disk: benchDisk,
					Window: &typesv1.ByteRange{Offset: off, Length: min(passWindow, m.Size-off)},
				}}
				if err := s.publish(ctx, bus.KindShip, t); err != nil {
					return err
				}
			}
			f, err := s.await(ctx, factKey(m, pass), windows)
			if err != nil {
				return err
			}
			stored[i] = f.stored
			if _, err := s.tracker.SettlePass(ctx, &changetrackerv1.SettlePassRequest{
				Vm: m.VM, Lineage: string(m.Lineage), Pass: pass, Epoch: 1, Outcome: typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED,
			}); err != nil {
				return err
			}
			_, f, err = s.cycle(ctx, i, point, typesv1.PointKind_POINT_KIND_BASE)
			stored[i] += f.stored
			out.Each[i] = f.at.Sub(begin).Seconds()
			return err
		})
	}
	err = g.Wait()
	out.Seconds = time.Since(begin).Seconds()
	for _, n := range stored {
		out.Stored += n
	}
	return out, err
}

func (s *site) shipTask(i int, base uint64) *uploaderv1.ShipTask {
	m := s.task.Machines[i]
	name := "sites/" + benchSite + "/vms/" + m.VM
	return &uploaderv1.ShipTask{
		Vm: name, Host: "sites/" + benchSite + "/hosts/" + benchHost, Lineage: string(m.Lineage), Epoch: 1, Base: base, Disks: s.disks[i], Reason: "bench",
		Machine: &typesv1.Machine{Name: name, Id: m.VM, DisplayName: m.VM, Generation: 2, Cpus: 1, MemoryBytes: gib, Disks: s.disks[i]},
	}
}

// cycle cuts a point and waits until it is durable. It returns when it was cut and what was reported of it.
func (s *site) cycle(ctx context.Context, i int, ordinal uint64, kind typesv1.PointKind) (cut time.Time, f fact, err error) {
	m := s.task.Machines[i]
	cut = time.Now()
	r, err := s.tracker.SwitchLogs(ctx, &changetrackerv1.SwitchLogsRequest{Vm: m.VM, Lineage: string(m.Lineage), Point: ordinal, Epoch: 1})
	if err != nil {
		return cut, f, fmt.Errorf("cut point %d: %w", ordinal, err)
	}
	t := s.shipTask(i, r.GetPoint().GetBase())
	t.Work = &uploaderv1.ShipTask_Point{Point: &uploaderv1.PointTask{
		Ordinal: ordinal, Kind: kind, CutTime: timestamppb.New(cut), Consistency: typesv1.Consistency_CONSISTENCY_CRASH,
	}}
	if err := s.publish(ctx, bus.KindShip, t); err != nil {
		return cut, f, err
	}
	if f, err = s.await(ctx, factKey(m, ordinal), 1); err != nil {
		return cut, f, err
	}
	_, err = s.tracker.SettleLogs(ctx, &changetrackerv1.SettleLogsRequest{
		Vm: m.VM, Lineage: string(m.Lineage), Point: ordinal, Epoch: 1, Outcome: typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED,
	})
	return cut, f, err
}

func (s *site) publish(ctx context.Context, kind bus.Kind, t proto.Message) error {
	s.mu.Lock()
	s.tasks++
	id := fmt.Sprintf("task-%d", s.tasks)
	s.mu.Unlock()
	return s.bus.PublishTask(ctx, kind, benchSite, id, t)
}

func factKey(m siteMachine, ordinal uint64) string {
	return fmt.Sprintf("%s/%d", m.Lineage, ordinal)
}

func processedKey(m siteMachine) string { return string(m.Lineage) + "/processed" }

// hear remembers what the uploader reports.
func (s *site) hear(_ context.Context, e *bus.Received) error {
	var key string
	f := fact{at: time.Now(), tasks: 1}
	switch e.Type {
	case "pass-task.shipped":
		var m eventsv1.PassTaskShipped
		if err := e.Decode(&m); err != nil {
			return err
		}
		key, f.stored = fmt.Sprintf("%s/%d", m.GetLineage(), m.GetPass()), m.GetStoredBytes()
	case "recovery-point.received":
		var m eventsv1.RecoveryPointReceived
		if err := e.Decode(&m); err != nil {
			return err
		}
		key, f.stored = fmt.Sprintf("%s/%d", m.GetLineage(), m.GetPoint()), m.GetStoredBytes()
	case "recovery-point.processed":
		var m eventsv1.RecoveryPointProcessed
		if err := e.Decode(&m); err != nil {
			return err
		}
		key, f.tasks = m.GetLineage()+"/processed", int(m.GetPoint())
	default:
		if e.Type == "ship.failed" || e.Type == "apply.failed" {
			key, f.failed = "failed", string(e.JSON())
			break
		}
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.facts[key]
	f.stored += old.stored
	if e.Type == "pass-task.shipped" {
		f.tasks += old.tasks
	}
	s.facts[key] = f
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// await waits for so many reports under a key (of the newest processed point: for that point).
func (s *site) await(ctx context.Context, key string, tasks int) (fact, error) {
	for {
		s.mu.Lock()
		f, bad, changed := s.facts[key], s.facts["failed"], s.changed
		s.mu.Unlock()
		if bad.failed != "" {
			return f, errors.New(bad.failed)
		}
		if f.tasks >= tasks {
			return f, nil
		}
		select {
		case <-ctx.Done():
			return f, fmt.Errorf("wait for %s: %w", key, ctx.Err())
		case <-changed:
		}
	}
}
