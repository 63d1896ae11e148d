package uploader_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/services/uploader"
)

func retiredEvent() *eventsv1.RecoveryPointsRetired { return &eventsv1.RecoveryPointsRetired{} }

// ages is a store in memory whose time can be moved on.
type ages struct {
	*blobstoretest.Memory
	ahead *atomic.Int64
}

func aging() ages {
	begin, ahead := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC), &atomic.Int64{}
	return ages{blobstoretest.NewMemoryClock(func() time.Time { return begin.Add(time.Duration(ahead.Add(1))) }), ahead}
}

func (a ages) wait(d time.Duration) { a.ahead.Add(int64(d)) }

// hourly is a policy that keeps every point for an hour and none after that.
func hourly() *uploaderv1.RetainTask {
	hour := durationpb.New(time.Hour)
	return &uploaderv1.RetainTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, KeepAll: hour, KeepHourly: hour, Retention: hour}
}

func ordinals(t *testing.T, s *hosttest.Site) (out []uint64) {
	t.Helper()
	points, err := s.Replica().Points(testkit.Context(t))
	require.NoError(t, err)
	for _, p := range points {
		out = append(out, uint64(p.Ordinal))
	}
	return out
}

// agedSite has points 2 to last, twenty minutes apart, each applied and with a checkpoint.
func agedSite(t *testing.T, store ages, c uploader.Config, last uint64) (*hosttest.Site, *uploader.Service) {
	t.Helper()
	s := newSite(t, store)
	service, _ := run(t, s, c)
	replicate(t, s)
	settle := func(o uint64) {
		s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, CheckpointAge: durationpb.New(0), Urgent: true})
		hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool {
			return e.GetPoint() == o && e.GetCheckpoint() == e.GetSequence()
		})
		store.wait(20 * time.Minute)
	}
	settle(2)
	for o := uint64(3); o <= last; o++ {
		s.Host.Write("os", int64(o)*64<<10, random(64<<10, o))
		s.Host.Write("data", 0, random(4096, o))
		ship(t, s, o, point)
		settle(o)
	}
	return s, service
}

// A policy of one hour: what is older goes from the points and from storage, what is kept materialises as it was.
func TestRetain(t *testing.T) {
	store := aging()
	s, service := agedSite(t, store, config(), 7)
	require.Equal(t, []uint64{2, 3, 4, 5, 6, 7}, ordinals(t, s))
	s.Publish(bus.KindRetain, hourly())
	e := hosttest.Await(s, "recovery-points.retired", retiredEvent, func(e *eventsv1.RecoveryPointsRetired) bool { return true })
	kept := ordinals(t, s)
	require.Equal(t, kept[0], e.GetOldestPoint())
	require.Greater(t, kept[0], uint64(3), "points of more than an hour ago are gone: %v", kept)
	require.EqualValues(t, 7, kept[len(kept)-1])
	require.EqualValues(t, 6-len(kept), e.GetPoints())
	require.Positive(t, e.GetDeletedObjects())
	require.Positive(t, e.GetDeletedBytes())
	for _, o := range kept {
		s.RequirePoint(o)
	}
	status, err := service.GetStatus(testkit.Context(t), &uploaderv1.GetStatusRequest{})
	require.NoError(t, err)
	require.Equal(t, e.GetDeletedObjects(), status.GetRetiredObjects())

	s.Publish(bus.KindRetain, hourly())
	awaitIdle(t, s, bus.KindRetain)
	s.Barrier()
	require.Len(t, hosttest.Events(s, "recovery-points.retired", retiredEvent), 1, "nothing was left to do, so nothing is told")

	// Shipping and applying go on above what was retired; days later only the newest is kept.
	s.Host.Write("os", 0, random(4096, 99))
	ship(t, s, 8, point)
	s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, CheckpointAge: durationpb.New(0), Urgent: true})
	hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool {
		return e.GetPoint() == 8 && e.GetCheckpoint() == e.GetSequence()
	})
	store.wait(72 * time.Hour)
	s.Publish(bus.KindRetain, hourly())
	hosttest.Await(s, "recovery-points.retired", retiredEvent, func(e *eventsv1.RecoveryPointsRetired) bool { return e.GetOldestPoint() == 8 })
	require.Equal(t, []uint64{8}, ordinals(t, s))
	s.RequirePoint(8)
	requireNoFailure(t, s)
}

// What somebody pinned stays, with what reaching it needs, until the pin ends.
func TestRetainKeepsPins(t *testing.T) {
	store := aging()
	s, _ := agedSite(t, store, config(), 6)
	m, err := s.Replica().Find(testkit.Context(t), 3)
	require.NoError(t, err)
	require.NoError(t, s.Replica().Pin(testkit.Context(t), replica.Pin{Seq: m.Seq, Owner: "hold/case-17", Reason: "the auditors"}))
	store.wait(72 * time.Hour)
	s.Publish(bus.KindRetain, hourly())
	hosttest.Await(s, "recovery-points.retired", retiredEvent, func(e *eventsv1.RecoveryPointsRetired) bool { return e.GetPoints() > 0 })
	require.Equal(t, []uint64{3, 6}, ordinals(t, s))
	s.RequirePoint(3)
	s.RequirePoint(6)
	require.NoError(t, s.Replica().Unpin(testkit.Context(t), "hold/case-17", 0))
	s.Publish(bus.KindRetain, hourly())
	hosttest.Await(s, "recovery-points.retired", retiredEvent, func(e *eventsv1.RecoveryPointsRetired) bool { return e.GetOldestPoint() == 6 })
	require.Equal(t, []uint64{6}, ordinals(t, s))
	s.RequirePoint(6)
}

// Small steps: one task does several, and what it does not get to, the next one does.
func TestRetainInSteps(t *testing.T) {
	store := aging()
	c := config()
	c.Retain.StepDeletes, c.Retain.Steps = 1, 2
	s, _ := agedSite(t, store, c, 5)
	store.wait(72 * time.Hour)
	n := 0
	testkit.Eventually(t, 30*time.Second, func() bool {
		s.Publish(bus.KindRetain, hourly())
		awaitIdle(t, s, bus.KindRetain)
		s.Barrier()
		told := len(hosttest.Events(s, "recovery-points.retired", retiredEvent))
		done := told == n
		n = told
		return done
	}, "a task that finds nothing")
	require.Greater(t, n, 2)
	require.Equal(t, []uint64{5}, ordinals(t, s))
	s.RequirePoint(5)
}

// Two processes, tasks delivered twice, and a process that is lost around a step: nothing goes that is kept.
func TestRetainLostAndTwice(t *testing.T) {
	for _, name := range []string{"uploader/before-retain", "uploader/after-retain"} {
		t.Run(name, func(t *testing.T) {
			store := aging()
			s, _ := agedSite(t, store, config(), 6)
			run(t, s, config())
			var once atomic.Bool
			disarm := failpoint.ArmFunc(name, func() error {
				if once.CompareAndSwap(false, true) {
					return failpoint.ErrInjected // lost: the queue delivers the task again
				}
				return nil
			})
			defer disarm()
			for range 4 {
				s.Publish(bus.KindRetain, hourly())
			}
			testkit.Eventually(t, 20*time.Second, func() bool { got := ordinals(t, s); return got[0] > 2 })
			awaitIdle(t, s, bus.KindRetain)
			require.True(t, once.Load())
			for _, o := range ordinals(t, s) {
				s.RequirePoint(o)
			}
			requireNoFailure(t, s)
		})
	}
}

// A journal that nothing may be deleted from yet: points are given up, their bytes are hidden, and it is no failure. What the
// role may not do at all is one, with its reason.
func TestRetainRefused(t *testing.T) {
	store := aging()
	s, _ := agedSite(t, store, config(), 6)
	journal := replica.Lineage(hosttest.Lineage).JournalContainer()
	require.NoError(t, store.ProtectContainer(testkit.Context(t), journal, blobstore.Protection{WriteOnce: 30 * 24 * time.Hour}))
	store.wait(72 * time.Hour)
	s.Publish(bus.KindRetain, hourly())
	e := hosttest.Await(s, "recovery-points.retired", retiredEvent, func(e *eventsv1.RecoveryPointsRetired) bool { return e.GetPoints() > 0 })
	require.Positive(t, e.GetHiddenBytes())
	require.Equal(t, []uint64{6}, ordinals(t, s))
	requireNoFailure(t, s)

	gone := hourly()
	gone.Lineage = "ffffffffffffffffffffffffffffffff"
	s.Publish(bus.KindRetain, gone)
	hosttest.Await(s, "ship.failed", failed, func(e *eventsv1.ShipFailed) bool {
		return e.GetError().GetReason() == "STORAGE_CONTAINER_MISSING" && e.GetLineage() == gone.GetLineage()
	})
	awaitIdle(t, s, bus.KindRetain)
}

// A task that waited while policy, suspicion or failover may have changed retires nothing; the next one does.
func TestRetainDropsLateTasks(t *testing.T) {
	store := aging()
	s := newSite(t, store)
	ahead := atomic.Int64{}
	runAt(t, s, config(), testkit.Logger(t), func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) })
	replicate(t, s)
	settle := func(o uint64) {
		s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, CheckpointAge: durationpb.New(0), Urgent: true})
		hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool {
			return e.GetPoint() == o && e.GetCheckpoint() == e.GetSequence()
		})
		store.wait(2 * time.Hour)
	}
	settle(2)
	ship(t, s, 3, point)
	settle(3)
	ahead.Store(int64(time.Hour))
	s.Publish(bus.KindRetain, hourly())
	awaitIdle(t, s, bus.KindRetain)
	s.Barrier()
	require.Equal(t, []uint64{2, 3}, ordinals(t, s))
	ahead.Store(0)
	s.Publish(bus.KindRetain, hourly())
	hosttest.Await(s, "recovery-points.retired", retiredEvent, func(*eventsv1.RecoveryPointsRetired) bool { return true })
	require.Equal(t, []uint64{3}, ordinals(t, s))
}
