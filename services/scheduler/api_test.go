package scheduler_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
	"github.com/landfall-dr/landfall/services/scheduler/schedulertest"
)

// refused checks the reason of an error, and that its text and its catalogue's advice are there.
func refused(t *testing.T, err error, reason typesv1.ErrorReason, words ...string) *errcat.Error {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, errcat.Code(reason), errcat.Code(errcat.Reason(err)), err.Error())
	for _, w := range words {
		require.Contains(t, err.Error(), w)
	}
	var e *errcat.Error
	require.ErrorAs(t, err, &e)
	require.Contains(t, errcat.Explain(err), "what to do")
	return e
}

func TestBadInputIsRefusedClearly(t *testing.T) {
	t.Parallel()
	twin := schedulertest.NewHost(schedulertest.Site, "host2", "6f1c2d3e-0000-4000-8000-00000000000b", "db01")
	l := newLab(t, schedulertest.NewHost(schedulertest.Site, "host1", guid, "web01"), twin)
	l.start(quick())
	ctx := testkit.Context(t)
	enable := func(vm, policy, request string) error {
		_, err := l.protection.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: vm, Policy: policy, RequestId: request})
		return err
	}
	refused(t, enable("sites/lab/vms/nobody", "policies/fast", ""), typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "nobody")
	refused(t, enable("web01", "policies/none", ""), typesv1.ErrorReason_ERROR_REASON_POLICY_NOT_FOUND, "policies/none")
	refused(t, enable("a/b", "policies/fast", ""), typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)

	l.host.SetFindings(
		&hostproviderv1.Finding{Check: "disk-image", Severity: hostproviderv1.Severity_SEVERITY_ERROR, Reason: typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, What: "os.raw does not exist", Action: "Put it back."},
		&hostproviderv1.Finding{Check: "disk-unique", Severity: hostproviderv1.Severity_SEVERITY_ERROR, Reason: typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE, What: "data.raw is named twice"},
		&hostproviderv1.Finding{Check: "space", Severity: hostproviderv1.Severity_SEVERITY_WARNING, What: "little space"},
	)
	e := refused(t, enable("web01", "policies/fast", ""), typesv1.ErrorReason_ERROR_REASON_PREREQUISITES_NOT_MET, "os.raw does not exist", "data.raw is named twice")
	require.Len(t, e.Fields, 2, "all findings at once")
	require.Equal(t, "DISK_IMAGE_MISSING", e.Fields[0].Rule)
	require.Equal(t, "2", e.Meta["findings"])
	require.Nil(t, l.vm(), "nothing is left behind")
	jobs, err := l.jobs.ListJobs(ctx, &schedulerv1.ListJobsRequest{})
	require.NoError(t, err)
	require.Empty(t, jobs.GetJobs())

	l.host.SetFindings(&hostproviderv1.Finding{Check: "space", Severity: hostproviderv1.Severity_SEVERITY_WARNING, What: "little space"})
	dry, err := l.protection.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast", ValidateOnly: true})
	require.NoError(t, err)
	require.Nil(t, dry.GetJob())
	require.Len(t, dry.GetFindings(), 1)
	require.Nil(t, l.vm())

	_, err = l.protection.GetProtectedVm(ctx, &schedulerv1.GetProtectedVmRequest{Vm: "web01"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED)
	_, err = l.protection.PauseReplication(ctx, &schedulerv1.PauseReplicationRequest{Vm: "nobody"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND)
	_, err = l.jobs.GetJob(ctx, &schedulerv1.GetJobRequest{Name: "jobs/none"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_JOB_NOT_FOUND)
	_, err = l.jobs.ListJobs(ctx, &schedulerv1.ListJobsRequest{PageToken: "!"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)

	job := l.protect()
	again := l.protect()
	require.Equal(t, job.GetName(), again.GetName(), "the same request finds the same job")
	refused(t, enable("web01", "policies/fast", "other"), typesv1.ErrorReason_ERROR_REASON_ALREADY_PROTECTED, "host1")
	l.awaitState(scheduler.Protected)

	_, err = l.policies.DeletePolicy(ctx, &schedulerv1.DeletePolicyRequest{Name: "policies/fast"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_POLICY_IN_USE)
	_, err = l.protection.ResumeReplication(ctx, &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err, "resuming what runs changes nothing")

	vms, err := l.protection.ListVms(ctx, &schedulerv1.ListVmsRequest{})
	require.NoError(t, err)
	require.Len(t, vms.GetVms(), 2)
	require.Equal(t, scheduler.Unprotected, vms.GetVms()[0].GetState())
	require.Equal(t, scheduler.Protected, vms.GetVms()[1].GetState())
	twin.Fail(func(string) error {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "no answer")
	})
	vms, err = l.protection.ListVms(ctx, &schedulerv1.ListVmsRequest{})
	require.NoError(t, err)
	require.Equal(t, []string{"sites/lab/hosts/host2"}, vms.GetUnreachableHosts())
	hosts, err := l.protection.ListHosts(ctx, &schedulerv1.ListHostsRequest{})
	require.NoError(t, err)
	require.Len(t, hosts.GetHosts(), 2)
}

// A second host that claims a protected VM id is refused.
func TestSecondHostIsRefused(t *testing.T) {
	t.Parallel()
	first := schedulertest.NewHost(schedulertest.Site, "host1", guid, "web01")
	clone := schedulertest.NewHost(schedulertest.Site, "host2", guid, "web01-copy")
	l := newLab(t, first, clone)
	l.start(quick())
	ctx := testkit.Context(t)
	_, err := l.protection.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: "sites/lab/vms/" + guid, Policy: "policies/fast"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "host1", "host2")
	l.protect()
	_, err = l.protection.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: "sites/lab/vms/web01-copy", Policy: "policies/fast"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_ALREADY_PROTECTED, "host1")
	require.Empty(t, clone.Status().GetLineage())
}

func TestPolicies(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	ctx := testkit.Context(t)
	apply := func(p *schedulerv1.Policy) (*schedulerv1.Policy, error) {
		resp, err := l.policies.ApplyPolicy(ctx, &schedulerv1.ApplyPolicyRequest{Policy: p})
		return resp.GetPolicy(), err
	}
	for name, p := range map[string]*schedulerv1.Policy{
		"no interval":  {Name: "policies/x"},
		"too short":    {Name: "policies/x", CopyInterval: durationpb.New(time.Millisecond)},
		"too long":     {Name: "policies/x", CopyInterval: durationpb.New(time.Hour)},
		"bad name":     {Name: "policies/X!", CopyInterval: durationpb.New(time.Minute)},
		"start is far": {Name: "policies/x", CopyInterval: durationpb.New(time.Minute), InitialReplicationStartTime: timestamppb.New(time.Now().Add(8 * 24 * time.Hour))},
		"always alert": {Name: "policies/x", CopyInterval: durationpb.New(time.Minute), RpoAlertThreshold: durationpb.New(time.Second)},
	} {
		_, err := apply(p)
		require.Error(t, err, name)
		reason := errcat.Reason(err)
		require.True(t, reason == typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT || reason == typesv1.ErrorReason_ERROR_REASON_POLICY_INVALID, "%s: %v", name, err)
		require.NotContains(t, strings.ToLower(err.Error()), "internal")
	}
	first, err := apply(&schedulerv1.Policy{Name: "policies/gold", CopyInterval: durationpb.New(30 * time.Second)})
	require.NoError(t, err)
	second, err := apply(&schedulerv1.Policy{Name: "policies/gold", CopyInterval: durationpb.New(time.Minute), Revision: first.GetRevision()})
	require.NoError(t, err)
	require.Greater(t, second.GetRevision(), first.GetRevision())
	_, err = apply(&schedulerv1.Policy{Name: "policies/gold", CopyInterval: durationpb.New(time.Minute), Revision: first.GetRevision()})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION)
	list, err := l.policies.ListPolicies(ctx, &schedulerv1.ListPoliciesRequest{PageSize: 1})
	require.NoError(t, err)
	require.Equal(t, "policies/fast", list.GetPolicies()[0].GetName())
	list, err = l.policies.ListPolicies(ctx, &schedulerv1.ListPoliciesRequest{PageToken: list.GetNextPageToken()})
	require.NoError(t, err)
	require.Len(t, list.GetPolicies(), 1)
	require.Equal(t, "policies/gold", list.GetPolicies()[0].GetName())
	for range 2 {
		_, err = l.policies.DeletePolicy(ctx, &schedulerv1.DeletePolicyRequest{Name: "policies/gold"})
		require.NoError(t, err)
	}
}

// Initial replication waits for the policy's start time, or for somebody to start it.
func TestStartTime(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	ctx := testkit.Context(t)
	_, err := l.policies.ApplyPolicy(ctx, &schedulerv1.ApplyPolicyRequest{Policy: &schedulerv1.Policy{
		Name: "policies/night", CopyInterval: durationpb.New(time.Second), InitialReplicationStartTime: timestamppb.New(time.Now().Add(time.Hour)),
	}})
	require.NoError(t, err)
	_, err = l.protection.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/night"})
	require.NoError(t, err)
	l.awaitState(scheduler.ReadyForInitialReplication)
	_, err = l.protection.Resynchronize(ctx, &schedulerv1.ResynchronizeRequest{Vm: "web01"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "ReadyForInitialReplication")
	_, err = l.protection.ResumeReplication(ctx, &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	l.awaitState(scheduler.Protected)
}

// Pause stops cycles, the tracker goes on, resume catches up with what was written meanwhile.
func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Write(block("os", 1))
	l.start(quick())
	ctx := testkit.Context(t)
	l.protect()
	l.awaitState(scheduler.Protected)
	for range 2 {
		resp, err := l.protection.PauseReplication(ctx, &schedulerv1.PauseReplicationRequest{Vm: "web01"})
		require.NoError(t, err)
		require.Equal(t, scheduler.Paused, resp.GetVm().GetState())
	}
	vm := l.await("the cycle in hand ends", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCycle() == nil })
	l.await("warning", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetHealth() == typesv1.Health_HEALTH_WARNING })
	l.host.Write(block("data", 2))
	cuts := l.host.Calls("CutPoint")
	require.Equal(t, vm.GetLastPoint(), l.vm().GetLastPoint())
	_, err := l.protection.ResumeReplication(ctx, &schedulerv1.ResumeReplicationRequest{Vm: "web01"})
	require.NoError(t, err)
	l.awaitPoints(2)
	require.Greater(t, l.host.Calls("CutPoint"), cuts)
	l.stop()
	l.Check(l.host, vm.GetLineage())
}

// An enable that cannot succeed ends in EnablingFailed with nothing left on the host; it can be tried again.
func TestEnablingFails(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.host.Fail(func(method string) error {
		if method == "CreateReplicationRelationship" {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "data is a differencing disk")
		}
		return nil
	})
	l.start(quick())
	job := l.protect()
	vm := l.awaitState(scheduler.EnablingFailed)
	require.Equal(t, "DISK_FORMAT_UNSUPPORTED", vm.GetRetry().GetError().GetReason())
	require.Empty(t, l.host.Status().GetLineage())
	testkit.Eventually(t, patien, func() bool {
		got, err := l.jobs.GetJob(testkit.Context(t), &schedulerv1.GetJobRequest{Name: job.GetName()})
		require.NoError(t, err)
		return got.GetJob().GetState() == typesv1.JobState_JOB_STATE_FAILED && got.GetJob().GetSteps()[1].GetError() != nil
	})
	l.host.Fail(nil)
	_, err := l.protection.EnableProtection(testkit.Context(t), &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast", RequestId: "second"})
	require.NoError(t, err)
	l.awaitState(scheduler.Protected)
}

// Watches show the record, the job and the events as they change.
func TestWatches(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	ctx, cancel := context.WithCancel(testkit.Context(t))
	defer cancel()
	vms, err := l.protection.WatchProtectedVms(ctx, &schedulerv1.WatchProtectedVmsRequest{})
	require.NoError(t, err)
	job := l.protect()
	watch, err := l.jobs.WatchJob(ctx, &schedulerv1.WatchJobRequest{Name: job.GetName()})
	require.NoError(t, err)
	var last *typesv1.Job
	for {
		resp, err := watch.Recv()
		if err != nil {
			break
		}
		require.GreaterOrEqual(t, resp.GetJob().GetRevision(), last.GetRevision())
		last = resp.GetJob()
	}
	require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, last.GetState(), "the stream ends with the job")
	for {
		resp, err := vms.Recv()
		require.NoError(t, err)
		if resp.GetVm().GetState() == scheduler.Protected {
			break
		}
	}
	l.awaitPoints(1)
	stored, err := l.events.WatchEvents(ctx, &schedulerv1.WatchEventsRequest{Vm: "sites/lab/vms/" + guid})
	require.NoError(t, err)
	seen, sequence := map[string]bool{}, uint64(0)
	for {
		e, err := stored.Recv()
		if err != nil {
			break
		}
		require.Greater(t, e.GetSequence(), sequence)
		sequence, seen[e.GetType()] = e.GetSequence(), true
	}
	for _, typ := range []string{"protection-state.changed", "job.changed", "health.changed", "recovery-point.received"} {
		require.True(t, seen[typ], "%s is among the events %v", typ, seen)
	}
	follow, err := l.events.WatchEvents(ctx, &schedulerv1.WatchEventsRequest{FromSequence: sequence + 1, Follow: true})
	require.NoError(t, err)
	e, err := follow.Recv()
	require.NoError(t, err)
	require.Greater(t, e.GetSequence(), sequence)
}

// People need a role.
func TestRoles(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	conn, err := l.Dialer(pki.UserIdentity("eve", pki.RoleViewer)).Conn("mem:scheduler")
	require.NoError(t, err)
	viewer := schedulerv1.NewProtectionServiceClient(conn)
	_, err = viewer.ListHosts(testkit.Context(t), &schedulerv1.ListHostsRequest{})
	require.NoError(t, err)
	_, err = viewer.EnableProtection(testkit.Context(t), &schedulerv1.EnableProtectionRequest{Vm: "web01", Policy: "policies/fast"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED)
}

// One trace per cycle: the cut, the publishing and the settle are its children, on both sides of the wire.
func TestOneTracePerCycle(t *testing.T) {
	t.Parallel()
	spans := testkit.NewSpans(t)
	l := tracedLab(t, spans.Provider())
	l.host.Write(block("os", 1))
	l.start(quick())
	l.protect()
	l.awaitState(scheduler.Protected)
	l.awaitPoints(1)
	l.stop()
	roots := spans.Find("replication cycle")
	require.NotEmpty(t, roots)
	tree := ""
	testkit.Eventually(t, patien, func() bool { // servers and workers end their spans a moment later
		tree = spans.Trace(roots[0].SpanContext().TraceID())
		for _, name := range []string{
			"replication cycle\n", "\n  cut\n", "\n  publish tasks\n", "\n  settle\n", "landfall.hostprovider.v1.HostService/CutPoint",
			"landfall.hostprovider.v1.HostService/SettlePoint", "task ship", "event recovery-point.received", "task apply",
		} {
			if !strings.Contains(tree, name) {
				return false
			}
		}
		return true
	})
	require.True(t, strings.HasPrefix(tree, "replication cycle\n"), tree)
	require.NotEmpty(t, spans.Find("replication pass"))
	t.Log("\n" + tree)
}
