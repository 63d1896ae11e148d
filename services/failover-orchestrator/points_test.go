package failoverorchestrator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

// pointRig reads points by the API. Its clock and the store's go together.
type pointRig struct {
	*rig
	store *blobstoretest.Faulty
	past  atomic.Int64 // ns that both clocks went on by hand
	api   failoverv1.PointServiceClient
	stop  func()
}

func newPointRig(t *testing.T) *pointRig {
	g := &pointRig{rig: newRig(t)}
	g.store = blobstoretest.NewFaulty(g.rig.store, nil)
	g.restart()
	return g
}

func (g *pointRig) advance(d time.Duration) {
	g.past.Add(int64(d))
	g.rig.store.Advance(d)
}

// restart replaces the process: what it had in memory is gone.
func (g *pointRig) restart() {
	g.t.Helper()
	if g.stop != nil {
		g.stop()
	}
	c := failoverorchestrator.Default()
	c.Site = "lab"
	s, err := failoverorchestrator.New(testkit.Context(g.t), c, failoverorchestrator.Deps{
		Logger: testkit.Logger(g.t), Bus: g.connect("failover-orchestrator"), Holder: "orchestrator-1",
		Store:     blobstoretest.Restrict(g.store, replica.Rights(replica.RoleFailover)),
		Scheduler: schedulerv1.NewProtectionServiceClient(g.dial(pki.ServiceIdentity("failover-orchestrator"), "scheduler")),
		Clock:     func() time.Time { return time.Now().Add(time.Duration(g.past.Load())) },
	})
	require.NoError(g.t, err)
	g.stop = g.serve("failover-orchestrator", s.Register)
	g.api = failoverv1.NewPointServiceClient(g.dial(pki.UserIdentity("otto", pki.RoleOperator), "failover-orchestrator"))
}

func (g *pointRig) openPoint(point string) (session string, r *failoverv1.OpenPointResponse) {
	g.t.Helper()
	session = uuid.NewString()
	r, err := g.api.OpenPoint(testkit.Context(g.t), &failoverv1.OpenPointRequest{Vm: vmName, Point: point, Session: session})
	require.NoError(g.t, err)
	return session, r
}

// read reads a range of a disk, which the API answers in one piece.
func (g *pointRig) read(session, disk string, off, n int64) ([]byte, error) {
	r, err := g.api.ReadPoint(testkit.Context(g.t), &failoverv1.ReadPointRequest{Session: session, Disk: disk, Offset: off, Length: n})
	if err != nil {
		return nil, err
	}
	if r.Zero {
		if len(r.Data) > 0 {
			return nil, errors.New("zero, and data")
		}
		return make([]byte, n), nil
	}
	if vdisk.IsZero(r.Data) {
		return nil, errors.New("zeros were sent")
	}
	return r.Data, nil
}

// whole reads a disk in pieces that are not aligned to anything.
func (g *pointRig) whole(session, disk string, size int64) ([]byte, error) {
	var out []byte
	for off := int64(0); off < size; {
		n := min(size-off, 777_777)
		b, err := g.read(session, disk, off, n)
		if err != nil {
			return nil, err
		}
		out = append(out, b...)
		off += n
	}
	return out, nil
}

func (g *pointRig) requireSame(session string, point uint64) {
	g.t.Helper()
	for id, want := range g.points[point] {
		got, err := g.whole(session, id, int64(len(want)))
		require.NoError(g.t, err)
		require.True(g.t, bytes.Equal(want, got), "disk %s differs from point %d", id, point)
	}
}

func requireReason(t *testing.T, err error, reason typesv1.ErrorReason) {
	t.Helper()
	require.Truef(t, errcat.Is(err, reason), "want %s, have %v", reason, err)
}

// grow adds random points; the applier checkpoints some.
func (g *pointRig) grow(n int) {
	g.t.Helper()
	r, err := replica.Open(testkit.Context(g.t), g.rig.store, lineage)
	require.NoError(g.t, err)
	rng := testkit.RandOf(7)
	last := uint64(0)
	for o := range g.points {
		last = max(last, o)
	}
	for range n {
		var changes []change
		disk := []string{"os", "data"}[rng.IntN(2)]
		at := int64(rng.IntN(4)) * 700 << 10
		for range 1 + rng.IntN(4) {
			length := int64(1+rng.IntN(100)) * 512
			at += int64(rng.IntN(64)) * 512
			if at+length > int64(len(g.now[disk])) {
				break
			}
			if rng.IntN(4) == 0 {
				clear(g.now[disk][at : at+length])
			} else {
				testkit.Fill(g.now[disk][at:at+length], rng.Uint64())
			}
			changes = append(changes, change{disk, at, length})
			at += length
		}
		last++
		g.commit(r, g.config, replica.KindPoint, replica.Ordinal(last), replica.Ordinal(last-1), g.now, changes...)
	}
}

// Every byte of every point is what its disks held then.
func TestReadPoints(t *testing.T) {
	g := newPointRig(t)
	g.grow(6)
	for point, disks := range g.points {
		session, r := g.openPoint(fmt.Sprint(point))
		require.Equal(t, point, r.Point)
		require.Equal(t, time.Date(2026, 11, 22, 10, 0, int(point), 0, time.UTC), r.CutTime.AsTime())
		require.InDelta(t, 15*60, time.Until(r.ExpireTime.AsTime()).Seconds(), 30)
		sizes := map[string]int64{}
		for _, d := range r.Disks {
			sizes[d.Id] = d.SizeBytes
		}
		require.Equal(t, map[string]int64{"os": 4 * mib, "data": 3*mib + 512}, sizes)
		g.requireSame(session, point)
		for id, want := range disks { // the map leaves out zeros only
			mapped := bytes.Clone(want)
			for off := int64(0); off < int64(len(want)); {
				m, err := g.api.MapPoint(testkit.Context(t), &failoverv1.MapPointRequest{Session: session, Disk: id, Offset: off, Length: int64(len(want)) - off})
				require.NoError(t, err)
				require.Greater(t, m.NextOffset, off)
				for _, e := range m.Extents {
					require.GreaterOrEqual(t, e.Offset, off)
					require.LessOrEqual(t, e.Offset+e.Length, m.NextOffset)
					clear(mapped[e.Offset : e.Offset+e.Length])
				}
				off = m.NextOffset
			}
			require.True(t, vdisk.IsZero(mapped), "disk %s holds more than its map says", id)
		}
		_, err := g.api.ClosePoint(testkit.Context(t), &failoverv1.ClosePointRequest{Session: session})
		require.NoError(t, err)
		_, err = g.read(session, "os", 0, 512)
		requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND)
	}
	require.Empty(t, g.pins())
}

func (g *pointRig) pins() []replica.Pin {
	g.t.Helper()
	pins, err := replica.ReadPins(testkit.Context(g.t), g.rig.store, lineage)
	require.NoError(g.t, err)
	return pins
}

func TestPointRefusals(t *testing.T) {
	g := newPointRig(t)
	ctx := testkit.Context(t)
	for what, c := range map[string]struct {
		r      *failoverv1.OpenPointRequest
		reason typesv1.ErrorReason
	}{
		"vm":      {&failoverv1.OpenPointRequest{Vm: "sites/lab/vms/nobody", Session: uuid.NewString()}, typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED},
		"point":   {&failoverv1.OpenPointRequest{Vm: vmName, Point: "77", Session: uuid.NewString()}, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND},
		"app":     {&failoverv1.OpenPointRequest{Vm: vmName, Point: "latest-app", Session: uuid.NewString()}, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND},
		"word":    {&failoverv1.OpenPointRequest{Vm: vmName, Point: "yesterday", Session: uuid.NewString()}, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
		"session": {&failoverv1.OpenPointRequest{Vm: vmName, Session: "mine"}, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
	} {
		t.Run(what, func(t *testing.T) {
			_, err := g.api.OpenPoint(ctx, c.r)
			requireReason(t, err, c.reason)
		})
	}
	require.Empty(t, g.pins())
	session, _ := g.openPoint("3")
	for what, c := range map[string]struct {
		session, disk string
		off, n        int64
		reason        typesv1.ErrorReason
	}{
		"no session": {uuid.NewString(), "os", 0, 512, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND},
		"no disk":    {session, "tape", 0, 512, typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND},
		"too long":   {session, "os", 0, mib + 1, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
		"nothing":    {session, "os", 0, 0, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
		"negative":   {session, "os", -512, 512, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
		"over end":   {session, "os", 4*mib - 512, 1024, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
		"beyond end": {session, "os", 1 << 62, 512, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
	} {
		t.Run(what, func(t *testing.T) {
			_, err := g.read(c.session, c.disk, c.off, c.n)
			requireReason(t, err, c.reason)
			if what != "too long" {
				_, err = g.api.MapPoint(ctx, &failoverv1.MapPointRequest{Session: c.session, Disk: c.disk, Offset: c.off, Length: c.n})
				requireReason(t, err, c.reason)
			}
		})
	}
	_, err := g.api.ClosePoint(ctx, &failoverv1.ClosePointRequest{Session: uuid.NewString()})
	require.NoError(t, err, "there is nothing to close")
	viewer := failoverv1.NewPointServiceClient(g.dial(pki.UserIdentity("vera", pki.RoleViewer), "failover-orchestrator"))
	_, err = viewer.OpenPoint(ctx, &failoverv1.OpenPointRequest{Vm: vmName, Session: uuid.NewString()})
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED)
}

// A session is its pin: it ends with it, lasts while it is read, and outlives the process.
func TestPointSessions(t *testing.T) {
	g := newPointRig(t)
	ctx := testkit.Context(t)
	session, first := g.openPoint("")
	require.EqualValues(t, 4, first.Point)
	g.grow(2)

	again, err := g.api.OpenPoint(ctx, &failoverv1.OpenPointRequest{Vm: vmName, Session: session})
	require.NoError(t, err)
	require.EqualValues(t, 4, again.Point, "a repeat finds what was opened, also when there is a newer point")
	_, err = g.api.OpenPoint(ctx, &failoverv1.OpenPointRequest{Vm: vmName, Session: session, Point: "3"})
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)
	require.Len(t, g.pins(), 1)
	require.Equal(t, "restore/"+session, g.pins()[0].Owner)

	for range 8 { // two hours, with a read now and then, and every other time by another process
		g.advance(13 * time.Minute)
		g.requireSame(session, 4)
		g.advance(time.Minute)
		g.restart()
		g.requireSame(session, 4)
	}
	// What is read at once writes the record once.
	before := g.pins()[0].Until
	g.advance(6 * time.Minute)
	var puts atomic.Int64
	g.store.SetHook(func(op blobstoretest.Op, container, name string) blobstoretest.Fault {
		if op == blobstoretest.OpPut {
			puts.Add(1)
		}
		return blobstoretest.None
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				if _, err := g.read(session, "os", 0, 4096); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, puts.Load())
	require.True(t, g.pins()[0].Until.After(before))

	// A store that refuses to lengthen it does no harm while the pin lasts.
	g.store.SetHook(func(op blobstoretest.Op, container, name string) blobstoretest.Fault {
		if op == blobstoretest.OpPut {
			return blobstoretest.Before
		}
		return blobstoretest.None
	})
	g.advance(10 * time.Minute)
	g.requireSame(session, 4)
	g.store.SetHook(nil)

	g.advance(16 * time.Minute)
	for range 2 {
		_, err = g.read(session, "os", 0, 512)
		requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND)
		g.restart()
	}

	// One that another process closed does not come back.
	session, _ = g.openPoint("5")
	g.requireSame(session, 5)
	r, err := replica.Open(ctx, g.rig.store, lineage)
	require.NoError(t, err)
	require.NoError(t, r.Unpin(ctx, "restore/"+session, 0))
	g.advance(6 * time.Minute)
	_, err = g.read(session, "os", 0, 512)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND)
}

// Storage that does not answer is not "no such session".
func TestUnknownSessionWithoutStorage(t *testing.T) {
	g := newPointRig(t)
	session, _ := g.openPoint("3")
	g.restart()
	g.store.SetHook(func(op blobstoretest.Op, container, name string) blobstoretest.Fault {
		if op == blobstoretest.OpGet {
			return blobstoretest.Before
		}
		return blobstoretest.None
	})
	_, err := g.read(session, "os", 0, 512)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE)
	g.store.SetHook(nil)
	g.requireSame(session, 3)
}

// Retention that runs beside takes nothing from an opened point, and takes it when it is closed.
func TestRetentionLeavesOpenedPoints(t *testing.T) {
	g := newPointRig(t)
	ctx := testkit.Context(t)
	g.grow(4)
	session, _ := g.openPoint("3")
	a, err := replica.NewApplier(g.replica(), replica.ApplierOptions{Footer: func(_ string, size int64) []byte {
		f, err := vdisk.NewFooter(size, uuid.Nil, time.Unix(1e9, 0))
		require.NoError(t, err)
		b := f.Bytes()
		return b[:]
	}})
	require.NoError(t, err)
	head, err := a.Advance(ctx, 0)
	require.NoError(t, err)
	_, err = g.replica().Checkpoint(ctx, head.Applied)
	require.NoError(t, err)
	reading, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			for reading.Err() == nil {
				off := int64(rng.IntN(4*mib-8192)) &^ 511
				got, err := g.read(session, "os", off, 8192)
				if err != nil || !bytes.Equal(got, g.points[3]["os"][off:off+8192]) {
					t.Errorf("read at %d: %v", off, err)
					return
				}
			}
		})
	}
	retain := func() (retired int) {
		for range 20 { // the pin is lengthened meanwhile, as the readers do it
			g.advance(4 * time.Minute)
			now, err := g.store.Now(ctx)
			require.NoError(t, err)
			res, err := g.replica().Retain(ctx, replica.RetainOptions{
				Keep: replica.Keep{All: time.Second, Hourly: time.Second, Limit: time.Second}, Now: now, OrphanAge: -1,
			})
			require.NoError(t, err)
			retired += res.RetiredPoints
			testkit.Eventually(t, 20*time.Second, func() error { // one reader lengthens it, the others go on meanwhile
				if _, err := g.read(session, "data", 0, 512); err != nil {
					return err
				}
				if left := g.pins()[0].Until.Sub(now); left < 6*time.Minute {
					return fmt.Errorf("%s are left", left)
				}
				return nil
			})
		}
		return retired
	}
	require.Positive(t, retain())
	stop()
	wg.Wait()
	g.requireSame(session, 3)
	g.restart()
	g.requireSame(session, 3)
	_, err = g.api.ClosePoint(ctx, &failoverv1.ClosePointRequest{Session: session})
	require.NoError(t, err)
	res, err := g.replica().Retain(ctx, replica.RetainOptions{Keep: replica.Keep{All: time.Second, Hourly: time.Second, Limit: time.Second}, OrphanAge: -1})
	require.NoError(t, err)
	require.Positive(t, res.RetiredPoints)
	_, err = g.api.OpenPoint(ctx, &failoverv1.OpenPointRequest{Vm: vmName, Point: "3", Session: uuid.NewString()})
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND)
}

func (g *pointRig) replica() *replica.Replica {
	g.t.Helper()
	r, err := replica.Open(testkit.Context(g.t), g.rig.store, lineage)
	require.NoError(g.t, err)
	return r
}

// A damaged segment is found by its checksum, and nothing else of the point is lost.
func TestDamagedPoint(t *testing.T) {
	g := newPointRig(t)
	ctx := testkit.Context(t)
	m, err := g.replica().Find(ctx, 3)
	require.NoError(t, err)
	for _, d := range m.Disks {
		if d.ID == "data" {
			require.NoError(t, g.rig.store.Container(lineage.JournalContainer()).Delete(ctx, d.Segments[0].Name, blobstore.Conditions{}))
		}
	}
	session, _ := g.openPoint("3")
	_, err = g.read(session, "data", 0, 512)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SEGMENT_CORRUPT)
	got, err := g.whole(session, "os", 4*mib)
	require.NoError(t, err)
	require.True(t, bytes.Equal(g.points[3]["os"], got))
}

// More disks than are kept open, more sessions than are kept at hand: each is found again.
func TestManySessions(t *testing.T) {
	g := newPointRig(t)
	g.grow(20)
	sessions := map[uint64]string{}
	for point := range g.points {
		sessions[point], _ = g.openPoint(fmt.Sprint(point))
	}
	for range 2 {
		var wg sync.WaitGroup
		for point, session := range sessions {
			wg.Go(func() {
				for id, want := range g.points[point] {
					got, err := g.whole(session, id, int64(len(want)))
					// All may be busy opening: the answer is to come again.
					for range 100 {
						if !errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE) {
							break
						}
						got, err = g.whole(session, id, int64(len(want)))
					}
					if err != nil || !bytes.Equal(want, got) {
						t.Errorf("point %d, disk %s: %v", point, id, err)
					}
				}
			})
		}
		wg.Wait()
		g.restart()
	}
	require.Len(t, g.pins(), len(sessions))
	require.True(t, proto.Equal(&failoverv1.ClosePointResponse{}, func() proto.Message {
		r, err := g.api.ClosePoint(testkit.Context(t), &failoverv1.ClosePointRequest{Session: sessions[2]})
		require.NoError(t, err)
		return r
	}()))
	require.Len(t, g.pins(), len(sessions)-1)
}
