package failoverorchestrator_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// requireEnded checks the job of a failover that kills interrupted: no step is left open.
func (g *rig) requireEnded(name string, want typesv1.JobState) {
	g.t.Helper()
	testkit.Eventually(g.t, 10*time.Second, func() bool { return g.job(name).EndTime != nil })
	j := g.job(name)
	require.Equal(g.t, want, j.State, "%v", j.Error)
	for _, s := range j.Steps {
		require.NotEqual(g.t, typesv1.JobState_JOB_STATE_IN_PROGRESS, s.State, s.Id)
	}
}

// A process may die before and after every step of a failover, and around the close and the open: the next one finishes
// with the same result. Cancellation likewise. LANDFALL_CRASH_RUNS=1 tries every point with every kind.
func TestFailoverKillAtEveryStep(t *testing.T) {
	up := []string{
		"before-check-target", "after-check-target", "before-close-lineage", "before-close", "after-close", "after-close-lineage",
		"before-choose-point", "after-choose-point", "before-claim-target", "after-claim-target", "before-materialise-disks",
		"after-materialise-disks", "before-describe-machine", "after-describe-machine", "before-boot-machine", "after-boot-machine",
		"before-rewind-replica", "after-rewind-replica", "before-drain-journal", "after-drain-journal", "before-rest",
	}
	down := []string{
		"before-stop-machine", "after-stop-machine", "before-remove-copy", "after-remove-copy", "before-open-lineage", "before-open",
		"after-open", "after-open-lineage", "before-rest",
	}
	for name, point := range map[string]*failoverv1.PointSelector{"planned": nil, "newest": latest(), "older": ordinal(3), "processed": latestProcessed()} {
		stride := map[string]int64{"planned": 6, "newest": 11, "older": 5, "processed": 13}[name]
		t.Run(name, func(t *testing.T) {
			g, m := bootRig(t)
			src := g.follow()
			points := up
			if point == nil {
				points = append([]string{"before-stop-source", "after-stop-source"}, up...)
			}
			first, stride := firstOf(t, stride)
			for i := first - 1; i < int64(len(points)); i += stride {
				at := points[i]
				newest := uint64(g.chain().StateOrdinal)
				dying := g.start(g.store, true)
				hit := killAt(t, at, dying)
				out := filepath.Join(t.TempDir(), "up")
				job := g.failOver(takeOver(out, point))
				wait(t, hit)
				dying.stop()
				require.Equal(t, phaseStarting, g.failover().Phase, at)
				failpoint.Disarm()

				next := g.start(g.store, true)
				f := g.awaitPhase(phaseUp)
				want := map[string]uint64{"planned": newest + 1, "newest": newest, "older": 3, "processed": 2}[name]
				g.requireUp(f, m, want)
				g.requireEnded(job.Name, typesv1.JobState_JOB_STATE_SUCCEEDED)
				require.Equal(t, point != nil, src.isRunning())
				next.stop()

				dying = g.start(g.store, true)
				hit = killAt(t, down[i%int64(len(down))], dying)
				cancel := g.cancelFailover()
				wait(t, hit)
				dying.stop()
				failpoint.Disarm()
				next = g.start(g.store, true)
				f = g.awaitPhase(phaseCancelled)
				g.requireBack(f, m, max(newest, want))
				g.requireEnded(cancel.Name, typesv1.JobState_JOB_STATE_SUCCEEDED)
				next.stop()
				testkit.Eventually(t, 10*time.Second, func() bool { return g.vm().State == typesv1.ProtectionState_PROTECTION_STATE_PROTECTED })
			}
		})
	}
}

// A commit may die at every point.
func TestKillCommit(t *testing.T) {
	for _, at := range []string{"before-confirm-close", "after-confirm-close", "before-rest"} {
		g, m := bootRig(t)
		i := g.start(g.store, true)
		g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), ordinal(3)))
		g.awaitPhase(phaseUp)
		hit := killAt(t, at, i)
		commit := g.commitFailover()
		wait(t, hit)
		i.stop()
		failpoint.Disarm()
		g.start(g.store, true)
		f := g.awaitPhase(phaseCommitted)
		g.requireEnded(commit.Name, typesv1.JobState_JOB_STATE_SUCCEEDED)
		require.True(t, m.runs(f.OutDir))
		require.True(t, g.chain().Closed())
	}
}

// A process that dies while it gives a failed failover up leaves it to the next, which ends the same way.
func TestKillWhileGivingUp(t *testing.T) {
	for _, at := range []string{"after-give-up", "after-undo", "before-rest"} {
		g, m := bootRig(t)
		m.setDead(true)
		i := g.start(g.store, true)
		hit := killAt(t, at, i)
		out := filepath.Join(t.TempDir(), "up")
		job := g.failOver(takeOver(out, latest()))
		wait(t, hit)
		i.stop()
		failpoint.Disarm()
		m.setDead(false) // it would come up now: given up is given up
		g.start(g.store, true)
		f := g.awaitPhase(phaseFailed)
		require.Equal(t, "TARGET_DID_NOT_BOOT", f.Error.Reason)
		require.NoDirExists(t, out)
		require.False(t, m.runs(out))
		g.requireEnded(job.Name, typesv1.JobState_JOB_STATE_FAILED)
		g.cancelFailover()
		g.requireBack(g.awaitPhase(phaseCancelled), m, 4)
	}
}

// A process may die at every call to storage of a failover that rewinds, and of its cancellation, before or after its
// effect (in turns). LANDFALL_CRASH_RUNS=1 tries every call.
func TestFailoverKillAtEveryStoreCall(t *testing.T) {
	for _, cancels := range []bool{false, true} {
		g, m := bootRig(t)
		first, stride := firstOf(t, 23)
		for n := first; ; n += stride {
			fault := blobstoretest.Crash
			if n%2 == 0 {
				fault = blobstoretest.CrashAfter
			}
			out := filepath.Join(t.TempDir(), "up")
			resting := phaseUp
			if cancels {
				i := g.start(g.store, true)
				g.failOver(takeOver(out, ordinal(3)))
				g.awaitPhase(phaseUp)
				i.stop()
				resting = phaseCancelled
			}
			api := g.api(g.newService(g.store)) // answers, and does not work
			var job *typesv1.Job
			if cancels {
				job = g.cancelFailover()
			} else {
				job = g.failOver(takeOver(out, ordinal(3)))
			}
			api()
			store := blobstoretest.NewFaulty(g.store, nil)
			var calls atomic.Int64
			var dying *instance
			started, hit := make(chan struct{}), make(chan struct{})
			store.SetHook(func(blobstoretest.Op, string, string) blobstoretest.Fault {
				<-started
				if calls.Add(1) != n {
					return blobstoretest.None
				}
				dying.kill()
				close(hit)
				return fault
			})
			dying = g.start(store, false)
			close(started)
			survived := false
			testkit.Eventually(t, 20*time.Second, func() bool {
				select {
				case <-hit:
					return true
				default:
				}
				survived = g.failover().Phase == resting
				return survived
			})
			dying.stop()
			next := g.start(g.store, true)
			if !cancels {
				g.requireUp(g.awaitPhase(phaseUp), m, 3)
				g.requireEnded(job.Name, typesv1.JobState_JOB_STATE_SUCCEEDED)
				g.cancelFailover()
			}
			g.requireBack(g.awaitPhase(phaseCancelled), m, 4)
			next.stop()
			if survived {
				require.Greater(t, n, int64(10), "calls to storage")
				break
			}
		}
	}
}

// An orchestrator that stood still just before its rewind while its failover was started again at another point sets the
// replica back wrongly; the machine is not touched by it, and commit and cancel put the replica right.
func TestLateRewind(t *testing.T) {
	for _, commit := range []bool{true, false} {
		g, m := bootRig(t)
		stale := g.newService(g.store)
		stop := g.api(stale)
		frozen := func(at string) (here, hold chan struct{}) {
			here, hold = make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			t.Cleanup(failpoint.ArmFunc("failover-orchestrator/"+at, func() error {
				if once.CompareAndSwap(false, true) {
					close(here)
					<-hold
				}
				return nil
			}))
			return here, hold
		}
		copies, letCopy := frozen("before-claim-target")
		rewinds, letRewind := frozen("before-rewind")
		m.setDead(true)
		g.failOver(takeOver(filepath.Join(t.TempDir(), "first"), ordinal(3)))
		name := g.failover().Name
		done := make(chan struct{})
		go func() { defer close(done); stale.Work(testkit.Context(t), name) }()
		wait(t, copies)
		wait(t, rewinds)
		stop()
		i := g.start(g.store, true)
		g.awaitPhase(phaseFailed)
		i.stop()

		// As if the first attempt had never come to its rewind, and the second one needs none.
		m.setDead(false)
		g.start(g.store, true)
		out := filepath.Join(t.TempDir(), "second")
		g.failOver(takeOver(out, latest()))
		f := g.awaitPhase(phaseUp)
		require.Equal(t, name, f.Name)
		g.requireUp(f, m, 4)
		head := g.chain().Head
		close(letRewind)
		testkit.Eventually(t, 10*time.Second, func() bool { return g.chain().Head > head })
		close(letCopy)
		<-done
		require.EqualValues(t, 3, g.chain().StateOrdinal, "the late rewind")
		g.requirePoint(out, 4)
		require.True(t, m.runs(out))
		if commit {
			job := g.commitFailover()
			f = g.awaitPhase(phaseCommitted)
			g.requireUp(f, m, 4)
			require.Contains(t, g.job(job.Name).Steps[0].Detail, "point 4 again")
		} else {
			g.cancelFailover()
			g.requireBack(g.awaitPhase(phaseCancelled), m, 4)
		}
	}
}

// An orchestrator that does not know that it is not the one any more, wherever it stands, neither closes nor sets back a
// lineage that another one has given back to its source, nor brings the record back (rule 16).
func TestStaleOrchestrator(t *testing.T) {
	for _, at := range sample(t, []string{
		"before-check-target", "before-close-lineage", "before-close", "after-close", "before-choose-point", "before-claim-target", "before-materialise-disks",
		"before-boot-machine", "before-rewind-replica", "after-rewind-replica", "before-rest",
	}, 5) {
		t.Run(at, func(t *testing.T) {
			g, m := bootRig(t)
			stale := g.newService(g.store)
			stop := g.api(stale)
			here, hold := make(chan struct{}), make(chan struct{})
			disarm := failpoint.ArmFunc("failover-orchestrator/"+at, func() error {
				select {
				case <-here:
				default:
					close(here)
					<-hold
				}
				return nil
			})
			defer disarm()
			g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), ordinal(3)))
			name := g.failover().Name
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan struct{})
			go func() { defer close(done); stale.Work(ctx, name) }()
			wait(t, here)
			stop()
			g.start(g.store, true)
			g.cancelFailover()
			f := g.awaitPhase(phaseCancelled)
			before := g.chain()
			close(hold)
			<-done
			g.requireBack(f, nil, 4)
			after := g.chain()
			require.Equal(t, before.Head, after.Head, "it changed the chain")
			require.Equal(t, phaseCancelled, g.failover().Phase)
			require.False(t, m.runs(f.OutDir))
			// The next failover is not disturbed either.
			g.failOver(takeOver(filepath.Join(t.TempDir(), "next"), latest()))
			g.requireUp(g.awaitPhase(phaseUp), m, 4)
		})
	}
}

// Two orchestrators that work on one failover at once do nothing twice that counts.
func TestTwinOrchestrators(t *testing.T) {
	g, m := bootRig(t)
	services := []interface {
		Work(context.Context, string)
	}{g.newService(g.store), g.newService(g.store)}
	stop := g.api(g.newService(g.store))
	defer stop()
	for run := range 6 {
		point, want := latest(), uint64(4)
		if run%2 == 1 {
			point, want = ordinal(3), 3
		}
		g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), point))
		name := g.failover().Name
		both := func() (f *failoverv1.Failover) {
			testkit.Eventually(t, 20*time.Second, func() error {
				done := make(chan struct{}, len(services))
				for _, s := range services {
					go func() { s.Work(testkit.Context(t), name); done <- struct{}{} }()
				}
				for range services {
					<-done
				}
				if f = g.failover(); f.Phase == phaseStarting || f.Phase == phaseCancelling {
					return fmt.Errorf("%s: %v", f.Phase, f.Error)
				}
				return nil
			})
			return f
		}
		// They may get in each other's way in the folder; then one of them gives up, and it is as if it had failed.
		switch f := both(); f.Phase {
		case phaseUp:
			g.requireUp(f, m, want)
		default:
			require.Equal(t, phaseFailed, f.Phase)
			require.True(t, g.chain().Closed())
		}
		for tries := 0; g.failover().Phase != phaseCancelled; tries++ {
			require.Less(t, tries, 5)
			g.cancelFailover()
			both()
		}
		f := g.failover()
		require.False(t, m.runs(f.OutDir))
		state := g.chain()
		require.False(t, state.Closed())
		require.EqualValues(t, 4, state.StateOrdinal)
	}
	closes := 0
	r, err := replica.Open(testkit.Context(t), g.store, lineage)
	require.NoError(t, err)
	_, err = r.Refresh(testkit.Context(t))
	require.NoError(t, err)
	for seq := replica.Seq(1); seq <= g.chain().Head; seq++ {
		mf, err := r.Manifest(testkit.Context(t), seq)
		require.NoError(t, err)
		if mf.Kind == replica.KindClose {
			closes++
		}
	}
	require.Equal(t, 6, closes, "one for each failover")
}
