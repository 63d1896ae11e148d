package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
)

// maxRewindTries bounds how often one Rewind is computed. Under a close only the same failover can move the head, so
// a race means two orchestrators of one failover.
const maxRewindTries = 8

// RewindOptions say what to set back. Failover and Target are required.
type RewindOptions struct {
	// Failover whose close is the newest fence.
	Failover string
	// Target is the ordinal of any base or point in the chain, also one above which a rewind stands: rewinds go back and
	// forth.
	Target Ordinal
	// Exact sets back also what only partials above the target changed, when no other point and no rewind stands above it: for
	// who goes on from the replica's own disks. It voids their pass and may move as much data as the pass did. Without it the
	// target is reached then, since points are read by their manifests, and after a cancel the pass goes on.
	Exact bool
	// Parallel is how many segments are built at once, each taking up to about 80 MiB of memory (the segment, and small
	// segments of the journal that are kept); default 2. With 1 no goroutine is started.
	Parallel int
	// Compression of the segments; default segment.Fast.
	Compression segment.Compression
	// Host, Reason and Trace go into the manifest.
	Host, Reason, Trace string
	// Progress, when set, hears how many bytes of the disks are set back and how many there are, from any goroutine.
	// It begins again when the rewind is computed again.
	Progress func(done, total int64)
}

// RewindResult of a Rewind that did not fail.
type RewindResult struct {
	// Outcome: Committed; AlreadyCommitted when this failover's rewind to the target is the newest content; NothingToDo
	// when the newest point or rewind is the target (or an older failover's rewind to it) anyway.
	Outcome Outcome
	// Seq is the manifest whose content is the target's: the rewind, or the target itself.
	Seq Seq
	// TargetSeq is the target's own manifest.
	TargetSeq Seq
	// Segments of the rewind, and the bytes they take in storage.
	Segments int
	Bytes    int64
	// SetBack is how many bytes of the disks this call set back, Zeros how many of them to zeros; 0 unless Committed.
	SetBack, Zeros int64
	// Tries is how often it was computed.
	Tries int
}

// Rewind makes an earlier (or later) point the chain's newest state: unless it is that already, it stores the target's bytes of every
// extent that any manifest above the target changed, and commits them as a rewind exactly on the head they were
// computed from (rules 6, 16, 17). Afterwards the state ordinal is the target's, running passes are void, and points
// above stay listed and reachable. A disk the target did not have becomes zeros where it was written since; one that
// was removed since comes back.
//
// It is idempotent: after an error that is none of those below, call it again. ErrNotFenced: the failover's close is
// not the newest fence. ErrNotFound: no such point. ErrDiskReplaced. ErrNotReachable: retention took what the target
// needs. ErrContention: another orchestrator of the same failover kept moving the head.
func (r *Replica) Rewind(ctx context.Context, o RewindOptions) (RewindResult, error) {
	if o.Parallel == 0 {
		o.Parallel = 2
	}
	res, err := r.rewind(ctx, &o)
	if err != nil {
		return RewindResult{}, fmt.Errorf("rewind lineage %s to point %d by failover %s: %w", r.lineage, o.Target, o.Failover, err)
	}
	return res, nil
}

func (r *Replica) rewind(ctx context.Context, o *RewindOptions) (RewindResult, error) {
	if !validToken(o.Failover, maxFailover) || o.Target == 0 || o.Parallel < 1 || o.Parallel > 16 {
		return RewindResult{}, fmt.Errorf("failover %q, parallel %d: %w", o.Failover, o.Parallel, ErrInvalid)
	}
	pinned := ""
	defer func() {
		if pinned != "" { // also after an error: the next attempt pins for itself
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unpinTimeout)
			defer cancel()
			_ = r.Unpin(ctx, pinned, 0) // what stays ends by its time
		}
	}()
	for try := 1; try <= maxRewindTries; try++ {
		res, err := r.rewindOnce(ctx, o, &pinned)
		if errors.Is(err, ErrHeadMoved) {
			continue
		}
		res.Tries = try
		return res, err
	}
	return RewindResult{}, fmt.Errorf("the head moved %d times: %w", maxRewindTries, ErrContention)
}

// Bounds of the pin that a rewind holds on its target.
const (
	rewindPin    = 24 * time.Hour
	unpinTimeout = 10 * time.Second
)

// pinTarget keeps what the target needs while it is read, by an owner of this attempt alone: another attempt of the same
// failover must not end it. The chain is read again after it.
func (r *Replica) pinTarget(ctx context.Context, o *RewindOptions, target Seq, pinned *string) error {
	now, err := r.store.Now(ctx)
	if err != nil {
		return fmt.Errorf("pin the target: %w", err)
	}
	*pinned = "failover/" + o.Failover + "/" + string(NewTx())
	return r.Pin(ctx, Pin{Seq: target, Owner: *pinned, Until: now.Add(rewindPin), Reason: "rewind"})
}

// rewindOnce computes from one head and commits on it, or not at all.
func (r *Replica) rewindOnce(ctx context.Context, o *RewindOptions, pinned *string) (res RewindResult, err error) {
	st, entries, ret, err := r.viewChain(ctx)
	if err != nil {
		return res, err
	}
	if _, err := st.admit(&Manifest{Kind: KindRewind, Failover: o.Failover, Base: o.Target}, &r.bugs); err != nil {
		return res, err
	}
	res.TargetSeq = st.points[o.Target]
	i := slices.IndexFunc(entries, func(e Entry) bool { return e.Seq == res.TargetSeq })
	if i < 0 {
		return res, fmt.Errorf("manifest %d: %w", res.TargetSeq, ErrNotFound)
	}
	target, newest := entries[i], entries[i]
	for _, e := range entries {
		if e.Seq > newest.Seq && (e.Kind.IsPoint() || e.Kind == KindRewind || e.Kind == KindPartial && o.Exact) {
			newest = e
		}
	}
	if done, err := r.alreadyAt(ctx, o, newest, &res); done || err != nil {
		return res, err
	}
	if *pinned == "" {
		if err := r.pinTarget(ctx, o, target.Seq, pinned); err != nil {
			return res, err
		}
		return r.rewindOnce(ctx, o, pinned)
	}
	m, err := r.Manifest(ctx, target.Seq)
	if err != nil {
		return res, err
	}
	backs, err := r.planRewind(ctx, st, entries, ret, target)
	if err != nil {
		return res, err
	}
	p := Proposal{Kind: KindRewind, Base: o.Target, Failover: o.Failover, At: st.Head + 1, Config: m.Config,
		Host: o.Host, Reason: o.Reason, Trace: o.Trace}
	if r.bugs.RewindNotComputedAgain {
		p.At = 0
	}
	if err := r.packRewind(ctx, o, backs, &res); err != nil {
		return res, err
	}
	for _, b := range backs {
		d := Disk{ID: b.d.ID, Gen: b.d.Gen, Size: b.d.Size, Segments: b.segs}
		p.Disks = append(p.Disks, d)
		res.Segments += len(d.Segments)
		for _, s := range d.Segments {
			res.Bytes += s.Bytes
		}
	}
	c, err := r.Commit(ctx, p)
	res.Outcome, res.Seq = c.Outcome, c.Seq
	return res, err
}

// alreadyAt reports whether the newest state is the target's, and fills res then.
func (r *Replica) alreadyAt(ctx context.Context, o *RewindOptions, newest Entry, res *RewindResult) (bool, error) {
	res.Seq = newest.Seq
	if newest.Seq == res.TargetSeq {
		res.Outcome = NothingToDo
		return true, nil
	}
	if newest.Kind != KindRewind {
		return false, nil
	}
	m, err := r.Manifest(ctx, newest.Seq)
	if err != nil {
		return false, err
	}
	if m.Base != o.Target && !r.bugs.RewindTrustsAnyRewind {
		return false, nil
	}
	if m.Failover != o.Failover {
		res.Outcome = NothingToDo
		return true, nil
	}
	res.Outcome, res.Bytes = AlreadyCommitted, newest.Bytes
	for _, d := range m.Disks {
		res.Segments += len(d.Segments)
	}
	return true, nil
}

// back is one disk to set back.
type back struct {
	d       DiskState  // as the rewind lists it
	at      Seq        // where to read it; 0: the target had no such disk, which reads as zeros
	changed extent.Set // where head and target may differ
	all     bool       // that is the whole disk
	segs    []Segment
}

func (b *back) whole() {
	b.all = true
	b.changed.Add(wholeDisk(b.d))
}

// unsaid lists the ranges above the target whose own segments cannot be asked: those that the record retires, and released
// runs. all is false when the entries lack more than that.
func unsaid(entries []Entry, ret *Retention, target, head Seq) (holes []SeqRange, all bool) {
	missing := head - target - Seq(len(entries))
	if ret != nil {
		for _, g := range ret.Retired {
			if g.From > target && g.To <= head {
				holes = append(holes, SeqRange{g.From, g.To})
				missing -= g.To - g.From + 1
			}
		}
		for _, g := range ret.Released {
			if g.From > target {
				holes = append(holes, g)
			}
		}
	}
	return holes, missing == 0
}

// planRewind says what of each disk to set back: what any manifest above the target says anything about. Where manifests
// are retired, or their segments given up, extent maps say it. Where that is not known (the disk left the chain in between, or
// there is no such map) it is the whole disk.
func (r *Replica) planRewind(ctx context.Context, st *State, entries []Entry, ret *Retention, target Entry) ([]*back, error) {
	entries = slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return e.Seq <= target.Seq })
	var backs []*back
	for _, d := range sortedDisks(target.disks) {
		now, ok := st.disks[d.ID]
		if ok && now.Gen != d.Gen {
			return nil, fmt.Errorf("disk %s: generation %d at the point, %d now: %w", d.ID, d.Gen, now.Gen, ErrDiskReplaced)
		}
		b := &back{d: d, at: target.Seq}
		if !ok || now.First != d.First {
			b.whole()
		}
		backs = append(backs, b)
	}
	for _, d := range st.Disks() {
		if _, ok := target.disks[d.ID]; !ok {
			backs = append(backs, &back{d: d})
		}
	}
	slices.SortFunc(backs, func(a, b *back) int { return strings.Compare(a.d.ID, b.d.ID) })
	known := false
	if holes, all := unsaid(entries, ret, target.Seq, st.Head); all {
		var err error
		if known, err = r.addMapped(ctx, holes, backs); err != nil {
			return nil, err
		}
	}
	if !known {
		for _, b := range backs {
			b.whole()
		}
		return backs, nil
	}
	var list []said
	for _, e := range entries {
		if e.Kind.IsFence() || ret.released(e.Seq) || r.bugs.RewindSkipsPartials && e.Kind == KindPartial || r.bugs.RewindSkipsRewinds && e.Kind == KindRewind {
			continue
		}
		m, err := r.Manifest(ctx, e.Seq)
		if err != nil {
			return nil, err
		}
		for _, b := range backs {
			if b.all {
				continue
			}
			for _, n := range collect(nil, m, b.d) {
				list = append(list, said{n, b})
			}
		}
	}
	return backs, r.addChanged(ctx, list)
}

// said is a segment that says something about a disk to set back.
type said struct {
	named
	b *back
}

// addChanged adds the extents of every segment to its disk. Only indexes are read, some at a time.
func (r *Replica) addChanged(ctx context.Context, list []said) error {
	for len(list) > 0 {
		n := min(len(list), max(r.opens, 1))
		opened := make([]*segData, n)
		if err := inParallel(ctx, n, func(ctx context.Context, i int) (err error) {
			opened[i], err = r.openIndex(ctx, list[i].s)
			return r.orRetired(ctx, list[i].m.Seq, err)
		}); err != nil {
			return err
		}
		for i, sd := range opened {
			m, b := list[i].m, list[i].b
			if err := sd.matches(r.lineage, m, b.d); err != nil {
				return fmt.Errorf("manifest %d: segment %s: %w", m.Seq, sd.name, err)
			}
			for _, e := range sd.ix.Extents {
				b.changed.Add(extent.Range{Off: e.Off, Len: e.Len})
			}
		}
		list = list[n:]
	}
	return nil
}
