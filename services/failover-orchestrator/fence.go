package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// fencing is what a failover does to the lineage, beside its copy.
type fencing struct {
	*copying
	// last is the point that the scheduler sent last; 0 when it did not say.
	last replica.Ordinal
}

// The question whose first answer decides whether a failover may ever close the lineage: an orchestrator that does not
// know yet that it is not the one any more cannot close the lineage of a failover that another one has cancelled.
const (
	fate       = "fate"
	fateClose  = "close"
	fateCancel = "cancel"
)

// fateOf settles the fate of a failover and says what stands.
func (s *Service) fateOf(ctx context.Context, lineage replica.Lineage, f *failoverv1.Failover, answer string) (string, error) {
	stands, err := s.fateJournal(lineage, f).decide(ctx, fate, answer)
	return stands, storeError(err)
}

// fateJournal is where the fate of a failover stands, whichever of its jobs asks.
func (s *Service) fateJournal(lineage replica.Lineage, f *failoverv1.Failover) *journal {
	return newJournal(s.deps.Store, lineage, lastPart(f.Name), "", s.deps.Clock)
}

// close fences the lineage: whatever the source still sends does not count any more.
func (c *fencing) close() step {
	return step{id: stepClose, do: func(ctx context.Context) (any, string, error) {
		s, f := c.s, c.f
		switch stands, err := s.fateOf(ctx, c.r.Lineage(), f, fateClose); {
		case err != nil:
			return nil, "", err
		case stands != fateClose:
			return nil, "", final{errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "failover %s was cancelled", lastPart(f.Name))}
		}
		if err := failpoint.Hit("failover-orchestrator/before-close"); err != nil {
			return nil, "", err
		}
		res, err := c.r.CloseLineage(ctx, replica.FenceOptions{Failover: lastPart(f.Name), Host: s.machine, Reason: kindName(f) + " failover"})
		if err != nil {
			return nil, "", closeError(err, "close the lineage")
		}
		if err := failpoint.Hit("failover-orchestrator/after-close"); err != nil {
			return nil, "", err
		}
		err = s.keep(ctx, f, func(r *failoverv1.Failover) { r.CloseSequence = uint64(res.Seq) })
		return uint64(res.Seq), fmt.Sprintf("manifest %d", res.Seq), err
	}}
}

// chosen is the result of step choose-point in the journal.
type chosen struct {
	Point uint64 `json:"point"`
}

// choose finds the point that is brought up, after the close: nothing newer comes any more.
func (c *fencing) choose() step {
	return step{id: stepChoose, do: func(ctx context.Context) (any, string, error) {
		points, err := c.r.Points(ctx)
		if err != nil {
			return nil, "", chainError(err, "list the recovery points")
		}
		selector := c.f.Selector
		if planned(c.f) {
			selector = newest
		}
		point, err := choose(points, selector)
		if err != nil {
			return nil, "", err
		}
		if point.Ordinal < c.last { // a newer one is of a source that was found running and stopped again before the close
			return nil, "", errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "the newest point is %d, and the last one of the source was %d", point.Ordinal, c.last)
		}
		m, err := c.r.Find(ctx, point.Ordinal)
		if err != nil {
			return nil, "", chainError(err, "find point %d", point.Ordinal)
		}
		machine, err := machineAt(ctx, c.r, m, c.f.Machine)
		if err != nil {
			return nil, "", err
		}
		err = c.s.keep(ctx, c.f, func(r *failoverv1.Failover) {
			r.Point, r.CutTime, r.Machine = uint64(point.Ordinal), timestamppb.New(point.CutTime), machine
		})
		return chosen{Point: uint64(point.Ordinal)}, fmt.Sprintf("point %d of %s, %s-consistent", point.Ordinal, point.CutTime.UTC().Format(time.RFC3339), point.Consistency), err
	}}
}

// newest selects the point that a planned failover brings up.
var newest = &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Latest{Latest: true}}

// rewind makes the chosen point the newest state of the chain, where it is not. A failover that was started again at
// another point has the same id: the record says whose point counts (doc.go, invariant 8).
func (c *fencing) rewind() step {
	return step{id: stepRewind, do: func(ctx context.Context) (any, string, error) {
		if _, err := c.s.current(ctx, c.f); err != nil {
			return nil, "", err
		}
		if err := failpoint.Hit("failover-orchestrator/before-rewind"); err != nil {
			return nil, "", err
		}
		res, err := c.setBack(ctx)
		if err != nil {
			return nil, "", err
		}
		if res.Outcome == replica.NothingToDo {
			return nil, "", skip("point %d is the newest state", c.f.Point)
		}
		err = c.s.keep(ctx, c.f, func(r *failoverv1.Failover) { r.RewindSequence = uint64(res.Seq) })
		return uint64(res.Seq), fmt.Sprintf("manifest %d: %d bytes set back", res.Seq, res.SetBack), err
	}}
}

func (c *fencing) setBack(ctx context.Context) (replica.RewindResult, error) {
	res, err := c.r.Rewind(ctx, replica.RewindOptions{
		Failover: lastPart(c.f.Name), Target: replica.Ordinal(c.f.Point), Host: c.s.machine, Reason: kindName(c.f) + " failover",
	})
	if err != nil {
		return res, closeError(err, "set the replica back to point %d", c.f.Point)
	}
	return res, nil
}

// checkpointAge asks for a checkpoint at the end of the chain: what comes next reads from there.
const checkpointAge = time.Minute

// drain asks for the rest of the journal to be applied to the replica's disks. Nothing waits for it, and a failover does
// not fail for want of it: whoever reads the replica reads the journal too.
func (c *fencing) drain() step {
	return step{id: stepDrain, do: func(ctx context.Context) (any, string, error) {
		state, err := c.r.Refresh(ctx)
		if err != nil {
			return nil, "", chainError(err, "read the chain")
		}
		id := fmt.Sprintf("%s/apply/failover/%s/%d", c.r.Lineage(), lastPart(c.f.Name), state.Head)
		err = c.s.deps.Bus.PublishTask(ctx, bus.KindApply, siteOf(c.f.Vm, c.s.config.Site), id, &uploaderv1.ApplyTask{
			Vm: c.f.Vm, Lineage: string(c.r.Lineage()), Sequence: uint64(state.Head), CheckpointAge: durationpb.New(checkpointAge), Urgent: true,
		})
		if err != nil {
			return nil, "", skip("not asked for: %v", err)
		}
		return nil, fmt.Sprintf("up to manifest %d", state.Head), nil
	}}
}

// closeError gives an error of fences and rewinds its reason.
func closeError(err error, format string, args ...any) error {
	switch {
	case errors.Is(err, replica.ErrClosed), errors.Is(err, replica.ErrNotFenced), errors.Is(err, replica.ErrReopened):
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED, err, format, args...)
	case errors.Is(err, replica.ErrDiskReplaced):
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND, err, format, args...)
	}
	return replicaError(err, format, args...)
}
