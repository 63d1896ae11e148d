package replica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// UsageKind is one kind of thing that a lineage keeps in storage.
type UsageKind string

// The kinds of usage.
const (
	UsageJournal   UsageKind = "journal"   // manifests, configurations, and segments that manifests name
	UsageStaging   UsageKind = "staging"   // segments of passes
	UsageReplica   UsageKind = "replica"   // page blobs, written ranges only, and the records beside them
	UsageSnapshots UsageKind = "snapshots" // pages that only snapshots hold: an estimate
	UsageOrphans   UsageKind = "orphans"   // segments that nothing in the chain names, of attempts still at work too
)

// UsageSum is what one kind takes.
type UsageSum struct {
	// Objects counts objects, or snapshots.
	Objects int64
	// Bytes stored, of page blobs written ranges.
	Bytes int64
	// HiddenObjects and HiddenBytes are the part of them that retention gave up, and that is not deleted: a write-once
	// policy keeps it, or the next step of retention deletes it.
	HiddenObjects, HiddenBytes int64
}

func (u *UsageSum) add(size int64, hidden bool) {
	u.Objects++
	u.Bytes += size
	if hidden {
		u.HiddenObjects++
		u.HiddenBytes += size
	}
}

// Usage is what a lineage takes in storage.
type Usage struct {
	Kinds map[UsageKind]UsageSum
	// Points by tier, those that can be reached.
	Points map[Tier]int
	// DayPuts and DayBytes are the objects stored in the journal and in staging in the last 24 hours of storage time, DayChanged
	// the bytes of the disks that points of that time say they changed (their stored bytes where they do not say): what an
	// estimate of a month's requests begins with.
	DayPuts, DayBytes, DayChanged int64
}

// Usage lists the lineage's containers and says what they hold: one request for every few thousand objects, and one for every
// page blob. The pages of snapshots are estimated: what the chain says was changed between a checkpoint and the next one,
// at most what the disks hold.
func (r *Replica) Usage(ctx context.Context) (Usage, error) {
	u := &usage{r: r, kinds: map[UsageKind]*UsageSum{}, segs: map[Ordinal]int64{}, points: map[Ordinal]int64{}}
	out, err := u.sum(ctx)
	if err != nil {
		return Usage{}, fmt.Errorf("usage of lineage %s: %w", r.lineage, err)
	}
	return out, nil
}

type usage struct {
	r       *Replica
	st      *State
	entries []Entry
	ret     *Retention
	now     time.Time
	kinds   map[UsageKind]*UsageSum
	points  map[Ordinal]int64 // of the chain, with the bytes that their manifests name
	segs    map[Ordinal]int64 // listed bytes of those
	out     Usage
}

func (u *usage) kind(k UsageKind) *UsageSum {
	if u.kinds[k] == nil {
		u.kinds[k] = &UsageSum{}
	}
	return u.kinds[k]
}

func (u *usage) sum(ctx context.Context) (Usage, error) {
	points, err := u.r.Points(ctx)
	if err != nil {
		return u.out, err
	}
	if u.now, err = u.r.store.Now(ctx); err != nil {
		return u.out, err
	}
	u.out.Points = map[Tier]int{}
	for _, p := range points {
		u.out.Points[p.Tier]++
	}
	if u.st, u.entries, u.ret, err = u.r.viewChain(ctx); err != nil {
		return u.out, err
	}
	for i := range u.entries {
		e := &u.entries[i]
		if e.Kind.IsPoint() {
			u.points[e.Ordinal] = e.Bytes
		}
		if e.Kind.IsPoint() && u.now.Sub(e.Stored) <= 24*time.Hour {
			u.out.DayChanged += e.changed()
		}
	}
	for _, step := range []func(context.Context) error{u.journal, u.staging, u.replica} {
		if err := step(ctx); err != nil {
			return u.out, err
		}
	}
	u.out.Kinds = make(map[UsageKind]UsageSum, len(u.kinds))
	for k, s := range u.kinds {
		u.out.Kinds[k] = *s
	}
	return u.out, nil
}

// changed is how many bytes of the disks a manifest changed, as far as it says.
func (e *Entry) changed() int64 {
	if e.Signals != nil {
		return e.Signals.Changed
	}
	return e.Bytes
}

func (u *usage) today(p blobstore.Properties) {
	if u.now.Sub(p.LastModified) <= 24*time.Hour {
		u.out.DayPuts++
		u.out.DayBytes += p.Size
	}
}

func (u *usage) journal(ctx context.Context) error {
	var rewinds, named int64
	for i := range u.entries {
		if u.entries[i].Kind == KindRewind {
			named += u.entries[i].Bytes
		}
	}
	if err := list(ctx, u.r.journal, "", func(p blobstore.Properties) (bool, error) {
		u.today(p)
		n, manifest := seqOfName(p.Name, logPrefix)
		a, segment := attemptOf(p.Name)
		bytes, point := u.points[a.ordinal]
		switch {
		case manifest:
			u.kind(UsageJournal).add(p.Size, u.ret.Retires(n))
		case segment && a.failover != "":
			if rewinds += p.Size; rewinds > named {
				u.kind(UsageOrphans).add(p.Size, false)
			} else {
				u.kind(UsageJournal).add(p.Size, false)
			}
		case segment && point:
			if u.segs[a.ordinal] += p.Size; u.segs[a.ordinal] > bytes {
				u.kind(UsageOrphans).add(p.Size, false) // another attempt
			} else {
				u.kind(UsageJournal).add(p.Size, false)
			}
		case segment && a.ordinal < u.st.Highest:
			u.kind(UsageJournal).add(p.Size, true)
		case segment:
			u.kind(UsageOrphans).add(p.Size, false)
		default:
			u.kind(UsageJournal).add(p.Size, false)
		}
		return false, nil
	}); err != nil {
		return err
	}
	return nil
}

func (u *usage) staging(ctx context.Context) error {
	live := map[Ordinal]bool{}
	for i := range u.entries {
		if e := &u.entries[i]; e.Kind == KindPartial && !u.ret.released(e.Seq) {
			live[e.Ordinal] = true
		}
	}
	return list(ctx, u.r.staging, "", func(p blobstore.Properties) (bool, error) {
		u.today(p)
		a, ok := attemptOf(p.Name)
		u.kind(UsageStaging).add(p.Size, ok && a.ordinal < u.st.Highest && !live[a.ordinal])
		return false, nil
	})
}

func (u *usage) replica(ctx context.Context) error {
	var blobs []blobstore.Properties
	if err := list(ctx, u.r.replica, "", func(p blobstore.Properties) (bool, error) {
		if p.IsPages {
			blobs = append(blobs, p)
			return false, nil
		}
		n, ok := seqOfName(p.Name, ckptPrefix)
		u.kind(UsageReplica).add(p.Size, ok && u.ret.givesUpCheckpoint(n))
		return false, nil
	}); err != nil {
		return err
	}
	var held int64
	for _, p := range blobs {
		var bytes int64
		for at := int64(0); at < p.Size; at += usageWindow {
			for x, err := range u.r.replica.PageRanges(ctx, p.Name, "", at, min(usageWindow, p.Size-at)) {
				if err != nil {
					return fmt.Errorf("page ranges of %s: %w", p.Name, err)
				}
				bytes += x.Length
			}
		}
		u.kind(UsageReplica).add(bytes, false)
		held += bytes
	}
	return u.snapshots(ctx, held)
}

// usageWindow bounds one request for page ranges, in bytes of the disk.
const usageWindow = 64 << 30

// snapshots estimates the pages that only snapshots hold: those of a checkpoint that were changed up to the next one.
func (u *usage) snapshots(ctx context.Context, held int64) error {
	if err := u.r.lock(ctx); err != nil {
		return err
	}
	ckpts, err := u.r.checkpoints(ctx)
	u.r.unlock()
	if err != nil {
		return err
	}
	sum := u.kind(UsageSnapshots)
	for i, c := range ckpts {
		end := u.st.Head
		if i+1 < len(ckpts) {
			end = ckpts[i+1].Seq
		}
		bytes, err := u.between(ctx, c.Seq, end)
		if err != nil {
			return err
		}
		sum.Objects += int64(len(c.Disks))
		sum.Bytes += min(bytes, held)
	}
	return nil
}

// between is what was changed in (low, high], by what the chain and the extent maps say.
func (u *usage) between(ctx context.Context, low, high Seq) (bytes int64, err error) {
	from, _ := slices.BinarySearchFunc(u.entries, low+1, func(e Entry, s Seq) int { return cmp.Compare(e.Seq, s) })
	for i := from; i < len(u.entries) && u.entries[i].Seq <= high; i++ {
		bytes += u.entries[i].changed()
	}
	var ranges []SeqRange
	if u.ret != nil {
		for _, g := range u.ret.Retired {
			if g.From > low && g.To <= high {
				ranges = append(ranges, SeqRange{g.From, g.To})
			}
		}
	}
	if len(ranges) == 0 {
		return bytes, nil
	}
	sets, ok, err := u.r.mapped(ctx, ranges)
	if err != nil && !errors.Is(err, blobstore.ErrNotFound) {
		return 0, err
	}
	if !ok {
		return bytes, nil // the estimate is lower than it might be
	}
	for _, s := range sets {
		bytes += s.Bytes()
	}
	return bytes, nil
}
