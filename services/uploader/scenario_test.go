package uploader_test

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// awaitIdle waits until nothing of a kind waits or is in work.
func awaitIdle(t *testing.T, s *hosttest.Site, kind bus.Kind) {
	t.Helper()
	testkit.Eventually(t, 20*time.Second, func() bool {
		n, err := s.Bus.Backlog(testkit.Context(t), kind, hosttest.SiteID)
		return err == nil && n == 0
	}, "queue is empty")
}

func anyFailure(*eventsv1.ShipFailed) bool { return true }

// hold makes the first message of a stream that match wants wait until release is called; held closes when one waits.
func hold(s *hosttest.Site, match func(hosttest.Message) bool) (held <-chan struct{}, release func()) {
	waits, free := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.Host.SetHook(func(m hosttest.Message) error {
		if m.Offset >= 0 && match(m) {
			once.Do(func() { close(waits) })
			<-free
		}
		return nil
	})
	return waits, sync.OnceFunc(func() { close(free) })
}

func await(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("nothing happened for 20 s")
	}
}

func TestRedeliveryReadsNothingFromTheHost(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	s.Host.Write("os", 0, random(100<<10, 5))
	task := s.PointTask(3, s.Host.Cut(3), 1, point)
	s.Publish(bus.KindShip, task)
	first := awaitPoint(s, 3)
	s.Host.SettlePoint(3, committed)
	before, streams := chain(t, s), s.Host.Streams()
	s.Publish(bus.KindShip, task)
	for _, old := range s.PassTasks(1, 0, 1, full, 2<<20) {
		s.Publish(bus.KindShip, old)
	}
	awaitIdle(t, s, bus.KindShip)
	require.Equal(t, before, chain(t, s))
	require.Equal(t, streams, s.Host.Streams())
	requireNoFailure(t, s)
	got := hosttest.Events(s, "recovery-point.received", received)
	require.Len(t, got, 2, "the repeat has the id of the first event and is dropped")
	require.False(t, first.GetAlreadyCommitted())
	s.RequirePoint(3)
}

func TestTwoUploadersOneTask(t *testing.T) {
	s := newSite(t, memory(t))
	c := config()
	c.Ship.Concurrency = 1
	run(t, s, c)
	run(t, s, c)
	replicate(t, s)
	s.Host.Write("os", 0, random(100<<10, 5))
	var open atomic.Int32
	both := make(chan struct{})
	s.Host.SetHook(func(m hosttest.Message) error {
		if m.Disk == "os" && m.Offset == 0 {
			if open.Add(1) == 2 {
				close(both)
			}
			<-both // each has looked at the chain before either can commit
		}
		return nil
	})
	task := s.PointTask(3, s.Host.Cut(3), 1, point)
	s.Publish(bus.KindShip, task)
	s.Publish(bus.KindShip, task)
	awaitPoint(s, 3)
	awaitIdle(t, s, bus.KindShip)
	require.EqualValues(t, 2, open.Load())
	got := chain(t, s)
	require.Equal(t, []string{"base 2", "point 3"}, got[len(got)-2:])
	requireNoFailure(t, s)
	s.Host.SetHook(nil)
	s.RequirePoint(3)
}

// The second worker is told POINT_SETTLED by the host, because the first one's commit was settled meanwhile: success.
func TestLoserOfASettledPointSucceeds(t *testing.T) {
	s := newSite(t, memory(t))
	c := config()
	c.Ship.Concurrency = 1
	run(t, s, c)
	run(t, s, c)
	replicate(t, s)
	s.Host.Write("os", 0, random(100<<10, 5))
	task := s.PointTask(3, s.Host.Cut(3), 1, point)
	var streams atomic.Int32
	waits, free := make(chan struct{}), make(chan struct{})
	s.Host.SetHook(func(m hosttest.Message) error {
		if m.Offset < 0 && m.Disk == "os" && streams.Add(1) == 1 {
			close(waits)
			<-free
			return status.Error(codes.Unavailable, "the connection broke")
		}
		return nil
	})
	s.Publish(bus.KindShip, task)
	await(t, waits)
	s.Publish(bus.KindShip, task)
	awaitPoint(s, 3)
	s.Host.SettlePoint(3, committed)
	close(free)
	awaitIdle(t, s, bus.KindShip)
	requireNoFailure(t, s)
	s.RequirePoint(3)
}

func TestHeldTaskOfAnAbandonedPointIsRefused(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	s.Host.Write("os", 0, random(100<<10, 5))
	old := s.PointTask(3, s.Host.Cut(3), 1, point)
	held, release := hold(s, func(m hosttest.Message) bool { return m.Method == "ReadChanges" && m.Disk == "os" })
	defer release()
	streams := s.Host.Streams()
	s.Publish(bus.KindShip, old)
	await(t, held)
	testkit.Eventually(t, 10*time.Second, func() bool { return s.Host.Streams() == streams+2 }, "both disks are streamed")
	s.Host.SetHook(nil)
	s.Host.SettlePoint(3, abandoned)
	s.Host.Write("os", 0, random(4096, 6)) // newer content where the old point has other
	b := s.Host.Cut(4)
	require.EqualValues(t, 2, b)
	s.Publish(bus.KindShip, s.PointTask(4, b, 2, point))
	awaitPoint(s, 4)
	release()
	e := hosttest.Await(s, "ship.failed", failed, anyFailure)
	require.Equal(t, "STALE_EPOCH", e.GetError().GetReason())
	require.EqualValues(t, 3, e.GetOrdinal())
	require.NotEmpty(t, e.GetError().GetCause())
	require.NotEmpty(t, e.GetError().GetAction())
	awaitIdle(t, s, bus.KindShip)
	s.RequirePoint(4)
	got := chain(t, s)
	require.Equal(t, []string{"base 2", "point 4"}, got[len(got)-2:])
}

func TestLateAbandonedPointIsHarmless(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	s.Host.Write("os", 0, random(100<<10, 5))
	old := s.PointTask(3, s.Host.Cut(3), 1, point)
	held, release := hold(s, func(m hosttest.Message) bool { return m.Method == "ReadChanges" && m.Disk == "os" })
	defer release()
	streams := s.Host.Streams()
	s.Publish(bus.KindShip, old)
	await(t, held)
	testkit.Eventually(t, 10*time.Second, func() bool { return s.Host.Streams() == streams+2 }, "both disks are streamed")
	s.Host.SetHook(nil)
	s.Host.SettlePoint(3, abandoned)
	s.Host.Zero("os", 0, 64<<10)
	b := s.Host.Cut(4)
	release()
	awaitPoint(s, 3) // it commits although it was given up
	s.Publish(bus.KindShip, s.PointTask(4, b, 1, point))
	awaitPoint(s, 4)
	s.RequirePoint(3)
	s.RequirePoint(4)
	requireNoFailure(t, s)
}

// A task of a given-up FULL pass commits first, between the new pass's look at the empty chain and its commit: what the
// guest zeroed in between must not shine through.
func TestFreshZerosAreNotSkippedOverAnOlderPass(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	s.Host.StartPass(1, full, false)
	old := s.PassTasks(1, 0, 1, full, 8<<20)[0]
	held, release := hold(s, func(m hosttest.Message) bool { return m.Offset == 5<<20 })
	defer release()
	s.Publish(bus.KindShip, old)
	await(t, held) // its first MiB is taken
	s.Host.EndPass(1, abandoned)
	s.Host.Write("os", 0, make([]byte, 512<<10))
	s.Host.StartPass(2, full, true)
	held2, release2 := hold(s, func(m hosttest.Message) bool { return m.Offset == 5<<20 })
	defer release2()
	tasks := s.PassTasks(2, 0, 1, full, 8<<20)
	s.Publish(bus.KindShip, tasks[0])
	await(t, held2)
	s.Host.SetHook(nil)
	release()
	hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetPass() == 1 })
	release2()
	s.Publish(bus.KindShip, tasks[1])
	for _, i := range []int32{1, 2} {
		hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetPass() == 2 && e.GetIndex() == i })
	}
	s.Host.EndPass(2, committed)
	ship(t, s, 3, base)
	s.RequirePoint(3)
	require.Equal(t, "partial 1", chain(t, s)[0])
}

func TestDirtyPassShipsZerosAndEmptyTasks(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	s.Host.Zero("os", 0, 128<<10)
	s.Host.Write("os", 192<<10, random(8192, 7))
	b := s.Host.StartPass(3, dirty, false)
	tasks := s.PassTasks(3, b, 1, dirty, 4<<20)
	tasks = append(tasks, &uploaderv1.ShipTask{
		Vm: hosttest.VMName, Host: hosttest.HostName, Lineage: hosttest.Lineage, Epoch: 1, Base: b, Disks: s.Host.Disks(),
		Work: &uploaderv1.ShipTask_Pass{Pass: &uploaderv1.PassTask{Ordinal: 3, Index: int32(len(tasks) + 1), Scope: dirty}},
	})
	for _, task := range tasks {
		task.GetPass().Tasks = int32(len(tasks))
		s.Publish(bus.KindShip, task)
	}
	for _, task := range tasks {
		i := task.GetPass().GetIndex()
		hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetPass() == 3 && e.GetIndex() == i })
	}
	s.Host.EndPass(3, committed)
	ship(t, s, 4, point)
	s.RequirePoint(4)
}

func TestBrokenAndDamagedStreamsAreReadOn(t *testing.T) {
	s := newSite(t, memory(t))
	s.Host.ChunkBytes = 64 << 10
	run(t, s, config())
	replicate(t, s)
	s.Host.Write("os", 0, random(1<<20, 5))
	s.Host.Write("data", 0, random(1<<20, 6))
	var n atomic.Int32
	s.Host.SetHook(func(m hosttest.Message) error {
		if m.Offset < 0 {
			return nil
		}
		switch n.Add(1) % 5 {
		case 3:
			m.Data[17] ^= 1
		case 0:
			return status.Error(codes.Unavailable, "the connection broke")
		}
		return nil
	})
	ship(t, s, 3, point)
	requireNoFailure(t, s)
	s.RequirePoint(3)
}

func TestDeadHostIsReportedAndAcknowledged(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	task := s.PointTask(3, s.Host.Cut(3), 1, point)
	s.StopHost()
	s.Publish(bus.KindShip, task)
	e := hosttest.Await(s, "ship.failed", failed, anyFailure)
	require.Equal(t, "HOST_UNREACHABLE", e.GetError().GetReason(), e.GetError().GetWhat())
	require.True(t, e.GetError().GetRecoverable())
	require.EqualValues(t, 3, e.GetOrdinal())
	awaitIdle(t, s, bus.KindShip)
	s.StartHost()
	s.Publish(bus.KindShip, task)
	awaitPoint(s, 3)
	s.RequirePoint(3)
}

func TestRefusalsNameTheirReason(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	s.Host.Cut(3)
	s.Host.Cut(4)
	for reason, change := range map[string]func(*uploaderv1.ShipTask){
		"BASE_AHEAD":                func(t *uploaderv1.ShipTask) { t.Base = 3; t.GetPoint().Ordinal = 4 },
		"STALE_OPEN":                func(t *uploaderv1.ShipTask) { t.Open = 5 },
		"POINT_NOT_CUT":             func(t *uploaderv1.ShipTask) { t.GetPoint().Ordinal = 7 },
		"DISK_CHANGED_OFFLINE":      func(t *uploaderv1.ShipTask) { t.Disks[0].SizeBytes += 512 },
		"HOST_NOT_FOUND":            func(t *uploaderv1.ShipTask) { t.Host = "sites/lab/hosts/other" },
		"STORAGE_CONTAINER_MISSING": func(t *uploaderv1.ShipTask) { t.Lineage = "ffffffffffffffffffffffffffffffff" },
	} {
		task := s.PointTask(3, 2, 1, point)
		change(task)
		s.Publish(bus.KindShip, task)
		hosttest.Await(s, "ship.failed", failed, func(e *eventsv1.ShipFailed) bool { return e.GetError().GetReason() == reason })
	}
	awaitIdle(t, s, bus.KindShip)
}

// Every moment of a cycle: the worker is lost there, another one takes over, the point is right and there once.
func TestLostAtEachFailpoint(t *testing.T) {
	for _, name := range failpoint.Names() {
		if len(name) < 9 || name[:9] != "uploader/" || strings.HasSuffix(name, "-retain") { // those have a test of their own
			continue
		}
		t.Run(name[9:], func(t *testing.T) {
			s := newSite(t, memory(t))
			_, stop := run(t, s, config())
			replicate(t, s)
			s.Host.Write("os", 0, random(600<<10, 5))
			s.Host.Zero("os", 5<<20, 256<<10)
			hit, gone := make(chan struct{}), make(chan struct{})
			var once sync.Once
			disarm := failpoint.ArmFunc(name, func() error {
				once.Do(func() { close(hit) })
				<-gone
				return failpoint.ErrInjected
			})
			defer disarm()
			s.Publish(bus.KindShip, s.PointTask(3, s.Host.Cut(3), 1, point))
			apply := &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, CheckpointAge: durationpb.New(0)}
			testkit.Eventually(t, 20*time.Second, func() bool {
				select {
				case <-hit:
					return true
				default:
					return len(chain(t, s)) == 8
				}
			}, "the point is in the chain, or its worker hangs")
			s.Publish(bus.KindApply, apply)
			await(t, hit)
			stopped := make(chan struct{})
			go func() { defer close(stopped); stop() }()
			close(gone) // before or while the worker is stopped: it is lost either way
			<-stopped
			disarm()
			run(t, s, config())
			awaitPoint(s, 3)
			hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() >= 2 })
			awaitIdle(t, s, bus.KindShip)
			s.Host.SettlePoint(3, committed)
			s.Host.Write("os", 0, random(4096, 8))
			ship(t, s, 4, point)
			s.Publish(bus.KindApply, apply)
			e := hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 4 && e.GetCheckpoint() > 0 })
			require.Equal(t, e.GetSequence(), e.GetCheckpoint())
			require.Equal(t, []string{"base 2", "point 3", "point 4"}, chain(t, s)[6:])
			s.RequirePoint(3)
			s.RequirePoint(4)
			s.RequireReplicaDisks(4)
			requireNoFailure(t, s)
		})
	}
}

func TestApplyWaitsForAnotherApplier(t *testing.T) {
	s := newSite(t, memory(t))
	c := config()
	c.Apply.SoleApplier = false
	logs := testkit.NewLogs(t)
	runLogged(t, s, c, logs.Logger())
	replicate(t, s)
	apply := &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage}
	s.Publish(bus.KindApply, apply)
	hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 2 })
	other := s.Store.Container(replica.Lineage(hosttest.Lineage).ReplicaContainer())
	ctx := testkit.Context(t)
	blob := replica.DiskBlobName("os", 1)
	require.NoError(t, other.AcquireLease(ctx, blob, blobstore.LeaseID("6f6f3d1c-6a39-4d0e-9a55-1d1f2f1c7a10"), time.Minute))
	s.Host.Write("os", 0, random(4096, 8))
	ship(t, s, 3, point)
	s.Publish(bus.KindApply, apply)
	testkit.Eventually(t, 10*time.Second, func() bool { return len(logs.Find("another applier")) > 0 }, "the task meets the lease")
	n, err := s.Bus.Backlog(ctx, bus.KindApply, hosttest.SiteID)
	require.NoError(t, err)
	require.EqualValues(t, 1, n, "it stays in the queue")
	require.NoError(t, other.ReleaseLease(ctx, blob, "6f6f3d1c-6a39-4d0e-9a55-1d1f2f1c7a10"))
	hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 3 })
	s.RequireReplicaDisks(3)
	requireNoFailure(t, s)
}

// Apply tasks that come while their VM is worked on are merged into that work.
func TestApplyTasksAreMerged(t *testing.T) {
	s := newSite(t, memory(t))
	service, _ := run(t, s, config())
	replicate(t, s)
	held, free := make(chan struct{}), make(chan struct{})
	var n atomic.Int32
	defer failpoint.ArmFunc("uploader/after-page-write", func() error {
		if n.Add(1) == 1 {
			close(held)
			<-free
		}
		return nil
	})()
	apply := &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, Sequence: 7}
	s.Publish(bus.KindApply, apply)
	await(t, held)
	for o := uint64(3); o < 8; o++ {
		s.Host.Write("os", 0, random(4096, o))
		ship(t, s, o, point)
		s.Publish(bus.KindApply, apply)
	}
	testkit.Eventually(t, 10*time.Second, func() bool {
		left, err := s.Bus.Backlog(testkit.Context(t), bus.KindApply, hosttest.SiteID)
		return err == nil && left == 1
	}, "the others are acknowledged")
	status, err := service.GetStatus(testkit.Context(t), &uploaderv1.GetStatusRequest{})
	require.NoError(t, err)
	require.Equal(t, []string{"apply " + hosttest.VMName}, status.GetActiveTasks())
	close(free)
	awaitIdle(t, s, bus.KindApply)
	hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 7 })
	s.RequireReplicaDisks(7)
	require.EqualValues(t, 2, n.Load())
}

func TestCheckpointsFollowTheirAge(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	replicate(t, s)
	at := func(ordinal uint64, age *durationpb.Duration) *eventsv1.RecoveryPointProcessed {
		s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, CheckpointAge: age})
		awaitIdle(t, s, bus.KindApply)
		return hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == ordinal })
	}
	require.EqualValues(t, 7, at(2, nil).GetCheckpoint(), "the end of a run of partials is one by itself")
	s.Host.Write("os", 0, random(4096, 8))
	ship(t, s, 3, point)
	require.EqualValues(t, 7, at(3, durationpb.New(time.Hour)).GetCheckpoint())
	s.Host.Write("os", 0, random(4096, 9))
	ship(t, s, 4, point)
	require.EqualValues(t, 9, at(4, durationpb.New(0)).GetCheckpoint())
}

func TestUndecodableTaskIsParked(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	s.Publish(bus.KindShip, &uploaderv1.ShipTask{Vm: hosttest.VMName, Lineage: "not a lineage"})
	awaitIdle(t, s, bus.KindShip)
	e := hosttest.Await(s, "parked.ship", func() *eventsv1.TaskParked { return &eventsv1.TaskParked{} }, func(*eventsv1.TaskParked) bool { return true })
	require.Equal(t, "INVALID_ARGUMENT", e.GetError().GetReason())
}
