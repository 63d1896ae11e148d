package resyncengine_test

import (
	"context"
	"crypto/sha256"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	resyncengine "github.com/landfall-dr/landfall/services/resync-engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	chunk     = 64 << 10
	committed = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
	abandoned = typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
	comparing = typesv1.PassScope_PASS_SCOPE_COMPARE
)

func shipped() *eventsv1.PassTaskShipped { return &eventsv1.PassTaskShipped{} }
func failed() *eventsv1.ShipFailed       { return &eventsv1.ShipFailed{} }

// config is small and quick.
func config() resyncengine.Config {
	c := resyncengine.Default()
	c.Site = hosttest.SiteID
	c.WindowBytes, c.SegmentBytes = 2<<20, 256<<10
	c.ResumeWait, c.ResumeWaitMax = time.Millisecond, 10*time.Millisecond
	c.RetryDelay = 10 * time.Millisecond
	return c
}

func run(t *testing.T, s *hosttest.Site, c resyncengine.Config) (service *resyncengine.Service, stop func()) {
	t.Helper()
	service, err := resyncengine.New(c, resyncengine.Deps{
		Bus: s.Connect("resync-engine"), Store: s.Store, Hosts: s.Hosts("resync-engine"), Logger: testkit.Logger(t),
	})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-done)
	})
	t.Cleanup(stop)
	return service, stop
}

func memory(t *testing.T) blobstore.Store {
	t.Helper()
	return blobstoretest.NewMemory()
}

func folder(t *testing.T) blobstore.Store {
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

// newSite is a site whose machine has two disks, base 1 in the chain. The second disk ends inside a chunk.
func newSite(t *testing.T, store blobstore.Store) *hosttest.Site {
	t.Helper()
	s := hosttest.NewSite(t, store)
	s.Host.AddDisk("os", hosttest.NewImage(6<<20))
	s.Host.AddDisk("data", hosttest.NewImage(3<<20+20<<10))
	s.Host.Write("os", 0, random(3<<20, 1))
	s.Host.Write("os", 4<<20, make([]byte, 256<<10)) // zero, but there
	s.Host.Write("data", 3<<20-100<<10, random(120<<10, 2))
	s.Host.Cut(1)
	_, err := s.Commit(1, 0, 1, replica.KindBase)
	require.NoError(t, err)
	s.Host.SettlePoint(1, committed)
	return s
}

func task(s *hosttest.Site, pass, epoch uint64) *resyncenginev1.CompareTask {
	return &resyncenginev1.CompareTask{
		Vm: hosttest.VMName, Host: hosttest.HostName, Lineage: hosttest.Lineage, Epoch: epoch, Pass: pass,
		Disks: s.Host.Disks(), ChunkBytes: chunk,
	}
}

// resync runs a comparing pass and returns what differed by the events.
func resync(t *testing.T, s *hosttest.Site, pass, epoch uint64) (differing int64) {
	t.Helper()
	s.Host.StartPass(pass, comparing, false)
	s.Publish(bus.KindResync, task(s, pass, epoch))
	return awaitPass(t, s, pass)
}

func awaitPass(t *testing.T, s *hosttest.Site, pass uint64) (differing int64) {
	t.Helper()
	first := hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetPass() == pass })
	for i := range first.GetTasks() {
		e := hosttest.Await(s, "pass-task.shipped", shipped, func(e *eventsv1.PassTaskShipped) bool { return e.GetPass() == pass && e.GetIndex() == i+1 })
		differing += e.GetDifferingBytes()
	}
	progress, err := s.Replica().PassProgress(testkit.Context(t), replica.Ordinal(pass), uint32(first.GetTasks()))
	require.NoError(t, err)
	require.True(t, progress.Complete)
	return differing
}

// finish ends a pass with the base that follows it, and checks the base.
func finish(t *testing.T, s *hosttest.Site, pass, point, epoch uint64) {
	t.Helper()
	s.Host.SetHook(nil)
	s.Host.EndPass(pass, committed)
	b := s.Host.Cut(point)
	require.Equal(t, pass, b)
	_, err := s.Commit(point, b, epoch, replica.KindBase)
	require.NoError(t, err)
	s.Host.SettlePoint(point, committed)
	s.RequirePoint(point)
}

func requireNoFailure(t *testing.T, s *hosttest.Site) {
	t.Helper()
	s.Barrier()
	require.Empty(t, hosttest.Events(s, "ship.failed", failed))
}

func awaitIdle(t *testing.T, s *hosttest.Site) {
	t.Helper()
	testkit.Eventually(t, 20*time.Second, func() bool {
		n, err := s.Bus.Backlog(testkit.Context(t), bus.KindResync, hosttest.SiteID)
		return err == nil && n == 0
	}, "queue is empty")
}

// difference is the length of the chunks in which two states of the machine differ.
func difference(s *hosttest.Site, old func(disk string) *hosttest.Image) (n int64) {
	for _, d := range s.Host.Disks() {
		a, b := old(d.GetId()).Bytes(), s.Host.Live(d.GetId()).Bytes()
		for off := int64(0); off < int64(len(a)); off += chunk {
			end := min(off+chunk, int64(len(a)))
			if sha256.Sum256(a[off:end]) != sha256.Sum256(b[off:end]) {
				n += end - off
			}
		}
	}
	return n
}

// Whatever happened behind the tracker's back: exactly the chunks that differ are sent, and the next base is right.
func TestExactlyTheDifferingChunks(t *testing.T) {
	for name, open := range map[string]func(*testing.T) blobstore.Store{"memory": memory, "dir": folder} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, open(t))
			service, _ := run(t, s, config())
			seed := testkit.Seed(t)
			rng := rand.New(rand.NewPCG(seed, 1))
			ordinal, last := uint64(1), uint64(1)
			for round := range 8 {
				for range rng.IntN(12) {
					d := s.Host.Disks()[rng.IntN(2)]
					off := 512 * rng.Int64N(d.GetSizeBytes()/512)
					n := min(512*(1+rng.Int64N(400)), d.GetSizeBytes()-off)
					switch rng.IntN(4) {
					case 0:
						s.Host.ZeroUntracked(d.GetId(), off, n)
					case 1:
						s.Host.WriteUntracked(d.GetId(), off, make([]byte, n))
					default:
						s.Host.WriteUntracked(d.GetId(), off, random(int(n), rng.Uint64()))
					}
				}
				want := difference(s, func(disk string) *hosttest.Image { return s.Host.At(last, disk) })
				epoch := uint64(round + 2)
				got := resync(t, s, ordinal+1, epoch)
				require.Equal(t, want, got, "round %d", round)
				finish(t, s, ordinal+1, ordinal+2, epoch)
				ordinal, last = ordinal+2, ordinal+2
			}
			requireNoFailure(t, s)
			got, err := service.GetStatus(testkit.Context(t), &resyncenginev1.GetStatusRequest{})
			require.NoError(t, err)
			require.EqualValues(t, 8*(9<<20+20<<10), got.GetComparedBytes())
		})
	}
}

// The guest goes on writing while it is compared; the cut that follows covers it.
func TestGuestWritesDuringTheComparison(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	s.Host.WriteUntracked("os", 1<<20, random(1<<20, 7))
	var n atomic.Uint64
	s.Host.SetHook(func(m hosttest.Message) error {
		i := n.Add(1)
		s.Host.Write("os", int64(i*37%90)*chunk, random(4096, i))
		s.Host.Zero("os", int64(i*53%90)*chunk, 8192)
		return nil
	})
	resync(t, s, 2, 2)
	finish(t, s, 2, 3, 2)
	require.Positive(t, n.Load())
	requireNoFailure(t, s)
}

// Rule 13: between the snapshot and the pass a point of an older epoch commits, and puts an old value where source and
// snapshot agree.
func TestLatePointBetweenSnapshotAndCompare(t *testing.T) {
	s := newSite(t, memory(t))
	before := random(chunk, 1)
	s.Host.Live("os").ReadInto(before, 0)
	s.Host.Write("os", 0, random(chunk, 50))
	s.Host.Cut(2)
	s.Host.Write("os", 0, before) // back to what the replica has
	s.Host.SettlePoint(2, abandoned)
	s.Host.StartPass(3, comparing, false)
	var once sync.Once
	disarm := failpoint.ArmFunc("resync-engine/before-manifest", func() error {
		once.Do(func() {
			if _, err := s.Commit(2, 1, 1, replica.KindPoint); err != nil {
				t.Errorf("the late point: %v", err)
			}
		})
		return nil
	})
	defer disarm()
	run(t, s, config())
	s.Publish(bus.KindResync, task(s, 3, 2))
	require.EqualValues(t, chunk, awaitPass(t, s, 3), "the chunk that the late point changed is sent")
	r := s.Replica()
	m, err := r.Manifest(testkit.Context(t), 3)
	require.NoError(t, err)
	require.EqualValues(t, 1, m.Pass.I, "the first partial follows the late point")
	finish(t, s, 3, 4, 2)
	requireNoFailure(t, s)
}

func TestLostAtEachFailpoint(t *testing.T) {
	for _, name := range failpoint.Names() {
		if len(name) < 14 || name[:14] != "resync-engine/" {
			continue
		}
		t.Run(name[14:], func(t *testing.T) {
			s := newSite(t, memory(t))
			for i := range int64(9) { // something differs in most windows
				s.Host.WriteUntracked("os", i*600<<10, random(8192, uint64(i)))
			}
			s.Host.WriteUntracked("data", 1<<20, random(8192, 20))
			want := difference(s, func(disk string) *hosttest.Image { return s.Host.At(1, disk) })
			require.Positive(t, want)
			_, stop := run(t, s, config())
			hit := make(chan struct{})
			var n atomic.Int32
			disarm := failpoint.ArmFunc(name, func() error { // the second time: in the middle, where there is one
				if name != "resync-engine/before-ack" && n.Add(1) < 2 {
					return nil
				}
				select {
				case <-hit:
				default:
					close(hit)
				}
				return failpoint.ErrInjected
			})
			defer disarm()
			s.Host.StartPass(2, comparing, false)
			s.Publish(bus.KindResync, task(s, 2, 2))
			select {
			case <-hit:
			case <-time.After(20 * time.Second):
				t.Fatal("the point was not reached")
			}
			stop()
			disarm()
			run(t, s, config())
			awaitPass(t, s, 2)
			awaitIdle(t, s)
			finish(t, s, 2, 3, 2)
			requireNoFailure(t, s)
			st, err := s.Replica().Refresh(testkit.Context(t))
			require.NoError(t, err)
			require.EqualValues(t, 8, st.Head, "base, six partials, base")
		})
	}
}

func TestTwoEnginesOneTask(t *testing.T) {
	s := newSite(t, memory(t))
	s.Host.WriteUntracked("os", 1<<20, random(1<<20, 7))
	run(t, s, config())
	run(t, s, config())
	s.Host.StartPass(2, comparing, false)
	for range 3 {
		s.Publish(bus.KindResync, task(s, 2, 2))
	}
	awaitPass(t, s, 2)
	awaitIdle(t, s)
	finish(t, s, 2, 3, 2)
	requireNoFailure(t, s)
}

func TestBrokenStreamsAreReadOn(t *testing.T) {
	s := newSite(t, memory(t))
	s.Host.WriteUntracked("os", 0, random(4<<20, 7))
	run(t, s, config())
	var n atomic.Int32
	s.Host.SetHook(func(m hosttest.Message) error {
		if m.Offset < 0 {
			return nil
		}
		switch n.Add(1) % 7 {
		case 1:
			if m.Method == "ReadRanges" && len(m.Data) > 0 {
				m.Data[3] ^= 1
			}
		case 0:
			return status.Error(codes.Unavailable, "the connection broke")
		}
		return nil
	})
	resync(t, s, 2, 2)
	finish(t, s, 2, 3, 2)
	requireNoFailure(t, s)
}

func TestRefusalsNameTheirReason(t *testing.T) {
	s := newSite(t, memory(t))
	run(t, s, config())
	head := func() replica.Seq {
		st, err := s.Replica().Refresh(testkit.Context(t))
		require.NoError(t, err)
		return st.Head
	}
	s.Host.StartPass(2, comparing, false)
	for _, c := range []struct {
		reason string
		change func(*resyncenginev1.CompareTask)
	}{
		{"DISK_CHANGED_OFFLINE", func(t *resyncenginev1.CompareTask) { t.Disks[0].SizeBytes += 1 << 20 }},
		{"STALE_OPEN", func(t *resyncenginev1.CompareTask) { t.Open = 1 }},
		{"INVALID_ARGUMENT", func(t *resyncenginev1.CompareTask) { t.ChunkBytes = 5000 }},
		{"ORDINAL_USED", func(t *resyncenginev1.CompareTask) { t.Pass = 1 }},
	} {
		before := head()
		bad := task(s, 2, 2)
		c.change(bad)
		s.Publish(bus.KindResync, bad)
		e := hosttest.Await(s, "ship.failed", failed, func(e *eventsv1.ShipFailed) bool { return e.GetError().GetReason() == c.reason })
		require.Equal(t, bad.GetPass(), e.GetOrdinal())
		require.Equal(t, before, head(), "nothing is committed")
	}
	s.StopHost()
	s.Publish(bus.KindResync, task(s, 2, 2))
	e := hosttest.Await(s, "ship.failed", failed, func(e *eventsv1.ShipFailed) bool { return e.GetError().GetReason() == "HOST_UNREACHABLE" })
	require.True(t, e.GetError().GetRecoverable())
	awaitIdle(t, s)
	s.StartHost()
	s.Publish(bus.KindResync, task(s, 2, 2)) // goes on from the first partial
	awaitPass(t, s, 2)
	finish(t, s, 2, 3, 2)
}

func TestWindowSizeMustNotChangeDuringAPass(t *testing.T) {
	s := newSite(t, memory(t))
	_, stop := run(t, s, config())
	resync(t, s, 2, 2)
	stop()
	c := config()
	c.WindowBytes = 1 << 20
	run(t, s, c)
	s.Publish(bus.KindResync, task(s, 2, 2))
	hosttest.Await(s, "ship.failed", failed, func(e *eventsv1.ShipFailed) bool { return e.GetError().GetReason() == "PASS_OUT_OF_ORDER" })
}

func TestConfigReportsEveryProblem(t *testing.T) {
	require.NoError(t, config().Validate())
	err := resyncengine.Config{WindowBytes: 5}.Validate()
	for _, key := range []string{"site", "concurrency", "window_bytes", "windows", "hash_workers", "segment_bytes", "buffers", "stream_idle"} {
		require.ErrorContains(t, err, key)
	}
	require.True(t, slices.Contains(failpoint.Names(), "resync-engine/before-ack"))
}
