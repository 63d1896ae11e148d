package scheduler_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/catalogue"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"

	"github.com/landfall-dr/landfall/services/scheduler/schedulertest"
)

// catalogued waits until a record of the catalogue is as wanted.
func (l *lab) catalogued(name string, ok func(r *catalogue.Record) bool) *catalogue.Record {
	l.t.Helper()
	var r *catalogue.Record
	testkit.Eventually(l.t, patien, func() error {
		var err error
		r, _, err = catalogue.Open(l.Store).Get(testkit.Context(l.t), name)
		if err == nil && (r == nil || !ok(r)) {
			err = fmt.Errorf("%s is %+v", name, r)
		}
		return err
	})
	return r
}

// What is protected, and how, is in storage; what ends says so, and what was lost is kept.
func TestCatalogueFollows(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	stop := l.start(quick())
	l.protect()
	vm := l.awaitPoints(1)
	name := catalogue.VMName(schedulertest.Site, guid, vm.GetLineage())
	r := l.catalogued(name, func(r *catalogue.Record) bool { return r.Ended.IsZero() })
	require.Equal(t, "web01", r.VM.DisplayName)
	require.Equal(t, vm.GetHost(), r.VM.Host)
	require.Equal(t, "policies/fast", r.VM.Policy)
	require.EqualValues(t, 1, r.Revision, "cycles are not written to the catalogue")
	l.catalogued(catalogue.PolicyName("fast"), func(r *catalogue.Record) bool { return r.Policy.CopyInterval.AsDuration() == 100*time.Millisecond })

	ctx := testkit.Context(t)
	apply := func(d time.Duration) {
		_, err := l.policies.ApplyPolicy(ctx, &schedulerv1.ApplyPolicyRequest{Policy: &schedulerv1.Policy{Name: "policies/gold", CopyInterval: durationpb.New(d)}})
		require.NoError(t, err)
	}
	apply(30 * time.Second)
	l.catalogued(catalogue.PolicyName("gold"), func(r *catalogue.Record) bool { return r.Policy.CopyInterval.AsDuration() == 30*time.Second })
	apply(60 * time.Second)
	l.catalogued(catalogue.PolicyName("gold"), func(r *catalogue.Record) bool { return r.Policy.CopyInterval.AsDuration() == 60*time.Second })
	_, err := l.policies.DeletePolicy(ctx, &schedulerv1.DeletePolicyRequest{Name: "policies/gold"})
	require.NoError(t, err)
	l.catalogued(catalogue.PolicyName("gold"), func(r *catalogue.Record) bool { return !r.Ended.IsZero() })

	_, err = l.protection.DisableProtection(ctx, &schedulerv1.DisableProtectionRequest{Vm: vm.GetName(), RequestId: "off"})
	require.NoError(t, err)
	r = l.catalogued(name, func(r *catalogue.Record) bool { return !r.Ended.IsZero() })
	require.Equal(t, "web01", r.VM.DisplayName)

	// A scheduler that was down when something was deleted learns it at its start; what no one deleted is kept.
	apply(30 * time.Second)
	l.catalogued(catalogue.PolicyName("gold"), func(r *catalogue.Record) bool { return r.Ended.IsZero() })
	stop()
	kv, err := bus.OpenKV[*schedulerv1.Policy](ctx, l.Bus, bus.BucketPolicies)
	require.NoError(t, err)
	_, rev, err := kv.Get(ctx, "gold")
	require.NoError(t, err)
	require.NoError(t, kv.Delete(ctx, "gold", rev))
	lost := &catalogue.Record{Written: time.Now(), Policy: &schedulerv1.Policy{Name: "policies/lost", CopyInterval: durationpb.New(time.Minute)}}
	_, err = catalogue.Open(l.Store).Put(ctx, lost, catalogue.VersionOf{})
	require.NoError(t, err)
	l.start(quick())
	l.catalogued(catalogue.PolicyName("gold"), func(r *catalogue.Record) bool { return !r.Ended.IsZero() })
	l.catalogued(catalogue.PolicyName("lost"), func(r *catalogue.Record) bool { return r.Ended.IsZero() })
	_, err = l.policies.GetPolicy(ctx, &schedulerv1.GetPolicyRequest{Name: "policies/lost"})
	require.Error(t, err, "nothing is restored silently")
	_, err = l.policies.DeletePolicy(ctx, &schedulerv1.DeletePolicyRequest{Name: "policies/lost"})
	require.NoError(t, err)
	l.catalogued(catalogue.PolicyName("lost"), func(r *catalogue.Record) bool { return !r.Ended.IsZero() })
}

// A catalogue that cannot be written stops nothing, and is brought up to date later.
func TestCatalogueBlocksNobody(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	faulty := blobstoretest.NewFaulty(l.Store, nil)
	var away atomic.Bool
	away.Store(true)
	faulty.SetHook(func(_ blobstoretest.Op, container, _ string) blobstoretest.Fault {
		if container == catalogue.Container && away.Load() {
			return blobstoretest.Denied
		}
		return blobstoretest.None
	})
	l.Store = faulty
	l.start(quick())
	l.protect()
	vm := l.awaitPoints(2)
	_, err := l.policies.ApplyPolicy(testkit.Context(t), &schedulerv1.ApplyPolicyRequest{Policy: &schedulerv1.Policy{Name: "policies/gold", CopyInterval: durationpb.New(time.Minute)}})
	require.NoError(t, err)
	away.Store(false)
	l.catalogued(catalogue.VMName(schedulertest.Site, guid, vm.GetLineage()), func(r *catalogue.Record) bool { return r.Ended.IsZero() })
	l.catalogued(catalogue.PolicyName("gold"), func(r *catalogue.Record) bool { return true })
}
