package hostprovider_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/host-provider/imagedir"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	mib     = 1 << 20
	lineage = "0123456789abcdef0123456789abcdef"
)

// tracker is a change-tracker that keeps what it is told and refuses as the real one does: images attached twice,
// another lineage, a lower epoch, a point cut twice or settled.
type tracker struct {
	changetrackerv1.UnimplementedChangeTrackerServiceServer

	mu       sync.Mutex
	attached map[string]*changetrackerv1.AttachMachineRequest // by VM
	attaches int
	tracking map[string]*tracked
	refuse   error // of every AttachMachine
	broken   error // of every GetTracking
}

type tracked struct {
	lineage string
	epoch   uint64
	base    uint64
	settled map[uint64]typesv1.SettleOutcome
	open    uint64
}

func (k *tracker) AttachMachine(_ context.Context, r *changetrackerv1.AttachMachineRequest) (*changetrackerv1.AttachMachineResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuse != nil {
		return nil, k.refuse
	}
	for vm, other := range k.attached {
		for _, d := range other.Disks {
			if vm != r.Vm && slices.ContainsFunc(r.Disks, func(x *typesv1.Disk) bool { return x.Path == d.Path }) {
				return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE, "%s is attached to %s", d.Path, vm)
			}
		}
	}
	k.attaches++
	k.attached[r.Vm] = r
	out := &changetrackerv1.AttachMachineResponse{}
	for _, d := range r.Disks {
		d = proto.CloneOf(d)
		d.ExportUri = fmt.Sprintf("nbd://127.0.0.1:10809/%s/%s", r.Vm, d.Id)
		out.Disks = append(out.Disks, d)
	}
	return out, nil
}

func (k *tracker) machine(vm, lineage string, epoch uint64) (*tracked, error) {
	m := k.tracking[vm]
	switch {
	case m == nil:
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED, "%s is not tracked", vm)
	case m.lineage != lineage:
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH, "%s is tracked for %s", vm, m.lineage)
	case epoch < m.epoch:
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH, "epoch %d after %d", epoch, m.epoch)
	}
	m.epoch = epoch
	return m, nil
}

func (m *tracked) status() *typesv1.TrackingStatus {
	return &typesv1.TrackingStatus{Tracking: true, Lineage: m.lineage, Epoch: m.epoch, Base: m.base}
}

func (k *tracker) StartTracking(_ context.Context, r *changetrackerv1.StartTrackingRequest) (*changetrackerv1.StartTrackingResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.attached[r.Vm] == nil {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "%s is not attached", r.Vm)
	}
	if k.tracking[r.Vm] == nil {
		k.tracking[r.Vm] = &tracked{lineage: r.Lineage, settled: map[uint64]typesv1.SettleOutcome{}}
	}
	m, err := k.machine(r.Vm, r.Lineage, r.Epoch)
	if err != nil {
		return nil, err
	}
	return &changetrackerv1.StartTrackingResponse{Status: m.status()}, nil
}

func (k *tracker) StopTracking(_ context.Context, r *changetrackerv1.StopTrackingRequest) (*changetrackerv1.StopTrackingResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tracking[r.Vm] == nil {
		return &changetrackerv1.StopTrackingResponse{}, nil
	}
	if _, err := k.machine(r.Vm, r.Lineage, r.Epoch); err != nil {
		return nil, err
	}
	delete(k.tracking, r.Vm)
	return &changetrackerv1.StopTrackingResponse{}, nil
}

func (k *tracker) SwitchLogs(_ context.Context, r *changetrackerv1.SwitchLogsRequest) (*changetrackerv1.SwitchLogsResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m, err := k.machine(r.Vm, r.Lineage, r.Epoch)
	if err != nil {
		return nil, err
	}
	if _, settled := m.settled[r.Point]; settled {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "point %d is settled", r.Point)
	}
	if m.open != 0 && m.open != r.Point {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_OPEN, "point %d is open", m.open)
	}
	m.open = r.Point
	return &changetrackerv1.SwitchLogsResponse{Point: &typesv1.HostPoint{Ordinal: r.Point, Base: m.base}}, nil
}

func (k *tracker) SettleLogs(_ context.Context, r *changetrackerv1.SettleLogsRequest) (*changetrackerv1.SettleLogsResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m, err := k.machine(r.Vm, r.Lineage, r.Epoch)
	if err != nil {
		return nil, err
	}
	if first, settled := m.settled[r.Point]; settled && first != r.Outcome {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "point %d is settled %s", r.Point, first)
	}
	m.settled[r.Point], m.open = r.Outcome, 0
	if r.Outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED {
		m.base = r.Point
	}
	return &changetrackerv1.SettleLogsResponse{Status: m.status()}, nil
}

func (k *tracker) GetTracking(_ context.Context, r *changetrackerv1.GetTrackingRequest) (*changetrackerv1.GetTrackingResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.broken != nil {
		return nil, k.broken
	}
	m := k.tracking[r.Vm]
	if m == nil {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED, "%s is not tracked", r.Vm)
	}
	return &changetrackerv1.GetTrackingResponse{Status: m.status()}, nil
}

func (k *tracker) set(change func(*tracker)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(k)
}

// rig is a folder of machines, a change-tracker behind gRPC, and the driver.
type rig struct {
	t       *testing.T
	root    string
	net     rpc.Network
	tracker *tracker
	driver  *imagedir.Driver
	stop    func() // the change-tracker
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{t: t, root: t.TempDir(), tracker: &tracker{attached: map[string]*changetrackerv1.AttachMachineRequest{}, tracking: map[string]*tracked{}}}
	g.startTracker()
	var err error
	g.driver, err = imagedir.New(g.root, "lab", "host-1", changetrackerv1.NewChangeTrackerServiceClient(g.dial(pki.ServiceIdentity("host-provider").On("host-1"), "change-tracker")), testkit.Logger(t))
	require.NoError(t, err)
	return g
}

func (g *rig) startTracker() {
	g.stop = g.serve("change-tracker", func(r grpc.ServiceRegistrar) { changetrackerv1.RegisterChangeTrackerServiceServer(r, g.tracker) })
}

// serve runs a server of one service until the test ends or stop is called.
func (g *rig) serve(name string, register func(grpc.ServiceRegistrar)) (stop func()) {
	g.t.Helper()
	srv, err := rpc.NewServer(rpc.ServerOptions{Name: name, Identity: rpc.Identity{Peer: pki.ServiceIdentity(name).On("host-1")}, StopTimeout: time.Second})
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

func (g *rig) refresh() {
	g.t.Helper()
	require.NoError(g.t, g.driver.Refresh(testkit.Context(g.t)))
}

// id makes a GUID of a letter.
func id(letter byte) string {
	return strings.ReplaceAll("xxxxxxxx-xxxx-4xxx-8xxx-xxxxxxxxxxxx", "x", string(letter))
}

// yaml is a good vm.yaml of one disk; lines replace or follow its own.
func yaml(id, name string, disks ...string) string {
	if disks == nil {
		disks = []string{"{id: os, image: os.raw, os: true}"}
	}
	return fmt.Sprintf("version: 1\nid: %s\nname: %s\ngeneration: 2\ncpus: 2\nmemory: 4GiB\nnetwork_adapters: [{name: lan, network: office}]\ndisks:\n  - %s\n",
		id, name, strings.Join(disks, "\n  - "))
}

// file writes a file below the root.
func (g *rig) file(path string, content []byte) string {
	g.t.Helper()
	full := filepath.Join(g.root, path)
	require.NoError(g.t, os.MkdirAll(filepath.Dir(full), 0o750))
	require.NoError(g.t, os.WriteFile(full, content, 0o600))
	return full
}

// machine makes a sound machine with os.raw of 2 MiB.
func (g *rig) machine(folder, id, name string) {
	g.t.Helper()
	g.file(folder+"/vm.yaml", []byte(yaml(id, name)))
	g.raw(folder+"/os.raw", 2*mib)
}

// raw makes a sparse image.
func (g *rig) raw(path string, size int64) {
	g.t.Helper()
	require.NoError(g.t, os.Truncate(g.file(path, nil), size))
}

// vhd makes a fixed VHD whose footer a test may spoil.
func (g *rig) vhd(path string, size int64, spoil func(f *vdisk.Footer, b []byte)) {
	g.t.Helper()
	f, err := vdisk.NewFooter(size, uuid.New(), time.Unix(1e9, 0))
	require.NoError(g.t, err)
	b := f.Bytes()
	if spoil != nil {
		spoil(&f, b[:])
	}
	full := g.file(path, nil)
	require.NoError(g.t, os.Truncate(full, size))
	w, err := os.OpenFile(full, os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(g.t, err)
	_, err = w.Write(b[:])
	require.NoError(g.t, err)
	require.NoError(g.t, w.Close())
}

// reasons are the errors among findings as "check REASON", sorted.
func reasons(findings []*hostproviderv1.Finding) []string {
	out := []string{}
	for _, f := range findings {
		if f.Severity == hostproviderv1.Severity_SEVERITY_ERROR {
			out = append(out, f.Check+" "+errcat.Code(f.Reason))
		}
	}
	slices.Sort(out)
	return out
}
