package failoverorchestrator_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/catalogue"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

func group(title string, wait time.Duration, vms ...string) *failoverv1.PlanGroup {
	return &failoverv1.PlanGroup{Title: title, Vms: vms, Wait: durationpb.New(wait)}
}

// Everything that is wrong with a plan is said at once.
func TestCheckPlan(t *testing.T) {
	same := func(vm string) (string, error) { return vm, nil }
	good := &failoverv1.RecoveryPlan{Name: "recoveryPlans/all", Groups: []*failoverv1.PlanGroup{
		group("databases", time.Minute, "sites/lab/vms/db-01"), group("", 0, "sites/lab/vms/web 01", "sites/other/vms/db-01"),
	}}
	require.NoError(t, failoverorchestrator.CheckPlan(good, same))
	bad := &failoverv1.RecoveryPlan{Name: "recoveryPlans/All of it", Groups: []*failoverv1.PlanGroup{
		group(strings.Repeat("x", 101), 2*time.Hour, "sites/lab/vms/a", "web", "sites/lab/vms/A", "sites/lab/vms/twice"),
		group("empty", -time.Second),
	}}
	err := failoverorchestrator.CheckPlan(bad, func(vm string) (string, error) {
		if strings.HasSuffix(vm, "twice") {
			return "", fmt.Errorf("%s means two", vm)
		}
		return vm, nil
	})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID))
	for _, want := range []string{
		`name: "recoveryPlans/All of it"`, "groups[0].title", "groups[0].wait: 2h0m0s", `groups[0].vms[1]: "web"`,
		"groups[0].vms[2]: sites/lab/vms/A is in the plan already, at groups[0].vms[0]", "groups[0].vms[3]: sites/lab/vms/twice means two",
		"groups[1].vms: there is none", "groups[1].wait: -1s",
	} {
		require.ErrorContains(t, err, want)
	}
	require.ErrorContains(t, failoverorchestrator.CheckPlan(&failoverv1.RecoveryPlan{}, same), "groups: there is none")
}

func TestPlans(t *testing.T) {
	g := newRig(t)
	faulty := blobstoretest.NewFaulty(g.store, nil)
	var away atomic.Bool
	away.Store(true)
	faulty.SetHook(func(_ blobstoretest.Op, container, _ string) blobstoretest.Fault {
		if container == catalogue.Container && away.Load() {
			return blobstoretest.Before
		}
		return blobstoretest.None
	})
	first := g.start(faulty, true)
	ctx := testkit.Context(t)
	admin := failoverv1.NewPlanServiceClient(g.dial(pki.UserIdentity("ada", pki.RoleAdmin), "failover-orchestrator"))
	viewer := failoverv1.NewPlanServiceClient(g.dial(pki.UserIdentity("vera", pki.RoleViewer), "failover-orchestrator"))
	g.setVM("sites/lab/vms/22222222-2222-3333-4444-555555555555", func(vm *schedulerv1.ProtectedVm) {
		vm.Name, vm.DisplayName = "sites/lab/vms/22222222-2222-3333-4444-555555555555", "db"
	})

	plan := &failoverv1.RecoveryPlan{Name: "recoveryPlans/all", Groups: []*failoverv1.PlanGroup{group("databases", time.Minute, "sites/lab/vms/db"), group("web", 0, vmName)}}
	_, err := viewer.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: plan})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED), "%v", err)
	r, err := admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: plan, ValidateOnly: true})
	require.NoError(t, err)
	require.Zero(t, r.Plan.Revision)
	_, err = viewer.GetPlan(ctx, &failoverv1.GetPlanRequest{Name: "recoveryPlans/all"})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PLAN_NOT_FOUND), "%v", err)

	r, err = admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: plan})
	require.NoError(t, err, "storage that is away blocks nobody")
	made := r.Plan.Revision
	require.NotZero(t, made)
	r, err = admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: plan})
	require.NoError(t, err)
	require.Equal(t, made, r.Plan.Revision, "nothing changed")
	stale := &failoverv1.RecoveryPlan{Name: plan.Name, Groups: plan.Groups[:1], Revision: made + 7}
	_, err = admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: stale})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION), "%v", err)
	stale.Revision = made
	r, err = admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: stale})
	require.NoError(t, err)
	require.Greater(t, r.Plan.Revision, made)

	// One machine by two names is one machine.
	twice := &failoverv1.RecoveryPlan{Name: "recoveryPlans/twice", Groups: []*failoverv1.PlanGroup{group("", 0, "sites/lab/vms/web", vmName)}}
	_, err = admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: twice})
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID), "%v", err)

	for _, name := range []string{"b", "c"} {
		_, err = admin.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: &failoverv1.RecoveryPlan{Name: "recoveryPlans/" + name, Groups: plan.Groups}})
		require.NoError(t, err)
	}
	page, err := viewer.ListPlans(ctx, &failoverv1.ListPlansRequest{PageSize: 2})
	require.NoError(t, err)
	require.Len(t, page.Plans, 2)
	page, err = viewer.ListPlans(ctx, &failoverv1.ListPlansRequest{PageSize: 2, PageToken: page.NextPageToken})
	require.NoError(t, err)
	require.Len(t, page.Plans, 1)
	require.Equal(t, "recoveryPlans/c", page.Plans[0].Name)
	require.Empty(t, page.NextPageToken)

	inStorage := func(name string, ok func(*catalogue.Record) bool) {
		t.Helper()
		testkit.Eventually(t, 20*time.Second, func() error {
			r, _, err := catalogue.Open(g.store).Get(ctx, catalogue.PlanName(name))
			if err == nil && (r == nil || !ok(r)) {
				err = fmt.Errorf("%s is %+v", name, r)
			}
			return err
		})
	}
	away.Store(false)
	inStorage("all", func(r *catalogue.Record) bool { return len(r.Plan.Groups) == 1 && r.Ended.IsZero() })
	inStorage("b", func(r *catalogue.Record) bool { return len(r.Plan.Groups) == 2 })

	_, err = admin.DeletePlan(ctx, &failoverv1.DeletePlanRequest{Name: "recoveryPlans/b"})
	require.NoError(t, err)
	_, err = admin.DeletePlan(ctx, &failoverv1.DeletePlanRequest{Name: "recoveryPlans/b"})
	require.NoError(t, err, "idempotent")
	inStorage("b", func(r *catalogue.Record) bool { return !r.Ended.IsZero() && len(r.Plan.Groups) == 2 })

	// What one instance stored, the next one mirrors.
	first.stop()
	away.Store(true)
	second := g.start(faulty, true)
	admin = failoverv1.NewPlanServiceClient(g.dial(pki.UserIdentity("ada", pki.RoleAdmin), "failover-orchestrator"))
	_, err = admin.DeletePlan(ctx, &failoverv1.DeletePlanRequest{Name: "recoveryPlans/c"})
	require.NoError(t, err)
	second.stop()
	away.Store(false)
	g.start(faulty, false)
	inStorage("c", func(r *catalogue.Record) bool { return !r.Ended.IsZero() })
	inStorage("all", func(r *catalogue.Record) bool { return r.Ended.IsZero() })
}
