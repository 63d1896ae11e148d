package replica

import (
	"context"
	"errors"
	"fmt"
)

// FenceOptions name who closes or reopens a lineage. Failover is required; the rest goes into the manifest.
type FenceOptions struct {
	Failover            string
	Host, Reason, Trace string
}

func (o *FenceOptions) proposal(k Kind) Proposal {
	return Proposal{Kind: k, Failover: o.Failover, Host: o.Host, Reason: o.Reason, Trace: o.Trace}
}

// CloseLineage commits the close of a failover: from its manifest on nothing of the source counts until the same failover
// reopens the lineage. Idempotent by failover. ErrClosed: another failover holds the fence. ErrReopened: this failover
// closed the lineage before and reopened it since, so it is not fenced; a new failover needs a new id.
func (r *Replica) CloseLineage(ctx context.Context, o FenceOptions) (Result, error) {
	res, err := r.Commit(ctx, o.proposal(KindClose))
	if err != nil || res.Outcome != AlreadyCommitted {
		return res, err
	}
	st, err := r.Refresh(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("close by failover %s: %w", o.Failover, err)
	}
	if _, opened := st.FenceSeqs(o.Failover); opened != 0 {
		return Result{}, fmt.Errorf("close %d by failover %s, its open is %d: %w", res.Seq, o.Failover, opened, ErrReopened)
	}
	return res, nil
}

// ReopenOptions of ReopenLineage.
type ReopenOptions struct {
	FenceOptions
	// Forward: when this failover rewound the lineage, rewind it to the chain's newest point before the open, so that a
	// source that never diverged goes on with deltas. Without it the state stays the rewind's target, and a host whose
	// base is newer must resync (ErrBaseAhead).
	Forward bool
	// Rewind tunes the rewind forward: Parallel, Compression and Progress.
	Rewind RewindOptions
}

// Reopened is the result of ReopenLineage.
type Reopened struct {
	// Result of the open: later tasks carry its Epoch and name its Seq.
	Result
	// Forward is the rewind forward; its zero value when there was none to do.
	Forward RewindResult
}

// ReopenLineage ends the fence of a failover: the rewind forward if asked for and needed, and the open, exactly on the
// head for which that was decided, so that a rewind still on the wire cannot slip in between. Idempotent by failover. ErrNotFenced: the
// failover's close is not the newest fence. Errors of Rewind come through: repeat, or go on without Forward.
func (r *Replica) ReopenLineage(ctx context.Context, o ReopenOptions) (Reopened, error) {
	out, err := r.reopen(ctx, &o)
	if err != nil {
		return Reopened{}, fmt.Errorf("reopen lineage %s: %w", r.lineage, err)
	}
	return out, nil
}

func (r *Replica) reopen(ctx context.Context, o *ReopenOptions) (out Reopened, err error) {
	for range maxRewindTries {
		st, entries, err := r.snapshotChain(ctx)
		if err != nil {
			return out, err
		}
		p := o.proposal(KindOpen)
		p.At = st.Head + 1
		if target := forward(st, entries); o.Forward && target != 0 && st.Closed() && st.Fence.Failover == o.Failover {
			w := o.Rewind
			w.Failover, w.Target = o.Failover, target
			w.Host, w.Reason, w.Trace = o.Host, o.Reason, o.Trace
			if out.Forward, err = r.Rewind(ctx, w); err != nil {
				return out, err
			}
			if out.Forward.Outcome == Committed {
				p.At = out.Forward.Seq + 1
			}
		}
		if r.bugs.ReopenAnywhere {
			p.At = 0
		}
		out.Result, err = r.Commit(ctx, p)
		if !errors.Is(err, ErrHeadMoved) {
			return out, err
		}
	}
	return out, fmt.Errorf("failover %s: the head moved %d times: %w", o.Failover, maxRewindTries, ErrContention)
}

// forward is the chain's newest point when a rewind of the newest fence stands above it and leads elsewhere; 0 when there
// is nothing to rewind forward.
func forward(st *State, entries []Entry) (newest Ordinal) {
	rewound := false
	for _, e := range entries {
		switch {
		case e.Kind.IsPoint():
			newest = e.Ordinal
		case e.Kind == KindRewind:
			rewound = e.Seq > st.Fence.Seq
		}
	}
	if !rewound || st.StateOrdinal == newest {
		return 0
	}
	return newest
}
