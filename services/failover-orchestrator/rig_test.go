package failoverorchestrator_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	lineage replica.Lineage = "0123456789abcdef0123456789abcdef"
	vmID                    = "11111111-2222-3333-4444-555555555555"
	vmName                  = "sites/lab/vms/" + vmID
	mib                     = 1 << 20
)

// Short names of the states that tests wait for.
const (
	starting      = typesv1.TestFailoverState_TEST_FAILOVER_STATE_STARTING
	ready         = typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP
	clean         = typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE
	failed        = typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED
	cleanupFailed = typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED
)

// model is what every disk holds.
type model map[string][]byte

func (m model) clone() model {
	out := model{}
	for id, b := range m {
		out[id] = bytes.Clone(b)
	}
	return out
}

// rig is a site with one protected VM of two disks (os 4 MiB, data 3 MiB and 512 bytes) whose chain has a base, point 2,
// and points 3 and 4; the replica's disks have taken in point 2 only.
type rig struct {
	t             *testing.T
	store         *blobstoretest.Memory
	server        *bus.Server
	bus           *bus.Bus
	net           rpc.Network
	vms           *bus.KV[*schedulerv1.ProtectedVm]
	now           model // what the source's disks hold
	config        string
	epoch         replica.Epoch
	open          replica.Seq
	targets       []target.Target
	machineName   string // of the next instance
	stopScheduler func()
	client        failoverv1.FailoverServiceClient
	viewer        failoverv1.FailoverServiceClient
	points        map[uint64]model

	mu     sync.Mutex
	events []*bus.Received
	serial int
}

// scheduler is a ProtectionService that knows no record: the orchestrator reads records where they are kept.
type scheduler struct {
	schedulerv1.UnimplementedProtectionServiceServer
}

func (s *scheduler) GetProtectedVm(_ context.Context, r *schedulerv1.GetProtectedVmRequest) (*schedulerv1.GetProtectedVmResponse, error) {
	return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED, "%s is not protected", r.Vm)
}

// setVM changes a VM's record as the scheduler does.
func (g *rig) setVM(name string, change func(*schedulerv1.ProtectedVm)) {
	g.t.Helper()
	_, _, err := g.vms.MutateOrCreate(testkit.Context(g.t), bus.Key("lab", filepath.Base(name)), func(vm *schedulerv1.ProtectedVm) error {
		change(vm)
		return nil
	})
	require.NoError(g.t, err)
}

func (g *rig) setState(state typesv1.ProtectionState) {
	g.t.Helper()
	g.setVM(vmName, func(vm *schedulerv1.ProtectedVm) { vm.State = state })
}

func machine() *typesv1.Machine {
	return &typesv1.Machine{
		Name: vmName, Id: vmID, DisplayName: "web", Generation: 2, Cpus: 2, MemoryBytes: 4 << 30, Host: "sites/lab/hosts/host-1",
		NetworkAdapters: []*typesv1.NetworkAdapter{{Name: "lan", MacAddress: "00:15:5d:00:00:01", Network: "office"}},
		Disks: []*typesv1.Disk{
			{Id: "os", SizeBytes: 4 * mib, Path: "/images/web/os.raw", Format: typesv1.DiskFormat_DISK_FORMAT_RAW, OsDisk: true},
			{Id: "data", SizeBytes: 3*mib + 512, Path: "/images/web/data.vhd", Format: typesv1.DiskFormat_DISK_FORMAT_VHD},
		},
	}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	t.Cleanup(failpoint.Disarm)
	g := &rig{t: t, store: blobstoretest.NewMemory(), points: map[uint64]model{}}
	ctx := testkit.Context(t)
	var err error
	g.server, err = bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: t.TempDir(), Unsynced: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, g.server.Stop(context.Background())) })
	g.bus = g.connect("scheduler")
	require.NoError(t, g.bus.Declare(ctx, bus.Declaration{}))
	g.watch()
	now := machine()
	now.Cpus = 16 // changed since the points were cut
	g.vms, err = bus.OpenKV[*schedulerv1.ProtectedVm](ctx, g.bus, bus.BucketVMs)
	require.NoError(t, err)
	g.setVM(vmName, func(vm *schedulerv1.ProtectedVm) {
		vm.Name, vm.DisplayName, vm.Lineage, vm.State, vm.Machine = vmName, "web", string(lineage), typesv1.ProtectionState_PROTECTION_STATE_PROTECTED, now
	})
	g.stopScheduler = g.serve("scheduler", func(r grpc.ServiceRegistrar) { schedulerv1.RegisterProtectionServiceServer(r, &scheduler{}) })
	g.replicate()
	return g
}

func (g *rig) connect(name string) *bus.Bus {
	g.t.Helper()
	b, err := bus.Connect(testkit.Context(g.t), bus.Options{Server: g.server, Name: name, Logger: testkit.Logger(g.t)})
	require.NoError(g.t, err)
	g.t.Cleanup(func() { require.NoError(g.t, b.Close(context.Background())) })
	return b
}

// serve runs a server of one service until the test ends or stop is called.
func (g *rig) serve(name string, register func(grpc.ServiceRegistrar)) (stop func()) {
	g.t.Helper()
	srv, err := rpc.NewServer(rpc.ServerOptions{Name: name, Identity: rpc.Identity{Peer: pki.ServiceIdentity(name)}, StopTimeout: time.Second})
	require.NoError(g.t, err)
	register(srv)
	ctx, cancel := context.WithCancel(context.Background())
	lis, err := g.net.Listen(ctx, "mem:"+name)
	require.NoError(g.t, err)
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, lis) }()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	g.t.Cleanup(stop)
	return stop
}

func (g *rig) dial(as rpc.Peer, name string) *rpc.Conn {
	g.t.Helper()
	d := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: as}, Network: &g.net})
	g.t.Cleanup(func() { require.NoError(g.t, d.Close()) })
	conn, err := d.Conn("mem:" + name)
	require.NoError(g.t, err)
	return conn
}

// instance is one orchestrator process.
type instance struct {
	stop func() // as a kill leaves it: nothing more is written
	kill context.CancelFunc
}

// newService makes a service that does not run.
func (g *rig) newService(store blobstore.Store) *failoverorchestrator.Service {
	g.t.Helper()
	g.serial++
	c := failoverorchestrator.Default()
	c.Site, c.LeaseTTL, c.RetryDelay, c.Attempts, c.Machine = "lab", 2*time.Second, 10*time.Millisecond, 3, g.machineName
	s, err := failoverorchestrator.New(testkit.Context(g.t), c, failoverorchestrator.Deps{
		Logger: testkit.Logger(g.t), Bus: g.connect("failover-orchestrator"), Store: store, Holder: fmt.Sprint("orchestrator-", g.serial),
		Scheduler: schedulerv1.NewProtectionServiceClient(g.dial(pki.ServiceIdentity("failover-orchestrator"), "scheduler")),
		Targets:   g.targets,
	})
	require.NoError(g.t, err)
	return s
}

// api serves an orchestrator and connects the clients anew: old connections would wait before they dial again.
func (g *rig) api(s *failoverorchestrator.Service) (stop func()) {
	g.t.Helper()
	stop = g.serve("failover-orchestrator", s.Register)
	g.client = failoverv1.NewFailoverServiceClient(g.dial(pki.UserIdentity("otto", pki.RoleOperator), "failover-orchestrator"))
	g.viewer = failoverv1.NewFailoverServiceClient(g.dial(pki.UserIdentity("vera", pki.RoleViewer), "failover-orchestrator"))
	return stop
}

// start runs an orchestrator over a store; serving adds its API.
func (g *rig) start(store blobstore.Store, serving bool) *instance {
	g.t.Helper()
	s := g.newService(store)
	if !serving {
		return g.run(s, func() {})
	}
	return g.run(s, g.api(s))
}

// run runs a service until the test ends or the instance is stopped, its API first.
func (g *rig) run(s *failoverorchestrator.Service, stopServer func()) *instance {
	g.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	i := &instance{kill: cancel}
	i.stop = sync.OnceFunc(func() {
		stopServer()
		cancel()
		require.NoError(g.t, <-done)
	})
	g.t.Cleanup(i.stop)
	return i
}

// replicate makes the chain.
func (g *rig) replicate() {
	g.t.Helper()
	ctx := testkit.Context(g.t)
	r, err := replica.Create(ctx, g.store, lineage)
	require.NoError(g.t, err)
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(machine())
	require.NoError(g.t, err)
	var members map[string]any
	require.NoError(g.t, json.Unmarshal(raw, &members))
	members["v"] = 1
	raw, err = json.Marshal(members)
	require.NoError(g.t, err)
	config, err := r.PutConfig(ctx, raw)
	require.NoError(g.t, err)

	now := model{"os": make([]byte, 4*mib), "data": make([]byte, 3*mib+512)}
	g.now, g.config = now, config
	write := func(disk string, off, n int64, seed uint64) change {
		testkit.Fill(now[disk][off:off+n], seed)
		return change{disk, off, n}
	}
	zero := func(disk string, off, n int64) change {
		clear(now[disk][off : off+n])
		return change{disk, off, n}
	}
	g.commit(r, config, replica.KindPartial, 1, 0, now, write("os", 0, 300<<10, 1), write("os", 3*mib, 200<<10, 2), write("data", 3*mib, 512, 3))
	g.commit(r, config, replica.KindBase, 2, 1, now, write("os", 4096, 8192, 4))
	a, err := replica.NewApplier(r, replica.ApplierOptions{Footer: func(_ string, size int64) []byte {
		f, err := vdisk.NewFooter(size, uuid.Nil, time.Unix(1e9, 0))
		require.NoError(g.t, err)
		b := f.Bytes()
		return b[:]
	}})
	require.NoError(g.t, err)
	_, err = a.Advance(ctx, 0)
	require.NoError(g.t, err)
	g.commit(r, config, replica.KindPoint, 3, 2, now, write("os", 100<<10, 64<<10, 5), write("data", 512, 1<<20, 6))
	g.commit(r, config, replica.KindPoint, 4, 3, now, zero("os", 3*mib, 100<<10), write("data", 2*mib, 4096, 7))
}

type change struct {
	disk   string
	off, n int64
}

// commit ships changes of the model and remembers it as the point's.
func (g *rig) commit(r *replica.Replica, config string, kind replica.Kind, ordinal, base replica.Ordinal, now model, changes ...change) {
	g.t.Helper()
	ctx := testkit.Context(g.t)
	p := replica.Proposal{Kind: kind, Epoch: max(1, g.epoch), Open: g.open, Base: base}
	h := segment.Header{Lineage: lineage.Bytes(), Gen: 1, Kind: segment.KindPoint, Ordinal: uint64(ordinal)}
	if kind == replica.KindPartial {
		p.Pass, h.Kind, h.Task = &replica.Pass{Ordinal: ordinal, I: 1, K: 1}, segment.KindPass, 1
	} else {
		p.Point, p.Config, p.Consistency = ordinal, config, replica.ConsistencyCrash
		p.CutTime = time.Date(2026, 11, 22, 10, 0, int(ordinal), 0, time.UTC)
		g.points[uint64(ordinal)] = now.clone()
	}
	tx := replica.NewTx()
	for _, id := range slices.Sorted(maps.Keys(now)) {
		h.DiskID, h.DiskSize = id, int64(len(now[id]))
		w, err := segment.NewWriter(h, nil, segment.Options{})
		require.NoError(g.t, err)
		for _, c := range changes {
			if c.disk == id {
				require.NoError(g.t, w.Data(c.off, now[id][c.off:c.off+c.n]))
			}
		}
		d := replica.Disk{ID: id, Gen: 1, Size: h.DiskSize}
		if !w.Empty() {
			body, sha, _, err := w.Finish()
			require.NoError(g.t, err)
			s, err := r.PutSegment(ctx, replica.SegmentKey{Kind: kind, Ordinal: ordinal, Tx: tx, DiskID: id}, body, sha)
			require.NoError(g.t, err)
			d.Segments = []replica.Segment{s}
		}
		p.Disks = append(p.Disks, d)
	}
	_, err := r.Commit(ctx, p)
	require.NoError(g.t, err)
}

// watch collects events.
func (g *rig) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	b := g.connect("watcher")
	go func() {
		done <- b.Subscribe(ctx, bus.Subscription{Start: bus.FromFirst}, func(_ context.Context, e *bus.Received) error {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.events = append(g.events, e)
			return nil
		})
	}()
	g.t.Cleanup(func() {
		cancel()
		require.NoError(g.t, <-done)
	})
}

// received are the events of a type so far.
func (g *rig) received(kind string) (out []*bus.Received) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range g.events {
		if e.Type == kind {
			out = append(out, e)
		}
	}
	return out
}

func latest() *failoverv1.PointSelector {
	return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Latest{Latest: true}}
}

func ordinal(n uint64) *failoverv1.PointSelector {
	return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Ordinal{Ordinal: n}}
}

func request(out string, p *failoverv1.PointSelector) *failoverv1.StartTestFailoverRequest {
	return &failoverv1.StartTestFailoverRequest{Vm: vmName, Point: p, Target: failoverv1.TargetKind_TARGET_KIND_VHD, OutDir: out}
}

// test starts a test failover and returns its job.
func (g *rig) test(r *failoverv1.StartTestFailoverRequest) *typesv1.Job {
	g.t.Helper()
	out, err := g.client.StartTestFailover(testkit.Context(g.t), r)
	require.NoError(g.t, err)
	require.NotNil(g.t, out.Job)
	return out.Job
}

// cleanUp starts the clean-up of the VM's test.
func (g *rig) cleanUp() *typesv1.Job {
	g.t.Helper()
	out, err := g.client.CleanUpTestFailover(testkit.Context(g.t), &failoverv1.CleanUpTestFailoverRequest{Vm: vmName})
	require.NoError(g.t, err)
	return out.Job
}

// refused requires that a test failover is refused with a reason.
func (g *rig) refused(r *failoverv1.StartTestFailoverRequest, reason typesv1.ErrorReason) {
	g.t.Helper()
	_, err := g.client.StartTestFailover(testkit.Context(g.t), r)
	require.Truef(g.t, errcat.Is(err, reason), "want %s, have %v", reason, err)
}

// failover reads the newest record straight from the bus: it is there whether or not a server runs.
func (g *rig) failover() *failoverv1.Failover {
	g.t.Helper()
	kv, err := bus.OpenKV[*failoverv1.Failover](testkit.Context(g.t), g.bus, bus.BucketFailovers)
	require.NoError(g.t, err)
	all, err := kv.List(testkit.Context(g.t), "")
	require.NoError(g.t, err)
	require.NotEmpty(g.t, all)
	newest := all[0].Value
	for _, e := range all {
		if e.Value.CreateTime.AsTime().After(newest.CreateTime.AsTime()) {
			newest = e.Value
		}
	}
	return newest
}

// await waits for the newest failover to rest in a state.
func (g *rig) await(state typesv1.TestFailoverState) *failoverv1.Failover {
	g.t.Helper()
	var f *failoverv1.Failover
	testkit.Eventually(g.t, 20*time.Second, func() error {
		if f = g.failover(); f.State != state {
			return fmt.Errorf("test failover is %s: %v", f.State, f.Error)
		}
		return nil
	})
	return f
}

// job reads a job.
func (g *rig) job(name string) *typesv1.Job {
	g.t.Helper()
	kv, err := bus.OpenKV[*typesv1.Job](testkit.Context(g.t), g.bus, bus.BucketJobs)
	require.NoError(g.t, err)
	j, _, err := kv.Get(testkit.Context(g.t), bus.Key(filepath.Base(name)))
	require.NoError(g.t, err)
	return j
}

// names lists a folder.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	out := []string{}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

var whole = []string{".landfall-failover.json", "data.vhd", "os.vhd", "vm.json"}

// requirePoint compares a folder with what the disks held at a point.
func (g *rig) requirePoint(dir string, point uint64) {
	g.t.Helper()
	require.Equal(g.t, whole, names(g.t, dir), "nothing half-done")
	for id, want := range g.points[point] {
		image, err := vdisk.Open(filepath.Join(dir, id+".vhd"), vdisk.FormatVHD, true)
		require.NoError(g.t, err)
		got := make([]byte, image.Size())
		_, err = image.ReadAt(got, 0)
		require.NoError(g.t, errors.Join(err, image.Close()))
		require.Zero(g.t, len(got)%mib)
		require.Truef(g.t, bytes.Equal(want, got[:len(want)]), "disk %s differs from point %d", id, point)
		require.True(g.t, vdisk.IsZero(got[len(want):]), "padding of disk %s", id)
	}
}
