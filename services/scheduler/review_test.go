package scheduler_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
)

// A host whose volume was put back from a backup holds an older base and disks that never had what the chain has. Its
// deltas must not be laid over the chain: the VM needs a resynchronisation.
func TestHostThatWentBackInTimeIsResynchronised(t *testing.T) {
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		t.Run(map[bool]string{false: "while the scheduler runs", true: "while it does not"}[restarted], func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.host.Write(block("os", 1), block("data", 2))
			stop := l.start(quick())
			l.protect()
			l.awaitState(scheduler.Protected)
			l.awaitPoints(1)
			_, err := l.protection.PauseReplication(testkit.Context(t), &schedulerv1.PauseReplicationRequest{Vm: "web01"})
			require.NoError(t, err)
			l.await("paused", func(vm *schedulerv1.ProtectedVm) bool {
				return vm.GetState() == scheduler.Paused && vm.GetCycle() == nil
			})
			restore := l.host.Backup()
			_, err = l.protection.ResumeReplication(testkit.Context(t), &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
			require.NoError(t, err)
			l.host.Write(block("os", 1), block("data", 2))
			l.awaitPoints(3)
			if restarted {
				stop()
			}
			restore()
			l.host.Write(block("os", 5))
			if restarted {
				l.start(quick())
			}
			vm := l.awaitState(scheduler.ResyncRequired)
			require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST, vm.GetResyncReason())
			_, err = l.protection.Resynchronize(testkit.Context(t), &schedulerv1.ResynchronizeRequest{Vm: "web01"})
			require.NoError(t, err)
			l.awaitState(scheduler.Protected)
			vm = l.awaitPoints(1)
			l.stop()
			l.Check(l.host, vm.GetLineage())
		})
	}
}

// Protection that was ended by force left the host tracking for it. The job says that the host cleans up when the VM is
// protected again, so that must work.
func TestProtectAgainAfterForcedDisable(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	l.protect()
	was := l.awaitState(scheduler.Protected)
	l.host.Fail(func(string) error { return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer") })
	_, err := l.protection.DisableProtection(testkit.Context(t), &schedulerv1.DisableProtectionRequest{Vm: was.GetName(), Force: true})
	require.NoError(t, err)
	testkit.Eventually(t, patien, func() bool { return l.vm() == nil })
	l.host.Fail(nil)
	require.Equal(t, was.GetLineage(), l.host.Status().GetLineage())
	_, err = l.protection.EnableProtection(testkit.Context(t), &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast", RequestId: "r2"})
	require.NoError(t, err)
	next := l.awaitState(scheduler.Protected)
	require.NotEqual(t, was.GetLineage(), next.GetLineage())
	l.stop()
	l.Check(l.host, next.GetLineage())
}
