package uploader

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// dear is a store whose page requests cost time.
type dear struct{ blobstore.Store }

func (dear) BytesPerRequest() int64 { return 126 << 10 }

// cutTime is the cut of point 0 of package hosttest; point n is n seconds later.
var cutTime = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)

// lazySite is a site with one uploader for role apply, whose clock the test holds.
func lazySite(t *testing.T, store blobstore.Store, change func(*Config)) (s *hosttest.Site, clock *atomic.Int64) {
	t.Helper()
	s = hosttest.NewSite(t, store)
	s.Host.AddDisk("os", hosttest.NewImage(64<<20))
	clock = &atomic.Int64{}
	clock.Store(cutTime.Add(10 * time.Second).UnixNano())
	c := Default()
	c.Roles, c.Apply.SoleApplier, c.Apply.BusyDelay = []Role{RoleApply}, true, 50*time.Millisecond
	if change != nil {
		change(&c)
	}
	service, err := New(c, Deps{
		Bus: s.Connect("uploader"), Store: store, Logger: testkit.Logger(t), Clock: func() time.Time { return time.Unix(0, clock.Load()) },
	})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
	return s, clock
}

// add commits the next point without an uploader; every one writes the same block.
func add(t *testing.T, s *hosttest.Site, ordinal uint64, kind replica.Kind) {
	t.Helper()
	p := make([]byte, 64<<10)
	testkit.Fill(p, ordinal)
	s.Host.Write("os", 0, p)
	_, err := s.Commit(ordinal, s.Host.Cut(ordinal), 1, kind)
	require.NoError(t, err)
	s.Host.SettlePoint(ordinal, typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED)
}

func task(change func(*uploaderv1.ApplyTask)) *uploaderv1.ApplyTask {
	t := &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage}
	if change != nil {
		change(t)
	}
	return t
}

func newProcessed() *eventsv1.RecoveryPointProcessed { return &eventsv1.RecoveryPointProcessed{} }

func awaitProcessed(s *hosttest.Site, point uint64) *eventsv1.RecoveryPointProcessed {
	return hosttest.Await(s, "recovery-point.processed", newProcessed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == point })
}

func appliedTo(t *testing.T, s *hosttest.Site) uint64 {
	t.Helper()
	b, err := s.Replica().Backlog(testkit.Context(t))
	require.NoError(t, err)
	return uint64(b.Applied)
}

// idle waits until the apply queue is empty.
func idle(t *testing.T, s *hosttest.Site, b *bus.Bus) {
	t.Helper()
	testkit.Eventually(t, 20*time.Second, func() bool {
		n, err := b.Backlog(testkit.Context(t), bus.KindApply, hosttest.SiteID)
		return err == nil && n == 0
	})
}

func TestPointsWaitToBeMerged(t *testing.T) {
	s, _ := lazySite(t, dear{blobstoretest.NewMemory()}, nil)
	b := s.Connect("test")
	add(t, s, 1, replica.KindBase)
	s.Publish(bus.KindApply, task(nil))
	require.Zero(t, awaitProcessed(s, 1).GetBacklog().GetManifests(), "a base never waits")
	for o := uint64(2); o <= 4; o++ {
		add(t, s, o, replica.KindPoint)
		s.Publish(bus.KindApply, task(func(t *uploaderv1.ApplyTask) { t.Sequence = o }))
		idle(t, s, b)
	}
	require.EqualValues(t, 1, appliedTo(t, s), "three points wait")
	s.Publish(bus.KindApply, task(func(t *uploaderv1.ApplyTask) { t.Urgent = true }))
	require.Zero(t, awaitProcessed(s, 4).GetBacklog().GetManifests())
	require.EqualValues(t, 4, appliedTo(t, s), "a failover drains at once")
	require.Len(t, hosttest.Events(s, "recovery-point.processed", newProcessed), 2, "2 and 3 went in with 4")

	add(t, s, 5, replica.KindPoint)
	s.Publish(bus.KindApply, task(func(t *uploaderv1.ApplyTask) { t.CheckpointAge = durationpb.New(0) }))
	require.EqualValues(t, 5, awaitProcessed(s, 5).GetCheckpoint(), "a checkpoint that is due does not wait")
}

func TestWaitingEndsByItself(t *testing.T) {
	store := dear{blobstoretest.NewMemory()}
	s, clock := lazySite(t, store, nil)
	add(t, s, 1, replica.KindBase)
	s.Publish(bus.KindApply, task(nil))
	awaitProcessed(s, 1)
	add(t, s, 2, replica.KindPoint)
	// The point was cut at second 2: it is due 200 ms from now.
	clock.Store(cutTime.Add(2*time.Second + 5*time.Minute - 200*time.Millisecond).UnixNano())
	s.Publish(bus.KindApply, task(nil))
	testkit.Eventually(t, 20*time.Second, func() bool {
		clock.Add(int64(time.Millisecond))
		return len(hosttest.Events(s, "recovery-point.processed", newProcessed)) == 2
	})
	require.EqualValues(t, 2, appliedTo(t, s))
}

func TestPromptWhereRequestsAreFree(t *testing.T) {
	s, _ := lazySite(t, blobstoretest.NewMemory(), nil)
	add(t, s, 1, replica.KindBase)
	add(t, s, 2, replica.KindPoint)
	s.Publish(bus.KindApply, task(nil))
	awaitProcessed(s, 2)
	add(t, s, 3, replica.KindPoint)
	s.Publish(bus.KindApply, task(nil))
	awaitProcessed(s, 3)
}

// TestWait is the table of what may wait.
func TestWait(t *testing.T) {
	c := Default().Apply
	now := cutTime.Add(time.Minute)
	good := replica.Backlog{Manifests: 1, Points: 1, Bytes: 1 << 20, Drain: time.Second, Oldest: cutTime, DiskBytes: 1 << 30, Based: true}
	require.Equal(t, cutTime.Add(5*time.Minute), c.wait(good, now, 5*time.Minute))
	for what, change := range map[string]func(b *replica.Backlog){
		"a pass among them":         func(b *replica.Backlog) { b.Due = true },
		"nothing waits":             func(b *replica.Backlog) { b.Points = 0 },
		"too many bytes":            func(b *replica.Backlog) { b.Bytes = c.Lazy.Bytes },
		"too long to drain":         func(b *replica.Backlog) { b.Drain = c.Lazy.Debt },
		"an eighth of a small disk": func(b *replica.Backlog) { b.DiskBytes = 8 << 20 },
		"the oldest waits too long": func(b *replica.Backlog) { b.Oldest = now.Add(-5 * time.Minute) },
	} {
		b := good
		change(&b)
		require.Zero(t, c.wait(b, now, 5*time.Minute), what)
	}
	require.Zero(t, c.wait(good, now, 0))
	require.Zero(t, LazyConfig{Mode: lazyOff, Delay: time.Minute}.delay(dear{}))
	require.Zero(t, LazyConfig{Mode: lazyAuto, Delay: time.Minute}.delay(blobstoretest.NewMemory()))
	require.Equal(t, time.Minute, LazyConfig{Mode: lazyAuto, Delay: time.Minute}.delay(dear{}))
	require.Equal(t, time.Minute, LazyConfig{Mode: lazyOn, Delay: time.Minute}.delay(blobstoretest.NewMemory()))
}

// TestBacklogAlarm: raised above a bound, cleared below half of it, never in between, by whichever process looks.
func TestBacklogAlarm(t *testing.T) {
	s := hosttest.NewSite(t, blobstoretest.NewMemory())
	process := func() *alarms {
		return &alarms{bus: s.Connect("uploader"), config: defaultBacklog(), clock: func() time.Time { return cutTime }, logger: testkit.Logger(t)}
	}
	all := []*alarms{process(), process()}
	at := replica.Seq(0)
	look := func(drain time.Duration, bytes int64) bool {
		at++
		b := replica.Backlog{Based: true, Applied: at, Drain: drain, Bytes: bytes, DiskBytes: 100 << 20, Oldest: cutTime.Add(-time.Minute)}
		got := all[int(at)%2].look(t.Context(), hosttest.VMName, hosttest.Lineage, b)
		require.Equal(t, time.Minute, got.GetAge().AsDuration())
		return got.GetHigh()
	}
	count := func(typ string) int {
		s.Barrier()
		if typ == "apply-backlog.raised" {
			return len(hosttest.Events(s, typ, func() *eventsv1.ApplyBacklogRaised { return &eventsv1.ApplyBacklogRaised{} }))
		}
		return len(hosttest.Events(s, typ, func() *eventsv1.ApplyBacklogCleared { return &eventsv1.ApplyBacklogCleared{} }))
	}
	require.False(t, look(9*time.Minute, 0))
	for range 3 {
		require.True(t, look(11*time.Minute, 0))
		require.True(t, look(6*time.Minute, 0), "between the bounds it stands")
		require.True(t, look(9*time.Minute, 0))
	}
	require.Equal(t, 1, count("apply-backlog.raised"))
	require.Zero(t, count("apply-backlog.cleared"))
	require.False(t, look(4*time.Minute, 0))
	require.False(t, look(9*time.Minute, 0))
	require.Equal(t, 1, count("apply-backlog.cleared"))
	require.True(t, look(0, 60<<20))
	raised := hosttest.Await(s, "apply-backlog.raised", func() *eventsv1.ApplyBacklogRaised { return &eventsv1.ApplyBacklogRaised{} },
		func(e *eventsv1.ApplyBacklogRaised) bool { return e.GetResyncMayBeCheaper() })
	require.Equal(t, "10m0s, or 25 % of the disks", raised.GetBound())
	require.True(t, raised.GetBacklog().GetHigh())
	require.False(t, all[0].look(t.Context(), hosttest.VMName, hosttest.Lineage, replica.Backlog{Drain: time.Hour, Applied: 99}).GetHigh(),
		"the initial copy is no debt")
	require.False(t, look(0, 1<<20))
	require.Equal(t, 2, count("apply-backlog.cleared"))
}

// TestUrgentFirst: a lineage that is not urgent stands back while another is, not for ever, and not when it becomes so too.
func TestUrgentFirst(t *testing.T) {
	u := newUrgents()
	no := func() bool { return false }
	require.False(t, u.others("a"))
	leave := u.enter("b")
	require.True(t, u.others("a"))
	require.False(t, u.others("b"))
	require.Zero(t, u.standBack(t.Context(), "a", 10*time.Millisecond, func() bool { return true }).Truncate(10*time.Millisecond))
	require.Equal(t, 10*time.Millisecond, u.standBack(t.Context(), "a", 10*time.Millisecond, no), "bounded")
	done := make(chan struct{})
	go func() {
		defer close(done)
		u.standBack(context.Background(), "a", time.Hour, no)
	}()
	leave()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("stood back for nobody")
	}
}

// TestUrgentTaskOvertakes: while a task with a long backlog is between two batches, an urgent one of another VM comes to
// its end first.
func TestUrgentTaskOvertakes(t *testing.T) {
	store := blobstoretest.NewMemory()
	var s *hosttest.Site
	var held atomic.Bool
	waiting, free := make(chan struct{}), make(chan struct{})
	hooked := blobstoretest.NewFaulty(store, func(op blobstoretest.Op, container, _ string) blobstoretest.Fault {
		if op == blobstoretest.OpWritePages && container == replica.Lineage(hosttest.Lineage).ReplicaContainer() && held.CompareAndSwap(true, false) {
			close(waiting)
			<-free
		}
		return blobstoretest.None
	})
	s, _ = lazySite(t, hooked, func(c *Config) { c.Apply.BatchBytes, c.Apply.Slice = 1, time.Nanosecond })
	add(t, s, 1, replica.KindBase)
	add(t, s, 2, replica.KindPoint)
	add(t, s, 3, replica.KindPoint)
	const other = "ffeeddccbbaa99887766554433221100"
	r, err := replica.Create(t.Context(), store, other)
	require.NoError(t, err)
	_, err = r.Commit(t.Context(), replica.Proposal{Kind: replica.KindBase, Epoch: 1, Point: 1, CutTime: cutTime, Consistency: replica.ConsistencyCrash,
		Disks: []replica.Disk{{ID: "os", Gen: 1, Size: 1 << 20}}})
	require.NoError(t, err)
	held.Store(true)
	s.Publish(bus.KindApply, task(nil))
	<-waiting
	s.Publish(bus.KindApply, task(func(t *uploaderv1.ApplyTask) { t.Lineage, t.Urgent = other, true }))
	hosttest.Await(s, "recovery-point.processed", newProcessed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetLineage() == other })
	require.Zero(t, appliedTo(t, s))
	close(free)
	awaitProcessed(s, 3)
	require.EqualValues(t, 3, appliedTo(t, s), "one batch at a time, each at the end of the queue")
}
