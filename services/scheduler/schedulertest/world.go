package schedulertest

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// Site is the site of the world.
const Site = "lab"

// World is an embedded bus, a store in memory, hosts on real gRPC in memory, and workers. It ends with the test.
type World struct {
	t       testing.TB
	Bus     *bus.Bus
	Store   blobstore.Store
	Network *rpc.Network
	Hosts   []*Host
	Workers *Workers
	tracer  trace.TracerProvider
}

func splitName(name string) (site, id string) {
	parts := strings.Split(name, "/")
	return parts[1], parts[len(parts)-1]
}

// NewWorld starts a world with the given hosts. tracer may be nil.
func NewWorld(t testing.TB, tracer trace.TracerProvider, hosts ...*Host) *World {
	ctx, stop := context.WithCancel(context.Background())
	var group errgroup.Group
	server, err := bus.StartEmbedded(testkit.Context(t), bus.ServerOptions{StoreDir: t.TempDir(), Unsynced: true})
	require.NoError(t, err)
	b, err := bus.Connect(testkit.Context(t), bus.Options{Server: server, Name: "world", TracerProvider: tracer})
	require.NoError(t, err)
	t.Cleanup(func() { // after the workers have stopped
		end, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = b.Close(end)
		_ = server.Stop(end)
	})
	t.Cleanup(func() {
		stop()
		_ = group.Wait()
	})
	require.NoError(t, b.Declare(testkit.Context(t), bus.Declaration{}))
	store := blobstoretest.NewMemory()
	w := &World{t: t, Bus: b, Store: store, Network: &rpc.Network{}, Hosts: hosts, tracer: tracer}
	w.Workers = &Workers{bus: b.As("uploader"), store: store, hosts: map[string]*Host{}, ledger: map[entry]Image{}}
	kv, err := bus.OpenKV[*hostproviderv1.Host](testkit.Context(t), b, bus.BucketHosts)
	require.NoError(t, err)
	for _, h := range hosts {
		w.Workers.hosts[h.name] = h
		_, id := splitName(h.name)
		identity := rpc.Identity{Peer: pki.ServiceIdentity("host-provider", "change-tracker").On(id)}
		srv, err := rpc.NewServer(rpc.ServerOptions{Name: "host", Identity: identity, TracerProvider: tracer})
		require.NoError(t, err)
		hostproviderv1.RegisterHostServiceServer(srv, h)
		lis, err := w.Network.Listen(ctx, "mem:"+id)
		require.NoError(t, err)
		group.Go(func() error { return srv.Run(ctx, lis) })
		_, err = kv.Create(testkit.Context(t), bus.Key(Site, id), h.Record())
		require.NoError(t, err)
	}
	for _, q := range []struct {
		kind   bus.Kind
		site   string
		name   string
		handle func(context.Context, *bus.Task) error
	}{
		{bus.KindShip, Site, "uploader-ship", w.Workers.Ship},
		{bus.KindCopy, Site, "uploader-copy", w.Workers.Ship},
		{bus.KindResync, Site, "resync-engine-compare", w.Workers.Compare},
		{bus.KindApply, bus.AllSites, "uploader-apply", w.Workers.Apply},
	} {
		c, err := b.As("uploader").Consumer(q.kind, q.site, q.name, bus.ConsumerOptions{
			Concurrency: 4, AckWait: 5 * time.Second, RetryDelay: 20 * time.Millisecond, RetryDelayMax: 100 * time.Millisecond,
		})
		require.NoError(t, err)
		group.Go(func() error { return c.Run(ctx, q.handle) })
	}
	return w
}

// Dialer is a dialer of an identity, closed with the test.
func (w *World) Dialer(id pki.Identity) *rpc.Dialer {
	d := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: id}, Network: w.Network, TracerProvider: w.tracer})
	w.t.Cleanup(func() { _ = d.Close() })
	return d
}

// HostsOf is what a scheduler finds hosts by.
func (w *World) HostsOf(d *rpc.Dialer) *rpc.Hosts {
	return rpc.NewHosts(d, func(_ context.Context, host, _ string) (string, error) {
		for _, h := range w.Hosts {
			if _, id := splitName(h.name); id == host {
				return "mem:" + host, nil
			}
		}
		return "", fmt.Errorf("host %s: %w", host, rpc.ErrUnknownHost)
	}, time.Now)
}

// Record reads the record of a host's machine; nil when there is none.
func (w *World) Record(h *Host) *schedulerv1.ProtectedVm {
	kv, err := bus.OpenKV[*schedulerv1.ProtectedVm](testkit.Context(w.t), w.Bus, bus.BucketVMs)
	require.NoError(w.t, err)
	rec, _, err := kv.Get(testkit.Context(w.t), bus.Key(Site, h.machine.GetId()))
	if err != nil {
		return nil
	}
	return rec
}

// Points are the ordinals of the bases and points in a lineage's chain, in order.
func (w *World) Points(lineage string) []uint64 {
	var out []uint64
	w.walk(lineage, func(m *replica.Manifest, _ Image) error {
		out = append(out, uint64(m.Point))
		return nil
	})
	return out
}

func (w *World) walk(lineage string, each func(*replica.Manifest, Image) error) {
	ctx := testkit.Context(w.t)
	chain, err := replica.Open(ctx, w.Store, replica.Lineage(lineage))
	require.NoError(w.t, err)
	state, err := chain.Refresh(ctx)
	require.NoError(w.t, err)
	_, err = w.Workers.fold(ctx, chain, state.Head, each)
	require.NoError(w.t, err)
}

// Check compares every point in the chain of the host's machine with the disks at its cut, and that ordinals only grow.
// It may be called while points are made.
func (w *World) Check(h *Host, lineage string) {
	w.t.Helper()
	type state struct {
		manifest *replica.Manifest
		image    Image
	}
	var points []state
	w.walk(lineage, func(m *replica.Manifest, at Image) error {
		points = append(points, state{m, maps.Clone(at)})
		return nil
	})
	cuts, last := h.Cuts(), uint64(0) // after the chain: a point in it was cut before
	for _, p := range points {
		o := uint64(p.manifest.Point)
		require.Greater(w.t, o, last, "ordinals grow")
		last = o
		require.Contains(w.t, cuts, o, "point %d was never cut", o)
		require.Equal(w.t, cuts[o], p.image, "point %d (%s on base %d) is not what its cut had", o, p.manifest.Kind, p.manifest.Base)
	}
}
