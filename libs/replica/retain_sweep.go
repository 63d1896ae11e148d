package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// Kinds of what a sweep deletes.
const (
	sweptManifests   = "manifests"
	sweptSegments    = "segments"
	sweptStaging     = "staging"
	sweptConfigs     = "configs"
	sweptCheckpoints = "checkpoints"
	sweptSnapshots   = "snapshots"
	sweptMaps        = "maps"
	sweptOrphans     = "orphans"
)

// configAge is how much later than a configuration a point must have been committed before the configuration, if nothing
// names it, counts as garbage: whoever stored it for a point of then can no longer commit that point.
const configAge = 24 * time.Hour

// sweeper deletes what a stored record gives up. Everything is found again by listing, so it may end anywhere: an object is
// garbage by its name, the record and the chain, whoever looks.
type sweeper struct {
	r   *Replica
	o   *RetainOptions
	res *RetainResult
	p   *plan
	now time.Time

	left  int // deletions that the step may still make
	mu    sync.Mutex
	guard map[string]*guard // by container
}

// guard knows what a container's write-once policy keeps, so that a step does not ask for every hidden object again.
type guard struct {
	protection blobstore.Protection
	refused    time.Time // objects this young, or younger, were refused
}

// sweep deletes manifests before segments and configurations: those are garbage because no manifest of the chain names them.
func (s *sweeper) sweep(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		s.manifests, s.checkpoints, s.staging, s.segments, s.configs, s.maps, s.snapshots,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// batch is garbage of one container, deleted some at a time.
type batch struct {
	s     *sweeper
	c     blobstore.Container
	kind  string
	items []blobstore.Properties
}

// maxBatch bounds a batch in memory.
const maxBatch = 256

// add takes an object; full says that the step's bound is reached, and the listing can end.
func (b *batch) add(ctx context.Context, p blobstore.Properties) (full bool, err error) {
	if b.s.left <= len(b.items) { // a refused deletion does not count: what is hidden must not keep the rest waiting
		if err := b.flush(ctx); err != nil {
			return false, err
		}
	}
	if b.s.hidden(ctx, b.c, p) {
		b.s.res.Hidden++
		b.s.res.HiddenBytes += p.Size
		return false, nil
	}
	if b.s.left <= 0 {
		b.s.res.More = true
		return true, nil
	}
	b.items = append(b.items, p)
	if len(b.items) >= maxBatch {
		return false, b.flush(ctx)
	}
	return false, nil
}

func (b *batch) flush(ctx context.Context) error {
	s := b.s
	refused := 0
	err := s.parallel(ctx, len(b.items), func(ctx context.Context, i int) error {
		p := b.items[i]
		if err := failpoint.Hit(fpBeforeDelete); err != nil {
			return err
		}
		err := b.c.Delete(ctx, p.Name, blobstore.Conditions{})
		if ferr := failpoint.Hit(fpAfterDelete); ferr != nil {
			return ferr
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case err == nil:
			s.res.Deleted[b.kind]++
			s.res.DeletedBytes += p.Size
		case errors.Is(err, blobstore.ErrNotFound): // somebody else, or our own lost answer
		case errors.Is(err, blobstore.ErrWriteOnce):
			refused++
			s.res.Hidden++
			s.res.HiddenBytes += p.Size
			if g := s.guard[b.c.Name()]; g != nil && (g.refused.IsZero() || p.LastModified.Before(g.refused)) {
				g.refused = p.LastModified
			}
		default:
			return fmt.Errorf("delete %s: %w", p.Name, err)
		}
		return nil
	})
	s.left -= len(b.items) - refused
	b.items = b.items[:0]
	return err
}

// parallel runs fn for 0 to n-1 with the step's parallelism; with 1 it starts no goroutine.
func (s *sweeper) parallel(ctx context.Context, n int, fn func(ctx context.Context, i int) error) error {
	if s.o.Parallel == 1 || n < 2 {
		for i := range n {
			if err := fn(ctx, i); err != nil {
				return err
			}
		}
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.o.Parallel)
	for i := range n {
		g.Go(func() error { return fn(ctx, i) })
	}
	return g.Wait()
}

// hidden reports whether a policy is known to refuse the deletion of p.
func (s *sweeper) hidden(ctx context.Context, c blobstore.Container, p blobstore.Properties) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.guard[c.Name()]
	if g == nil {
		g = &guard{}
		if s.guard == nil {
			s.guard = map[string]*guard{}
		}
		s.guard[c.Name()] = g
		if pr, ok := s.r.store.(blobstore.Protector); ok {
			// Not to be told costs one refused deletion, not the step.
			g.protection, _ = pr.ContainerProtection(ctx, c.Name())
		}
	}
	if g.protection.LegalHold || !g.refused.IsZero() && !p.LastModified.Before(g.refused) {
		return true
	}
	return g.protection.WriteOnce > 1 && s.now.Before(p.LastModified.Add(g.protection.WriteOnce))
}

// list runs fn over a listing until it says stop.
func list(ctx context.Context, c blobstore.Container, prefix string, fn func(blobstore.Properties) (stop bool, err error)) error {
	for p, err := range c.List(ctx, prefix, "") {
		if err != nil {
			return fmt.Errorf("list %s of %s: %w", prefix, c.Name(), err)
		}
		if stop, err := fn(p); stop || err != nil {
			return err
		}
	}
	return nil
}

// manifests deletes those that the record retires, whoever put them: a number that a sleeper refilled too.
func (s *sweeper) manifests(ctx context.Context) error {
	ret := s.p.next
	top := ret.Floor
	if n := len(ret.Retired); n > 0 {
		top = ret.Retired[n-1].To
	}
	if top == 0 {
		return nil
	}
	b := &batch{s: s, c: s.r.journal, kind: sweptManifests}
	err := list(ctx, b.c, logPrefix, func(p blobstore.Properties) (bool, error) {
		n, ok := seqOfName(p.Name, logPrefix)
		switch {
		case !ok || n <= top && !ret.Retires(n):
			return false, nil
		case n > top:
			return true, nil
		}
		return b.add(ctx, p)
	})
	if err != nil {
		return err
	}
	return b.flush(ctx)
}

// checkpoints deletes the snapshots and then the records of checkpoints that carry nothing. Void records stay: a
// checkpointer that slept must not find its number free after its snapshots were deleted (rule 23).
func (s *sweeper) checkpoints(ctx context.Context) error {
	ret := s.p.next
	var gone []blobstore.Properties
	if err := list(ctx, s.r.replica, ckptPrefix, func(p blobstore.Properties) (bool, error) {
		if n, ok := seqOfName(p.Name, ckptPrefix); ok && ret.givesUpCheckpoint(n) {
			gone = append(gone, p)
		}
		return false, nil
	}); err != nil {
		return err
	}
	for _, p := range gone {
		if s.left <= 0 {
			s.res.More = true
			return nil
		}
		n, _ := seqOfName(p.Name, ckptPrefix)
		b, err := readAll(ctx, s.r.replica, p.Name, maxCheckpoint)
		if errors.Is(err, blobstore.ErrNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read checkpoint %d: %w", n, err)
		}
		c, err := s.r.decodeCheckpoint(b, n)
		if err != nil {
			return err
		}
		if c.Void {
			continue
		}
		if err := s.parallel(ctx, len(c.Disks), func(ctx context.Context, i int) error {
			return s.dropSnapshot(ctx, DiskBlobName(c.Disks[i].ID, c.Disks[i].Gen), c.Disks[i].Snapshot)
		}); err != nil {
			return err
		}
		one := &batch{s: s, c: s.r.replica, kind: sweptCheckpoints, items: []blobstore.Properties{p}}
		if err := one.flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *sweeper) dropSnapshot(ctx context.Context, blob string, id blobstore.SnapshotID) error {
	err := s.r.replica.DeleteSnapshot(ctx, blob, id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left--
	switch {
	case err == nil:
		s.res.Deleted[sweptSnapshots]++
	case errors.Is(err, blobstore.ErrNotFound):
	default:
		return fmt.Errorf("delete snapshot %s of %s: %w", id, blob, err)
	}
	return nil
}

// maps deletes extent maps below the floor, and those that a longer one contains.
func (s *sweeper) maps(ctx context.Context) error {
	floor := s.p.next.Floor
	var all []SeqRange
	props := map[SeqRange]blobstore.Properties{}
	if err := list(ctx, s.r.replica, mapPrefix, func(p blobstore.Properties) (bool, error) {
		if m, ok := rangeOfMap(p.Name); ok {
			all = append(all, m)
			props[m] = p
		}
		return false, nil
	}); err != nil {
		return err
	}
	b := &batch{s: s, c: s.r.replica, kind: sweptMaps}
	slices.SortFunc(all, func(x, y SeqRange) int {
		if x.From != y.From {
			return int(x.From) - int(y.From)
		}
		return int(y.To) - int(x.To)
	})
	reach := Seq(0) // how far a map that began at or before this one goes
	for _, m := range all {
		if m.To > floor && m.To > reach {
			reach = m.To
			continue
		}
		if full, err := b.add(ctx, props[m]); full || err != nil {
			return err
		}
	}
	return b.flush(ctx)
}

// configs deletes configurations that no manifest of the chain names, when a point was committed long after they were
// stored. The chain is read again: an old configuration may have come back into use since the plan was made.
func (s *sweeper) configs(ctx context.Context) error {
	_, entries, err := s.r.snapshotChain(ctx)
	if err != nil {
		return err
	}
	named := map[string]bool{}
	var newest time.Time
	for i := range entries {
		e := &entries[i]
		if s.p.next.Retires(e.Seq) {
			continue
		}
		named[e.config] = true
		if e.Kind.IsPoint() && e.Stored.After(newest) {
			newest = e.Stored
		}
	}
	b := &batch{s: s, c: s.r.journal, kind: sweptConfigs}
	err = list(ctx, b.c, configPrefix, func(p blobstore.Properties) (bool, error) {
		id := strings.TrimSuffix(strings.TrimPrefix(p.Name, configPrefix), jsonSuffix)
		if !isHex(id, 64) || named[id] || newest.Sub(p.LastModified) < configAge {
			return false, nil
		}
		return b.add(ctx, p)
	})
	if err != nil {
		return err
	}
	return b.flush(ctx)
}
