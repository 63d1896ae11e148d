package replica

import (
	"context"
	"fmt"
	"slices"
)

// Points refreshes and lists the recovery points that can be reached, oldest first, with why each is kept by the Keep of the
// last Retain. Points above which a rewind stands are listed too: they can be materialised, and rewound to. Who wants to
// read one pins it first.
func (r *Replica) Points(ctx context.Context) ([]Point, error) {
	if err := r.lock(ctx); err != nil {
		return nil, err
	}
	defer r.unlock()
	for range maxRecordTries {
		out, unreachable, err := r.points(ctx)
		if err != nil {
			return nil, fmt.Errorf("list points: %w", err)
		}
		if unreachable {
			// Retention may have gone on between the record and the checkpoints.
			if moved, err := r.recordMoved(ctx); err != nil {
				return nil, fmt.Errorf("list points: %w", err)
			} else if moved {
				continue
			}
		}
		return out, nil
	}
	return nil, fmt.Errorf("list points: the record changed %d times: %w", maxRecordTries, ErrContention)
}

// points lists what can be reached; unreachable says that the chain has others.
func (r *Replica) points(ctx context.Context) (out []Point, unreachable bool, err error) {
	if err := r.refresh(ctx); err != nil {
		return nil, false, err
	}
	if r.chain.state.Head == 0 {
		return nil, false, nil
	}
	processed, err := r.processed(ctx)
	if err != nil {
		return nil, false, err
	}
	ckpts, err := r.checkpoints(ctx)
	if err != nil {
		return nil, false, err
	}
	now, err := r.store.Now(ctx)
	if err != nil {
		return nil, false, err
	}
	c := &r.chain
	keep := Keep{}.normal()
	var pins []Pin
	if c.retention != nil {
		keep, pins = c.retention.Keep.keep(), c.retention.Pins
	}
	tiers := keep.tiers(&c.state, c.entries, ckpts, now)
	for _, h := range reaches(c.retention, c.entries, ckpts, func(e *Entry) bool { return e.Kind.IsPoint() }) {
		if !h.ok {
			unreachable = true
			continue
		}
		e := &c.entries[h.i]
		p := Point{Ordinal: e.Ordinal, Seq: e.Seq, Kind: e.Kind, CutTime: e.CutTime, Consistency: e.Consistency,
			Bytes: e.Bytes, Signals: e.Signals, Stored: e.Stored, Processed: e.Seq <= processed, Tier: tiers[h.i]}
		if len(h.uses) > 0 {
			p.Checkpoint = slices.Max(h.uses)
		}
		p.Checkpointed = r.ckpts[e.Seq] != nil && !r.ckpts[e.Seq].Void
		for _, q := range pins {
			if q.Seq == e.Seq && (q.Until.IsZero() || !q.Until.Before(now)) {
				p.Pins = append(p.Pins, q)
			}
		}
		if p.Tier == TierNone && len(p.Pins) > 0 {
			p.Tier = TierPinned
		}
		out = append(out, p)
	}
	return out, unreachable, nil
}
