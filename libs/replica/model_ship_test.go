package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
)

// shipJob is one delivery of a task.
func (a *actor) shipJob(t *modelTask) job {
	return func(ctx context.Context, r *Replica) error {
		if t.compare {
			return a.compareJob(ctx, r, t)
		}
		p, ok := a.w.host.read(t)
		if !ok {
			return nil // settled meanwhile; the uploader acks and reports
		}
		disks, err := a.ship(ctx, r, t, p)
		if err != nil {
			return err
		}
		prop := Proposal{Kind: t.kind, Epoch: t.epoch, Open: t.open, Point: t.point, Pass: t.pass, Base: t.base, Disks: disks, Trace: t.id}
		if t.pass == nil {
			prop.CutTime, prop.Consistency = a.w.clock, ConsistencyCrash
		} else if len(p) == 0 {
			a.w.hit("R11 an empty partial")
		}
		return a.commit(ctx, r, t, prop)
	}
}

// held is a task whose worker sleeps between its segments and its manifest, and wakes up in some process later.
type held struct {
	t    *modelTask
	prop Proposal
}

// commit proposes, or falls asleep before.
func (a *actor) commit(ctx context.Context, r *Replica, t *modelTask, p Proposal) error {
	if w := a.w; !w.quiet && !w.awake && w.rng.IntN(6) == 0 {
		w.held = append(w.held, held{t, p})
		return nil
	}
	res, err := r.Commit(ctx, p)
	if err == nil {
		a.w.check.committed(t, res)
	}
	return err
}

// heldJob wakes one of them.
func (a *actor) heldJob() job {
	w := a.w
	i := w.rng.IntN(len(w.held))
	h := w.held[i]
	w.held = append(w.held[:i], w.held[i+1:]...)
	w.hit("paused: between segments and manifest")
	return func(ctx context.Context, r *Replica) error {
		res, err := r.Commit(ctx, h.prop)
		if err == nil {
			w.check.committed(h.t, res)
		}
		return err
	}
}

// compareJob is one delivery of a task of a comparing pass. Task 1 marks the manifest to compare with by an empty partial
// right above it; the others read the chain's disks there and send what differs. (The mark's own blocks ride with task 2.)
func (a *actor) compareJob(ctx context.Context, r *Replica, t *modelTask) error {
	p := Proposal{Kind: KindPartial, Epoch: t.epoch, Open: t.open, Base: t.base, Pass: t.pass, Trace: t.id}
	st, err := r.Refresh(ctx)
	if err != nil {
		return err
	}
	if t.pass.I == 1 {
		p.At = st.Head + 1
		for range 8 { // it waits for a snapshot at the head
			if _, err := r.store.Now(ctx); err != nil {
				return err
			}
		}
		_, err := r.Commit(ctx, p)
		if errors.Is(err, ErrHeadMoved) {
			a.w.hit("R13 the mark's place was taken")
		}
		return err
	}
	mark := Seq(0)
	if ps := st.passes[t.pass.Ordinal]; ps != nil {
		mark = ps.seqOf(1)
	}
	if mark == 0 {
		return nil // not yet: redelivered later
	}
	have := parcel{}
	for _, d := range modelDisks {
		if have[d], err = a.chainAt(ctx, r, mark-1, d); err != nil {
			return err
		}
	}
	live, ok := a.w.host.read(t)
	if !ok {
		return nil
	}
	if t.pass.I == 2 {
		for d, c := range pick(a.w.host.pass.tasks[0], &a.w.host.guest) {
			if live[d] == nil {
				live[d] = content{}
			}
			maps.Copy(live[d], c)
		}
	}
	for d, c := range live {
		maps.DeleteFunc(c, func(b int64, v uint64) bool { return have[d].get(b) == v })
		if len(c) == 0 {
			delete(live, d)
		}
	}
	a.w.hit("R13 compared with the manifest below the mark")
	if p.Disks, err = a.ship(ctx, r, t, live); err != nil {
		return err
	}
	return a.commit(ctx, r, t, p)
}

// chainAt reads a disk with the code a resync engine uses; a disk the chain does not know yet is empty.
func (a *actor) chainAt(ctx context.Context, r *Replica, at Seq, disk string) (content, error) {
	if at == 0 {
		return content{}, nil
	}
	src, err := r.SourceAt(ctx, at, disk)
	if errors.Is(err, ErrNotFound) {
		if at <= a.w.check.head && a.w.check.listed(at) && a.w.check.knows(at, disk) {
			a.w.fail("%s: manifest %d of disk %s to compare with: %v", a.name, at, disk, err)
		}
		return content{}, a.gone(at, err)
	}
	if err != nil {
		return nil, a.gone(at, err)
	}
	if src.checkpoint > 0 {
		a.w.hit("R14 comparing reads a checkpoint")
	}
	b := make([]byte, testSize)
	if err := src.ReadAt(ctx, b, 0); err != nil {
		return nil, a.gone(at, err)
	}
	return contentOf(b), nil
}

// gone: what a pass compares with was retired while it ran, and without it a disk must not be taken for empty.
func (a *actor) gone(at Seq, err error) error {
	if !a.w.check.listed(at) {
		a.w.hit("R13 what a pass compares with was retired")
		return errGiveUp
	}
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

var errGiveUp = fmt.Errorf("given up: %w", ErrHeadMoved)

// ship stores what a task sends, and tells the checker.
func (a *actor) ship(ctx context.Context, r *Replica, t *modelTask, p parcel) ([]Disk, error) {
	tx, o, task := Tx(fmt.Sprintf("%016x", a.w.rng.Uint64())), t.point, uint32(0)
	if t.pass != nil {
		o, task = t.pass.Ordinal, t.pass.I
	}
	for id, c := range p {
		a.w.segs[SegmentKey{Kind: t.kind, Ordinal: o, Tx: tx, DiskID: id}.name()] = maps.Clone(c)
	}
	return ship(ctx, r, t.kind, o, task, tx, p)
}
