package hostprovider_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/imagedir"
)

const (
	crash     = typesv1.Consistency_CONSISTENCY_CRASH
	committed = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
	abandoned = typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
)

// service is a running host-provider over a real bus and gRPC.
type service struct {
	*rig
	b      *bus.Bus
	hosts  *bus.KV[*hostproviderv1.Host]
	client hostproviderv1.HostServiceClient // as the scheduler
	viewer hostproviderv1.HostServiceClient
	stop   func()
}

func config(root string) hostprovider.Config {
	c := hostprovider.Default()
	c.Site, c.Images, c.Address, c.ChangeTrackerAddress = "lab", root, "mem:host-provider", "mem:change-tracker"
	c.ScanInterval, c.Heartbeat = 100*time.Millisecond, 100*time.Millisecond
	return c
}

func newService(t *testing.T) *service {
	t.Helper()
	t.Cleanup(failpoint.Disarm)
	ctx := testkit.Context(t)
	server, err := bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: t.TempDir(), Unsynced: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Stop(context.Background())) })
	b, err := bus.Connect(ctx, bus.Options{Server: server, Name: "host-provider", Logger: testkit.Logger(t)})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Close(context.Background())) })
	require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	g := &service{rig: newRig(t), b: b}
	g.hosts, err = bus.OpenKV[*hostproviderv1.Host](ctx, b, bus.BucketHosts)
	require.NoError(t, err)
	s, err := hostprovider.New(ctx, config(g.root), hostprovider.Deps{Logger: testkit.Logger(t), Bus: b, Driver: g.driver, Version: "test"})
	require.NoError(t, err)
	g.serve("host-provider", s.Register)
	g.client = hostproviderv1.NewHostServiceClient(g.dial(pki.ServiceIdentity("scheduler"), "host-provider"))
	g.viewer = hostproviderv1.NewHostServiceClient(g.dial(pki.UserIdentity("vera", pki.RoleViewer), "host-provider"))
	run, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(run) }()
	g.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-done)
	})
	t.Cleanup(g.stop)
	return g
}

// record waits until the host's record satisfies want.
func (g *service) record(want func(h *hostproviderv1.Host) error) *hostproviderv1.Host {
	g.t.Helper()
	var h *hostproviderv1.Host
	testkit.Eventually(g.t, 15*time.Second, func() error {
		var err error
		if h, _, err = g.hosts.Get(testkit.Context(g.t), bus.Key("lab", "host-1")); err != nil {
			return err
		}
		return want(h)
	})
	return h
}

func holds(vms ...string) func(h *hostproviderv1.Host) error {
	return func(h *hostproviderv1.Host) error {
		if have, want := strings.Join(h.Vms, " "), strings.Join(vms, " "); have != want {
			return fmt.Errorf("record has %q, want %q", have, want)
		}
		return nil
	}
}

func TestHeartbeat(t *testing.T) {
	g := newService(t)
	h := g.record(holds())
	require.Equal(t, "sites/lab/hosts/host-1", h.Name)
	require.Equal(t, "imagedir", h.Driver)
	require.Equal(t, "test", h.Version)
	require.Equal(t, "mem:host-provider", h.HostProviderAddress)
	require.Equal(t, "mem:change-tracker", h.ChangeTrackerAddress)
	first := h.HeartbeatTime.AsTime()
	g.machine("web", id('a'), "web")
	g.machine("db", id('b'), "db")
	h = g.record(holds(id('b'), id('a'))) // by name
	require.True(t, h.HeartbeatTime.AsTime().After(first))

	// Machines do not leave the record because the change-tracker is away, or because their folder is broken.
	g.rig.stop()
	g.file("db/vm.yaml", []byte("version: 1\n"))
	later := h.HeartbeatTime.AsTime()
	g.record(func(h *hostproviderv1.Host) error {
		if !h.HeartbeatTime.AsTime().After(later.Add(300 * time.Millisecond)) {
			return errors.New("no heartbeat")
		}
		return holds(id('b'), id('a'))(h)
	})
}

// A host that starts while its change-tracker is away is alive, and has not lost the machines that it held.
func TestRestartWithoutTracker(t *testing.T) {
	g := newService(t)
	g.machine("web", id('a'), "web")
	h := g.record(holds(id('a')))
	g.stop()
	fresh := newRig(t)
	fresh.machine("web", id('a'), "web")
	fresh.stop()
	s, err := hostprovider.New(testkit.Context(t), config(fresh.root), hostprovider.Deps{Bus: g.b, Driver: fresh.driver})
	require.NoError(t, err)
	run, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(run) }()
	defer func() {
		cancel()
		require.NoError(t, <-done)
	}()
	before := h.HeartbeatTime.AsTime()
	g.record(func(h *hostproviderv1.Host) error {
		if !h.HeartbeatTime.AsTime().After(before) || h.Version != "" {
			return errors.New("no heartbeat of the second")
		}
		return holds(id('a'))(h)
	})
}

// Pages have every machine once, whatever their names, and the last one has the problems.
func TestPages(t *testing.T) {
	g := newService(t)
	var want []string
	for i, name := range []string{"a", "a b", "a-1", "a1", "a2", "B", "web"} {
		g.machine(fmt.Sprint("m", i), id("9876543"[i]), name)
	}
	for _, same := range []byte("fed") { // one name, three ids
		g.machine("same-"+string(same), id(same), "twin")
	}
	want = []string{"B", "a", "a b", "a-1", "a1", "a2", "twin", "twin", "twin", "web"}
	g.file("broken/vm.yaml", []byte("version: 1\n"))
	g.record(func(h *hostproviderv1.Host) error {
		if len(h.Vms) != len(want) {
			return fmt.Errorf("%d machines", len(h.Vms))
		}
		return nil
	})
	for _, size := range []int32{0, 1, 2, 3, 7, 10, 5000} {
		var got []string
		ids := map[string]bool{}
		r := &hostproviderv1.ListMachinesRequest{PageSize: size}
		for {
			page, err := g.viewer.ListMachines(testkit.Context(t), r)
			require.NoError(t, err)
			for _, m := range page.Machines {
				got = append(got, m.DisplayName)
				ids[m.Id] = true
			}
			r.PageToken = page.NextPageToken
			require.Equal(t, r.PageToken == "", len(page.Problems) > 0)
			if r.PageToken == "" {
				break
			}
		}
		require.Equal(t, want, got, "pages of %d", size)
		require.Len(t, ids, len(want))
	}
	_, err := g.viewer.ListMachines(testkit.Context(t), &hostproviderv1.ListMachinesRequest{PageToken: "!"})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), "%v", err)
	_, err = g.viewer.ListMachines(testkit.Context(t), &hostproviderv1.ListMachinesRequest{PageSize: -1})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), "%v", err)
}

// A point's life over the wire: what the change-tracker answers and refuses arrives with its reason.
func TestPoints(t *testing.T) {
	g := newService(t)
	g.machine("w", id('a'), "web")
	g.record(holds(id('a')))
	ctx := testkit.Context(t)
	vm := strings.ToUpper(id('a')) // a GUID in either case
	refused := func(err error, reason typesv1.ErrorReason) {
		t.Helper()
		require.Truef(t, errcat.Is(err, reason), "want %s, have %v", reason, err)
	}
	cut := func(point, epoch uint64, consistency typesv1.Consistency) (*hostproviderv1.CutPointResponse, error) {
		return g.client.CutPoint(ctx, &hostproviderv1.CutPointRequest{Vm: vm, Lineage: lineage, Point: point, Epoch: epoch, Consistency: consistency})
	}
	settle := func(point, epoch uint64, outcome typesv1.SettleOutcome) (*hostproviderv1.SettlePointResponse, error) {
		return g.client.SettlePoint(ctx, &hostproviderv1.SettlePointRequest{Vm: vm, Lineage: lineage, Point: point, Epoch: epoch, Outcome: outcome})
	}
	_, err := cut(1, 1, crash)
	refused(err, typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED)
	rel, err := g.client.CreateReplicationRelationship(ctx, &hostproviderv1.CreateReplicationRelationshipRequest{Vm: "web", Lineage: lineage, Epoch: 2})
	require.NoError(t, err)
	require.Equal(t, lineage, rel.Status.Lineage)
	require.Equal(t, "web", rel.Machine.DisplayName)
	_, err = g.client.CreateReplicationRelationship(ctx, &hostproviderv1.CreateReplicationRelationshipRequest{Vm: "web", Lineage: strings.Repeat("f", 32), Epoch: 2})
	refused(err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH)

	_, err = cut(1, 2, typesv1.Consistency_CONSISTENCY_APPLICATION)
	refused(err, typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED)
	for range 2 {
		got, err := cut(1, 2, crash)
		require.NoError(t, err)
		require.EqualValues(t, 1, got.Point.Ordinal)
		require.Equal(t, crash, got.Consistency)
		require.Equal(t, "web", got.Machine.DisplayName)
	}
	_, err = cut(2, 2, crash)
	refused(err, typesv1.ErrorReason_ERROR_REASON_POINT_OPEN)
	_, err = cut(1, 1, crash)
	refused(err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)
	for range 2 {
		s, err := settle(1, 2, committed)
		require.NoError(t, err)
		require.EqualValues(t, 1, s.Status.Base)
	}
	_, err = settle(1, 2, abandoned)
	refused(err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)

	// The folder breaks: the guest runs on, and so do its points.
	g.file("w/vm.yaml", []byte("version: 1\n"))
	testkit.Eventually(t, 10*time.Second, func() bool {
		_, problems, err := g.driver.Machines(ctx)
		return err == nil && len(problems) > 0
	})
	_, err = cut(2, 2, crash)
	require.NoError(t, err)
	_, err = settle(2, 2, abandoned)
	require.NoError(t, err)
	list, err := g.viewer.ListPoints(ctx, &hostproviderv1.ListPointsRequest{Vm: vm})
	require.NoError(t, err)
	require.EqualValues(t, 1, list.Status.Base)

	// Who may do what, and what is malformed.
	_, err = g.viewer.CutPoint(ctx, &hostproviderv1.CutPointRequest{Vm: vm, Lineage: lineage, Point: 3, Consistency: crash})
	refused(err, typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED)
	_, err = cut(0, 2, crash)
	refused(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)
	_, err = g.viewer.GetMachine(ctx, &hostproviderv1.GetMachineRequest{Vm: "nobody"})
	refused(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND)
	check, err := g.viewer.CheckPrerequisites(ctx, &hostproviderv1.CheckPrerequisitesRequest{Vm: "web"})
	require.NoError(t, err, "known by its name, though vm.yaml has lost it")
	require.Contains(t, reasons(check.Findings), "vm-definition VM_DEFINITION_INVALID")

	for range 2 {
		_, err = g.client.RemoveReplicationRelationship(ctx, &hostproviderv1.RemoveReplicationRelationshipRequest{Vm: vm, Lineage: lineage, Epoch: 2})
		require.NoError(t, err)
	}
	require.Empty(t, g.tracker.tracking)
}

// A call whose answer is lost may simply be repeated.
func TestLostAnswers(t *testing.T) {
	g := newService(t)
	g.machine("web", id('a'), "web")
	g.record(holds(id('a')))
	ctx := testkit.Context(t)
	_, err := g.client.CreateReplicationRelationship(ctx, &hostproviderv1.CreateReplicationRelationshipRequest{Vm: id('a'), Lineage: lineage, Epoch: 1})
	require.NoError(t, err)
	for _, p := range []string{"before-cut", "after-cut", "before-settle", "after-settle"} {
		require.NoError(t, failpoint.Arm("host-provider/"+p+"=1*error"))
		r := &hostproviderv1.CutPointRequest{Vm: id('a'), Lineage: lineage, Point: uint64(len(p)), Epoch: 1, Consistency: crash}
		c := &hostproviderv1.SettlePointRequest{Vm: id('a'), Lineage: lineage, Point: r.Point, Epoch: 1, Outcome: committed}
		_, cutErr := g.client.CutPoint(ctx, r)
		if cutErr != nil {
			_, err = g.client.CutPoint(ctx, r)
			require.NoError(t, err, p)
		}
		_, settleErr := g.client.SettlePoint(ctx, c)
		if settleErr != nil {
			_, err = g.client.SettlePoint(ctx, c)
			require.NoError(t, err, p)
		}
		require.Equal(t, strings.HasSuffix(p, "cut"), cutErr != nil, p)
		require.Equal(t, strings.HasSuffix(p, "settle"), settleErr != nil, p)
		g.tracker.set(func(k *tracker) { clear(k.tracking[id('a')].settled) })
	}
}

func TestConfig(t *testing.T) {
	require.NoError(t, config("/images").Validate())
	err := hostprovider.Config{Site: "Lab 1", Host: "-", ScanInterval: 1}.Validate()
	for _, key := range []string{"site:", "host:", "images:", "address:", "change_tracker_address:", "scan_interval:", "heartbeat:"} {
		require.ErrorContains(t, err, key)
	}
	_, err = hostprovider.New(testkit.Context(t), config("/images"), hostprovider.Deps{})
	require.Error(t, err)
	g := newRig(t)
	file := g.file("plain", nil)
	for _, root := range []string{file, filepath.Join(g.root, "none")} {
		_, err = imagedir.New(root, "lab", "host-1", nil, testkit.Logger(t))
		require.ErrorContains(t, err, "image folder")
	}
	require.NoError(t, os.Remove(file))
}
