package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// ApplierOptions configure an Applier. The zero value of each field but Footer is a sensible default.
type ApplierOptions struct {
	// Footer returns the 512-byte fixed VHD footer of a disk of size bytes. Required.
	Footer func(diskID string, size int64) []byte
	// Clock decides when leases are renewed; default time.Now.
	Clock func() time.Time
	// Parallel is how many page requests are in flight per disk; default 4. With 1 no goroutine is started.
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
	// RequestBytes is how many bytes a page request is worth; 0 asks the store (blobstore.RequestCost) for each batch,
	// negative says that requests are free.
	RequestBytes int64
	// Yield is asked between batches; true ends Advance early, without error. nil never does.
	Yield func() bool
}

// Applier brings the page blobs of one lineage up to the chain. One works at a time per lineage, by leases; several
// may exist. It is not safe for concurrent use.
type Applier struct {
	r     *Replica
	o     ApplierOptions
	disks map[string]*appliedDisk // by blob name, only during Advance; changed by its goroutine alone

	mu      sync.Mutex // guards renewed
	renewed time.Time  // when every lease held was last known to be good

	written, cleared, unchanged, read, requests atomic.Int64
}

// appliedDisk is a page blob whose lease is held.
type appliedDisk struct {
	d      DiskState
	name   string
	a, t   Seq // what the number says, with a at least First-1
	number int64
	rest   bool // it was at rest when its lease was taken, or this lease brought it there
	empty  bool // its blob holds nothing of what lies at or below a

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
	// Unchanged page bytes that were found to be there already and not written, and page bytes read to know so, or to fill
	// the gap between two ranges that went out as one.
	Unchanged, Read int64
	// Requests to page blobs that moved or listed pages.
	Requests int64
	// Yielded: there is more to apply, and ApplierOptions.Yield wanted a pause.
	Yielded bool
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
	for _, n := range []*atomic.Int64{&a.written, &a.cleared, &a.unchanged, &a.read, &a.requests} {
		n.Store(0)
	}
	a.renewed = a.o.Clock() // no lease is older
	p, err := a.advance(ctx, to)
	for i := 0; i < 3 && errors.Is(err, errBehind); i++ {
		// Another applier went on after we read the head and before we had its lease. We have it now.
		before := p
		p, err = a.advance(ctx, to)
		p.Points, p.Batches = append(before.Points, p.Points...), p.Batches+before.Batches
		p.Checkpoints = append(before.Checkpoints, p.Checkpoints...)
	}
	if errors.Is(err, errBehind) { // under the lease, and the chain does not reach it
		err = fmt.Errorf("%w: %w", ErrTampered, err)
	}
	p.Written, p.Cleared, p.Requests = a.written.Load(), a.cleared.Load(), a.requests.Load()
	p.Unchanged, p.Read = a.unchanged.Load(), a.read.Load()
	a.release(ctx)
	if err != nil {
		return p, fmt.Errorf("apply lineage %s: %w", a.r.lineage, err)
	}
	return p, nil
}

// errBehind: a number is above the head that was read before the lease was taken.
var errBehind = fmt.Errorf("number above the head: %w", ErrCorrupt)

func (a *Applier) advance(ctx context.Context, to Seq) (p Progress, err error) {
	if err := a.r.whole(); err != nil {
		return p, err
	}
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
		if p.Batches > 0 && a.o.Yield != nil && a.o.Yield() {
			p.Applied, p.Yielded = low, true
			return p, nil
		}
		target := entries[end].Seq
		from := low
		for _, d := range disks {
			if d.a < target || d.t > d.a {
				from = min(from, d.a)
			}
		}
		if err := a.batch(ctx, disks, entries, from, target); err != nil {
			return p, err
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
	ev, err := a.r.evidence(ctx, ds)
	if err != nil {
		return nil, err
	}
	var early *blobstore.Properties // only with the bug
	if a.r.bugs.NumberBeforeLease {
		if p, err := c.Stat(ctx, name, ""); err == nil {
			early = &p
		}
	}
	if !a.r.bugs.NoLeaseNoNumber {
		id := blobstore.LeaseID(uuid.NewString())
		err := c.AcquireLease(ctx, name, id, a.o.Lease)
		if errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
			if err = ev.neverThere(ds); err != nil {
				return nil, err
			}
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
	if err := a.r.untouched(ds, p, ev); err != nil {
		return nil, err
	}
	if early != nil {
		p.Sequence = early.Sequence
	}
	d.number = p.Sequence
	d.a, d.t = splitNumber(p.Sequence)
	d.rest = d.a == d.t
	// A number of 0 is set before any page is. With First = 1 nothing lies below the batch that is in flight either; a
	// disk that was removed and comes back by a rewind is named first anew, and its blob may hold anything.
	d.empty = p.Sequence == 0 || d.a == 0 && ds.First == 1
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
	_, err := a.r.replica.CreatePages(ctx, DiskBlobName(ds.ID, ds.Gen), blobSize(ds.Size), a.r.diskMetadata(ds), blobstore.Conditions{CreateOnly: true})
	if err != nil && !errors.Is(err, blobstore.ErrExists) {
		return fmt.Errorf("create page blob of disk %s: %w", ds.ID, err)
	}
	return nil
}

// batch brings the disks that are below target to it, several at a time.
func (a *Applier) batch(ctx context.Context, disks []*appliedDisk, entries []Entry, from, target Seq) error {
	started, requests := a.o.Clock(), a.requests.Load()
	var behind []*appliedDisk
	for _, d := range disks {
		if d.a < target || d.t > d.a {
			behind = append(behind, d)
		}
	}
	if a.o.Parallel == 1 {
		for _, d := range behind {
			if err := a.bring(ctx, d, entries, target); err != nil {
				return err
			}
		}
	} else {
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(disksAtOnce)
		for _, d := range behind {
			g.Go(func() error { return a.bring(gctx, d, entries, target) })
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	var stored int64
	for _, e := range entries {
		if e.Seq > from && e.Seq <= target {
			stored += e.Bytes
		}
	}
	a.r.pace.observe(stored, a.requests.Load()-requests, a.o.Clock().Sub(started))
	return nil
}

// disksAtOnce is how many disks of a VM are written at the same time: the limits that bind are those of each blob. Each takes
// assemblers times a buffer and a fetcher, 36 MiB.
const disksAtOnce = 2

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
		return a.refused(ctx, d, "set number", err)
	}
	d.number, d.a, d.t = n, from, to
	if from == to {
		d.rest, d.empty = true, false // what this lease wrote is durable now
	}
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
	cost := a.requestBytes()
	p := planner{cost: cost, trust: d.rest, fresh: d.empty, ranges: t.ranges}
	w := pageWriter{a: a, d: d, o: o, cost: cost, trust: d.rest}
	if a.o.Parallel > 1 {
		w.sem = make(chan struct{}, a.o.Parallel)
	}
	return p.slabs(o, func(atoms []atom) error {
		l, err := p.look(ctx, atoms)
		if err != nil {
			return err
		}
		return w.run(ctx, p.plan(atoms, l))
	})
}

// requestBytes is what a page request is worth in bytes, 0 for nothing.
func (a *Applier) requestBytes() int64 {
	n := a.o.RequestBytes
	if n == 0 {
		if c, ok := a.r.store.(blobstore.RequestCost); ok {
			n = c.BytesPerRequest()
		}
	}
	return min(max(n, 0), blobstore.MaxPageWrite)
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
		d := a.disks[name]
		if d.lease == "" || a.r.replica.ReleaseLease(ctx, name, d.lease) != nil {
			continue
		}
		if d.rest && d.a == d.t { // from now on no request of ours can change it
			a.r.leave(ctx, name, d.number)
		}
	}
	clear(a.disks)
}
