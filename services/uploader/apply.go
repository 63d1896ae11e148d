package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// applier brings replica disks up to their chains.
type applier struct {
	config   Config
	replicas *replicas
	clock    func() time.Time
	metrics  *metrics
	logger   *slog.Logger
}

// applied is how far a lineage's disks are.
type applied struct {
	// seq is the manifest at which all disks are at rest.
	seq replica.Seq
	// point is the newest point at or below it; 0 for none.
	point replica.Ordinal
	// checkpoint is the newest one; 0 for none.
	checkpoint replica.Seq

	// more: there is more to apply, and the caller wanted a pause.
	more bool
	// due is until when the backlog may wait, zero when it was applied. Then the fields above are not set.
	due time.Time
	// backlog is what is left, looked the same as the alarms see it.
	backlog replica.Backlog
	looked  *typesv1.ApplyBacklog
}

// apply brings the disks to the head of the chain and makes the checkpoint that the task wants, unless all of it may wait
// to be merged with what comes. yield is asked between batches and ends it early. ErrBusy and ErrLeaseLost: another applier
// is at work, the task must come again. One call at a time per lineage.
func (a *applier) apply(ctx context.Context, t *uploaderv1.ApplyTask, yield func() bool) (applied, error) {
	l, err := a.replicas.lineage(ctx, t.GetLineage())
	if err != nil {
		return applied{}, err
	}
	if last := l.last.Load(); last != nil && t.GetSequence() > 0 && uint64(last.seq) >= t.GetSequence() && t.GetCheckpointAge() == nil {
		out := *last // an earlier task went further: this one was merged into it
		out.backlog, err = l.r.BacklogAbove(ctx, out.seq)
		return out, err
	}
	if wait, err := a.postpone(ctx, l, t); err != nil || !wait.due.IsZero() {
		return wait, err
	}
	if err := failpoint.Hit(fpBeforePageWrite); err != nil {
		return applied{}, err
	}
	progress, err := shipping.Drain(ctx, l.r, replica.ApplierOptions{
		Clock: a.clock, Parallel: a.config.Apply.Parallel, Lease: a.config.Apply.Lease,
		Takeover: a.config.Apply.SoleApplier, MaxBatchBytes: a.config.Apply.BatchBytes, Yield: yield,
	})
	a.metrics.applied(ctx, progress)
	if err != nil {
		return applied{}, fmt.Errorf("apply the journal: %w", err)
	}
	if err := failpoint.Hit(fpAfterPageWrite); err != nil {
		return applied{}, err
	}
	var age *time.Duration
	if t.GetCheckpointAge() != nil {
		d := t.GetCheckpointAge().AsDuration()
		age = &d
	}
	out, err := a.checkpoint(ctx, l.r, progress.Applied, age)
	if err != nil {
		return applied{}, err
	}
	last := out
	l.last.Store(&last)
	out.more = progress.Yielded
	if out.backlog, err = l.r.BacklogAbove(ctx, progress.Applied); err != nil {
		return applied{}, fmt.Errorf("measure the backlog: %w", err)
	}
	return out, nil
}

// postpone says until when everything may wait, in due, with the backlog as it is. The first task of a lineage in a process
// never waits: it finds out how the disks are.
func (a *applier) postpone(ctx context.Context, l *lineage, t *uploaderv1.ApplyTask) (applied, error) {
	delay := a.config.Apply.Lazy.delay(a.replicas.store)
	if t.GetDelay() != nil && a.config.Apply.Lazy.Mode != lazyOff {
		delay = t.GetDelay().AsDuration()
	}
	last := l.last.Load()
	if delay <= 0 || t.GetUrgent() || last == nil {
		return applied{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.config.StorageTimeout)
	defer cancel()
	b, err := l.r.BacklogAbove(ctx, last.seq)
	if err != nil {
		return applied{}, fmt.Errorf("measure the backlog: %w", err)
	}
	due := a.config.Apply.wait(b, a.clock(), delay)
	if due.IsZero() {
		return applied{}, nil
	}
	if t.GetCheckpointAge() != nil {
		if last.checkpoint == 0 {
			return applied{}, nil
		}
		young, err := a.younger(ctx, l.r, last.checkpoint, t.GetCheckpointAge().AsDuration())
		if err != nil || !young {
			return applied{}, err
		}
	}
	return applied{due: due, backlog: b}, nil
}

// checkpoint finds the newest point at or below the applied manifest, and marks it when it is exactly there and the
// newest checkpoint is older than age. Nil age: only the protocol's own checkpoints, which Advance has made.
func (a *applier) checkpoint(ctx context.Context, r *replica.Replica, at replica.Seq, age *time.Duration) (applied, error) {
	ctx, cancel := context.WithTimeout(ctx, a.config.StorageTimeout)
	defer cancel()
	out := applied{seq: at}
	points, err := r.Points(ctx)
	if err != nil {
		return out, fmt.Errorf("list the points: %w", err)
	}
	newest := replica.Seq(0)
	for _, p := range points {
		if p.Seq > at {
			break
		}
		out.point, newest = p.Ordinal, p.Seq
		if p.Checkpointed {
			out.checkpoint = p.Seq
		}
	}
	if age == nil || newest != at || out.checkpoint == at {
		return out, nil
	}
	if out.checkpoint > 0 {
		young, err := a.younger(ctx, r, out.checkpoint, *age)
		if err != nil {
			return out, err
		}
		if young {
			return out, nil
		}
	}
	if err := failpoint.Hit(fpBeforeCheckpoint); err != nil {
		return out, err
	}
	_, err = r.Checkpoint(ctx, at)
	switch {
	case err == nil:
		out.checkpoint = at
		a.metrics.checkpointed(ctx)
	case errors.Is(err, replica.ErrNotAtRest), errors.Is(err, replica.ErrVoid):
		// Another applier has gone on, or retention forbids it: the next task makes one at a later point.
		a.logger.InfoContext(ctx, "no checkpoint at this point", "lineage", string(r.Lineage()), "sequence", uint64(at), "error", err)
	default:
		return out, fmt.Errorf("make a checkpoint: %w", err)
	}
	return out, failpoint.Hit(fpAfterCheckpoint)
}

// younger reports whether a checkpoint is younger than age, by storage time.
func (a *applier) younger(ctx context.Context, r *replica.Replica, seq replica.Seq, age time.Duration) (bool, error) {
	c, err := r.ReadCheckpoint(ctx, seq)
	if errors.Is(err, replica.ErrNotFound) || errors.Is(err, replica.ErrVoid) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the newest checkpoint: %w", err)
	}
	now, err := r.Store().Now(ctx)
	if err != nil {
		return false, fmt.Errorf("ask storage for its time: %w", err)
	}
	return now.Sub(c.Created) < age, nil
}
