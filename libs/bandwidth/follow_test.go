package bandwidth_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/bus/bustest"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

const patience = 20 * time.Second

// rig is a site with a bus.
type rig struct {
	t      *testing.T
	server *bus.Server
	bus    *bus.Bus
	sites  *bus.KV[*schedulerv1.SiteBandwidth]
	flows  *bus.KV[*uploaderv1.TransferDemand]
	now    atomic.Int64 // of all workers, Unix seconds
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, server: bustest.Serve(t, bus.ServerOptions{Unsynced: true})}
	r.bus = bustest.Dial(t, bus.Options{Server: r.server, Name: "scheduler"})
	require.NoError(t, r.bus.Declare(testkit.Context(t), bus.Declaration{}))
	var err error
	r.sites, err = bus.OpenKV[*schedulerv1.SiteBandwidth](testkit.Context(t), r.bus, bus.BucketSites)
	require.NoError(t, err)
	r.flows, err = bus.OpenKV[*uploaderv1.TransferDemand](testkit.Context(t), r.bus, bus.BucketFlows)
	require.NoError(t, err)
	r.now.Store(at(t, "2026-11-23 12:00:00 +0000").Unix())
	return r
}

func (r *rig) set(b *schedulerv1.SiteBandwidth) {
	r.t.Helper()
	_, _, err := r.sites.MutateOrCreate(testkit.Context(r.t), bus.Key("lab"), func(have *schedulerv1.SiteBandwidth) error {
		have.Name, have.TimeZone, have.Windows, have.DefaultBytesPerSecond = "sites/lab", b.GetTimeZone(), b.GetWindows(), b.GetDefaultBytesPerSecond()
		return nil
	})
	require.NoError(r.t, err)
}

func (r *rig) limit(n int64) { r.set(&schedulerv1.SiteBandwidth{DefaultBytesPerSecond: n}) }

// worker is one process.
type worker struct {
	*bandwidth.Limiter
	f    *bandwidth.Follower
	stop func()
}

// start runs a worker whose followers are four times as quick as usual.
func (r *rig) start(name string, b *bus.Bus) *worker {
	r.t.Helper()
	w := &worker{Limiter: bandwidth.NewLimiter()}
	var err error
	w.f, err = bandwidth.NewFollower(bandwidth.FollowerOptions{
		Bus: b, Site: "lab", Service: name, Limiter: w.Limiter, Logger: testkit.Logger(r.t),
		Clock: func() time.Time { return time.Unix(r.now.Load(), 0) },
	})
	require.NoError(r.t, err)
	w.f.Hurry(4)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.f.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(r.t, <-done)
	})
	r.t.Cleanup(w.stop)
	<-w.f.Ready()
	return w
}

func (r *rig) has(w *worker, want bandwidth.Part) {
	r.t.Helper()
	var got bandwidth.Part
	defer func() {
		if got != want {
			r.t.Logf("part is %v, want %v", got, want)
		}
	}()
	testkit.Eventually(r.t, patience, func() bool {
		got, _ = w.Part()
		return got == want
	}, "worker has its part")
}

func (r *rig) records() int {
	keys, err := r.flows.Keys(testkit.Context(r.t), "")
	require.NoError(r.t, err)
	return len(keys)
}

func TestWorkersShareASite(t *testing.T) {
	r := newRig(t)
	a, b := r.start("a", r.bus), r.start("b", r.bus)
	require.Zero(t, a.Rate(), "without a schedule there is no limit")
	endCopy := a.Begin(bulk)
	r.limit(9 * mib)
	r.has(a, bandwidth.Part{0, 9 * mib, 0})
	endDelta := b.Begin(delta)
	r.has(a, bandwidth.Part{0, mib, 0})
	r.has(b, bandwidth.Part{8 * mib, 0, 0})
	r.limit(18 * mib) // changed at run time
	r.has(a, bandwidth.Part{0, 2 * mib, 0})
	r.has(b, bandwidth.Part{16 * mib, 0, 0})
	c := r.start("c", r.bus)
	endOther := c.Begin(bulk)
	r.has(a, bandwidth.Part{0, mib, 0})
	r.has(c, bandwidth.Part{0, mib, 0})
	endOther()
	r.has(a, bandwidth.Part{0, 2 * mib, 0})
	endOther = c.Begin(bulk)
	r.has(a, bandwidth.Part{0, mib, 0})
	c.stop() // leaves while it sends
	endOther()
	r.has(a, bandwidth.Part{0, 2 * mib, 0})
	endDelta()
	r.has(a, bandwidth.Part{0, 18 * mib, 0})
	endCopy()
	testkit.Eventually(t, patience, func() bool { return r.records() == 0 }, "nobody has anything to send")
	require.NoError(t, func() error {
		_, rev, err := r.sites.Get(testkit.Context(t), bus.Key("lab"))
		require.NoError(t, err)
		return r.sites.Delete(testkit.Context(t), bus.Key("lab"), rev)
	}())
	testkit.Eventually(t, patience, func() bool { return a.Rate() == 0 && b.Rate() == 0 }, "no limit any more")
}

func TestWindowsChangeWithTime(t *testing.T) {
	r := newRig(t)
	r.set(&schedulerv1.SiteBandwidth{TimeZone: "Europe/Berlin", Windows: []*schedulerv1.BandwidthWindow{
		win(8*time.Hour, 18*time.Hour, 4*mib, mon), win(18*time.Hour, 20*time.Hour, 8*mib),
	}})
	a := r.start("a", r.bus)
	require.EqualValues(t, 4*mib, a.Rate(), "known before any work begins")
	r.now.Store(at(t, "2026-11-23 18:00:00 +0100").Unix())
	testkit.Eventually(t, patience, func() bool { return a.Rate() == 8*mib })
	r.now.Store(at(t, "2026-11-23 20:00:00 +0100").Unix())
	testkit.Eventually(t, patience, func() bool { return a.Rate() == 0 })
	r.now.Store(at(t, "2026-11-24 18:30:00 +0100").Unix())
	testkit.Eventually(t, patience, func() bool { return a.Rate() == 8*mib })
}

func TestDeadWorkerIsForgotten(t *testing.T) {
	r := newRig(t)
	r.limit(8 * mib)
	a := r.start("a", r.bus)
	defer a.Begin(bulk)()
	r.has(a, bandwidth.Part{0, 8 * mib, 0})
	_, err := r.flows.Create(testkit.Context(t), bus.Key("lab", "dead"), &uploaderv1.TransferDemand{
		Worker: "dead", Streams: map[string]int32{"copy": 1, "from-the-future": 7}, Time: timestamppb.New(time.Now().Add(time.Hour)), // its clock is off
	})
	require.NoError(t, err)
	began := time.Now()
	r.has(a, bandwidth.Part{0, 4 * mib, 0})
	require.Len(t, a.f.Workers(), 1)
	r.has(a, bandwidth.Part{0, 8 * mib, 0})
	require.Greater(t, time.Since(began), time.Second, "not at once")
	require.Empty(t, a.f.Workers())
	testkit.Eventually(t, 2*patience, func() bool { return r.records() == 1 }, "its record is taken away")
}

// While the bus is away, the schedule goes on and nobody is forgotten; afterwards everybody finds together again.
func TestBusAway(t *testing.T) {
	e := bustest.StartExternal(t)
	b := bustest.Dial(t, e.Options())
	require.NoError(t, b.Declare(testkit.Context(t), bus.Declaration{}))
	r := &rig{t: t, bus: b}
	var err error
	r.sites, err = bus.OpenKV[*schedulerv1.SiteBandwidth](testkit.Context(t), b, bus.BucketSites)
	require.NoError(t, err)
	r.now.Store(at(t, "2026-11-23 12:00:00 +0000").Unix())
	r.set(&schedulerv1.SiteBandwidth{DefaultBytesPerSecond: 8 * mib, Windows: []*schedulerv1.BandwidthWindow{win(13*time.Hour, 14*time.Hour, 2*mib)}})
	first, second := r.start("a", b), r.start("b", bustest.Dial(t, e.Options()))
	defer first.Begin(bulk)()
	end := second.Begin(bulk)
	r.has(first, bandwidth.Part{0, 4 * mib, 0})
	r.has(second, bandwidth.Part{0, 4 * mib, 0})
	e.Kill()
	testkit.Eventually(t, patience, func() bool { return b.State() != bus.Connected })
	r.now.Store(at(t, "2026-11-23 13:00:00 +0000").Unix())
	r.has(first, bandwidth.Part{0, mib, 0})
	r.has(second, bandwidth.Part{0, mib, 0})
	quiet := time.Now()
	testkit.Eventually(t, patience, func() bool { // longer than records are believed
		part, limited := first.Part()
		require.Equal(t, bandwidth.Part{0, mib, 0}, part)
		require.True(t, limited)
		return time.Since(quiet) > 2*time.Second
	})
	e.Start()
	testkit.Eventually(t, patience, func() bool { return b.State() == bus.Connected })
	r.set(&schedulerv1.SiteBandwidth{DefaultBytesPerSecond: 16 * mib})
	r.has(first, bandwidth.Part{0, 8 * mib, 0})
	r.has(second, bandwidth.Part{0, 8 * mib, 0})
	end()
	r.has(first, bandwidth.Part{0, 16 * mib, 0})
}

// A schedule that this program cannot read is not taken for none.
func TestUnusableSchedule(t *testing.T) {
	r := newRig(t)
	r.set(&schedulerv1.SiteBandwidth{TimeZone: "Moon/Tranquility", DefaultBytesPerSecond: 9 * mib, Windows: []*schedulerv1.BandwidthWindow{win(0, time.Hour, 3*mib)}})
	a := r.start("a", r.bus)
	require.EqualValues(t, 3*mib, a.Rate(), "the lowest that it names")
	r.limit(5 * mib)
	testkit.Eventually(t, patience, func() bool { return a.Rate() == 5*mib })
	r.set(&schedulerv1.SiteBandwidth{TimeZone: "Moon/Tranquility", DefaultBytesPerSecond: mib})
	r.limit(6 * mib)
	testkit.Eventually(t, patience, func() bool { return a.Rate() == 6*mib })
}

func TestFollowerNeedsItsOptions(t *testing.T) {
	_, err := bandwidth.NewFollower(bandwidth.FollowerOptions{})
	require.Error(t, err)
}
