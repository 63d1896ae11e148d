package scheduler

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// restFence has the host asked at once.
func (v *vmRun) restFence() {
	v.m.fenceAt, v.m.fenceTries, v.m.fencePoll, v.m.watchAt, v.m.released = time.Time{}, 0, time.Time{}, time.Time{}, ""
}

// fenceGap is the rhythm in which a host is asked about a machine that was failed over.
func (v *vmRun) fenceGap() time.Duration {
	if v.m.fenceTries <= len(rungs) {
		return v.cfg.FenceRetry
	}
	return v.cfg.FenceRetryMax
}

// keepFenced is what a VM does while it is failed over: the host of its source is asked again and again to stop it, until
// it says that it is off. Once the lineage is closed as well, what is left of it there is released. It goes on being
// looked at: a fence is no lock on a power button. f may be nil.
func (v *vmRun) keepFenced(ctx context.Context, f *failoverv1.Failover) (next, error) {
	p := v.rec.GetFailover()
	if p == nil {
		return next{}, nil
	}
	closed, poll := p.GetStage() == stageClosed, next{}
	if !closed && f != nil {
		var err error
		if closed, poll, err = v.pollClose(ctx, f); err != nil {
			return poll, err
		}
		if closed {
			return atOnce, v.stage(ctx, stageClosed)
		}
	}
	now := v.now()
	waits := now.Before(v.m.fenceAt)
	if waits {
		poll = sooner(later(v.m.fenceAt.Sub(now)), poll)
	}
	if !p.GetSourceFenced() {
		if waits {
			return poll, nil
		}
		return v.fence(ctx, poll)
	}
	if closed && !waits && v.m.released != p.GetFailover() {
		err := v.settleForRelease(ctx)
		if err == nil {
			err = v.releaseMachine(ctx)
		}
		if err != nil { // it may run again
			v.log.WarnContext(ctx, "source not released yet", "vm", v.rec.GetName(), "error", err)
			v.m.fenceTries++
			v.m.fenceAt, v.m.watchAt = now.Add(v.fenceGap()), now
			poll = sooner(later(v.fenceGap()), poll)
		} else {
			v.m.released, v.m.fenceTries = p.GetFailover(), 0
		}
	}
	n, err := v.watchSource(ctx, v.cfg.FenceRetryMax)
	return sooner(n, poll), err
}

// watchSource looks now and then whether a source that was off and fenced still is: its host may have been restarted, and
// have started its machines. One that runs is not fenced, and what was decided upon its last point is decided again. A host
// that does not answer proves nothing.
func (v *vmRun) watchSource(ctx context.Context, gap time.Duration) (next, error) {
	now := v.now()
	if now.Before(v.m.watchAt) {
		return later(v.m.watchAt.Sub(now)), nil
	}
	power, err := v.stopMachine(ctx)
	if errors.Is(err, failpoint.ErrInjected) || ctx.Err() != nil {
		return next{}, err
	}
	v.m.watchAt = now.Add(gap)
	if err != nil {
		if n, again, aerr := v.takeEpoch(ctx, err); again || aerr != nil {
			v.m.watchAt = now
			return n, aerr
		}
		v.log.DebugContext(ctx, "fenced source not looked at", "vm", v.rec.GetName(), "error", err)
		return later(gap), nil
	}
	if power == typesv1.PowerState_POWER_STATE_OFF || power == typesv1.PowerState_POWER_STATE_UNSPECIFIED {
		return later(gap), nil
	}
	v.log.ErrorContext(ctx, "fenced source runs", "vm", v.rec.GetName(), "failover", v.rec.GetFailover().GetFailover(), "power", power.String())
	v.restFence()
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		p := rec.GetFailover()
		p.SourceFenced, p.StopTime = false, timestamppb.New(now)
		if p.GetStage() == stageReady {
			p.Stage, p.FinalPoint, p.Error, rec.Retry = stageStopping, 0, nil, nil
		}
	})
}

// settleForRelease ends what the host still holds open of before the failover: as long as it is, its data is kept.
func (v *vmRun) settleForRelease(ctx context.Context) error {
	status, err := v.tracking(ctx)
	if err != nil || status.GetLineage() != v.rec.GetLineage() {
		return err
	}
	chain, err := v.chainState(ctx)
	if err != nil {
		return err
	}
	_, err = v.settleStrangers(ctx, status, chain)
	return err
}

// sooner is the earlier of two looks; the zero one is the latest.
func sooner(a, b next) next {
	if !a.now && (b.now || b.in > 0 && (a.in <= 0 || b.in < a.in)) {
		return b
	}
	return a
}

// fence asks once.
func (v *vmRun) fence(ctx context.Context, poll next) (next, error) {
	if v.rec.GetFailover().GetStopTime() == nil {
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover.StopTime = timestamppb.New(v.now()) })
	}
	power, err := v.stopMachine(ctx)
	if err == nil && power == typesv1.PowerState_POWER_STATE_OFF {
		v.log.InfoContext(ctx, "source is off and fenced", "vm", v.rec.GetName(), "failover", v.rec.GetFailover().GetFailover())
		v.restFence()
		v.m.watchAt = v.now().Add(v.cfg.FenceRetryMax)
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover.SourceFenced, rec.Failover.Error = true, nil })
	}
	if errors.Is(err, failpoint.ErrInjected) || ctx.Err() != nil {
		return next{}, err
	}
	if err != nil {
		if n, again, aerr := v.takeEpoch(ctx, err); again || aerr != nil {
			return n, aerr
		}
	}
	now := v.now()
	v.m.fenceTries++
	v.m.fenceAt = now.Add(v.fenceGap())
	var d *typesv1.ErrorDetail
	switch {
	case err != nil:
		d = detailOf(err, now)
	case now.Sub(v.rec.GetFailover().GetStopTime().AsTime()) >= v.cfg.StopTimeout:
		d = detail(typesv1.ErrorReason_ERROR_REASON_GUEST_DID_NOT_STOP, "the guest of the source still runs", now)
	}
	if v.rec.GetState() != CancellingFailover && d.GetReason() != v.rec.GetFailover().GetError().GetReason() {
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover.Error = d })
	}
	return sooner(later(v.fenceGap()), poll), nil
}

// pollClose looks whether the chain has the failover's close, in the rhythm of the looks at storage.
func (v *vmRun) pollClose(ctx context.Context, f *failoverv1.Failover) (bool, next, error) {
	if closedOnly(f) {
		return true, next{}, nil
	}
	now := v.now()
	if now.Before(v.m.fencePoll) {
		return false, later(v.m.fencePoll.Sub(now)), nil
	}
	v.m.fencePoll = now.Add(v.cfg.Poll)
	chain, err := v.chainState(ctx)
	if err != nil { // it does not matter yet: the fence is kept all the same
		v.log.WarnContext(ctx, "chain not read", "vm", v.rec.GetName(), "error", err)
		return false, later(v.cfg.Poll), nil
	}
	closed, opened := fencesOf(chain, f.GetName())
	return closed != 0 && opened == 0, later(v.cfg.Poll), nil
}

// fenceNames are the failovers of this protection that may hold the machine's fence on its host: the present one first,
// then those that it took the place of.
func (v *vmRun) fenceNames() []string {
	names := []string{v.rec.GetFailover().GetFailover()}
	for _, f := range v.followed.of(v.rec.GetName(), v.rec.GetLineage()) {
		if f.GetName() != names[0] {
			names = append(names, f.GetName())
		}
	}
	return names
}

// asFailover makes a call to the host under the name that holds the fence. That may be a failover whose record is gone:
// the host knows its name.
func (v *vmRun) asFailover(ctx context.Context, do func(ctx context.Context, host hostproviderv1.HostServiceClient, failover string) error) error {
	ctx, cancel := context.WithTimeout(ctx, v.cfg.FenceTimeout)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return err
	}
	var first error
	for _, name := range v.fenceNames() {
		err := do(ctx, host, name)
		if !errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED) {
			return err
		}
		if first == nil {
			first = err
		}
	}
	resp, err := host.GetMachine(ctx, &hostproviderv1.GetMachineRequest{Vm: v.vmID()})
	if holder := resp.GetMachine().GetFence(); err == nil && holder != "" && !v.followed.elsewhere(v.rec.GetName(), v.rec.GetLineage(), holder) {
		return do(ctx, host, holder)
	}
	return first
}

func (v *vmRun) stopMachine(ctx context.Context) (power typesv1.PowerState, err error) {
	if err := failpoint.Hit(fpBeforeStop); err != nil {
		return power, err
	}
	err = v.asFailover(ctx, func(ctx context.Context, host hostproviderv1.HostServiceClient, failover string) error {
		resp, err := host.StopMachine(ctx, &hostproviderv1.StopMachineRequest{
			Vm: v.vmID(), Lineage: v.rec.GetLineage(), Epoch: v.rec.GetEpoch(), Failover: failover,
		})
		power = resp.GetPowerState()
		return err
	})
	if ferr := failpoint.Hit(fpAfterStop); ferr != nil {
		return power, ferr
	}
	return power, err
}

func (v *vmRun) releaseMachine(ctx context.Context) error {
	return v.asFailover(ctx, func(ctx context.Context, host hostproviderv1.HostServiceClient, failover string) error {
		_, err := host.ReleaseMachine(ctx, &hostproviderv1.ReleaseMachineRequest{
			Vm: v.vmID(), Lineage: v.rec.GetLineage(), Epoch: v.rec.GetEpoch(), Failover: failover,
		})
		return err
	})
}

// startMachine lifts the fence and starts the source. ok is false when that has to be tried again.
func (v *vmRun) startMachine(ctx context.Context) (n next, ok bool, _ error) {
	err := v.asFailover(ctx, func(ctx context.Context, host hostproviderv1.HostServiceClient, failover string) error {
		_, err := host.StartMachine(ctx, &hostproviderv1.StartMachineRequest{
			Vm: v.vmID(), Lineage: v.rec.GetLineage(), Epoch: v.rec.GetEpoch(), Failover: failover,
		})
		return err
	})
	if err == nil {
		return next{}, true, nil
	}
	switch errcat.Reason(errcat.FromError(err)) {
	case typesv1.ErrorReason_ERROR_REASON_UNIMPLEMENTED, // a driver without power: a person starts it
		typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH: // forgotten, with its fence
		v.log.WarnContext(ctx, "source not started", "vm", v.rec.GetName(), "error", err)
		return next{}, true, nil
	}
	n, again, aerr := v.takeEpoch(ctx, err)
	if again || aerr != nil {
		return n, false, aerr
	}
	n, err = v.climb(ctx, err)
	return n, false, err
}

// takeEpoch takes over the epoch of a host that has seen a higher one. again is false when cause was something else, or
// when it does not help.
func (v *vmRun) takeEpoch(ctx context.Context, cause error) (n next, again bool, err error) {
	if !errcat.Is(cause, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH) || v.m.quiet >= maxQuiet {
		return next{}, false, nil
	}
	v.m.quiet++
	status, terr := v.tracking(ctx)
	if terr != nil || status.GetEpoch() <= v.rec.GetEpoch() {
		return next{}, false, nil
	}
	return atOnce, true, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Epoch = status.GetEpoch() })
}

// fenceOnce asks a last time for the fence of a machine whose protection ends while it is failed over, and says so when
// the host has not confirmed it. Ending protection never lifts a fence and never starts a machine.
func (v *vmRun) fenceOnce(ctx context.Context) string {
	p := v.rec.GetFailover()
	if p.GetStage() != stageClosed {
		return ""
	}
	if p.GetSourceFenced() {
		return "; the source stays fenced on its host"
	}
	if power, err := v.stopMachine(ctx); err == nil && power == typesv1.PowerState_POWER_STATE_OFF {
		return "; the source stays fenced on its host"
	}
	return "; the host has NOT said that the source is off: keep it off by hand"
}
