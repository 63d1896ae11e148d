package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/policy"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// retains are the states in which points are retired: the lineage is open and this service decides what becomes of it. From
// the start of a failover until its cancellation has ended, every point is somebody's choice; a committed failover keeps
// all of them (its lineage is closed and stays), and so does a protection that was ended: its storage is deleted by hand.
var retains = map[State]bool{
	Protected: true, Paused: true, ReplicationError: true, ResyncRequired: true, Resynchronizing: true, ResyncPaused: true,
}

// mayRetain reports whether points of the VM may be retired now.
func mayRetain(rec *schedulerv1.ProtectedVm) bool {
	return retains[rec.GetState()] && rec.GetLastPoint() != 0 && rec.GetSuspicion() == nil
}

// retentionDue says how long it is until a step of retention is due; 0 is now. After a checkpoint, or when many points came
// since the last step, it is due early, but not more often than RetentionGap.
func (v *vmRun) retentionDue(now time.Time) time.Duration {
	lastTime := v.rec.GetLastRetentionTime()
	if lastTime == nil {
		return 0
	}
	every := v.cfg.Retention.Every
	if v.m.checkpointed || v.rec.GetCounters().GetPoints()-v.m.retainedAt >= v.cfg.Retention.Points {
		every = v.cfg.Retention.Gap
	}
	return waitFor(lastTime.AsTime().Add(every), now, v.cfg.Retention.Every)
}

// syncRetention asks for a step of retention when one is due. wait is how long until then; changed that the record was
// written. The task is published before the record says so: a repeat has the same id, and is harmless besides.
func (v *vmRun) syncRetention(ctx context.Context) (wait time.Duration, changed bool, err error) {
	if !mayRetain(v.rec) {
		return 0, false, nil
	}
	now := v.now()
	if !v.m.retainKnown { // a new term counts points from here
		v.m.retainKnown, v.m.retainedAt = true, v.rec.GetCounters().GetPoints()
	}
	if wait := v.retentionDue(now); wait > 0 {
		return wait, false, nil
	}
	id := fmt.Sprintf("%s/retain/%d", v.rec.GetLineage(), v.rec.GetLastRetentionTime().AsTime().UnixNano())
	keep := policy.TiersAt(v.policy, now)
	err = v.bus.PublishTask(ctx, bus.KindRetain, v.site(), id, &uploaderv1.RetainTask{
		Vm: v.rec.GetName(), Lineage: v.rec.GetLineage(), KeepAll: keep.GetKeepAll(), KeepHourly: keep.GetKeepHourly(), Retention: keep.GetRetention(),
	})
	if err != nil {
		return 0, false, err
	}
	if err := failpoint.Hit(fpAfterRetain); err != nil {
		return 0, false, err
	}
	v.m.checkpointed, v.m.retainedAt = false, v.rec.GetCounters().GetPoints()
	v.views.retained(ctx)
	return 0, true, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.LastRetentionTime = timestamppb.New(now) })
}

// syncPoints keeps what is decided about points in line with the record: the pin of a suspicion and the steps of retention.
// Neither may hold replication up: what fails is logged and tried again.
func (v *vmRun) syncPoints(ctx context.Context) (wait time.Duration, changed bool, err error) {
	wait, changed, err = v.syncSuspicion(ctx)
	if err != nil || changed {
		return wait, changed, err
	}
	retain, changed, err := v.syncRetention(ctx)
	if err != nil && !errors.Is(err, bus.ErrRevision) && !errors.Is(err, failpoint.ErrInjected) && ctx.Err() == nil {
		v.log.WarnContext(ctx, "retention not asked for, trying again", "vm", v.rec.GetName(), "error", err)
		retain, err = v.cfg.Poll, nil
	}
	if wait == 0 || retain > 0 && retain < wait {
		wait = retain
	}
	return wait, changed, err
}
