package failoverorchestrator_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var update = flag.Bool("update", false, "rewrite golden files")

// Every selector brings up its point byte for byte, and clean-up leaves no trace.
func TestPoints(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	for _, c := range []struct {
		name  string
		point *failoverv1.PointSelector
		want  uint64
	}{
		{"latest", latest(), 4},
		{"an older one", ordinal(3), 3},
		{"latest processed", &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestProcessed{LatestProcessed: true}}, 2},
	} {
		out := filepath.Join(t.TempDir(), "drill")
		job := g.test(request(out, c.point))
		require.Equal(t, typesv1.JobKind_JOB_KIND_TEST_FAILOVER, job.Kind)
		f := g.await(ready)
		require.Equal(t, c.want, f.Point, c.name)
		require.Equal(t, []string{"os.vhd", "data.vhd", "vm.json"}, f.Files)
		require.EqualValues(t, 2, f.Machine.Cpus, "the machine is that of the point, not today's")
		require.NotNil(t, f.ReadyTime)
		require.Nil(t, f.Error)
		g.requirePoint(out, c.want)

		job = g.job(job.Name)
		require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, job.State)
		require.Equal(t, f.Files, job.GetTestFailover().Files)
		require.EqualValues(t, 7*mib+512, job.Progress.TotalBytes)
		require.Equal(t, job.Progress.TotalBytes, job.Progress.DoneBytes, "what succeeded is done wholly")
		require.Less(t, job.Progress.SentBytes, job.Progress.TotalBytes, "absent space is not written")
		for _, s := range job.Steps {
			require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, s.State, s.Id)
			require.NotNil(t, s.EndTime)
			require.NotEmpty(t, s.Detail)
		}

		cleanup := g.cleanUp()
		g.await(clean)
		require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, g.job(cleanup.Name).State)
		require.NoDirExists(t, out)
	}
	g.refused(request(filepath.Join(t.TempDir(), "x"), &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestApp{LatestApp: true}}), typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND)
	g.refused(request(filepath.Join(t.TempDir(), "x"), ordinal(9)), typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND)
	g.refused(request(filepath.Join(t.TempDir(), "x"), ordinal(1)), typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND)

	var pages []string
	r := &failoverv1.ListFailoversRequest{PageSize: 2, Vm: "web"}
	for {
		page, err := g.viewer.ListFailovers(testkit.Context(t), r)
		require.NoError(t, err)
		for _, f := range page.Failovers {
			pages = append(pages, fmt.Sprint(f.Point))
		}
		if r.PageToken = page.NextPageToken; r.PageToken == "" {
			break
		}
	}
	require.Equal(t, []string{"2", "3", "4"}, pages, "newest first")
	r.PageToken = "nonsense"
	_, err := g.viewer.ListFailovers(testkit.Context(t), r)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), "%v", err)
}

// vm.json is part of the product: a change of it shows in review.
func TestMachineFile(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	out := t.TempDir()
	g.test(request(out, ordinal(3)))
	f := g.await(ready)
	raw, err := os.ReadFile(filepath.Join(out, "vm.json"))
	require.NoError(t, err)
	got := strings.ReplaceAll(string(raw), filepath.Base(f.Name), "FAILOVER")
	golden := filepath.Join("testdata", "vm.json")
	if *update {
		require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(string(want), got), "run the test with -update if this is meant, and describe it in docs/formats/vhd-target.md")
	marker := struct {
		V             int      `json:"v"`
		Failover      string   `json:"failover"`
		CreatedFolder bool     `json:"created_folder"`
		Files         []string `json:"files"`
	}{}
	raw, err = os.ReadFile(filepath.Join(out, ".landfall-failover.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(raw, &marker))
	require.Equal(t, filepath.Base(f.Name), marker.Failover)
	require.False(t, marker.CreatedFolder)
	g.cleanUp()
	g.await(clean)
	require.Empty(t, names(t, out), "the folder was there before and stays")
}

// A repeated request is the same job; another one is refused while a test is there; validate_only leaves nothing.
func TestOneTestAtATime(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	ctx := testkit.Context(t)
	out := filepath.Join(t.TempDir(), "drill")
	r := request(out, latest())
	r.RequestId, r.ValidateOnly = "drill-1", true
	v, err := g.client.StartTestFailover(ctx, r)
	require.NoError(t, err)
	require.Nil(t, v.Job)
	require.NoDirExists(t, out)
	require.Empty(t, names(t, filepath.Dir(out)))

	r.ValidateOnly = false
	job := g.test(r)
	require.Equal(t, "drill-1", job.RequestId)
	require.Contains(t, job.RequestedBy, "otto")
	require.Equal(t, job.Name, g.test(r).Name)
	g.refused(request(filepath.Join(t.TempDir(), "second"), latest()), typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
	g.await(ready)
	require.Equal(t, job.Name, g.test(r).Name, "and when it is up")
	g.refused(request(filepath.Join(t.TempDir(), "second"), latest()), typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
	require.Equal(t, "drill-1", g.job(job.Name).RequestId)
	require.Contains(t, g.job(job.Name).RequestedBy, "otto")

	// Clean-up is idempotent: while it runs, after it, by the same request and by name.
	c := &failoverv1.CleanUpTestFailoverRequest{Vm: "web", RequestId: "clean-1", Notes: "all came up"}
	first, err := g.client.CleanUpTestFailover(ctx, c)
	require.NoError(t, err)
	f := g.await(clean)
	for _, again := range []*failoverv1.CleanUpTestFailoverRequest{c, {Failover: f.Name}} {
		second, err := g.client.CleanUpTestFailover(ctx, again)
		require.NoError(t, err)
		require.Equal(t, first.Job.Name, second.Job.Name)
	}
	_, err = g.client.CleanUpTestFailover(ctx, &failoverv1.CleanUpTestFailoverRequest{Vm: vmName})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND), "%v", err)
	_, err = g.client.CleanUpTestFailover(ctx, &failoverv1.CleanUpTestFailoverRequest{Failover: "failovers/none"})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND), "%v", err)
	_, err = g.client.CleanUpTestFailover(ctx, &failoverv1.CleanUpTestFailoverRequest{})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), "%v", err)
	_, err = g.viewer.GetFailover(ctx, &failoverv1.GetFailoverRequest{Name: "failovers/none"})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND), "%v", err)
	_, err = g.viewer.StartTestFailover(ctx, r)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED), "a viewer starts nothing: %v", err)
	got, err := g.viewer.GetFailover(ctx, &failoverv1.GetFailoverRequest{Name: f.Name})
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(f, got.Failover, protocmp.Transform(), protocmp.IgnoreFields(f, "revision")))
}

// Many requests at once, each with its own id and folder: exactly one test comes up.
func TestRacingRequests(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 6 {
		r := request(filepath.Join(t.TempDir(), "drill"), latest())
		r.RequestId = fmt.Sprint("racer-", i)
		wg.Go(func() {
			_, err := g.client.StartTestFailover(testkit.Context(t), r)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	require.Positive(t, won)
	kv, err := bus.OpenKV[*failoverv1.Failover](testkit.Context(t), g.bus, bus.BucketFailovers)
	require.NoError(t, err)
	testkit.Eventually(t, 20*time.Second, func() error {
		all, err := kv.List(testkit.Context(t), "")
		require.NoError(t, err)
		up := 0
		for _, e := range all {
			switch e.Value.State {
			case ready:
				up++
			case starting:
				return fmt.Errorf("%s is starting", e.Key)
			}
		}
		if up != 1 {
			return fmt.Errorf("%d are up", up)
		}
		return nil
	})
}

// What cannot work is refused at once, with its reason, and leaves nothing.
func TestRefusals(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	free := filepath.Join(t.TempDir(), "drill")

	occupied := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(occupied, "thesis.doc"), []byte("mine"), 0o600))
	g.refused(request(occupied, latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY)
	require.Equal(t, []string{"thesis.doc"}, names(t, occupied))

	if runtime.GOOS == "linux" { // where not even root can make files
		g.refused(request("/proc/drill", latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE)
	}
	if os.Geteuid() != 0 {
		locked := t.TempDir()
		require.NoError(t, os.Chmod(locked, 0o500))
		g.refused(request(filepath.Join(locked, "drill"), latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE)
		g.refused(request(locked, latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE)
	}
	g.refused(request(filepath.Join(free, "not", "there"), latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE)
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	g.refused(request(file, latest()), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE)
	g.refused(request("drill", latest()), typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)
	g.refused(request("", latest()), typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT)

	unknown := request(free, latest())
	unknown.Vm = "sites/lab/vms/nobody"
	g.refused(unknown, typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED)
	azure := request(free, latest())
	azure.Target = 7
	g.refused(azure, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT) // not in the contract: the validation layer is first
	for _, state := range []typesv1.ProtectionState{typesv1.ProtectionState_PROTECTION_STATE_INITIAL_REPLICATING, typesv1.ProtectionState_PROTECTION_STATE_UNSPECIFIED} {
		g.setState(state)
		g.refused(request(free, latest()), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	}
	g.setVM("lost", func(vm *schedulerv1.ProtectedVm) {
		vm.Name, vm.DisplayName, vm.Lineage, vm.State = "sites/lab/vms/lost", "lost", strings.Repeat("9", 32), typesv1.ProtectionState_PROTECTION_STATE_PROTECTED
	})
	lost := request(free, latest())
	lost.Vm = "lost"
	g.refused(lost, typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING)

	require.NoDirExists(t, free)
	require.Empty(t, names(t, filepath.Dir(free)))
	page, err := g.viewer.ListFailovers(testkit.Context(t), &failoverv1.ListFailoversRequest{})
	require.NoError(t, err)
	require.Empty(t, page.Failovers)
}

// Progress is in the job while disks are written, and a test that is under way cannot be cleaned up.
func TestProgressIsVisible(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	hold := make(chan struct{})
	defer failpoint.ArmFunc("failover-orchestrator/after-materialise-disks", func() error { <-hold; return nil })()
	release := sync.OnceFunc(func() { close(hold) })
	defer release()
	job := g.test(request(filepath.Join(t.TempDir(), "drill"), latest()))
	testkit.Eventually(t, 10*time.Second, func() error {
		j := g.job(job.Name)
		if j.State != typesv1.JobState_JOB_STATE_IN_PROGRESS || j.Progress.GetDoneBytes() == 0 {
			return fmt.Errorf("job is %v", j)
		}
		if st := j.Steps[2]; st.Id != "materialise-disks" || st.State != typesv1.JobState_JOB_STATE_IN_PROGRESS {
			return fmt.Errorf("step is %v", st)
		}
		return nil
	})
	_, err := g.client.CleanUpTestFailover(testkit.Context(t), &failoverv1.CleanUpTestFailoverRequest{Vm: vmName})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE), "%v", err)
	release()
	g.await(ready)
}

// Every change of state is told once.
func TestEvents(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	g.test(request(filepath.Join(t.TempDir(), "drill"), latest()))
	f := g.await(ready)
	g.cleanUp()
	g.await(clean)
	states := func() (out []string) {
		for _, e := range g.received("test-failover.changed") {
			var m eventsv1.TestFailoverChanged
			require.NoError(t, e.Decode(&m))
			require.Equal(t, vmName, m.Vm)
			require.Equal(t, f.Name, m.Failover)
			require.EqualValues(t, 4, m.Point)
			require.Equal(t, vmID, e.VM)
			out = append(out, strings.TrimPrefix(m.State.String(), "TEST_FAILOVER_STATE_"))
		}
		return out
	}
	jobs := func() (out []string) {
		for _, e := range g.received("job.changed") {
			var m eventsv1.JobChanged
			require.NoError(t, e.Decode(&m))
			out = append(out, strings.TrimPrefix(m.Job.Kind.String(), "JOB_KIND_")+" "+strings.TrimPrefix(m.Job.State.String(), "JOB_STATE_"))
		}
		return out
	}
	testkit.Eventually(t, 10*time.Second, func() error {
		if len(states()) < 4 || len(jobs()) < 4 {
			return fmt.Errorf("%v %v", states(), jobs())
		}
		return nil
	})
	require.ElementsMatch(t, []string{"STARTING", "WAITING_CLEANUP", "CLEANING_UP", "NONE"}, states())
	require.Equal(t, []string{"TEST_FAILOVER IN_PROGRESS", "TEST_FAILOVER SUCCEEDED", "CLEAN_UP_TEST_FAILOVER IN_PROGRESS", "CLEAN_UP_TEST_FAILOVER SUCCEEDED"}, jobs())
}

// A request that was stored by one instance is carried out by the one that holds the lease, and by no other.
func TestOneActsOfTwo(t *testing.T) {
	g := newRig(t)
	active := g.start(g.store, false)
	var mu sync.Mutex
	hits := 0
	defer failpoint.ArmFunc("failover-orchestrator/before-check-target", func() error {
		mu.Lock()
		defer mu.Unlock()
		hits++
		return nil
	})()
	g.awaitLease("orchestrator-1")
	g.start(g.store, true) // the standby answers requests
	g.test(request(filepath.Join(t.TempDir(), "drill"), latest()))
	g.await(ready)
	mu.Lock()
	require.Equal(t, 1, hits)
	mu.Unlock()
	active.stop()
	g.awaitLease("orchestrator-2")
	g.cleanUp()
	g.await(clean)
}

// awaitLease waits until an instance is the active one.
func (g *rig) awaitLease(holder string) {
	g.t.Helper()
	kv, err := bus.OpenKV[*structpb.Struct](testkit.Context(g.t), g.bus, bus.BucketLeases)
	require.NoError(g.t, err)
	testkit.Eventually(g.t, 20*time.Second, func() error {
		s, _, err := kv.Get(testkit.Context(g.t), "failover-orchestrator")
		if err != nil {
			return err
		}
		if have := s.Fields["holder"].GetStringValue(); have != holder {
			return fmt.Errorf("held by %q", have)
		}
		return nil
	})
}

// A record whose job was not made (the process died in between) is carried out all the same.
func TestRecordWithoutJob(t *testing.T) {
	g := newRig(t)
	kv, err := bus.OpenKV[*failoverv1.Failover](testkit.Context(t), g.bus, bus.BucketFailovers)
	require.NoError(t, err)
	out := filepath.Join(t.TempDir(), "drill")
	_, err = kv.Create(context.Background(), "orphan", &failoverv1.Failover{
		Name: "failovers/orphan", Vm: vmName, Lineage: string(lineage), State: starting, Point: 3, Target: failoverv1.TargetKind_TARGET_KIND_VHD,
		OutDir: out, Job: "jobs/orphan", CreateTime: timestamppb.Now(), Machine: machine(),
	})
	require.NoError(t, err)
	g.start(g.store, true)
	g.await(ready)
	g.requirePoint(out, 3)
	require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, g.job("jobs/orphan").State)
}
