package replica

import (
	"context"
	"fmt"
)

// plannedFailover: the source is stopped, its last point shipped, and only then the lineage is closed.
type plannedFailover struct {
	failover string
	ready    bool    // the final point is settled
	final    Ordinal // it
	closing  bool    // the orchestrator's record says that it closes: no cancel from here on
}

// call is a call to the host: mostly it happens and is answered; else it comes late, or its answer is lost, and now and then it
// comes again later (rule 4).
func (w *world) call(f func() bool) (answered, ok bool) {
	if w.quiet {
		return true, f()
	}
	x := w.rng.Float64()
	if x < w.rates.wire {
		w.wire = append(w.wire, func() {
			w.hit("R4 host call late")
			f()
		})
		return false, false
	}
	if x < 2*w.rates.wire {
		w.wire = append(w.wire, func() { f() })
	}
	ok = f()
	return w.rng.Float64() >= w.rates.wire, ok
}

// tick is one look of the scheduler: read the head, settle or give up what is open, else begin the next thing.
func (w *world) tick(ctx context.Context, r *Replica) error {
	st, err := r.Refresh(ctx)
	if err != nil {
		return err
	}
	if _, err := r.store.Now(ctx); err != nil { // it may be paused between looking and acting
		return err
	}
	rec := &w.rec
	if st.Open > rec.open {
		rec.open = st.Open
		w.hit("R18 the open's epoch is adopted")
	}
	rec.epoch = max(rec.epoch, st.Epoch)
	if rec.cycle != nil {
		w.settle(st, rec.cycle)
		return nil
	}
	if st.Closed() {
		if p := w.planned; p != nil && !p.closing && st.Fence.Failover != p.failover {
			w.planned = nil // somebody else closed first
		}
		return nil
	}
	if p := w.planned; p == nil {
		w.host.fenced = false
	} else {
		if !w.host.fenced {
			w.host.fenced = true
			w.host.flushAll()
		}
		if p.ready {
			return nil
		}
	}
	o := max(rec.highest, w.host.highest, st.Highest) + 1
	rec.highest = o
	idle := w.host.pass == nil && w.host.point == nil
	if w.host.base > st.StateOrdinal && idle && (w.quiet || w.rng.IntN(2) == 0) {
		w.host.disconnect() // a rewind stands above it: the host resyncs
		w.hit("R6 host ahead of a rewind resyncs")
	}
	if !w.quiet && w.planned == nil && w.host.base != 0 && idle && w.rng.IntN(8) == 0 {
		w.beginPass(o, true) // a manual resync
		return nil
	}
	rec.cycle = &cycle{ordinal: o, open: rec.open}
	w.cut(st, rec.cycle)
	return nil
}

// cut asks the host for the cycle's point. A host that wants a pass first gets one; one that does not answer is asked again.
func (w *world) cut(st *State, c *cycle) {
	rec, e, o := &w.rec, w.rec.epoch, c.ordinal
	var base Ordinal
	answered, ok := w.call(func() bool {
		b, ok := w.host.cut(o, e)
		if ok {
			base = b
		}
		return ok
	})
	switch {
	case !answered:
		return
	case ok:
		c.base, c.stage, c.fenced = base, shipping, w.host.fenced
		t := &modelTask{kind: KindPoint, epoch: e, open: c.open, base: base, point: o}
		if st.Base == 0 {
			t.kind = KindBase
		}
		w.issue(c, t)
	case w.host.settled[o] || w.host.point != nil: // refused: the scheduler lists points and reconciles
		w.raise()
		c.stage = abandoning
	default:
		rec.cycle = nil
		w.beginPass(o, (w.host.base != 0 || st.Base != 0) && w.rng.IntN(3) == 0)
	}
}

// beginPass starts an initial copy, a catch-up, or a resync that compares.
func (w *world) beginPass(o Ordinal, compare bool) {
	k := uint32(1 + w.rng.IntN(3))
	if compare {
		k++ // the first task is the mark
	}
	rec := &w.rec
	base, ok := w.host.beginPass(o, int(k), compare, rec.epoch)
	if !ok {
		return
	}
	w.hit("passes")
	c := &cycle{ordinal: o, base: base, stage: shipping, pass: true, k: k, open: rec.open}
	rec.cycle = c
	for i := range k {
		w.issue(c, &modelTask{kind: KindPartial, epoch: rec.epoch, open: rec.open, base: base, pass: &Pass{o, i + 1, k}, compare: compare})
	}
}

func (w *world) issue(c *cycle, t *modelTask) {
	t.n = len(w.tasks)
	t.id = fmt.Sprintf("task-%d", t.n)
	w.tasks = append(w.tasks, t)
	c.tasks = append(c.tasks, t)
}

// settle ends the cycle when the chain has it; otherwise it may give it up, raising the epoch first (design 7.4).
func (w *world) settle(st *State, c *cycle) {
	done, h := false, w.host
	gone := h.settled[c.ordinal]
	if c.pass {
		p, ok := st.Pass(c.ordinal)
		done = ok && p.Complete
		if ok && !p.Complete {
			w.hit("R11 a pass with tasks missing is not settled")
		}
	} else {
		_, done = st.PointSeq(c.ordinal)
		gone = gone || c.stage == shipping && (h.point == nil || h.point.ordinal != c.ordinal)
	}
	switch {
	case c.stage == abandoning:
		if done {
			w.hit("R3 a point committed after it was given up")
		}
		w.give(c)
	case done:
		w.take(c)
	case gone || c.open != w.rec.open || w.quiet && c.stage == shipping && c.base > st.StateOrdinal || !w.quiet && w.rng.Float64() < w.rates.abandon:
		w.raise()
		c.stage = abandoning
		w.give(c)
	case c.stage == cutting:
		w.cut(st, c)
	}
}

// give and take end a cycle once the host has heard of it.
func (w *world) give(c *cycle) { w.settled(c, false) }
func (w *world) take(c *cycle) { w.settled(c, true) }

func (w *world) settled(c *cycle, committed bool) {
	e := w.rec.epoch
	answered, _ := w.call(func() bool {
		if c.pass {
			return w.host.settlePass(c.ordinal, committed, e)
		}
		return w.host.settle(c.ordinal, committed, e)
	})
	if !answered {
		return
	}
	w.rec.cycle = nil
	if p := w.planned; p != nil && committed && !c.pass && c.fenced && w.host.fenced && w.host.base == c.ordinal {
		p.ready, p.final = true, c.ordinal
	}
}

func (w *world) raise() {
	if !w.rates.meek {
		w.rec.epoch++
	}
}

func (t *modelTask) ordinal() Ordinal {
	if t.pass != nil {
		return t.pass.Ordinal
	}
	return t.point
}
