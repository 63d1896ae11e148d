package replica

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// Tier is why a point is kept. A point may have several reasons; the first in the order of these constants is told.
type Tier string

// The tiers.
const (
	TierNone   Tier = ""       // no longer kept: a later Retain retires it, once no point that stays is reached through it
	TierAll    Tier = "all"    // younger than Keep.All
	TierHourly Tier = "hourly" // the hour's point
	TierDaily  Tier = "daily"  // the day's point
	TierNewest Tier = "newest" // the newest point, or the newest application-consistent one, however old
	TierPinned Tier = "pinned" // only a pin keeps it
)

// Keep says how long points are kept, by their age in storage time. The zero value of a field is its default.
type Keep struct {
	// All: every point that is at most this old; default 4 h.
	All time.Duration
	// Hourly: up to this age one point an hour (UTC); default 48 h.
	Hourly time.Duration
	// Limit: up to this age one point a day (UTC), and nothing beyond; default 24 h. It also bounds All and Hourly.
	Limit time.Duration
}

// RetainOptions of one step of retention.
type RetainOptions struct {
	// Keep is the policy's.
	Keep Keep
	// Now is what ages are measured by; default storage time.
	Now time.Time
	// Ended: the VM's protection ended and nobody waits for this lineage any more, so points are retired also while a failover's
	// close fences it. Without it a closed lineage keeps every point it had.
	Ended bool
	// OrphanAge is how old an object must be by storage time, besides being an orphan by the rules; default 1 h, negative for 0.
	OrphanAge time.Duration
	// MaxDeletes bounds the objects and snapshots that one step deletes; default 1,000.
	MaxDeletes int
	// MaxReads bounds the segment indexes that one step reads to store extent maps; default 2,000.
	MaxReads int
	// Parallel is how many requests are in flight; default 4. With 1 no goroutine is started.
	Parallel int
}

// RetainResult says what one step did.
type RetainResult struct {
	// Points by tier after the step.
	Points map[Tier]int
	// Retired counts the points and manifests that this step took out of the chain.
	RetiredPoints, RetiredManifests int
	// Floor and Ranges describe the record after the step.
	Floor  Seq
	Ranges int
	// Dropped are the pins that had expired.
	Dropped []Pin
	// Deleted by kind: "manifests", "segments", "staging", "configs", "checkpoints", "snapshots", "maps", "orphans".
	Deleted map[string]int
	// DeletedBytes of objects; the pages of snapshots are not counted.
	DeletedBytes int64
	// Hidden objects are retired, and a write-once policy still keeps them. A later step finds them again.
	Hidden      int
	HiddenBytes int64
	// Maps is how many extent maps were stored.
	Maps int
	// More: a bound ended the step, and another one has work now.
	More bool
}

// Retain does one bounded step of retention: it decides which points stay, stores what reaching them needs, raises the floor or
// retires ranges in the retention record, and only then deletes what the record retires, and orphans. Any number of
// processes may run it at the same time, beside appliers, shippers, failovers and readers; whoever dies at any call leaves
// what the next step finds. While More, call it again.
//
// Nothing above the newest checkpoint is retired, nor that checkpoint, the newest point, the newest
// application-consistent point, what a pin needs, or a run of partials that has not ended.
func (r *Replica) Retain(ctx context.Context, o RetainOptions) (RetainResult, error) {
	o.defaults()
	res := RetainResult{Points: map[Tier]int{}, Deleted: map[string]int{}}
	err := r.retain(ctx, &o, &res)
	if err != nil {
		return res, fmt.Errorf("retain lineage %s: %w", r.lineage, err)
	}
	return res, nil
}

func (o *RetainOptions) defaults() {
	o.Keep = o.Keep.normal()
	if o.OrphanAge == 0 {
		o.OrphanAge = time.Hour
	}
	o.OrphanAge = max(o.OrphanAge, 0)
	if o.MaxDeletes <= 0 {
		o.MaxDeletes = 1000
	}
	if o.MaxReads <= 0 {
		o.MaxReads = 2000
	}
	if o.Parallel <= 0 {
		o.Parallel = 4
	}
}

func (r *Replica) retain(ctx context.Context, o *RetainOptions, res *RetainResult) (err error) {
	if err := r.whole(); err != nil {
		return err
	}
	now := o.Now
	if now.IsZero() {
		if now, err = r.store.Now(ctx); err != nil {
			return fmt.Errorf("storage time: %w", err)
		}
	}
	p, err := r.decide(ctx, o, now, res)
	if err != nil {
		return err
	}
	p.count(res)
	s := &sweeper{r: r, o: o, res: res, now: p.now, p: p, left: o.MaxDeletes}
	return s.sweep(ctx)
}

// earlier is the earlier one of now and a later reading of storage time, after other answers of storage: one answer with a
// wrong date must not end points and pins, for they do not come back.
func (r *Replica) earlier(ctx context.Context, o *RetainOptions, now time.Time) (time.Time, error) {
	if !o.Now.IsZero() {
		return now, nil
	}
	again, err := r.store.Now(ctx)
	if err != nil {
		return now, fmt.Errorf("storage time: %w", err)
	}
	if again.Before(now) {
		return again, nil
	}
	return now, nil
}

// decide makes a plan, stores the extent maps that it wants, and puts the record; again when the record changed meanwhile.
// The plan's next record is in storage when it returns.
func (r *Replica) decide(ctx context.Context, o *RetainOptions, now time.Time, res *RetainResult) (*plan, error) {
	if err := r.lock(ctx); err != nil {
		return nil, err
	}
	defer r.unlock()
	reads := o.MaxReads
	var last error
	for range maxRecordTries {
		if err := r.refresh(ctx); err != nil {
			return nil, err
		}
		ckpts, err := r.checkpoints(ctx)
		if err != nil {
			return nil, err
		}
		if now, err = r.earlier(ctx, o, now); err != nil {
			return nil, err
		}
		ret := r.chain.retention
		if r.bugs.PinIgnored && ret != nil {
			ret = ret.clone(r.lineage)
			ret.Pins = nil
		}
		p := newPlan(r.lineage, ret, r.chain.state.clone(), slices.Clone(r.chain.entries), ckpts, o.Keep, now, o.Ended)
		m := &mapper{r: r, p: p, reads: reads, opens: o.Parallel}
		more, err := m.fill(ctx)
		reads, res.Maps = m.reads, res.Maps+m.stored
		if errors.Is(err, blobstore.ErrNotFound) || errors.Is(err, ErrNotFound) {
			last = err // another step was faster: what it retired or replaced is gone
			continue
		}
		if err != nil {
			return nil, err
		}
		if reflect.DeepEqual(p.next, p.ret.clone(r.lineage)) {
			res.More = res.More || more
			return p, nil
		}
		if err := r.deleteFirst(ctx, o, now, res, p); err != nil {
			return nil, err
		}
		if err := failpoint.Hit(fpBeforeRetention); err != nil {
			return nil, err
		}
		won, err := r.putRecord(ctx, p.next)
		if err != nil {
			return nil, err
		}
		if err := failpoint.Hit(fpAfterRetention); err != nil {
			return nil, err
		}
		if won || r.bugs.LostRaceDeletes {
			res.More = res.More || more
			res.Dropped = p.dropped
			return p, nil
		}
	}
	if last != nil {
		return nil, last
	}
	return nil, fmt.Errorf("the record changed %d times: %w", maxRecordTries, ErrContention)
}

// deleteFirst is the planted bugs that delete what no record retires yet.
func (r *Replica) deleteFirst(ctx context.Context, o *RetainOptions, now time.Time, res *RetainResult, p *plan) error {
	if !r.bugs.FloorAfterDeletion && !r.bugs.NoRetiredRanges {
		return nil
	}
	r.unlock() // the sweeper takes turns
	err := (&sweeper{r: r, o: o, res: res, now: now, p: p, left: o.MaxDeletes}).sweep(ctx)
	r.turn <- struct{}{}
	if r.bugs.NoRetiredRanges {
		p.next.Retired = nil
	}
	return err
}

// fill takes into the plan's next record what the step's bound on reads allows.
func (m *mapper) fill(ctx context.Context) (more bool, err error) {
	p := m.p
	list := func() error {
		if m.maps == nil {
			m.maps, err = m.r.listMaps(ctx)
		}
		return err
	}
	for _, g := range p.gaps {
		if err := list(); err != nil {
			return false, err
		}
		done, err := m.build(ctx, g.SeqRange)
		if err != nil {
			return false, err
		}
		if !done {
			more = true
			break
		}
		p.retire(g)
	}
	for _, run := range p.finish() {
		if p.pointBelow(run.From) {
			if err := list(); err != nil {
				return false, err
			}
			done, err := m.build(ctx, run)
			if err != nil {
				return false, err
			}
			if !done {
				more = true
				break
			}
		}
		p.release(run)
	}
	return more, nil
}

// count says what the plan did, and which points there are.
func (p *plan) count(res *RetainResult) {
	res.Floor, res.Ranges = p.next.Floor, len(p.next.Retired)
	for i := range p.entries {
		e := &p.entries[i]
		gone := p.next.Retires(e.Seq)
		switch {
		case gone && e.Kind.IsPoint():
			res.RetiredPoints++
			res.RetiredManifests++
		case gone:
			res.RetiredManifests++
		case e.Kind.IsPoint():
			res.Points[p.tiers[i]]++
		}
	}
}
