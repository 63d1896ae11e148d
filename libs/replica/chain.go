package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Entry is what the chain keeps in memory of each manifest.
type Entry struct {
	Seq         Seq
	Kind        Kind
	Ordinal     Ordinal // of a point or pass
	CutTime     time.Time
	Consistency Consistency
	Bytes       int64 // stored bytes of its segments
	// Signals of a point; nil when unknown. Never changed.
	Signals *Signals
	// Stored is when the manifest was stored, by storage time.
	Stored time.Time

	disks  map[string]DiskState // at this manifest; shared between entries, never changed
	config string
	state  anchorState
}

// anchorState is what an anchor at an entry says besides its disks.
type anchorState struct {
	hash                  string
	epoch                 Epoch
	open, base, newest    Seq
	stateOrdinal, highest Ordinal
	fences                map[string]fenceSeqs // shared, never changed
}

// anchor of the chain at this entry. Only a base, point or rewind can be one: it ends what came before.
func (e *Entry) anchor() *Anchor {
	return newAnchor(e.Seq, &e.state, sortedDisks(e.disks))
}

// Bounds of the cache of decoded manifests: enough for one batch of an applier.
const (
	maxCachedManifests     = 1024
	maxCachedManifestBytes = 16 << 20
)

// chain is the verified chain in memory.
type chain struct {
	state     State
	entries   []Entry // ascending; holes where ranges are retired
	retention *Retention

	tag blobstore.ETag // of the record; empty when there is none

	cache      map[Seq]cachedManifest
	cacheOrder []Seq
	cacheBytes int
}

type cachedManifest struct {
	m     *Manifest
	bytes int
}

func (c *chain) reset(to *State) {
	*c = chain{retention: c.retention, tag: c.tag}
	if to != nil {
		c.state = *to
	}
}

// entry finds a manifest that is in the chain.
func (c *chain) entry(s Seq) (*Entry, bool) {
	i, ok := slices.BinarySearchFunc(c.entries, s, func(e Entry, s Seq) int {
		switch {
		case e.Seq < s:
			return -1
		case e.Seq > s:
			return 1
		}
		return 0
	})
	if !ok {
		return nil, false
	}
	return &c.entries[i], true
}

// above yields the index of the first entry above s.
func (c *chain) above(s Seq) int {
	i, _ := slices.BinarySearchFunc(c.entries, s+1, func(e Entry, s Seq) int {
		if e.Seq < s {
			return -1
		}
		if e.Seq > s {
			return 1
		}
		return 0
	})
	return i
}

// add verifies and appends the manifest after the head. stored is its storage time.
func (c *chain) add(body []byte, stored time.Time, lineage Lineage, b *bugs) error {
	m, err := DecodeManifest(body)
	if err != nil {
		return fmt.Errorf("manifest %d: %w: %w", c.state.Head+1, ErrCorrupt, err)
	}
	if m.Lineage != lineage {
		return fmt.Errorf("manifest %d is of lineage %s: %w", m.Seq, m.Lineage, ErrCorrupt)
	}
	if err := c.state.next(m, hashHex(body), b); err != nil {
		return err
	}
	st := &c.state
	e := Entry{Seq: m.Seq, Kind: m.Kind, Ordinal: m.Ordinal(), CutTime: m.CutTime, Consistency: m.Consistency, Signals: m.Signals, Stored: stored,
		disks: st.disks, config: m.Config, state: anchorState{hash: st.HeadHash, epoch: st.Epoch, open: st.Open, base: st.Base,
			newest: st.Newest, stateOrdinal: st.StateOrdinal, highest: st.Highest, fences: st.fences}}
	if n := len(c.entries); n > 0 && c.entries[n-1].config == e.config {
		e.config = c.entries[n-1].config // one string for all
	}
	for _, d := range m.Disks {
		for _, s := range d.Segments {
			e.Bytes += s.Bytes
		}
	}
	c.entries = append(c.entries, e)
	c.remember(m, len(body))
	return nil
}

func (c *chain) remember(m *Manifest, size int) {
	if c.cache == nil {
		c.cache = map[Seq]cachedManifest{}
	}
	if _, ok := c.cache[m.Seq]; ok {
		return
	}
	c.cache[m.Seq] = cachedManifest{m, size}
	c.cacheOrder = append(c.cacheOrder, m.Seq)
	c.cacheBytes += size
	for len(c.cacheOrder) > 1 && (len(c.cacheOrder) > maxCachedManifests || c.cacheBytes > maxCachedManifestBytes) {
		c.cacheBytes -= c.cache[c.cacheOrder[0]].bytes
		delete(c.cache, c.cacheOrder[0])
		c.cacheOrder = c.cacheOrder[1:]
	}
}

// refresh brings the chain up to storage's head. The caller holds the turn (or owns r alone).
func (r *Replica) refresh(ctx context.Context) error {
	if r.damage != nil {
		return nil // what is known is all that can be
	}
	const tries = 4 // a floor may rise while the log is listed, but not four times in one refresh
	for range tries {
		again, err := r.refreshOnce(ctx)
		if err != nil || !again {
			return err
		}
	}
	return fmt.Errorf("chain of lineage %s has a gap after manifest %d: %w", r.lineage, r.chain.state.Head, ErrCorrupt)
}

// refreshOnce reports again when the log did not connect to what is known: retention may have moved meanwhile.
func (r *Replica) refreshOnce(ctx context.Context) (again bool, err error) {
	ret, tag, err := r.readRetention(ctx)
	if err != nil {
		return false, err
	}
	r.obey(ret, tag)
	var names []blobstore.Properties
	for p, err := range r.journal.List(ctx, logPrefix, manifestName(r.chain.state.Head)) {
		if errors.Is(err, blobstore.ErrNotFound) && r.chain.state.Head == 0 {
			return false, fmt.Errorf("lineage %s: %w", r.lineage, ErrNoLineage)
		}
		if err != nil {
			return false, fmt.Errorf("list manifests: %w", err)
		}
		if names = append(names, p); len(names) == aheadNames {
			if again, err := r.follow(ctx, ret, tag, names); again || err != nil {
				return again, err
			}
			names = names[:0]
		}
	}
	if again, err := r.follow(ctx, ret, tag, names); again || err != nil {
		return again, err
	}
	if a, in := ret.anchorFor(r.chain.state.Head + 1); in {
		r.chain.jump(a, ret)
	}
	return false, nil
}

// Bounds of reading ahead when many manifests are new.
const (
	aheadNames    = 512 // listed ones held at a time
	aheadMin      = 128 // fewer are read one after the other
	aheadGroup    = 32
	aheadBytes    = 16 << 20
	aheadParallel = 8
)

type storedManifest struct {
	body   []byte
	stored time.Time
}

// follow adds the listed manifests to the chain.
func (r *Replica) follow(ctx context.Context, ret *Retention, tag blobstore.ETag, names []blobstore.Properties) (again bool, err error) {
	ahead := map[Seq]storedManifest{}
	for i, p := range names {
		seq, ok := seqOfName(p.Name, logPrefix)
		if !ok {
			return false, fmt.Errorf("object %s in the log: %w", p.Name, ErrCorrupt)
		}
		if len(names) >= aheadMin && i%aheadGroup == 0 {
			if err := r.readAhead(ctx, ret, names[i:min(i+aheadGroup, len(names))], ahead); err != nil {
				return false, err
			}
		}
		// A listing may miss a name that appeared while it ran although it shows a later one: read up to seq.
		for {
			if a, in := ret.anchorFor(r.chain.state.Head + 1); in {
				r.chain.jump(a, ret)
			}
			next := r.chain.state.Head + 1
			if seq < next {
				break
			}
			m, ok := ahead[next]
			if !ok {
				body, props, err := readAllOf(ctx, r.journal, manifestName(next), MaxManifest)
				if errors.Is(err, blobstore.ErrNotFound) {
					return true, nil
				}
				if err != nil {
					return false, fmt.Errorf("read manifest %d: %w", next, err)
				}
				m = storedManifest{body, props.LastModified}
			}
			delete(ahead, next)
			if err := r.chain.add(m.body, m.stored, r.lineage, &r.bugs); err != nil {
				return r.retiredSince(ctx, next, tag, err)
			}
		}
	}
	return false, nil
}

// readAhead reads a group of listed manifests side by side. What is missing or large is left to be read in its turn.
func (r *Replica) readAhead(ctx context.Context, ret *Retention, names []blobstore.Properties, ahead map[Seq]storedManifest) error {
	var bytes int64
	for _, p := range names {
		bytes += p.Size
	}
	if bytes > aheadBytes {
		return nil
	}
	got := make([]storedManifest, len(names))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(aheadParallel)
	for i, p := range names {
		if n, ok := seqOfName(p.Name, logPrefix); !ok || n <= r.chain.state.Head || ret.Retires(n) {
			continue
		}
		g.Go(func() error {
			body, props, err := readAllOf(ctx, r.journal, p.Name, MaxManifest)
			if err != nil && !errors.Is(err, blobstore.ErrNotFound) {
				return fmt.Errorf("read manifest %s: %w", p.Name, err)
			}
			got[i] = storedManifest{body, props.LastModified}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, p := range names {
		if n, ok := seqOfName(p.Name, logPrefix); ok && got[i].body != nil {
			ahead[n] = got[i]
		}
	}
	return nil
}

// retiredSince decides about a manifest that does not fit the chain: when the record has changed since it was read, a sleeper
// may have refilled a number that is retired now (rule 8), and the chain is read again.
func (r *Replica) retiredSince(ctx context.Context, next Seq, tag blobstore.ETag, broken error) (again bool, err error) {
	_, now, err := r.readRetention(ctx)
	switch {
	case err != nil:
		return false, fmt.Errorf("manifest %d: %s; whether it was retired since is not known: %w", next, broken.Error(), err)
	case now == tag:
		return false, broken
	}
	return true, nil
}

// obey makes the chain forget what the record retires. A chain that reaches above all of it only loses entries; one whose
// head is retired goes on from an anchor, for a sleeper may have refilled that number (rule 8).
func (r *Replica) obey(ret *Retention, tag blobstore.ETag) {
	c := &r.chain
	c.retention, c.tag = ret, tag
	if ret == nil {
		return
	}
	if ret.Floor > c.state.Head {
		c.reset(ret.Anchor.state(ret.Floor))
	} else if a, in := ret.anchorFor(c.state.Head); in && c.state.Head > 0 {
		c.jump(a, ret)
	}
	c.state.Floor = ret.Floor
	for o, s := range c.state.points {
		if ret.Retires(s) {
			delete(c.state.points, o)
		}
	}
	c.entries = slices.DeleteFunc(c.entries, func(e Entry) bool { return ret.Retires(e.Seq) })
}

// jump goes on from an anchor above the head, keeping the entries below it.
func (c *chain) jump(a *Anchor, ret *Retention) {
	st := a.state(ret.Floor)
	for o, s := range c.state.points {
		if !ret.Retires(s) {
			st.points[o] = s
		}
	}
	c.state = *st
}

// manifest reads a manifest of the chain, from the cache or storage. The caller holds the turn.
func (r *Replica) manifest(ctx context.Context, seq Seq) (*Manifest, error) {
	if _, ok := r.chain.entry(seq); !ok {
		return nil, fmt.Errorf("manifest %d of lineage %s: %w", seq, r.lineage, ErrNotFound)
	}
	if c, ok := r.chain.cache[seq]; ok {
		return c.m, nil
	}
	body, err := readAll(ctx, r.journal, manifestName(seq), MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("read manifest %d: %w", seq, err)
	}
	m, err := DecodeManifest(body)
	if err != nil {
		return nil, fmt.Errorf("read manifest %d: %w: %w", seq, ErrCorrupt, err)
	}
	if m.Seq != seq || m.Lineage != r.lineage {
		return nil, fmt.Errorf("manifest %d holds %d of lineage %s: %w", seq, m.Seq, m.Lineage, ErrCorrupt)
	}
	r.chain.remember(m, len(body))
	return m, nil
}

// snapshotChain refreshes and returns the state and a copy of the entries.
func (r *Replica) snapshotChain(ctx context.Context) (*State, []Entry, error) {
	st, entries, _, err := r.viewChain(ctx)
	return st, entries, err
}

// viewChain is snapshotChain with the retention record that the entries obey, nil when there is none.
func (r *Replica) viewChain(ctx context.Context) (*State, []Entry, *Retention, error) {
	if err := r.lock(ctx); err != nil {
		return nil, nil, nil, err
	}
	defer r.unlock()
	if err := r.refresh(ctx); err != nil {
		return nil, nil, nil, err
	}
	return r.chain.state.clone(), slices.Clone(r.chain.entries), r.chain.retention, nil
}
