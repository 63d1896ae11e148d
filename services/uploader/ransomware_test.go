package uploader_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

func suspected() *eventsv1.RecoveryPointSuspected { return &eventsv1.RecoveryPointSuspected{} }

// guest is a machine full of documents whose points are cut every five minutes.
type guest struct {
	*hosttest.Site
	t    *testing.T
	next uint64
	task *uploaderv1.ShipTask
}

func newGuest(t *testing.T) *guest {
	g := &guest{Site: newSite(t, memory(t)), t: t, next: 2}
	g.Host.AddDisk("files", hosttest.NewImage(96<<20))
	c := config()
	c.Ship.SegmentBytes, c.Ship.Compression = 8<<20, "fast"
	run(t, g.Site, c)
	replicate(t, g.Site)
	return g
}

// write puts p on the disk, 1 MiB at a time, as a guest would.
func (g *guest) write(off int64, p []byte) {
	for len(p) > 0 {
		n := min(len(p), 1<<20)
		g.Host.Write("files", off, p[:n])
		off, p = off+int64(n), p[n:]
	}
}

// cut ships a point and returns what was said about it.
func (g *guest) cut() *eventsv1.RecoveryPointReceived {
	g.next++
	b := g.Host.Cut(g.next)
	g.task = g.PointTask(g.next, b, 1, point)
	g.task.GetPoint().CutTime = timestamppb.New(time.Date(2026, 11, 22, 10, 5*int(g.next), 0, 0, time.UTC))
	g.Publish(bus.KindShip, g.task)
	e := awaitPoint(g.Site, g.next)
	g.Host.SettlePoint(g.next, committed)
	return e
}

// A guest works on its documents, gets many more of them at once, and then something encrypts those. The event names the last
// point before that, comes once, with the same id when the task comes again, and the point that it names has the documents. The
// same volume of documents raises none, nor does freeing everything.
func TestRansomwareIsSuspected(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 150 MiB")
	}
	g := newGuest(t)
	work := func(seed uint64) {
		edited := make([]byte, 2<<20)
		testkit.Text(edited, seed)
		g.write(int64(seed)*(3<<20), edited)
		e := g.cut()
		require.EqualValues(t, 2<<20, e.GetSignals().GetChangedBytes())
		require.Zero(t, e.GetSignals().GetIncompressibleBytes())
		require.Equal(t, e.GetStoredBytes(), e.GetSignals().GetStoredBytes())
		require.Less(t, e.GetStoredBytes(), int64(2<<20)*3/4)
	}
	for seed := range uint64(6) {
		work(seed)
	}
	text := make([]byte, 70<<20)
	testkit.Text(text, 99)
	g.write(20<<20, text)
	require.Zero(t, g.cut().GetSignals().GetIncompressibleBytes())
	work(0)
	awaitIdle(t, g.Site, bus.KindShip)
	require.Empty(t, hosttest.Events(g.Site, "recovery-point.suspected", suspected), "thirty-five times the usual, and it compresses")

	good := g.next
	testkit.Encrypt(text, 7)
	g.write(20<<20, text)
	e := g.cut()
	require.Greater(t, e.GetSignals().GetIncompressibleBytes(), int64(69<<20))
	alarm := hosttest.Await(g.Site, "recovery-point.suspected", suspected, func(*eventsv1.RecoveryPointSuspected) bool { return true })
	require.Equal(t, []uint64{g.next, good}, []uint64{alarm.GetPoint(), alarm.GetLastGoodPoint()})
	require.EqualValues(t, 2<<20, alarm.GetUsualBytes())
	require.Equal(t, e.GetSignals().GetChangedBytes(), alarm.GetSignals().GetChangedBytes())
	require.NotZero(t, alarm.GetLastGoodSequence())
	require.True(t, alarm.GetCutTime().AsTime().After(alarm.GetLastGoodTime().AsTime()))

	g.Publish(bus.KindShip, g.task) // the worker was lost before it acknowledged
	awaitIdle(t, g.Site, bus.KindShip)
	testkit.Encrypt(text[:20<<20], 8) // it goes on
	g.write(0, text[:20<<20])
	g.cut()
	g.Host.Zero("files", 0, 96<<20)
	require.EqualValues(t, 96<<20, g.cut().GetSignals().GetZeroBytes())
	awaitIdle(t, g.Site, bus.KindShip)
	require.Len(t, hosttest.Events(g.Site, "recovery-point.suspected", suspected), 1)
	points, err := g.Replica().Points(testkit.Context(t))
	require.NoError(t, err)
	require.Equal(t, replica.Ordinal(good), points[len(points)-4].Ordinal)
	require.EqualValues(t, 2<<20, points[len(points)-4].Signals.Changed)
	g.RequirePoint(good)
}
