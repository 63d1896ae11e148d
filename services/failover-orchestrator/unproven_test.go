package failoverorchestrator_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// requireKept checks the copy of a failover whose machine has not shown that it is up: it runs, is whole, and the failed
// job says where to look.
func (g *rig) requireKept(f *failoverv1.Failover, m *machines, point uint64) {
	g.t.Helper()
	require.Equal(g.t, "TARGET_DID_NOT_BOOT", f.Error.GetReason())
	require.True(g.t, m.runs(f.OutDir), "the machine is left as it is")
	g.requirePoint(f.OutDir, point)
	require.Equal(g.t, []string{"os.vhd", "data.vhd", "vm.json"}, f.Files)
	require.Equal(g.t, "screen.png", f.Boot.GetScreenshotFile())
	require.Nil(g.t, f.ReadyTime)
	j := g.job(f.Job)
	require.Equal(g.t, typesv1.JobState_JOB_STATE_FAILED, j.State)
	for _, what := range []string{"nothing but a cursor", f.OutDir, "console.log", "screen.png"} {
		require.Contains(g.t, j.Error.GetWhat(), what)
	}
	boot := j.GetFailover().GetBoot()
	if boot == nil {
		boot = j.GetTestFailover().GetBoot()
	}
	require.Equal(g.t, "loading", boot.GetConsoleTail())
	require.Contains(g.t, g.steps(f.Job), "boot-machine FAILED")
}

// A recovered machine that has not shown in time that it is up is not removed: a person looks at it, and commits or
// cancels. The replica is set back all the same, and a kill on the way changes nothing.
func TestSlowMachineIsKept(t *testing.T) {
	kills := []string{"before-boot-machine", "before-rewind-replica", "after-rewind-replica", "after-drain-journal", "before-rest"}
	for _, at := range append(sample(t, kills, 2), "") {
		g, m := bootRig(t)
		g.follow()
		m.setSilent(true)
		i := g.start(g.store, true)
		out := filepath.Join(t.TempDir(), "up")
		if at != "" {
			hit := killAt(t, at, i)
			g.failOver(takeOver(out, ordinal(3)))
			wait(t, hit)
			i.stop()
			failpoint.Disarm()
			g.start(g.store, true)
		} else {
			g.failOver(takeOver(out, ordinal(3)))
		}
		f := g.awaitPhase(phaseUp)
		g.requireKept(f, m, 3)
		state := g.chain()
		require.True(t, state.Closed())
		require.EqualValues(t, 3, state.StateOrdinal, "the chain's state is the machine's")
		testkit.Eventually(t, 10*time.Second, func() bool { return g.vm().State == typesv1.ProtectionState_PROTECTION_STATE_FAILED_OVER })
		g.refusedFailover(takeOver(out+"2", latest()), typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE)
		if at == "" {
			g.commitFailover()
			f = g.awaitPhase(phaseCommitted)
			require.True(t, m.runs(out))
			require.Nil(t, f.Error)
			continue
		}
		g.cancelFailover()
		g.requireBack(g.awaitPhase(phaseCancelled), m, 4)
	}
}

// A machine that shows itself to the orchestrator that looks again after a kill is up.
func TestSlowMachineComesUpAfterAll(t *testing.T) {
	g, m := bootRig(t)
	m.setSilent(true)
	i := g.start(g.store, true)
	hit := killAt(t, "after-drain-journal", i)
	job := g.failOver(takeOver(filepath.Join(t.TempDir(), "up"), ordinal(3)))
	wait(t, hit)
	i.stop()
	failpoint.Disarm()
	m.setSilent(false)
	g.start(g.store, true)
	g.requireUp(g.awaitPhase(phaseUp), m, 3)
	g.requireEnded(job.Name, typesv1.JobState_JOB_STATE_SUCCEEDED)
}

// A drill that did not come up is kept as evidence, also one whose machine ended, until somebody cleans it up.
func TestSlowDrillIsKept(t *testing.T) {
	g, m := bootRig(t)
	g.start(g.store, true)
	for _, ends := range []bool{false, true} {
		m.setSilent(!ends)
		m.setDead(ends)
		r := request(filepath.Join(t.TempDir(), "drill"), ordinal(3))
		r.Target = failoverv1.TargetKind_TARGET_KIND_QEMU
		g.test(r)
		f := g.await(ready)
		require.Equal(t, !ends, m.runs(r.OutDir))
		if !ends {
			g.requireKept(f, m, 3)
		}
		require.DirExists(t, r.OutDir)
		require.Equal(t, "TARGET_DID_NOT_BOOT", f.Error.GetReason())
		g.refused(r, typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
		g.cleanUp()
		f = g.await(clean)
		require.Nil(t, f.Error)
		require.NoDirExists(t, r.OutDir)
		require.False(t, m.runs(r.OutDir))
	}
}

// The machine that holds the copy is gone for good: a cancellation by force opens the lineage all the same, and says what
// is left where; also one that is asked for while another cancellation is under way. Without force nothing is opened.
func TestForceCancel(t *testing.T) {
	g, m := bootRig(t)
	g.machineName = "alpha"
	first := g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "up")
	g.failOver(takeOver(out, ordinal(3)))
	g.awaitPhase(phaseUp)
	first.stop()
	m.lose()
	require.NoError(t, os.RemoveAll(out))

	g.machineName = "beta"
	g.start(g.store, true)
	g.cancelFailover()
	require.Equal(t, "TARGET_UNAVAILABLE", g.awaitPhase(phaseCancelFailed).Error.Reason)
	require.True(t, g.chain().Closed())
	job := g.forceCancel()
	f := g.awaitPhase(phaseCancelled)
	g.requireBack(f, m, 4)
	require.Equal(t, []string{"stop-machine SKIPPED", "remove-copy SKIPPED", "open-lineage SUCCEEDED"}, g.steps(job.Name))
	for _, said := range []string{f.LeftBehind, g.job(job.Name).Steps[1].Detail} {
		require.Contains(t, said, out)
		require.Contains(t, said, "alpha")
	}
	g.failOver(takeOver(out+"2", latest()))
	g.requireUp(g.awaitPhase(phaseUp), m, 4)
}

// A drill whose machine is gone is cleaned up by force, and the next one may begin.
func TestForceCleanUp(t *testing.T) {
	g := newRig(t)
	g.machineName = "alpha"
	first := g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "drill")
	g.test(request(out, latest()))
	g.await(ready)
	first.stop()
	require.NoError(t, os.RemoveAll(out))

	g.machineName = "beta"
	g.start(g.store, true)
	g.cleanUp()
	g.await(cleanupFailed)
	r, err := g.client.CleanUpTestFailover(testkit.Context(t), &failoverv1.CleanUpTestFailoverRequest{Vm: vmName, Force: true})
	require.NoError(t, err)
	f := g.await(clean)
	require.Contains(t, f.LeftBehind, "alpha")
	require.Equal(t, []string{"remove-copy SKIPPED"}, g.steps(r.Job.Name))
	require.Contains(t, g.job(r.Job.Name).Steps[0].Detail, out)
	g.test(request(out, latest()))
	g.await(ready)
}

// Force never opens a lineage while the machine is seen to run; and where the copy can be removed, it is.
func TestForceRemovesWhatItCan(t *testing.T) {
	g, m := bootRig(t)
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "up")
	g.failOver(takeOver(out, latest()))
	g.awaitPhase(phaseUp)
	m.mu.Lock()
	m.stubborn = true
	m.mu.Unlock()
	g.forceCancel()
	f := g.awaitPhase(phaseCancelFailed)
	require.True(t, f.Force)
	require.True(t, m.runs(out))
	require.True(t, g.chain().Closed())
	m.mu.Lock()
	m.stubborn = false
	m.mu.Unlock()
	job := g.forceCancel()
	f = g.awaitPhase(phaseCancelled)
	g.requireBack(f, m, 4)
	require.Empty(t, f.LeftBehind)
	require.Equal(t, []string{"stop-machine SUCCEEDED", "remove-copy SUCCEEDED", "open-lineage SUCCEEDED"}, g.steps(job.Name))
}
