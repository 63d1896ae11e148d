package replica

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// attempt is whose a segment is: an ordinal's, or a rewind's of a failover.
type attempt struct {
	ordinal  Ordinal // of a point or pass; 0 for a rewind
	failover string  // of a rewind
	tx       string
}

// attemptOf parses seg/<ordinal>-<tx>/… and seg/rewind-<failover>-<tx>/…
func attemptOf(name string) (a attempt, ok bool) {
	dir, _, ok := strings.Cut(strings.TrimPrefix(name, segPrefix), "/")
	at := strings.LastIndexByte(dir, '-')
	if !ok || at < 0 || !isHex(dir[at+1:], 16) {
		return a, false
	}
	a.tx = dir[at+1:]
	if f, is := strings.CutPrefix(dir[:at], "rewind-"); is {
		a.failover = f
		return a, f != ""
	}
	o, err := ParseOrdinal(dir[:at])
	a.ordinal = o
	return a, err == nil && o > 0
}

// dead reports whether an ordinal can never be committed any more: it is strictly below the highest of the chain (rule 25).
// Then it is in the chain, or never will be.
func (s *sweeper) dead(o Ordinal) bool { return o < s.p.st.Highest || s.r.bugs.OrphansByAge }

// given reports whether the ordinal is of what the record retires or older, so that its segments were not just put.
func (s *sweeper) given(o Ordinal) bool {
	ret := s.p.next
	if n := len(ret.Retired); n > 0 {
		return o <= ret.Retired[n-1].Anchor.Highest
	}
	return ret.Anchor != nil && o <= ret.Anchor.Highest
}

func (s *sweeper) young(p blobstore.Properties) bool {
	return s.now.Sub(p.LastModified) < s.o.OrphanAge
}

// segments deletes, of the journal, the segments of points that the chain does not have and can never have, and of other
// attempts of points that it has; and of rewinds that no manifest names, unless their failover's close is the newest fence.
func (s *sweeper) segments(ctx context.Context) error {
	chain := map[Ordinal]Seq{} // points of the chain as the record leaves it
	for i := range s.p.entries {
		if e := &s.p.entries[i]; e.Kind.IsPoint() && !s.p.next.Retires(e.Seq) {
			chain[e.Ordinal] = e.Seq
		}
	}
	b := &batch{s: s, c: s.r.journal, kind: sweptSegments}
	var last attempt
	var several []Ordinal
	var rewinds []attempt
	err := list(ctx, b.c, segPrefix, func(p blobstore.Properties) (bool, error) {
		a, ok := attemptOf(p.Name)
		if !ok {
			return false, nil
		}
		was := last
		last = a
		switch {
		case a.failover != "":
			if a != was {
				rewinds = append(rewinds, a)
			}
			return false, nil
		case !s.dead(a.ordinal):
			return false, nil
		case chain[a.ordinal] != 0:
			if was.ordinal == a.ordinal && was.tx != a.tx && (len(several) == 0 || several[len(several)-1] != a.ordinal) {
				several = append(several, a.ordinal)
			}
			return false, nil
		case !s.given(a.ordinal) && s.young(p):
			return false, nil
		}
		return b.add(ctx, p)
	})
	if err == nil {
		err = b.flush(ctx)
	}
	if err != nil {
		return err
	}
	for _, o := range several {
		if err := s.attempts(ctx, fmt.Sprintf("%s%012d-", segPrefix, uint64(o)), []Seq{chain[o]}); err != nil {
			return err
		}
	}
	return s.rewinds(ctx, rewinds)
}

// attempts deletes what has the prefix and no manifest of seqs names.
func (s *sweeper) attempts(ctx context.Context, prefix string, seqs []Seq) error {
	named := map[string]bool{}
	for _, n := range seqs {
		m, err := s.r.Manifest(ctx, n)
		if errors.Is(err, ErrNotFound) || errors.Is(err, blobstore.ErrNotFound) {
			return nil // another step retired it: what it named is found without it
		}
		if err != nil {
			return err
		}
		for _, d := range m.Disks {
			for _, g := range d.Segments {
				named[g.Name] = true
			}
		}
	}
	b := &batch{s: s, c: s.r.journal, kind: sweptOrphans}
	err := list(ctx, b.c, prefix, func(p blobstore.Properties) (bool, error) {
		if _, ok := attemptOf(p.Name); !ok || named[p.Name] || s.young(p) {
			return false, nil
		}
		return b.add(ctx, p)
	})
	if err != nil {
		return err
	}
	return b.flush(ctx)
}

// rewinds decides about segments that were listed before the chain is read here: a rewind stores them only once its close
// is in the chain, so one that is still at work is seen.
func (s *sweeper) rewinds(ctx context.Context, list []attempt) error {
	if len(list) == 0 {
		return nil
	}
	st, entries, err := s.r.snapshotChain(ctx)
	if err != nil {
		return err
	}
	var seqs []Seq
	for _, e := range entries {
		if e.Kind == KindRewind {
			seqs = append(seqs, e.Seq)
		}
	}
	for _, a := range list {
		if closed, _ := st.FenceSeqs(a.failover); !s.r.bugs.RewindOrphansAnytime && (closed == 0 || st.Closed() && st.Fence.Failover == a.failover) {
			continue
		}
		if err := s.attempts(ctx, rewindPrefix+a.failover+"-"+a.tx+"/", seqs); err != nil {
			return err
		}
	}
	return nil
}

// staging deletes the segments of passes that the chain does not have any more or whose run is released, and of passes
// that can never be in it (rules 15 and 25). A pass that the chain still has keeps other attempts of its tasks until then.
func (s *sweeper) staging(ctx context.Context) error {
	live := map[Ordinal]bool{}
	for i := range s.p.entries {
		if e := &s.p.entries[i]; e.Kind == KindPartial && !s.p.next.Retires(e.Seq) && !s.p.next.released(e.Seq) {
			live[e.Ordinal] = true
		}
	}
	b := &batch{s: s, c: s.r.staging, kind: sweptStaging}
	var known map[Ordinal]bool // passes of the chain: not just put
	for i := range s.p.entries {
		if e := &s.p.entries[i]; e.Kind == KindPartial {
			if known == nil {
				known = map[Ordinal]bool{}
			}
			known[e.Ordinal] = true
		}
	}
	err := list(ctx, b.c, segPrefix, func(p blobstore.Properties) (bool, error) {
		a, ok := attemptOf(p.Name)
		if !ok || a.failover != "" || !s.dead(a.ordinal) || live[a.ordinal] && !s.r.bugs.StagingEarly {
			return false, nil
		}
		if !known[a.ordinal] && !s.given(a.ordinal) && s.young(p) {
			return false, nil
		}
		return b.add(ctx, p)
	})
	if err != nil {
		return err
	}
	return b.flush(ctx)
}

// snapshots deletes those that no checkpoint names, below the newest checkpoint: whoever took one there has gone on. A void
// record is put first (rule 23).
func (s *sweeper) snapshots(ctx context.Context) error {
	top := Seq(0)
	named := map[string]bool{}
	key := func(blob string, id blobstore.SnapshotID) string { return blob + "@" + string(id) }
	for _, c := range s.p.ckpts {
		top = c.Seq
		for _, d := range c.Disks {
			named[key(DiskBlobName(d.ID, d.Gen), d.Snapshot)] = true
		}
	}
	var blobs []string
	if err := list(ctx, s.r.replica, diskPrefix, func(p blobstore.Properties) (bool, error) {
		if p.IsPages {
			blobs = append(blobs, p.Name)
		}
		return false, nil
	}); err != nil {
		return err
	}
	for _, blob := range blobs {
		var unnamed []blobstore.Properties
		for p, err := range s.r.replica.ListSnapshots(ctx, blob) {
			if err != nil {
				return fmt.Errorf("list snapshots of %s: %w", blob, err)
			}
			if n, ok := snapshotSeq(p); ok && n < top && !named[key(blob, p.Snapshot)] {
				unnamed = append(unnamed, p)
			}
		}
		for _, p := range unnamed {
			n, _ := snapshotSeq(p)
			if s.left <= 0 {
				s.res.More = true
				return nil
			}
			if err := s.orphanSnapshot(ctx, blob, n, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// snapshotSeq is the manifest that a snapshot of ours was taken at.
func snapshotSeq(p blobstore.Properties) (Seq, bool) {
	n, err := ParseSeq(p.Metadata["seq"])
	return n, err == nil && n > 0
}

func (s *sweeper) orphanSnapshot(ctx context.Context, blob string, n Seq, p blobstore.Properties) error {
	if s.young(p) {
		return nil
	}
	if s.r.bugs.SnapshotWithoutVoid {
		return s.dropSnapshot(ctx, blob, p.Snapshot)
	}
	c, err := s.r.VoidCheckpoint(ctx, n)
	if err != nil {
		return err
	}
	for _, d := range c.Disks {
		if DiskBlobName(d.ID, d.Gen) == blob && d.Snapshot == p.Snapshot {
			return nil
		}
	}
	return s.dropSnapshot(ctx, blob, p.Snapshot)
}
