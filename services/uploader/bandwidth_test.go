package uploader_test

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/services/uploader"
)

// setLimit is what the scheduler does.
func setLimit(t *testing.T, s *hosttest.Site, rate int64) {
	t.Helper()
	kv, err := bus.OpenKV[*schedulerv1.SiteBandwidth](testkit.Context(t), s.Bus, bus.BucketSites)
	require.NoError(t, err)
	_, _, err = kv.MutateOrCreate(testkit.Context(t), bus.Key(hosttest.SiteID), func(b *schedulerv1.SiteBandwidth) error {
		b.Name, b.DefaultBytesPerSecond = "sites/"+hosttest.SiteID, rate
		return nil
	})
	require.NoError(t, err)
}

func statusOf(t *testing.T, u *uploader.Service) *uploaderv1.GetStatusResponse {
	t.Helper()
	out, err := u.GetStatus(testkit.Context(t), &uploaderv1.GetStatusRequest{})
	require.NoError(t, err)
	return out
}

// deltas is a third shipper of the site, of another machine, that has one delta after the other.
type deltas struct {
	limiter *bandwidth.Limiter
	stop    func()
}

const deltaBytes = 256 << 10

func shipDeltas(t *testing.T, s *hosttest.Site) *deltas {
	t.Helper()
	d := &deltas{limiter: bandwidth.NewLimiter()}
	follower, err := bandwidth.NewFollower(bandwidth.FollowerOptions{Bus: s.Connect("uploader"), Site: hosttest.SiteID, Service: "uploader", Limiter: d.limiter})
	require.NoError(t, err)
	store := blobstoretest.NewMemory()
	require.NoError(t, store.CreateContainer(t.Context(), "lfj-other"))
	journal := bandwidth.Store(store, d.limiter).Container("lfj-other")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = follower.Run(ctx) })
	<-follower.Ready()
	wg.Go(func() {
		for ctx.Err() == nil {
			_, _ = journal.Put(bandwidth.With(ctx, bandwidth.Delta), "seg", bytes.NewReader(make([]byte, deltaBytes)), deltaBytes, blobstore.Conditions{})
		}
	})
	d.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	t.Cleanup(d.stop)
	return d
}

func (d *deltas) sent() float64 { return float64(d.limiter.Sent(bandwidth.Delta)) }

// Shippers of a site with a limit: two with a large copy and one with deltas. All of it together keeps to the limit, deltas go
// before the copy, the copy goes on, and a change of the limit is one of the rate within seconds. Rates are compared over
// what was sent, so that a busy machine makes the test slow, not wrong.
func TestSiteBandwidthIsShared(t *testing.T) {
	const (
		mib    = 1 << 20
		limit  = 4 * mib
		window = 4 * mib
	)
	s := hosttest.NewSite(t, memory(t))
	s.Host.AddDisk("os", hosttest.NewImage(64*mib))
	s.Host.AddDisk("data", hosttest.NewImage(4*mib))
	s.Host.Write("data", 0, random(mib, 2))
	c := config()
	c.Roles = []uploader.Role{uploader.RoleShip}
	c.StorageTimeout = time.Second // what a segment of the slow phase takes, and more
	one, _ := run(t, s, c)
	two, _ := run(t, s, c)
	replicate(t, s)
	require.Zero(t, statusOf(t, one).GetBandwidthBytesPerSecond())
	s.Host.Write("os", 0, random(64*mib, 3)) // nothing of it compresses

	setLimit(t, s, limit)
	for _, u := range []*uploader.Service{one, two} {
		testkit.Eventually(t, 10*time.Second, func() bool { return statusOf(t, u).GetBandwidthBytesPerSecond() == limit }, "limit is known")
	}
	copied := func() float64 {
		return float64(statusOf(t, one).GetShippedBytes() + statusOf(t, two).GetShippedBytes())
	}
	d := shipDeltas(t, s)
	b := s.Host.StartPass(3, full, true)
	tasks := s.PassTasks(3, b, 1, full, window)
	for _, task := range tasks {
		s.Publish(bus.KindShip, task)
	}
	// measure waits until n bytes were copied and returns the rates.
	measure := func(n float64) (copies, deltas float64) {
		t.Helper()
		from, other, began := copied(), d.sent(), time.Now()
		testkit.Eventually(t, time.Minute, func() bool { return copied() >= from+n }, "bytes are copied")
		took := time.Since(began).Seconds()
		return (copied() - from) / took, (d.sent() - other) / took
	}
	share := func() int64 {
		return statusOf(t, one).GetBandwidthBytesPerSecond() + statusOf(t, two).GetBandwidthBytesPerSecond()
	}
	testkit.Eventually(t, 20*time.Second, func() bool { return share() < limit/4 }, "all know of each other")
	measure(1.5 * mib) // segments that were begun before are through
	copies, others := measure(2 * mib)
	t.Logf("beside deltas: copies %.2f, deltas %.2f MiB/s", copies/mib, others/mib)
	require.Less(t, copies+others, 1.3*limit)
	require.Greater(t, others, 3*copies, "deltas go first")
	require.Greater(t, copies, 0.05*limit, "the copy is not starved")
	d.stop()
	testkit.Eventually(t, 20*time.Second, func() bool { return share() > limit/2 }, "the deltas are gone")
	measure(4 * mib)
	slow, _ := measure(10 * mib)
	t.Logf("alone: %.2f MiB/s", slow/mib)
	require.Less(t, slow, 1.3*limit)
	require.Greater(t, slow, 2*copies, "what deltas leave is the copy's")
	setLimit(t, s, 2*limit)
	measure(6 * mib)
	fast, _ := measure(16 * mib)
	t.Logf("twice the limit: %.2f MiB/s", fast/mib)
	require.Greater(t, fast, 1.4*slow)
	require.Less(t, fast, 2.6*limit)
	setLimit(t, s, 0)
	for _, task := range tasks {
		i := task.GetPass().GetIndex()
		hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetPass() == 3 && e.GetIndex() == i })
	}
	testkit.Eventually(t, 10*time.Second, func() bool { return statusOf(t, one).GetBandwidthBytesPerSecond() == 0 }, "no limit")
	requireNoFailure(t, s)
	s.Host.EndPass(3, committed)
	ship(t, s, 4, base)
	s.RequirePoint(4)
}
