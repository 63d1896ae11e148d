package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// commit makes a failover final: the lineage stays closed, and its state is the point of the machine that stays. When it
// fails the failover waits for a commit as before.
func (s *Service) commit(ctx context.Context, f *failoverv1.Failover) {
	err := s.attempts(ctx, f, s.runCommit)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		s.rest(ctx, f, resting{phase: waitingCommit, job: f.CommitJob, cause: err})
	default:
		s.rest(ctx, f, resting{phase: committed, job: f.CommitJob, change: func(r *failoverv1.Failover) {
			r.CommitTime = timestamppb.New(s.deps.Clock())
		}})
	}
}

func (s *Service) runCommit(ctx context.Context, f *failoverv1.Failover) error {
	job := newJob(f.CommitJob, typesv1.JobKind_JOB_KIND_COMMIT_FAILOVER, f.Vm, "", "", timestamppb.New(s.deps.Clock()), commitSteps)
	if err := s.ensureJob(ctx, job); err != nil {
		return storeError(err)
	}
	c, err := s.open(ctx, f)
	if err != nil {
		return err
	}
	j := newJournal(s.deps.Store, c.r.Lineage(), lastPart(f.Name), lastPart(f.CommitJob), s.deps.Clock)
	return s.perform(ctx, f.CommitJob, j, step{id: stepCommit, do: func(ctx context.Context) (any, string, error) {
		state, err := c.r.Refresh(ctx)
		if err != nil {
			return nil, "", chainError(err, "read the chain")
		}
		if !state.Closed() || state.Fence.Failover != lastPart(f.Name) {
			return nil, "", final{errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "the newest fence of the lineage is a %q of %q, not the close of this failover", state.Fence.Kind, state.Fence.Failover)}
		}
		detail := fmt.Sprintf("closed by manifest %d", state.Fence.Seq)
		switch res, err := (&fencing{copying: c}).setBack(ctx); {
		case errcat.Recoverable(err):
			return nil, "", err
		case err != nil: // the recovered machine is what counts, and it does not come from there
			detail += fmt.Sprintf("; the replica does not stand at point %d: %v", f.Point, err)
		case res.Outcome == replica.Committed:
			detail += fmt.Sprintf("; the replica was set to point %d again by manifest %d", f.Point, res.Seq)
		}
		return nil, detail, nil
	}})
}

// cancel takes a failover back: the copy goes first, so that there are never two of the machine, then the lineage is
// opened again, if it was closed.
func (s *Service) cancel(ctx context.Context, f *failoverv1.Failover) {
	err := s.attempts(ctx, f, s.runCancel)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		s.rest(ctx, f, resting{phase: cancelFailed, job: f.CancelJob, cause: err})
	default:
		s.rest(ctx, f, resting{phase: cancelled, job: f.CancelJob, change: func(r *failoverv1.Failover) { r.Files = nil }})
	}
}

func (s *Service) runCancel(ctx context.Context, f *failoverv1.Failover) error {
	job := newJob(f.CancelJob, typesv1.JobKind_JOB_KIND_CANCEL_FAILOVER, f.Vm, "", "", timestamppb.New(s.deps.Clock()), s.cancelSteps(f))
	if err := s.ensureJob(ctx, job); err != nil {
		return storeError(err)
	}
	c, err := s.open(ctx, f)
	if err != nil {
		return err
	}
	j := newJournal(s.deps.Store, c.r.Lineage(), lastPart(f.Name), lastPart(f.CancelJob), s.deps.Clock)
	var steps []step
	if c.t.Boots() {
		steps = append(steps, step{id: stepShutdown, do: func(ctx context.Context) (any, string, error) {
			err, runs := s.reachable(c.t, f), false
			if err == nil {
				runs, err = c.t.Running(ctx, planOf(f))
			}
			switch {
			case err != nil && ctx.Err() == nil && s.forced(ctx, f):
				return nil, "", skip("not known to be off: %v", err)
			case err != nil:
				return nil, "", err
			case !runs:
				return nil, "", skip("it does not run")
			}
			return nil, "it is off", c.t.Shutdown(ctx, planOf(f))
		}})
	}
	steps = append(steps, step{id: stepRemove, do: func(ctx context.Context) (any, string, error) {
		s.letGo(ctx, f)
		detail, err := s.removeOrLeave(ctx, f)
		return nil, detail, err
	}}, (&fencing{copying: c}).reopen())
	return s.perform(ctx, f.CancelJob, j, steps...)
}

// reopen ends the fence of a failover. Where the replica was set back it is first brought forward again, so that a
// source that did not run meanwhile goes on with differences.
func (c *fencing) reopen() step {
	return step{id: stepOpen, do: func(ctx context.Context) (any, string, error) {
		s, f, id := c.s, c.f, lastPart(c.f.Name)
		switch stands, err := s.fateOf(ctx, c.r.Lineage(), f, fateCancel); {
		case err != nil:
			return nil, "", err
		case stands == fateCancel:
			return nil, "", skip("the lineage was not closed")
		}
		// Whoever was allowed to close may have died before, or be about to: with the close in the chain it is settled.
		who := replica.FenceOptions{Failover: id, Host: s.machine, Reason: "failover cancelled"}
		switch _, err := c.r.CloseLineage(ctx, who); {
		case errors.Is(err, replica.ErrClosed):
			return nil, "", skip("the lineage is closed by another: %v", err)
		case err != nil && !errors.Is(err, replica.ErrReopened):
			return nil, "", closeError(err, "find the close")
		}
		if err := failpoint.Hit("failover-orchestrator/before-open"); err != nil {
			return nil, "", err
		}
		res, err := c.r.ReopenLineage(ctx, replica.ReopenOptions{FenceOptions: who, Forward: true})
		detail := ""
		if errors.Is(err, replica.ErrNotReachable) || errors.Is(err, replica.ErrDiskReplaced) || errors.Is(err, replica.ErrNotFound) {
			detail = "; the newest point cannot be restored, the source will be compared"
			res, err = c.r.ReopenLineage(ctx, replica.ReopenOptions{FenceOptions: who})
		}
		if errors.Is(err, replica.ErrNotFenced) { // a twin was faster
			if state, serr := c.r.Refresh(ctx); serr == nil {
				if _, opened := state.FenceSeqs(id); opened != 0 {
					res.Seq, res.Epoch, err = opened, state.Epoch, nil
				}
			}
		}
		if err != nil {
			return nil, "", closeError(err, "open the lineage")
		}
		if err := failpoint.Hit("failover-orchestrator/after-open"); err != nil {
			return nil, "", err
		}
		if err := s.keep(ctx, f, func(r *failoverv1.Failover) { r.OpenSequence = uint64(res.Seq) }); err != nil {
			return nil, "", err
		}
		return uint64(res.Seq), fmt.Sprintf("manifest %d, epoch %d%s", res.Seq, res.Epoch, detail), nil
	}}
}
