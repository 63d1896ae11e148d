package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// tick is one look of the scheduler: read the head, settle or give up what is open, else begin the next thing.
func (w *world) tick(ctx context.Context, r *Replica) error {
	st, err := r.Refresh(ctx)
	if err != nil {
		return err
	}
	rec := &w.rec
	if st.Open > rec.open {
		rec.open = st.Open
	}
	rec.epoch = max(rec.epoch, st.Epoch)
	if c := rec.cycle; c != nil {
		w.settle(st, c)
		return nil
	}
	if st.Closed() {
		return nil
	}
	o := max(rec.highest, w.host.highest, st.Highest) + 1
	rec.highest = o
	if ahead := w.host.base > st.StateOrdinal; ahead && w.host.pass == nil && w.host.point == nil && (w.quiet || w.rng.IntN(2) == 0) {
		w.host.base = 0 // a rewind stands above it: the host resyncs
		w.stats.resyncs++
	}
	if !w.quiet && w.host.base != 0 && w.host.pass == nil && w.host.point == nil && w.rng.IntN(8) == 0 {
		return w.beginPass(o, true) // a manual resync
	}
	if base, ok := w.host.cut(o); ok {
		kind := KindPoint
		if st.Base == 0 {
			kind = KindBase
		}
		rec.cycle = &cycle{ordinal: o, base: base, open: rec.open}
		w.issue(&modelTask{kind: kind, epoch: rec.epoch, open: rec.open, base: base, point: o})
		return nil
	}
	return w.beginPass(o, (w.host.base != 0 || st.Base != 0) && w.rng.IntN(3) == 0)
}

// beginPass starts an initial copy, a catch-up, or a resync that compares.
func (w *world) beginPass(o Ordinal, compare bool) error {
	k := uint32(1 + w.rng.IntN(3))
	if compare {
		k++ // the first task is the mark
	}
	rec := &w.rec
	base, ok := w.host.beginPass(o, int(k), compare)
	if !ok {
		return nil
	}
	w.stats.passes++
	rec.cycle = &cycle{ordinal: o, base: base, pass: true, k: k, open: rec.open}
	for i := range k {
		w.issue(&modelTask{kind: KindPartial, epoch: rec.epoch, open: rec.open, base: base, pass: &Pass{o, i + 1, k}, compare: compare})
	}
	return nil
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
		_, err := r.Commit(ctx, p)
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
		for d, c := range a.w.host.guest.pick(a.w.host.pass.tasks[0]) {
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
	a.w.stats.compared++
	if p.Disks, err = a.ship(ctx, r, t, live); err != nil {
		return err
	}
	_, err = r.Commit(ctx, p)
	return err
}

// chainAt reads a disk with the code a resync engine uses; a disk the chain does not know yet is empty.
func (a *actor) chainAt(ctx context.Context, r *Replica, at Seq, disk string) (content, error) {
	if at == 0 {
		return content{}, nil
	}
	src, err := r.SourceAt(ctx, at, disk)
	if errors.Is(err, ErrNotFound) {
		return content{}, nil
	}
	if err != nil {
		return nil, err
	}
	b := make([]byte, testSize)
	if err := src.ReadAt(ctx, b, 0); err != nil {
		return nil, err
	}
	return contentOf(b), nil
}

// ship stores what a task sends, and tells the checker.
func (a *actor) ship(ctx context.Context, r *Replica, t *modelTask, p parcel) ([]Disk, error) {
	tx, o, task := NewTx(), t.point, uint32(0)
	if t.pass != nil {
		o, task = t.pass.Ordinal, t.pass.I
	}
	for id, c := range p {
		a.w.segs[SegmentKey{Kind: t.kind, Ordinal: o, Tx: tx, DiskID: id}.name()] = maps.Clone(c)
	}
	return ship(ctx, r, t.kind, o, task, tx, p)
}

func (w *world) issue(t *modelTask) {
	t.id = fmt.Sprintf("task-%d", len(w.tasks))
	w.tasks = append(w.tasks, t)
}

// settle ends the cycle when the chain has it; otherwise it may give it up, raising the epoch first (design 7.4).
func (w *world) settle(st *State, c *cycle) {
	done, gone := false, false
	if c.pass {
		p, ok := st.Pass(c.ordinal)
		done = ok && p.Complete
		gone = w.host.settled[c.ordinal]
	} else {
		_, done = st.PointSeq(c.ordinal)
	}
	switch {
	case done && c.pass:
		w.host.settlePass(c.ordinal, true)
	case done:
		w.host.settle(c.ordinal, true)
	case gone || c.open != w.rec.open || c.base > st.StateOrdinal && w.quiet || !w.quiet && w.rng.Float64() < w.rates.abandon:
		w.rec.epoch++
		if c.pass {
			w.host.settlePass(c.ordinal, false)
		} else {
			w.host.settle(c.ordinal, false)
		}
	default:
		return
	}
	w.rec.cycle = nil
}

// shipJob is one delivery of a task.
func (a *actor) shipJob(t *modelTask) func(context.Context, *Replica) error {
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
			prop.CutTime, prop.Consistency = testTime, ConsistencyCrash
		}
		res, err := r.Commit(ctx, prop)
		if err == nil && res.Outcome == AlreadyCommitted {
			a.w.stats.already++
		}
		return err
	}
}

// applyJob advances, or takes a checkpoint of whatever it thinks is due, as a separate program might.
func (a *actor) applyJob() func(context.Context, *Replica) error {
	return func(ctx context.Context, r *Replica) error {
		if a.applier == nil {
			var err error
			a.applier, err = NewApplier(r, ApplierOptions{Footer: testFooter, Clock: func() time.Time { return a.w.clock }, Parallel: 1,
				Takeover: a.w.rates.takeover || a.w.quiet, Stop: a.w.rates.stop, MaxBatchBytes: a.w.rates.batch})
			if err != nil {
				return err
			}
		}
		if !a.w.quiet && a.w.rng.IntN(3) == 0 {
			head := a.w.check.head
			n := Seq(1 + a.w.rng.Uint64N(uint64(head)+1))
			if a.w.rng.IntN(20) == 0 {
				_, err := r.VoidCheckpoint(ctx, n)
				return err
			}
			_, err := r.Checkpoint(ctx, n)
			if errors.Is(err, ErrInvalid) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrVoid) || errors.Is(err, ErrNotAtRest) {
				return nil
			}
			return err
		}
		_, err := a.applier.Advance(ctx, 0)
		return err
	}
}

// fence is one act of an orchestrator: it closes; then rewinds to any point, changes its mind, or reopens, with a rewind
// forward or without. Two of them do so for the same failover, and sometimes one that slept repeats an old act.
func (w *world) fence(ctx context.Context, r *Replica) error {
	st, err := r.Refresh(ctx)
	if err != nil {
		return err
	}
	o, act := FenceOptions{Failover: fmt.Sprintf("failover-%d", w.check.closes+1)}, 0
	if st.Closed() {
		o.Failover, act = st.Fence.Failover, 2
		if !w.quiet && len(w.check.points) > 1 && w.rng.IntN(4) > 0 {
			act = 1
		}
	}
	if w.check.closes > 0 && w.rng.IntN(6) == 0 && !w.quiet {
		o.Failover, act = fmt.Sprintf("failover-%d", 1+w.rng.IntN(w.check.closes)), w.rng.IntN(3)
	}
	switch act {
	case 0:
		_, err = r.CloseLineage(ctx, o)
	case 1:
		points := slices.Sorted(maps.Keys(w.check.points))
		if len(points) == 0 {
			return nil
		}
		var res RewindResult
		target := points[w.rng.IntN(len(points))]
		if res, err = r.Rewind(ctx, RewindOptions{Failover: o.Failover, Target: target, Exact: w.rng.IntN(2) == 0, Parallel: 1}); err == nil {
			w.check.claims = append(w.check.claims, claim{res.Seq, target})
			switch {
			case res.Outcome != Committed:
				w.stats.reached++
			case res.Tries > 1:
				w.stats.again++
			}
		}
	case 2:
		var res Reopened
		ro := ReopenOptions{FenceOptions: o, Forward: w.rng.IntN(2) == 0, Rewind: RewindOptions{Parallel: 1}}
		if res, err = r.ReopenLineage(ctx, ro); err == nil && ro.Forward && res.Outcome == Committed {
			w.check.claims = append(w.check.claims, claim{seq: res.Seq})
			if res.Forward.Outcome == Committed {
				w.stats.forwards++
			}
		}
	}
	return err
}

// end kills everyone, lets what is on the wire land, and with no more faults asks for a new, right point (S6), reads
// all points (S2) and the replica (S4).
func (w *world) end() {
	for _, a := range w.actors {
		for a.busy {
			a.store.Crash()
			a.grant <- 0
			w.wait()
		}
		a.r, a.applier = nil, nil
		a.store.Revive()
	}
	w.quiet = true
	for len(w.late) > 0 {
		w.deliver(w.rng.IntN(len(w.late)))
	}
	w.check.all()
	if w.failed != nil {
		return
	}
	by := map[string]*actor{}
	for _, a := range w.actors {
		by[a.name] = a
	}
	finish := func(name string, job func(context.Context, *Replica) error) {
		a := by[name]
		w.start(a, job)
		for a.busy {
			w.step(a)
		}
	}
	w.host.write(w.rng)
	before := w.host.highest
	for round := 0; w.failed == nil; round++ {
		if round > 20 {
			w.fail("S6: no new point in %d rounds: record %+v, base %d", round, w.rec, w.host.base)
			return
		}
		if w.check.closed {
			finish("orch-1", w.fence)
		}
		finish("scheduler", w.tick)
		for _, t := range slices.Clone(w.tasks) {
			if c := w.rec.cycle; c != nil && (t.point == c.ordinal || t.pass != nil && t.pass.Ordinal == c.ordinal) {
				finish("ship-1", by["ship-1"].shipJob(t))
			}
		}
		finish("scheduler", w.tick)
		if w.host.base > before && w.host.cuts[w.host.base] != nil {
			break
		}
	}
	if w.failed != nil {
		return
	}
	finish("apply-1", by["apply-1"].applyJob())
	w.check.atEnd()
}
