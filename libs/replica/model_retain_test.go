package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// modelTiers are the policy of one run, small enough to pass many times.
type modelTiers struct {
	keep    Keep
	scale   time.Duration // the run's clock goes so much faster
	orphans time.Duration
	deletes int
}

func (w *world) drawRetention() {
	scale := []time.Duration{1, 10, 60}[w.rng.IntN(3)]
	w.rates.tiers = modelTiers{scale: scale, orphans: []time.Duration{-1, time.Second, time.Minute}[w.rng.IntN(3)], deletes: []int{1, 3, 1000}[w.rng.IntN(3)],
		keep: Keep{All: time.Duration(10+w.rng.IntN(60)) * time.Second * scale, Hourly: time.Duration(1+w.rng.IntN(10)) * time.Minute * scale,
			Limit: time.Duration(2+w.rng.IntN(20)) * time.Minute * scale}}
	if w.rng.IntN(3) == 0 {
		w.rates.writeOnce = time.Duration(10+w.rng.IntN(300)) * time.Second * scale
	}
}

// retainJob is one step of a retention worker.
func (a *actor) retainJob() job {
	return func(ctx context.Context, r *Replica) error {
		_, err := a.retain(ctx, r)
		return err
	}
}

func (a *actor) retain(ctx context.Context, r *Replica) (RetainResult, error) {
	w := a.w
	t := w.rates.tiers
	if w.others(a) {
		w.hit("R24 two retention workers")
	}
	res, err := r.Retain(ctx, RetainOptions{Keep: t.keep, OrphanAge: t.orphans, MaxDeletes: t.deletes, Parallel: 1})
	for kind, n := range res.Deleted {
		if n > 0 {
			w.hit("deleted: " + kind)
		}
	}
	if res.Hidden > 0 {
		w.hit("R24 write-once hides, and frees later")
	}
	if len(res.Dropped) > 0 {
		w.hit("R24 expired pins dropped")
	}
	if res.Points[TierPinned] > 0 {
		w.hit("R24 only a pin keeps a point")
	}
	return res, err
}

// retainToEnd lets time pass and retention finish.
func (w *world) retainToEnd() {
	var last RetainResult
	for round := 0; w.failed == nil; round++ {
		if round > 400 {
			w.fail("S6: retention does not end: tiers %+v, write-once %s, last step %+v", w.rates.tiers, w.rates.writeOnce, last)
			return
		}
		if round < 3 {
			w.advance(time.Duration(1+w.rng.IntN(300)) * time.Second * w.rates.tiers.scale)
		}
		var res RetainResult
		var err error
		w.alone("retain-1", func(ctx context.Context, r *Replica) error {
			res, err = w.actor("retain-1").retain(ctx, r)
			return err
		})
		last = res
		if w.failed == nil && err == nil && !res.More && round >= 2 {
			return
		}
	}
}

// promise is a pin that its owner was told stands.
type promise struct {
	seq   Seq
	until time.Time
}

// readJob reads a point, with a pin or without: right bytes or an error, and no error while a pin stands.
func (a *actor) readJob() job {
	return func(ctx context.Context, r *Replica) error {
		w := a.w
		all := slices.Sorted(maps.Keys(w.check.points))
		o := all[w.rng.IntN(len(all))]
		seq := w.check.points[o]
		owner := ""
		if w.rng.IntN(3) > 0 {
			w.check.readers++
			owner = fmt.Sprintf("restore/%d", w.check.readers)
			now, err := r.store.Now(ctx)
			if err != nil {
				return err
			}
			p := Pin{Seq: seq, Owner: owner, Until: now.Add(time.Duration(5+w.rng.IntN(600)) * time.Second * w.rates.tiers.scale)}
			if w.rng.IntN(5) == 0 {
				p.Owner, p.Until = fmt.Sprintf("hold/%d", w.check.readers), time.Time{}
				owner = p.Owner
			}
			if err := r.Pin(ctx, p); err != nil {
				return a.pinRefused(seq, err)
			}
			w.check.promises[owner] = promise{seq, p.Until}
			w.check.reachable("pinned")
			w.hit("R24 pinned")
		}
		s := memSink{}
		m, err := r.Materialise(ctx, o, s, MaterialiseOptions{Parallel: 1})
		if err == nil {
			w.check.read(o, s)
			if owner != "" {
				w.hit("S8 a pinned point read")
			} else {
				w.hit("S8 a point read without a pin")
			}
			_ = m
		}
		if err != nil && owner != "" && !errors.Is(err, blobstoretest.ErrInjected) && !errors.Is(err, blobstoretest.ErrCrashed) && w.check.stands(owner) {
			w.fail("S8: point %d, pinned by %s: %v", o, owner, err)
		}
		if err != nil && owner == "" && taken(err) {
			w.hit("S8 a point retired while it was read")
			err = nil
		}
		if owner == "" || w.rng.IntN(4) == 0 { // some never unpin
			return err
		}
		delete(w.check.promises, owner)
		unpinned := seq
		if w.rng.IntN(2) == 0 {
			unpinned = 0
		}
		if uerr := r.Unpin(ctx, owner, unpinned); uerr != nil && err == nil {
			err = uerr
		}
		if taken(err) {
			err = nil
		}
		return err
	}
}

// taken says that retention has taken what the caller wanted.
func taken(err error) bool {
	return errors.Is(err, ErrNotReachable) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrRetired)
}

func (a *actor) pinRefused(seq Seq, err error) error {
	switch {
	case errors.Is(err, ErrRetired), errors.Is(err, ErrNotFound):
		a.w.hit("R24 a pin of what is retired is refused")
		if a.w.check.listed(seq) {
			a.w.fail("S8: manifest %d is in the chain, its pin was refused: %v", seq, err)
		}
		return nil
	case errors.Is(err, ErrNotReachable):
		if !a.w.check.listed(seq) { // retired while it was pinned
			return nil
		}
		a.w.fail("S8: a pin of manifest %d: %v", seq, err)
		return nil
	case errors.Is(err, ErrContention):
		a.w.hit("R24 a pin lost its races")
		return nil
	}
	return err
}
