package uploader_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/services/uploader"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	base      = typesv1.PointKind_POINT_KIND_BASE
	point     = typesv1.PointKind_POINT_KIND_POINT
	committed = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
	abandoned = typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
	full      = typesv1.PassScope_PASS_SCOPE_FULL
	dirty     = typesv1.PassScope_PASS_SCOPE_DIRTY
)

func received() *eventsv1.RecoveryPointReceived   { return &eventsv1.RecoveryPointReceived{} }
func shipped() *eventsv1.PassTaskShipped          { return &eventsv1.PassTaskShipped{} }
func failed() *eventsv1.ShipFailed                { return &eventsv1.ShipFailed{} }
func processed() *eventsv1.RecoveryPointProcessed { return &eventsv1.RecoveryPointProcessed{} }

// config is small and quick.
func config() uploader.Config {
	c := uploader.Default()
	c.Site = hosttest.SiteID
	c.Ship.SegmentBytes = 256 << 10
	c.Ship.ResumeWait, c.Ship.ResumeWaitMax = time.Millisecond, 10*time.Millisecond
	c.Ship.RetryDelay = 10 * time.Millisecond
	c.Apply.BusyDelay = 50 * time.Millisecond
	c.Apply.SoleApplier = true
	return c
}

// run starts an uploader; stop ends it, and so does the end of the test.
func run(t *testing.T, s *hosttest.Site, c uploader.Config) (service *uploader.Service, stop func()) {
	t.Helper()
	return runLogged(t, s, c, testkit.Logger(t))
}

func runLogged(t testing.TB, s *hosttest.Site, c uploader.Config, logger *slog.Logger) (service *uploader.Service, stop func()) {
	t.Helper()
	return runAt(t, s, c, logger, nil)
}

func runAt(t testing.TB, s *hosttest.Site, c uploader.Config, logger *slog.Logger, clock func() time.Time) (service *uploader.Service, stop func()) {
	t.Helper()
	service, err := uploader.New(c, uploader.Deps{
		Bus: s.Connect("uploader"), Store: s.Store, Hosts: s.Hosts("uploader"), Logger: logger, Clock: clock,
	})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cancel()
			require.NoError(t, <-done)
		}
	}
	t.Cleanup(stop)
	return service, stop
}

func memory(t *testing.T) blobstore.Store {
	t.Helper()
	return blobstoretest.NewMemory()
}

func folder(t testing.TB) blobstore.Store {
	t.Helper()
	store, err := dir.Open(t.TempDir(), dir.Options{NoSync: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return store
}

func random(n int, seed uint64) []byte {
	p := make([]byte, n)
	testkit.Fill(p, seed)
	return p
}

// newSite is a site whose machine has two disks with some content.
func newSite(t *testing.T, store blobstore.Store) *hosttest.Site {
	t.Helper()
	s := hosttest.NewSite(t, store)
	s.Host.AddDisk("os", hosttest.NewImage(8<<20))
	s.Host.AddDisk("data", hosttest.NewImage(4<<20))
	s.Host.Write("os", 0, random(700<<10, 1))
	s.Host.Write("os", 5<<20, random(1<<20, 2))
	s.Host.Write("os", 5<<20+128<<10, make([]byte, 256<<10)) // zeros inside allocated space
	s.Host.Write("data", 1<<20+512, random(300<<10, 3))
	return s
}

// replicate does initial replication: pass 1, base point 2.
func replicate(t *testing.T, s *hosttest.Site) {
	t.Helper()
	passBase := s.Host.StartPass(1, full, false)
	tasks := s.PassTasks(1, passBase, 1, full, 2<<20)
	for _, task := range tasks {
		s.Publish(bus.KindShip, task)
	}
	for _, task := range tasks {
		i := task.GetPass().GetIndex()
		hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetIndex() == i })
	}
	progress, err := s.Replica().PassProgress(testkit.Context(t), 1, uint32(len(tasks)))
	require.NoError(t, err)
	require.True(t, progress.Complete)
	s.Host.EndPass(1, committed)
	ship(t, s, 2, base)
}

// ship cuts, ships and settles a point.
func ship(t *testing.T, s *hosttest.Site, ordinal uint64, kind typesv1.PointKind) *eventsv1.RecoveryPointReceived {
	t.Helper()
	b := s.Host.Cut(ordinal)
	s.Publish(bus.KindShip, s.PointTask(ordinal, b, 1, kind))
	e := awaitPoint(s, ordinal)
	s.Host.SettlePoint(ordinal, committed)
	return e
}

func awaitPoint(s *hosttest.Site, ordinal uint64) *eventsv1.RecoveryPointReceived {
	return hosttest.Await(s, "recovery-point.received", received, func(e *eventsv1.RecoveryPointReceived) bool { return e.GetPoint() == ordinal })
}

// requireNoFailure checks that no worker reported one so far.
func requireNoFailure(t *testing.T, s *hosttest.Site) {
	t.Helper()
	s.Barrier()
	require.Empty(t, hosttest.Events(s, "ship.failed", failed))
}

// chain lists the manifests as "kind ordinal".
func chain(t *testing.T, s *hosttest.Site) (out []string) {
	t.Helper()
	r := s.Replica()
	st, err := r.Refresh(testkit.Context(t))
	require.NoError(t, err)
	for seq := replica.Seq(1); seq <= st.Head; seq++ {
		m, err := r.Manifest(testkit.Context(t), seq)
		require.NoError(t, err)
		out = append(out, string(m.Kind)+" "+string('0'+rune(m.Ordinal())))
	}
	return out
}

func TestWholeRoad(t *testing.T) {
	for name, open := range map[string]func(*testing.T) blobstore.Store{
		"memory": memory, "dir": func(t *testing.T) blobstore.Store { return folder(t) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, open(t))
			service, _ := run(t, s, config())
			replicate(t, s)
			s.RequirePoint(2)
			s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage})
			e := hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 2 })
			require.EqualValues(t, 7, e.GetSequence())
			s.RequireReplicaDisks(2)

			s.Host.Write("os", 600<<10, random(200<<10, 9))
			s.Host.Zero("os", 5<<20, 512<<10)
			s.Host.Write("data", 0, random(4096, 10))
			got := ship(t, s, 3, point)
			require.EqualValues(t, 200<<10+512<<10+4096, got.GetChangedBytes())
			require.Positive(t, got.GetStoredBytes())
			require.False(t, got.GetAlreadyCommitted())
			s.Host.Write("os", 0, random(512, 11))
			ship(t, s, 4, point)
			for _, o := range []uint64{2, 3, 4} {
				s.RequirePoint(o)
			}
			s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, Sequence: 9, CheckpointAge: durationpb.New(time.Hour)})
			hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 4 })
			s.RequireReplicaDisks(4)
			requireNoFailure(t, s)

			status, err := service.GetStatus(testkit.Context(t), &uploaderv1.GetStatusRequest{})
			require.NoError(t, err)
			require.Equal(t, []string{"ship", "apply", "retain"}, status.GetRoles())
			require.Positive(t, status.GetShippedBytes())
			require.Positive(t, status.GetAppliedBytes())
		})
	}
}
