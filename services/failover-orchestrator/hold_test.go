package failoverorchestrator_test

import (
	"bytes"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

// age makes all points but the newest too old for the policy of retire: two newer ones come, and a checkpoint.
func (g *rig) age() {
	g.t.Helper()
	r, err := replica.Open(testkit.Context(g.t), g.store, lineage)
	require.NoError(g.t, err)
	for n := replica.Ordinal(5); n < 7; n++ {
		g.store.Advance(time.Hour)
		testkit.Fill(g.now["os"][:64<<10], uint64(n))
		g.commit(r, g.config, replica.KindPoint, n, n-1, g.now, change{"os", 0, 64 << 10})
	}
	g.checkpoint()
}

// checkpoint applies the chain and marks its head.
func (g *rig) checkpoint() {
	g.t.Helper()
	ctx := testkit.Context(g.t)
	r, err := replica.Open(ctx, g.store, lineage)
	require.NoError(g.t, err)
	a, err := replica.NewApplier(r, replica.ApplierOptions{Footer: func(_ string, size int64) []byte {
		f, err := vdisk.NewFooter(size, uuid.Nil, time.Unix(1e9, 0))
		require.NoError(g.t, err)
		b := f.Bytes()
		return b[:]
	}})
	require.NoError(g.t, err)
	done, err := a.Advance(ctx, 0)
	require.NoError(g.t, err)
	_, err = r.Checkpoint(ctx, done.Applied)
	require.NoError(g.t, err)
}

// retire does all steps of retention that there are, of which no point is young enough.
func (g *rig) retire() error {
	ctx := testkit.Context(g.t)
	r, err := replica.Open(ctx, g.store, lineage)
	if err != nil {
		return err
	}
	for more := true; more; {
		res, err := r.Retain(ctx, replica.RetainOptions{Keep: replica.Keep{All: time.Second, Hourly: time.Second, Limit: time.Second}, OrphanAge: -1, Parallel: 1})
		if err != nil {
			return err
		}
		more = res.More
	}
	return nil
}

// pins are those of the lineage.
func (g *rig) pins() []replica.Pin {
	g.t.Helper()
	pins, err := replica.ReadPins(testkit.Context(g.t), g.store, lineage)
	require.NoError(g.t, err)
	return pins
}

// has says whether a point is in the chain.
func (g *rig) has(point replica.Ordinal) bool {
	g.t.Helper()
	r, err := replica.Open(testkit.Context(g.t), g.store, lineage)
	require.NoError(g.t, err)
	_, err = r.Find(testkit.Context(g.t), point)
	return err == nil
}

// Retention takes what a test reads only when the test has read it.
func TestRetentionDuringTestFailover(t *testing.T) {
	g := newRig(t)
	g.age()
	t.Cleanup(failpoint.ArmFunc("failover-orchestrator/before-materialise-disks", g.retire))
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "drill")
	job := g.test(request(out, ordinal(3)))
	g.await(ready)
	g.requirePoint(out, 3)
	g.requireSucceeded(job.Name)
	require.False(t, g.has(2), "retention did run")
	require.True(t, g.has(3))
	require.Empty(t, g.pins(), "what is read no more is not held")
	require.NoError(t, g.retire())
	require.False(t, g.has(3))
}

// The pin of a process that died keeps the point for the next one, which ends it.
func TestRetentionBetweenInstances(t *testing.T) {
	g := newRig(t)
	g.age()
	dying := g.start(g.store, true)
	hit := killAt(t, "after-claim-target", dying)
	out := filepath.Join(t.TempDir(), "drill")
	g.test(request(out, ordinal(3)))
	wait(t, hit)
	dying.stop()
	failpoint.Disarm()
	require.NoError(t, g.retire())
	require.Len(t, g.pins(), 1)

	g.start(g.store, true)
	g.await(ready)
	g.requirePoint(out, 3)
	require.Empty(t, g.pins())
}

// A failover for real holds its point from before the close's protection is known to retention, and lets go of it when it is up.
func TestRetentionDuringFailover(t *testing.T) {
	g, _ := bootRig(t)
	g.age()
	g.follow()
	var held []replica.Pin
	t.Cleanup(failpoint.ArmFunc("failover-orchestrator/before-materialise-disks", func() error {
		held = g.pins()
		return g.retire()
	}))
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "real")
	g.failOver(takeOver(out, ordinal(3)))
	f := g.awaitPhase(phaseUp)
	require.EqualValues(t, 3, f.Point)
	owners := map[string]bool{}
	for _, p := range held {
		owners[p.Owner] = true
	}
	require.Contains(t, owners, "failover/"+filepath.Base(f.Name))
	require.Empty(t, g.pins())
}

// A test that is given up holds nothing.
func TestFailedTestFailoverLetsGo(t *testing.T) {
	g := newRig(t)
	t.Cleanup(failpoint.ArmFunc("failover-orchestrator/before-materialise-disks", func() error { return errKilled }))
	g.start(g.store, true)
	g.test(request(filepath.Join(t.TempDir(), "drill"), ordinal(3)))
	g.await(failed)
	require.Empty(t, g.pins())
}

// The pin is lengthened while a copy takes long.
func TestHoldIsRenewed(t *testing.T) {
	g := newRig(t)
	var first, later time.Time
	t.Cleanup(failpoint.ArmFunc("failover-orchestrator/before-materialise-disks", func() error {
		first = g.pins()[0].Until
		g.store.Advance(time.Hour)
		testkit.Eventually(t, 10*time.Second, func() bool {
			later = g.pins()[0].Until
			return later.Sub(first) >= time.Hour
		})
		return nil
	}))
	s := g.newService(g.store)
	s.RenewHolds(10 * time.Millisecond)
	g.run(s, g.api(s))
	g.test(request(filepath.Join(t.TempDir(), "drill"), ordinal(3)))
	g.await(ready)
	require.Empty(t, g.pins())
}

// A point that is opened again is read from what its new pin keeps, not from what an earlier session had open.
func TestReopenedPointAfterRetention(t *testing.T) {
	g := newPointRig(t)
	read := func(session string) {
		t.Helper()
		have, err := g.read(session, "os", 0, 1<<20)
		require.NoError(t, err)
		require.True(t, bytes.Equal(g.points[4]["os"][:1<<20], have))
	}
	first, _ := g.openPoint("4")
	read(first)
	g.checkpoint()
	g.age() // nobody closed the session, and its pin ends
	g.past.Add(int64(2 * time.Hour))
	second, _ := g.openPoint("4")
	require.NoError(t, g.retire())
	require.False(t, g.has(2))
	read(second)
}
