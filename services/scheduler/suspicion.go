package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/policy"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

const (
	// suspectPrefix is what owners of the pins of suspicions begin with.
	suspectPrefix = "suspect/"
	// suspectPin is how long such a pin holds by itself, and suspectRenew how often it is put again while the suspicion is
	// open. One that a dying process leaves behind after the suspicion was cleared ends in time.
	suspectPin   = 30 * 24 * time.Hour
	suspectRenew = 24 * time.Hour
)

// suspectOwner is the owner of the pin that a suspected point has put on the last good one.
func suspectOwner(point uint64) string { return fmt.Sprintf("%s%d", suspectPrefix, point) }

// suspected stores the first suspicion of an episode. Points that came before a person cleared one are not suspected again.
func (r *reconciler) suspected(ctx context.Context, p *eventsv1.RecoveryPointSuspected) error {
	key := keyOf(p.GetVm())
	if key == "" {
		return nil
	}
	return r.with(ctx, key, func(v *vmRun) error {
		open := v.rec.GetSuspicion()
		switch {
		case v.rec.GetLineage() != p.GetLineage(), p.GetPoint() == 0, p.GetPoint() <= v.rec.GetClearedSuspicion():
			return nil
		case open != nil && open.GetPoint() <= p.GetPoint(): // of the same episode
			return nil
		case policy.SuspicionFactor(v.policy) == policy.SuspicionOff:
			return nil
		}
		v.log.ErrorContext(ctx, "point is suspected to be the work of ransomware", "vm", v.rec.GetName(), "point", p.GetPoint(), "last_good_point", p.GetLastGoodPoint())
		return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.Suspicion = &schedulerv1.Suspicion{
				Point: p.GetPoint(), CutTime: p.GetCutTime(), LastGoodPoint: p.GetLastGoodPoint(), LastGoodTime: p.GetLastGoodTime(),
				Signals: p.GetSignals(), UsualBytes: p.GetUsualBytes(),
			}
		})
	})
}

// syncSuspicion sees to it that the last good point of an open suspicion is pinned in storage. It never fails for storage's
// sake: the pin is tried again.
func (v *vmRun) syncSuspicion(ctx context.Context) (wait time.Duration, changed bool, err error) {
	s, now := v.rec.GetSuspicion(), v.now()
	if s.GetLastGoodPoint() == 0 {
		return 0, false, nil
	}
	if wait := v.m.pinAt.Sub(now); wait > 0 && wait <= suspectRenew && v.m.pinFor == s.GetPoint() {
		return wait, false, nil
	}
	v.m.pinFor = s.GetPoint()
	if err := v.pinLastGood(ctx, s); err != nil {
		if ctx.Err() != nil {
			return 0, false, ctx.Err()
		}
		v.log.ErrorContext(ctx, "last good point not pinned, trying again", "vm", v.rec.GetName(), "point", s.GetLastGoodPoint(), "error", err)
		v.m.pinAt = now.Add(v.cfg.Poll)
		return v.cfg.Poll, false, nil
	}
	v.m.pinAt = now.Add(suspectRenew)
	if s.GetPinned() {
		return suspectRenew, false, nil
	}
	return suspectRenew, true, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Suspicion.Pinned = true })
}

func (v *vmRun) pinLastGood(ctx context.Context, s *schedulerv1.Suspicion) error {
	state, err := v.chainState(ctx)
	if err != nil {
		return err
	}
	seq, ok := state.PointSeq(replica.Ordinal(s.GetLastGoodPoint()))
	if !ok {
		return fmt.Errorf("point %d: %w", s.GetLastGoodPoint(), replica.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(ctx, v.cfg.StorageTimeout)
	defer cancel()
	now, err := v.blobs.Now(ctx)
	if err != nil {
		return err
	}
	return v.m.chain.Pin(ctx, replica.Pin{
		Seq: seq, Owner: suspectOwner(s.GetPoint()), Until: now.Add(suspectPin),
		Reason: fmt.Sprintf("last point before point %d, which is suspected to be the work of ransomware", s.GetPoint()),
	})
}

// ClearSuspicion ends the open suspicion: what is there now was looked at. The record first, then the pins; a repeat of the
// call removes pins that the first one did not get to.
func (s *protectionServer) ClearSuspicion(ctx context.Context, r *schedulerv1.ClearSuspicionRequest) (*schedulerv1.ClearSuspicionResponse, error) {
	key, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	was := rec.GetSuspicion()
	rec, rev, err := s.store.vms.Mutate(ctx, key, func(rec *schedulerv1.ProtectedVm) error {
		if rec.GetSuspicion() == nil {
			return bus.NoChange
		}
		was = rec.GetSuspicion()
		rec.ClearedSuspicion = max(rec.GetClearedSuspicion(), rec.GetLastPoint(), was.GetPoint())
		rec.Suspicion, rec.UpdateTime = nil, timestamppb.New(s.now())
		return nil
	})
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return nil, notProtectedAnyMore(r.GetVm())
	case err != nil:
		return nil, busError(err, "clear the suspicion of %s", r.GetVm())
	}
	if was != nil {
		s.log.InfoContext(ctx, "suspicion cleared", "vm", rec.GetName(), "point", was.GetPoint(), "by", caller(ctx))
	}
	if _, err := s.unpin(ctx, rec, isSuspect); err != nil {
		return nil, err
	}
	return &schedulerv1.ClearSuspicionResponse{Vm: s.present(rec, rev)}, nil
}
