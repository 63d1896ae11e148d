package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// applyJob advances, or takes a checkpoint of whatever it thinks is due, as a separate program might.
func (a *actor) applyJob() job {
	return func(ctx context.Context, r *Replica) error {
		w := a.w
		if a.applier == nil {
			var err error
			a.applier, err = NewApplier(r, ApplierOptions{Footer: testFooter, Clock: func() time.Time { return w.clock }, Parallel: 1,
				Takeover: w.rates.takeover || w.quiet, Stop: w.rates.stop, MaxBatchBytes: w.rates.batch})
			if err != nil {
				return err
			}
		}
		if !w.quiet && w.rng.IntN(3) == 0 {
			return a.markJob(ctx, r)
		}
		if w.others(a) {
			w.hit("R21 two appliers alive")
		}
		_, err := a.applier.Advance(ctx, 0)
		return err
	}
}

// markJob takes or voids a checkpoint.
func (a *actor) markJob(ctx context.Context, r *Replica) error {
	w := a.w
	head := w.check.head
	n := Seq(1 + w.rng.Uint64N(uint64(head)+1))
	if head > 3 && w.rng.IntN(2) == 0 { // near the head: there the disks may rest
		n = head - Seq(w.rng.Uint64N(3))
	}
	if w.rng.IntN(20) == 0 {
		_, err := r.VoidCheckpoint(ctx, n)
		return err
	}
	_, err := r.Checkpoint(ctx, n)
	switch {
	case errors.Is(err, ErrNotAtRest):
		w.hit("R22 no checkpoint while a disk moves")
		return nil
	case errors.Is(err, ErrVoid):
		w.hit("R23 a void checkpoint stays void")
		return nil
	case errors.Is(err, ErrInvalid), errors.Is(err, ErrNotFound):
		return nil
	}
	return err
}

// fence is one act of an orchestrator: it closes; then rewinds to any point, changes its mind, or reopens, with a rewind
// forward or without. Two of them do so for the same failover, and sometimes one that slept repeats an old act.
func (w *world) fence(ctx context.Context, r *Replica) error {
	st, err := r.Refresh(ctx)
	if err != nil {
		return err
	}
	const doClose, doRewind, doOpen = 0, 1, 2
	o, act := FenceOptions{Failover: fmt.Sprintf("failover-%d", w.check.closes+1)}, doClose
	p := w.planned
	switch {
	case st.Closed():
		o.Failover, act = st.Fence.Failover, doOpen
		if !w.quiet && len(w.check.points) > 1 && w.rng.IntN(4) > 0 {
			act = doRewind
		}
	case p != nil && p.ready:
		p.closing = true // its record says so before the call: no cancel any more
		o.Failover = p.failover
	case p != nil:
		if !p.closing && w.rng.IntN(20) == 0 {
			w.planned = nil // cancelled: nothing is in storage
			w.hit("planned failover cancelled before its close")
		}
		return nil
	case !w.quiet && w.host.base != 0 && w.rng.IntN(3) == 0:
		w.planned = &plannedFailover{failover: fmt.Sprintf("planned-%d", w.check.closes+1)}
		return nil
	}
	if w.check.closes > 0 && w.rng.IntN(6) == 0 && !w.quiet {
		o.Failover, act = w.check.failovers[w.rng.IntN(w.check.closes)], w.rng.IntN(3)
	}
	switch act {
	case doClose:
		res, err := r.CloseLineage(ctx, o)
		if err == nil && res.Outcome == AlreadyCommitted {
			w.hit("R16 close repeated is success")
		}
		if p != nil && o.Failover == p.failover && w.planned == p && (err == nil || IsRefusal(err)) {
			w.planned = nil
		}
		return err
	case doRewind:
		return w.rewind(ctx, r, o)
	}
	var res Reopened
	ro := ReopenOptions{FenceOptions: o, Forward: w.rng.IntN(2) == 0, Rewind: RewindOptions{Parallel: 1}}
	if res, err = r.ReopenLineage(ctx, ro); err == nil && ro.Forward && res.Outcome == Committed {
		w.check.claims = append(w.check.claims, claim{seq: res.Seq})
		if res.Forward.Outcome == Committed {
			w.hit("R6 rewound forward before open")
		}
	}
	if errors.Is(err, ErrNotReachable) || errors.Is(err, ErrNotFound) {
		return w.lost(err)
	}
	return err
}

// rewind to any point, also one that retention has taken.
func (w *world) rewind(ctx context.Context, r *Replica, o FenceOptions) error {
	points := slices.Sorted(maps.Keys(w.check.points))
	if len(points) == 0 {
		return nil
	}
	target := points[w.rng.IntN(len(points))]
	res, err := r.Rewind(ctx, RewindOptions{Failover: o.Failover, Target: target, Exact: w.rng.IntN(2) == 0, Parallel: 1})
	if errors.Is(err, ErrNotReachable) || errors.Is(err, ErrNotFound) {
		return w.lost(err)
	}
	if err != nil {
		return err
	}
	w.check.claims = append(w.check.claims, claim{res.Seq, target})
	switch {
	case res.Outcome != Committed:
		w.hit("R16 rewind repeated, or nothing to do")
	case res.Tries > 1:
		w.hit("R17 rewind computed again")
	}
	if res.Outcome == Committed && w.check.gapAbove(res.TargetSeq) {
		w.hit("R17 rewind over retired manifests")
	}
	return nil
}

// lost: a point that retention took meanwhile cannot be read. With no faults it may not be lost: the caller fails then.
func (w *world) lost(err error) error {
	w.hit("R24 a rewind found its target retired")
	if w.quiet {
		return err
	}
	return nil
}

// alone runs one job to its end while nobody else moves.
func (w *world) alone(name string, j job) {
	a := w.actor(name)
	w.start(a, j)
	for a.busy {
		w.step(a)
	}
}

func (w *world) actor(name string) *actor {
	return w.actors[slices.IndexFunc(w.actors, func(a *actor) bool { return a.name == name })]
}

// cycleAlone brings one new point into the chain with no faults; false when rounds were not enough.
func (w *world) cycleAlone(rounds int) bool {
	before := max(w.host.highest, w.rec.highest)
	for range rounds {
		if w.check.closed {
			w.alone("orch-1", w.fence)
		}
		w.alone("scheduler", w.tick)
		if c := w.rec.cycle; c != nil {
			for _, t := range c.tasks {
				w.alone("ship-1", w.actor("ship-1").shipJob(t))
			}
		}
		w.alone("scheduler", w.tick)
		if w.failed != nil || w.host.base > before && w.host.cuts[w.host.base] != nil {
			return w.failed == nil
		}
	}
	return false
}

// prelude gives the run a past: some points, applied, with no faults.
func (w *world) prelude() {
	w.quiet = true
	defer func() { w.quiet = false }()
	for range w.rates.prelude {
		for range 1 + w.rng.IntN(3) {
			w.host.write()
			w.host.step()
		}
		if !w.cycleAlone(20) || w.failed != nil {
			w.fail("prelude: no point")
			return
		}
		if w.rng.IntN(3) > 0 {
			w.alone("apply-1", w.actor("apply-1").applyJob())
		}
		w.advance(time.Duration(w.rng.IntN(60)) * time.Second * w.rates.tiers.scale)
	}
}

// sleeper picks somebody who sleeps in the middle of a job until retention has taken all that it knew.
func (w *world) sleeper() *actor {
	var out []*actor
	for _, a := range w.actors { // the others are needed at the end
		if a.busy && (strings.HasSuffix(a.name, "-2") || a.role == "read") {
			out = append(out, a)
		}
	}
	if len(out) == 0 || w.rng.IntN(3) == 0 {
		return nil
	}
	a := out[w.rng.IntN(len(out))]
	w.doze(a)
	return a
}

// end wakes who sleeps or kills them, lets what is on the wire land, and with no more faults asks for a new, right point (S6),
// retires what is old, reads all points (S2, S8) and the replica (S4).
func (w *world) end() {
	w.awake = w.rng.IntN(2) == 0
	for w.failed == nil && w.awake { // they go on with what they knew
		busy := slices.DeleteFunc(slices.Clone(w.actors), func(a *actor) bool { return !a.busy })
		if len(busy) == 0 {
			break
		}
		w.step(busy[w.rng.IntN(len(busy))])
	}
	w.awake = false
	sleeper := w.sleeper()
	for _, a := range w.actors {
		if a == sleeper {
			continue
		}
		for a.busy {
			a.store.Crash()
			a.grant <- 0
			w.wait()
		}
		if a.store.Crashed() || w.rng.IntN(2) == 0 { // else it is idle, and keeps what it knows
			a.r, a.applier = nil, nil
		}
		a.store.Revive()
	}
	w.quiet = true
	w.actor("apply-1").applier = nil // the next one takes over
	for len(w.late) > 0 {
		w.deliver(w.rng.IntN(len(w.late)))
	}
	for len(w.wire) > 0 {
		w.reach(w.rng.IntN(len(w.wire)))
	}
	w.planned = nil
	w.check.all()
	if w.failed != nil {
		return
	}
	w.host.write()
	w.host.lowSpace = false
	if !w.cycleAlone(25) {
		w.fail("S6: no new point: record %+v, cycle %+v, base %d", w.rec, w.rec.cycle, w.host.base)
		return
	}
	w.alone("apply-1", w.actor("apply-1").applyJob())
	w.retainToEnd()
	if w.failed != nil {
		return
	}
	w.awake = true
	if sleeper != nil {
		w.wake(sleeper)
		for sleeper.busy {
			w.step(sleeper)
		}
		sleeper.r, sleeper.applier = nil, nil
	}
	for len(w.held) > 0 && w.failed == nil {
		w.alone("ship-2", w.actor("ship-2").heldJob())
	}
	w.awake = false
	w.planned, w.host.fenced = nil, false
	w.host.write()
	if !w.cycleAlone(25) {
		w.fail("S6: no new point after retention: record %+v, cycle %+v, base %d", w.rec, w.rec.cycle, w.host.base)
		return
	}
	w.alone("apply-1", w.actor("apply-1").applyJob())
	if w.failed == nil {
		w.check.atEnd()
	}
}
