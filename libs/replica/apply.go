package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// ApplierOptions configure an Applier. The zero value of each field but Footer is a sensible default.
type ApplierOptions struct {
	// Footer returns the 512-byte fixed VHD footer of a disk of size bytes. Required.
	Footer func(diskID string, size int64) []byte
	// Clock decides when leases are renewed; default time.Now.
	Clock func() time.Time
	// Parallel is how many page writes are in flight per disk; default 4. With 1 no goroutine is started.
	Parallel int
	// Lease is the duration of the leases, 15 s to 60 s; default 60 s.
	Lease time.Duration
	// Takeover breaks another applier's lease instead of answering ErrBusy. Safe at any time; it costs the other
	// its batch.
	Takeover bool
	// Stop names further manifests to checkpoint: only those of kind base, point or rewind count. It should answer the
	// same for the same entry. nil: only those that the protocol wants.
	Stop func(Entry) bool
	// MaxBatchBytes bounds the stored bytes of the segments merged in one batch; default 256 MiB.
	MaxBatchBytes int64
}

// Applier brings the page blobs of one lineage up to the chain. One works at a time per lineage, by leases; several
// may exist. It is not safe for concurrent use.
type Applier struct {
	r     *Replica
	o     ApplierOptions
	disks map[string]*appliedDisk // by blob name, only during Advance; changed by its goroutine alone

	mu      sync.Mutex // guards renewed
	renewed time.Time  // when every lease held was last known to be good

	written, cleared atomic.Int64
}

// appliedDisk is a page blob whose lease is held.
type appliedDisk struct {
	d      DiskState
	name   string
	a, t   Seq // what the number says, with a at least First-1
	number int64

	lease blobstore.LeaseID
}

// Progress says where Advance got to.
type Progress struct {
	// Applied: all disks have taken in the chain up to it. Fences are not counted: it is the newest manifest with data.
	Applied Seq
	// Head of the chain when Advance began.
	Head Seq
	// Points lists what this call brought into the disks, oldest first.
	Points []Ordinal
	// Checkpoints taken or found at stops, ascending.
	Checkpoints []Seq
	// Batches written, page bytes written and page bytes cleared.
	Batches, Written, Cleared int64
}

// NewApplier returns an applier for r.
func NewApplier(r *Replica, o ApplierOptions) (*Applier, error) {
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Parallel == 0 {
		o.Parallel = 4
	}
	if o.Lease == 0 {
		o.Lease = 60 * time.Second
	}
	if o.MaxBatchBytes == 0 {
		o.MaxBatchBytes = 256 << 20
	}
	if o.Footer == nil || o.Parallel < 1 || o.Parallel > 64 || o.Lease < 15*time.Second || o.Lease > time.Minute || o.MaxBatchBytes < 0 {
		return nil, fmt.Errorf("new applier: footer set %t, parallel %d, lease %s: %w", o.Footer != nil, o.Parallel, o.Lease, ErrInvalid)
	}
	return &Applier{r: r, o: o, disks: map[string]*appliedDisk{}}, nil
}

// Advance applies the chain up to the newest manifest with data at or below to (0: the head), taking the checkpoints that are due on the way. It may
// go further than to when an earlier batch did. ErrBusy: another applier is at work. ErrLeaseLost: another took
// over. After any error the applier can be used again: it starts from what storage says, under new leases. Progress
// is valid with an error too, as far as it got. Leases are released before it returns.
func (a *Applier) Advance(ctx context.Context, to Seq) (Progress, error) {
	a.written.Store(0)
	a.cleared.Store(0)
	a.renewed = a.o.Clock() // no lease is older
	p, err := a.advance(ctx, to)
	for i := 0; i < 3 && errors.Is(err, errBehind); i++ {
		// Another applier went on after we read the head and before we had its lease. We have it now.
		before := p
		p, err = a.advance(ctx, to)
		p.Points, p.Batches = append(before.Points, p.Points...), p.Batches+before.Batches
		p.Checkpoints = append(before.Checkpoints, p.Checkpoints...)
	}
	p.Written, p.Cleared = a.written.Load(), a.cleared.Load()
	a.release(ctx)
	if err != nil {
		return p, fmt.Errorf("apply lineage %s: %w", a.r.lineage, err)
	}
	return p, nil
}

// errBehind: a number is above the head that was read before the lease was taken.
var errBehind = fmt.Errorf("number above the head: %w", ErrCorrupt)

func (a *Applier) advance(ctx context.Context, to Seq) (p Progress, err error) {
	st, entries, err := a.r.snapshotChain(ctx)
	if err != nil || st.Head == 0 {
		return p, err
	}
	p.Head = st.Head
	if to == 0 || to > st.Head {
		to = st.Head
	}
	// The newest manifest with data at or below to: fences change no page, and a disk at rest at a point can still be
	// checkpointed when a close stands above it.
	last := len(entries) - 1
	for last >= 0 && (entries[last].Seq > to || entries[last].Kind.IsFence()) {
		last--
	}
	if last < 0 {
		return p, nil
	}
	for {
		disks, low, end, err := a.plan(ctx, st, entries, last)
		if err != nil {
			return p, err
		}
		rest := !slices.ContainsFunc(disks, func(d *appliedDisk) bool { return d.a != low || d.t != low })
		if rest {
			if p.Applied, err = low, a.checkpointAt(ctx, entries, low, &p); err != nil {
				return p, err
			}
		}
		if end < 0 {
			p.Applied = low
			return p, nil
		}
		target := entries[end].Seq
		from := low
		for _, d := range disks {
			if d.a < target || d.t > d.a {
				from = min(from, d.a)
				if err := a.bring(ctx, d, entries, target); err != nil {
					return p, err
				}
			}
		}
		p.Batches++
		for _, e := range entries {
			if e.Seq > from && e.Seq <= target && e.Kind.IsPoint() {
				p.Points = append(p.Points, e.Ordinal)
			}
		}
	}
}

// plan takes the leases of the disks that the next batch concerns, and says where it ends: the index of its last
// manifest. low is the lowest manifest applied on any of them. end is negative when there is nothing to do.
func (a *Applier) plan(ctx context.Context, st *State, entries []Entry, last int) (disks []*appliedDisk, low Seq, end int, err error) {
	end = last
	for {
		disks = disks[:0]
		at := entries[end]
		low = at.Seq
		reach := Seq(0) // a batch in flight must be redone at least up to its end
		for _, ds := range sortedDisks(at.disks) {
			d, err := a.take(ctx, ds, st.Head)
			if err != nil {
				return nil, 0, 0, err
			}
			disks = append(disks, d)
			low = min(low, d.a)
			if d.t > d.a {
				reach = max(reach, d.t)
			}
		}
		if low >= entries[last].Seq && reach == 0 {
			return disks, low, -1, nil
		}
		from := slices.IndexFunc(entries, func(e Entry) bool { return e.Seq > low })
		if from < 0 {
			return disks, low, -1, nil
		}
		next := from
		if from < end {
			next = batchEnd(entries, from, end, a.o.MaxBatchBytes, a.o.Stop)
		}
		for entries[next].Seq < reach {
			if next++; next == len(entries) {
				return nil, 0, 0, fmt.Errorf("a disk is going to %d, head is %d: %w", reach, st.Head, ErrCorrupt)
			}
		}
		if next >= end {
			return disks, low, next, nil
		}
		end = next // the disks of an earlier manifest may be others
	}
}

// checkpointAt takes the checkpoint due at low, with all disks at rest there.
func (a *Applier) checkpointAt(ctx context.Context, entries []Entry, low Seq, p *Progress) error {
	i := slices.IndexFunc(entries, func(e Entry) bool { return e.Seq == low })
	if i < 0 || !isStop(entries, i, a.o.Stop) || slices.Contains(p.Checkpoints, low) {
		return nil
	}
	// A disk that the next manifest no longer has may lag behind after a crash.
	for _, ds := range sortedDisks(entries[i].disks) {
		d, err := a.take(ctx, ds, p.Head)
		if err != nil {
			return err
		}
		if d.a < low && d.t <= low {
			if err := a.bring(ctx, d, entries, low); err != nil {
				return err
			}
		}
	}
	switch _, err := a.r.Checkpoint(ctx, low); {
	case errors.Is(err, ErrVoid):
		return nil
	case err != nil:
		return err
	}
	p.Checkpoints = append(p.Checkpoints, low)
	return nil
}

// take makes the page blob if need be, takes its lease, and only then reads its number (rule 21).
func (a *Applier) take(ctx context.Context, ds DiskState, head Seq) (*appliedDisk, error) {
	name := DiskBlobName(ds.ID, ds.Gen)
	if d, ok := a.disks[name]; ok {
		return d, d.known(head)
	}
	c := a.r.replica
	d := &appliedDisk{d: ds, name: name}
	if !a.r.bugs.NoLeaseNoNumber {
		id := blobstore.LeaseID(uuid.NewString())
		err := c.AcquireLease(ctx, name, id, a.o.Lease)
		if errors.Is(err, blobstore.ErrNotFound) {
			if err = a.create(ctx, ds); err == nil {
				err = c.AcquireLease(ctx, name, id, a.o.Lease)
			}
		}
		if errors.Is(err, blobstore.ErrLeaseConflict) && a.o.Takeover {
			if err = c.BreakLease(ctx, name); err == nil {
				err = c.AcquireLease(ctx, name, id, a.o.Lease)
			}
		}
		if errors.Is(err, blobstore.ErrLeaseConflict) {
			return nil, fmt.Errorf("disk %s: %w: %w", ds.ID, ErrBusy, err)
		}
		d.lease = id
		a.disks[name] = d // also after an unknown outcome: release gives it back
		if err != nil {
			return nil, fmt.Errorf("lease disk %s: %w", ds.ID, err)
		}
	} else if err := a.create(ctx, ds); err != nil {
		return nil, err
	}
	p, err := c.Stat(ctx, name, "")
	if err != nil {
		return nil, fmt.Errorf("read number of disk %s: %w", ds.ID, err)
	}
	if p.Size != blobSize(ds.Size) {
		return nil, fmt.Errorf("disk %s: page blob of %d bytes, want %d: %w", ds.ID, p.Size, blobSize(ds.Size), ErrCorrupt)
	}
	d.number = p.Sequence
	d.a, d.t = splitNumber(p.Sequence)
	if a.r.bugs.BatchMarkWithoutLowerBound && d.t > d.a {
		d.a = d.t - 1
	}
	// Manifests before First name nothing of this generation.
	d.a = max(d.a, ds.First-1)
	d.t = max(d.t, d.a)
	a.disks[name] = d
	return d, d.known(head)
}

func (d *appliedDisk) known(head Seq) error {
	if d.t > head {
		return fmt.Errorf("disk %s is at %d going to %d, head is %d: %w", d.d.ID, d.a, d.t, head, errBehind)
	}
	return nil
}

// blobSize is the virtual size padded to 1 MiB, as Azure wants it, plus the footer.
func blobSize(size int64) int64 {
	const mib = 1 << 20
	return (size+mib-1)/mib*mib + footerSize
}

const footerSize = 512

func (a *Applier) create(ctx context.Context, ds DiskState) error {
	meta := map[string]string{"lineage": string(a.r.lineage), "disk": ds.ID, "gen": strconv.FormatUint(uint64(ds.Gen), 10),
		"size": strconv.FormatInt(ds.Size, 10), "format": "vhdfixed1"}
	_, err := a.r.replica.CreatePages(ctx, DiskBlobName(ds.ID, ds.Gen), blobSize(ds.Size), meta, blobstore.Conditions{CreateOnly: true})
	if err != nil && !errors.Is(err, blobstore.ErrExists) {
		return fmt.Errorf("create page blob of disk %s: %w", ds.ID, err)
	}
	return nil
}

// bring writes (d.a, target] to one disk: number going, pages, number at rest.
func (a *Applier) bring(ctx context.Context, d *appliedDisk, entries []Entry, target Seq) error {
	var o overlay
	var list []named
	want := d.a + 1
	for _, e := range entries {
		if e.Seq <= d.a || e.Seq > target {
			continue
		}
		if e.Seq != want {
			return fmt.Errorf("disk %s is at %d, manifests %d to %d are retired: %w", d.d.ID, d.a, want, e.Seq-1, ErrNotReachable)
		}
		want++
		if e.Kind.IsFence() {
			continue
		}
		m, err := a.r.Manifest(ctx, e.Seq)
		if err != nil {
			return err
		}
		list = collect(list, m, d.d)
	}
	if err := o.add(ctx, a.r, d.d, list, a.o.Parallel, func() error { return a.renew(ctx) }); err != nil {
		return err
	}
	if target-d.a > maxStep {
		return fmt.Errorf("batch from %d to %d: %w", d.a, target, ErrInvalid)
	}
	first := d.a < d.d.First // the footer is part of the first batch of the generation
	pages := func() error { return a.pages(ctx, d, &o, first) }
	if a.r.bugs.ProgressBeforePages {
		if err := a.setNumber(ctx, d, target, target); err != nil {
			return err
		}
		return pages()
	}
	if o.m.Len() > 0 || first {
		if err := a.setNumber(ctx, d, d.a, target); err != nil {
			return err
		}
		if err := pages(); err != nil {
			return err
		}
	}
	return a.setNumber(ctx, d, target, target)
}

func (a *Applier) setNumber(ctx context.Context, d *appliedDisk, from, to Seq) error {
	if err := failpoint.Hit(fpBeforeSequence); err != nil {
		return err
	}
	if err := a.renew(ctx); err != nil {
		return err
	}
	n := joinNumber(from, to)
	if _, err := a.r.replica.SetSequence(ctx, d.name, n, blobstore.Conditions{Lease: d.lease}); err != nil {
		return d.wrap("set number", err)
	}
	d.number, d.a, d.t = n, from, to
	return failpoint.Hit(fpAfterSequence)
}

func (a *Applier) pages(ctx context.Context, d *appliedDisk, o *overlay, first bool) error {
	t := pageTarget{a: a, d: d}
	if first {
		f := a.o.Footer(d.d.ID, d.d.Size)
		if len(f) != footerSize {
			return fmt.Errorf("footer of disk %s has %d bytes: %w", d.d.ID, len(f), ErrInvalid)
		}
		if err := t.write(ctx, blobSize(d.d.Size)-footerSize, f); err != nil {
			return err
		}
	}
	c := copier{o: o, t: t}
	return c.run(ctx, &o.m, wholeDisk(d.d), a.o.Parallel)
}

// pageTarget writes pages under lease and number.
type pageTarget struct {
	a *Applier
	d *appliedDisk
}

func (t pageTarget) cond(ctx context.Context) (blobstore.Conditions, error) {
	if t.a.r.bugs.NoLeaseNoNumber {
		return blobstore.Conditions{}, nil
	}
	if err := t.a.renew(ctx); err != nil {
		return blobstore.Conditions{}, err
	}
	return blobstore.Conditions{Lease: t.d.lease, IfSequence: &t.d.number}, nil
}

func (t pageTarget) write(ctx context.Context, off int64, p []byte) error {
	if err := failpoint.Hit(fpBeforePageWrite); err != nil {
		return err
	}
	cond, err := t.cond(ctx)
	if err != nil {
		return err
	}
	if _, err := t.a.r.replica.WritePages(ctx, t.d.name, off, p, cond); err != nil {
		return t.d.wrap("write pages", err)
	}
	t.a.written.Add(int64(len(p)))
	return failpoint.Hit(fpAfterPageWrite)
}

func (t pageTarget) zero(ctx context.Context, off, length int64) error {
	if err := failpoint.Hit(fpBeforePageWrite); err != nil {
		return err
	}
	cond, err := t.cond(ctx)
	if err != nil {
		return err
	}
	if _, err := t.a.r.replica.ClearPages(ctx, t.d.name, off, length, cond); err != nil {
		return t.d.wrap("clear pages", err)
	}
	t.a.cleared.Add(length)
	return failpoint.Hit(fpAfterPageWrite)
}

func (d *appliedDisk) wrap(what string, err error) error {
	if errors.Is(err, blobstore.ErrLeaseConflict) || errors.Is(err, blobstore.ErrConditionFailed) {
		return fmt.Errorf("%s of disk %s: %w: %w", what, d.d.ID, ErrLeaseLost, err)
	}
	return fmt.Errorf("%s of disk %s: %w", what, d.d.ID, err)
}

// renew extends every lease that is held once a third of it has passed: while one disk is written, the others wait.
func (a *Applier) renew(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.o.Clock()
	if now.Sub(a.renewed) < a.o.Lease/3 {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(a.disks)) {
		d := a.disks[name]
		if d.lease == "" {
			continue
		}
		if err := a.r.replica.RenewLease(ctx, name, d.lease); err != nil {
			return d.wrap("renew lease", err)
		}
	}
	a.renewed = now
	return nil
}

// release gives the leases back so that the next applier need not wait. It runs after success and after errors: a
// lease id is never used again, so that a request still in flight from before an error fails (I12).
func (a *Applier) release(ctx context.Context) {
	// The caller's context may be what ended Advance; the store's own leases end by themselves if this fails.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	for _, name := range slices.Sorted(maps.Keys(a.disks)) {
		if d := a.disks[name]; d.lease != "" {
			_ = a.r.replica.ReleaseLease(ctx, name, d.lease)
		}
	}
	clear(a.disks)
}
