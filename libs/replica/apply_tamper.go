package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// seen is how appliers of this process left page blobs at rest, by blob name: at that number a page blob keeps its ETag,
// for nobody may write to it without changing the number.
type seen struct {
	mu    sync.Mutex
	blobs map[string]leftAt
}

type leftAt struct {
	number int64
	etag   blobstore.ETag
}

func (s *seen) get(name string) (leftAt, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.blobs[name]
	return l, ok
}

// leave remembers a blob whose lease was just given back, at rest at number: from now on no request that carried that lease
// has an effect. What cannot be read now is only not remembered.
func (r *Replica) leave(ctx context.Context, name string, number int64) {
	p, err := r.replica.Stat(ctx, name, "")
	if err != nil || p.Sequence != number {
		return // another applier has gone on
	}
	r.seen.mu.Lock()
	defer r.seen.mu.Unlock()
	if r.seen.blobs == nil {
		r.seen.blobs = map[string]leftAt{}
	}
	r.seen.blobs[name] = leftAt{number, p.ETag}
}

func (r *Replica) diskMetadata(ds DiskState) map[string]string {
	return map[string]string{"lineage": string(r.lineage), "disk": ds.ID, "gen": strconv.FormatUint(uint64(ds.Gen), 10),
		"size": strconv.FormatInt(ds.Size, 10), "format": "vhdfixed1"}
}

// evidence is what is known of a page blob before it is looked at. Numbers never fall, so whatever is read later must be at
// least as far; what was learnt after the look could be news of another applier.
type evidence struct {
	left       *leftAt
	checkpoint Seq // newest one of the disk; only looked for when the blob was not seen before
}

func (r *Replica) evidence(ctx context.Context, ds DiskState) (ev evidence, err error) {
	if l, ok := r.seen.get(DiskBlobName(ds.ID, ds.Gen)); ok {
		ev.left = &l
		return ev, nil
	}
	ev.checkpoint, err = r.newestCheckpoint(ctx, ds)
	return ev, err
}

// untouched refuses a page blob that is not as appliers leave theirs. p was read under its lease, after the evidence.
func (r *Replica) untouched(ds DiskState, p blobstore.Properties, ev evidence) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("disk %s: %s: %w", ds.ID, fmt.Sprintf(format, args...), ErrTampered)
	}
	switch {
	case !p.IsPages:
		return bad("%s is no page blob", p.Name)
	case p.Size != blobSize(ds.Size):
		return bad("page blob of %d bytes, want %d", p.Size, blobSize(ds.Size))
	}
	for k, want := range r.diskMetadata(ds) {
		if have := p.Metadata[k]; have != want {
			return bad("its %s is %q, want %q: it is another blob", k, have, want)
		}
	}
	a, t := splitNumber(p.Sequence)
	switch {
	case ev.left != nil && p.Sequence < ev.left.number:
		la, _ := splitNumber(ev.left.number)
		return bad("at %d going to %d, and it was left at %d: numbers never fall", a, t, la)
	case ev.left != nil && p.Sequence == ev.left.number && p.ETag != ev.left.etag:
		return bad("at rest at %d as it was left, and written to since", a)
	case a < ev.checkpoint:
		return bad("at %d going to %d, and checkpoint %d was taken of it: it was replaced", a, t, ev.checkpoint)
	}
	return nil
}

// neverThere refuses to make a page blob again that was there before: its snapshots went with it.
func (ev evidence) neverThere(ds DiskState) error {
	switch {
	case ev.left != nil:
		a, _ := splitNumber(ev.left.number)
		return fmt.Errorf("disk %s: its page blob is gone, it was at %d: %w", ds.ID, a, ErrTampered)
	case ev.checkpoint > 0:
		return fmt.Errorf("disk %s: its page blob is gone, checkpoint %d was taken of it: %w", ds.ID, ev.checkpoint, ErrTampered)
	}
	return nil
}

// newestCheckpoint is the newest checkpoint that has the disk in its generation; 0 for none.
func (r *Replica) newestCheckpoint(ctx context.Context, ds DiskState) (Seq, error) {
	if err := r.lock(ctx); err != nil {
		return 0, err
	}
	defer r.unlock()
	all, err := r.checkpoints(ctx)
	if err != nil {
		return 0, err
	}
	for _, c := range slices.Backward(all) {
		if slices.ContainsFunc(c.Disks, func(d CheckpointDisk) bool { return d.ID == ds.ID && d.Gen == ds.Gen }) {
			return c.Seq, nil
		}
	}
	return 0, nil
}

// refused says what a refusal of a call under our lease means: somebody took the lease, which is ErrLeaseLost, or somebody
// changed or deleted the blob although we hold it, which is ErrTampered.
func (a *Applier) refused(ctx context.Context, d *appliedDisk, what string, err error) error {
	if errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
		return fmt.Errorf("%s of disk %s: %w: %w", what, d.d.ID, ErrTampered, err)
	}
	if d.lease != "" && errors.Is(err, blobstore.ErrConditionFailed) && !errors.Is(err, blobstore.ErrLeaseConflict) &&
		a.r.replica.RenewLease(ctx, d.name, d.lease) == nil {
		if p, serr := a.r.replica.Stat(ctx, d.name, ""); serr == nil && p.Sequence != d.number {
			from, to := splitNumber(p.Sequence)
			return fmt.Errorf("%s of disk %s: at %d going to %d, and we hold its lease at %d going to %d: %w: %w",
				what, d.d.ID, from, to, d.a, d.t, ErrTampered, err)
		}
	}
	return d.wrap(what, err)
}
