package changetracker

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd"
)

const (
	// exportPatience bounds the opening of an export, and each count of its changes.
	exportPatience = 10 * time.Second
	// exportsAtOnce bounds the exports that are opened in parallel.
	exportsAtOnce = 4
	// countedExtents bounds the extents that are counted for the size of a point or pass, which is for progress only.
	countedExtents = 1 << 20
	// exportUnit is what reads of an export are aligned to, in bytes; exports of larger blocks have their own.
	exportUnit = 4096
)

var errDetached = errors.New("the source was detached")

// bitmapSource reads an open point or pass of a machine from NBD exports of its hypervisor, which keeps the list of
// changes. Every reading call has connections of its own, opened when it begins: a hypervisor that comes back is
// found again by the next call.
type bitmapSource struct {
	t  *Tracker
	id string

	ctl sync.Mutex    // serialises attach and detach
	rec *sourceRecord // guarded by ctl

	mu   sync.Mutex
	open *attachment // nil when detached
}

// attachment is one ordinal's source while it is attached.
type attachment struct {
	rec     *sourceRecord // never changes
	ctx     context.Context
	cancel  context.CancelCauseFunc
	readers sync.WaitGroup
}

func newAttachment(r *sourceRecord) *attachment {
	a := &attachment{rec: r}
	a.ctx, a.cancel = context.WithCancelCause(context.Background()) // ended by replace, for all its readers
	return a
}

// replace makes next the open attachment and ends the readers of the one before.
func (s *bitmapSource) replace(next *attachment, why error) {
	s.mu.Lock()
	old := s.open
	s.open = next
	s.mu.Unlock()
	if old != nil {
		old.cancel(why)
		old.readers.Wait()
	}
}

func (s *bitmapSource) end(why error) { s.replace(nil, why) }

// reading is one call that reads a disk of an attachment.
type reading struct {
	*attachment
	disk SourceDisk
	done func()
}

// read begins a call. missing is the error for an ordinal that is not attached; fits says whether the attachment is
// the one that the call means. The context ends with the attachment.
func (s *bitmapSource) read(ctx context.Context, lineage, diskID string, missing error, fits func(*sourceRecord) bool) (context.Context, *reading, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.open
	if a == nil {
		return nil, nil, fmt.Errorf("%w: no source of machine %s is attached", missing, s.id)
	}
	if a.rec.Lineage != lineage {
		return nil, nil, fmt.Errorf("%w: %s, the call names %s", ErrLineage, a.rec.Lineage, lineage)
	}
	if !fits(a.rec) {
		return nil, nil, fmt.Errorf("%w: the source of machine %s is for %d", missing, s.id, a.rec.Ordinal)
	}
	for _, d := range a.rec.Disks {
		if d.ID != diskID {
			continue
		}
		ctx, cancel := context.WithCancelCause(ctx)
		stop := context.AfterFunc(a.ctx, func() { cancel(context.Cause(a.ctx)) })
		a.readers.Add(1)
		return ctx, &reading{attachment: a, disk: d, done: func() {
			stop()
			cancel(nil)
			a.readers.Done()
		}}, nil
	}
	return nil, nil, fmt.Errorf("%w: %q of machine %s", ErrDiskNotFound, diskID, s.id)
}

func (s *bitmapSource) readChanges(ctx context.Context, lineage string, ordinal uint64, diskID string, from int64,
	emit func(Chunk) error,
) error {
	ctx, r, err := s.read(ctx, lineage, diskID, ErrNotCut, func(r *sourceRecord) bool { return r.Scope == "" && r.Ordinal == ordinal })
	if err != nil {
		return err
	}
	defer r.done()
	d := r.disk
	out := joiner{emit: emit}
	defer out.drop()
	c, err := d.dial(ctx, d.Context)
	if err == nil {
		defer c.Close()
		rest := extent.Span(min(from, d.Size), d.Size)
		plan := func(ctx context.Context) iter.Seq2[nbd.Run, error] {
			return func(yield func(nbd.Run, error) bool) {
				for e, err := range c.Extents(ctx, d.Context, d.aligned(c, rest)) {
					if (err != nil || e.Flags&nbd.Dirty != 0) && !yield(nbd.Run{Range: e.Range}, err) {
						return
					}
				}
			}
		}
		err = c.Stream(ctx, plan, func(at extent.Range, data []byte) error {
			want := at.Intersect(rest)
			if want.Empty() {
				return nil
			}
			return split(want, data[want.Off-at.Off:][:want.Len], out.put, out.zero)
		})
		if err == nil {
			err = d.stands(ctx, c)
		}
	}
	if err == nil {
		err = out.flush()
	}
	return r.judge(ctx, err, out.failed, ErrNotCut)
}

func (s *bitmapSource) readRanges(ctx context.Context, lineage string, pass uint64, diskID string, window extent.Range,
	ranges []extent.Range, emit func(Chunk) error,
) error {
	ctx, r, err := s.read(ctx, lineage, diskID, ErrPassNotOpen, func(r *sourceRecord) bool { return r.Scope != "" && r.Ordinal == pass })
	if err != nil {
		return err
	}
	defer r.done()
	if len(ranges) == 0 && r.rec.Scope != Compare {
		ranges = []extent.Range{window.Intersect(extent.Range{Len: r.disk.Size})}
	}
	out := joiner{emit: emit}
	defer out.drop()
	err = readLive(ctx, r.disk.walk, r.disk.Size, ranges, out.put)
	if err == nil {
		err = out.flush()
	}
	return r.judge(ctx, err, out.failed, ErrPassNotOpen)
}

func (s *bitmapSource) hashRanges(ctx context.Context, lineage, diskID string, window extent.Range, step int64,
	emit func(Hashes) error,
) error {
	ctx, r, err := s.read(ctx, lineage, diskID, ErrPassNotOpen, func(r *sourceRecord) bool { return r.Scope != "" })
	if err != nil {
		return err
	}
	defer r.done()
	var failed error
	err = hashLive(ctx, r.disk.walk, r.disk.Size, window, step, func(h Hashes) error {
		failed = emit(h)
		return failed
	})
	return r.judge(ctx, err, failed, ErrPassNotOpen)
}

// judge gives the end of a call its sentinel. failed is what the receiver of the bytes said, if anything; missing is what a
// detached source means to the call.
func (r *reading) judge(ctx context.Context, err, failed, missing error) error {
	switch {
	case err == nil || failed != nil:
		return err
	case r.ctx.Err() != nil:
		if cause := context.Cause(r.ctx); errors.Is(cause, ErrUnavailable) || errors.Is(cause, ErrSourceLost) {
			return cause
		}
		return fmt.Errorf("%w: %w", missing, context.Cause(r.ctx))
	case ctx.Err() != nil:
		return err
	}
	return fmt.Errorf("disk %s: %w", r.disk.ID, exportError(err, r.rec.Scope == ""))
}

// exportError tells an export that is wrong from one that cannot be reached. An error of reading a frozen export means
// that its copy could not be kept.
func exportError(err error, frozen bool) error {
	var refused *nbd.Error
	switch {
	case errors.Is(err, ErrExportInvalid), errors.Is(err, ErrInvalidState):
		return err
	case errors.Is(err, nbd.ErrNoContext), errors.Is(err, nbd.ErrNoExport), errors.Is(err, nbd.ErrURI), errors.Is(err, nbd.ErrProtocol):
		return fmt.Errorf("%w: %w", ErrExportInvalid, err)
	case errors.As(err, &refused) && refused.Errno == nbd.ESHUTDOWN:
		return fmt.Errorf("%w: %w", ErrSourceLost, err)
	case errors.As(err, &refused) && frozen:
		return fmt.Errorf("%w: %w", ErrSnapshotBroken, err)
	case errors.As(err, &refused):
		return fmt.Errorf("%w: %w", ErrExportInvalid, err)
	case errors.Is(err, nbd.ErrLost), errors.Is(err, nbd.ErrClosed), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", ErrSourceLost, err)
	}
	return err
}

// dial opens the export with the contexts and checks that it is the disk.
func (d SourceDisk) dial(ctx context.Context, contexts ...string) (*nbd.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, exportPatience)
	defer cancel()
	c, err := nbd.Dial(ctx, d.URI, contexts...)
	if err != nil {
		return nil, err
	}
	if c.Size() != d.Size {
		_ = c.Close() // never fails
		return nil, fmt.Errorf("%w: export %s has %d bytes, the disk has %d", ErrExportInvalid, d.URI, c.Size(), d.Size)
	}
	c.LimitReads(d.ReadUnit)
	return c, nil
}

// stands checks that a frozen copy still stood after everything was read of it. A filter that gives up its copy lets the guest
// overwrite what is just being read, and that read gets the new bytes and no error; only reads that begin later fail. So it
// is also asked by a reader who comes back for nothing.
func (d SourceDisk) stands(ctx context.Context, c *nbd.Client) error {
	at := d.aligned(c, extent.Range{Len: 1})
	if err := c.ReadAt(ctx, make([]byte, at.Len), at.Off); err != nil {
		return fmt.Errorf("see that the frozen copy still stands: %w", err)
	}
	return nil
}

// contexts are those that the export must offer for what the record reads.
func (r *sourceRecord) contexts(d SourceDisk) []string {
	switch {
	case r.Scope == "":
		return []string{d.Context}
	case d.Allocation:
		return []string{nbd.ContextAllocation}
	}
	return nil
}

// aligned is r with its ends moved outwards to what the export takes, within the disk.
func (d SourceDisk) aligned(c *nbd.Client, r extent.Range) extent.Range {
	return r.Align(max(exportUnit, c.Info().Block.Min)).Intersect(extent.Range{Len: d.Size})
}

// walk is a walker.
func (d SourceDisk) walk(ctx context.Context, wants []extent.Range, _ int64, absent func(extent.Range) error,
	present func(extent.Range, []byte) error,
) error {
	var contexts []string
	if d.Allocation {
		contexts = append(contexts, nbd.ContextAllocation)
	}
	c, err := d.dial(ctx, contexts...)
	if err != nil {
		return err
	}
	defer c.Close()
	plan := func(ctx context.Context) iter.Seq2[nbd.Run, error] {
		return func(yield func(nbd.Run, error) bool) {
			for _, want := range wants {
				if want.Empty() {
					continue
				}
				for run, err := range d.runs(ctx, c, d.aligned(c, want)) {
					if !yield(run, err) {
						return
					}
				}
			}
		}
	}
	next := 0 // of wants: what comes is a part of this one, moved outwards
	return c.Stream(ctx, plan, func(at extent.Range, data []byte) error {
		for wants[next].Empty() {
			next++
		}
		want := at.Intersect(wants[next])
		if at.End() == d.aligned(c, wants[next]).End() {
			next++
		}
		if want.Empty() {
			return nil
		}
		if data == nil {
			return absent(want)
		}
		return present(want, data[want.Off-at.Off:][:want.Len])
	})
}

// runs are the parts of a range with what is known of their zeros, ascending, without gaps.
func (d SourceDisk) runs(ctx context.Context, c *nbd.Client, at extent.Range) iter.Seq2[nbd.Run, error] {
	return func(yield func(nbd.Run, error) bool) {
		if !d.Allocation {
			yield(nbd.Run{Range: at}, nil)
			return
		}
		for e, err := range c.Extents(ctx, nbd.ContextAllocation, at) {
			// A hole that is not known to read as zeros is read.
			if !yield(nbd.Run{Range: e.Range, Zero: e.Flags&nbd.Zero != 0}, err) {
				return
			}
		}
	}
}

// measure opens every export, checks it, and counts what there is to read.
func (r *sourceRecord) measure(ctx context.Context) ([]Change, error) {
	out := make([]Change, len(r.Disks))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(exportsAtOnce)
	for i, d := range r.Disks {
		group.Go(func() error {
			c, err := d.dial(ctx, r.contexts(d)...)
			if err != nil {
				return fmt.Errorf("disk %s: %w", d.ID, exportError(err, r.Scope == ""))
			}
			defer c.Close()
			n, err := r.count(ctx, c, d)
			if err != nil {
				return fmt.Errorf("disk %s: %w", d.ID, exportError(err, r.Scope == ""))
			}
			out[i] = Change{Disk: d.ID, Size: d.Size, Bytes: n}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}

// count returns the bytes that a reader will get; at least those that could be counted in time.
func (r *sourceRecord) count(ctx context.Context, c *nbd.Client, d SourceDisk) (int64, error) {
	all := extent.Range{Len: d.Size}
	name, counts := nbd.ContextAllocation, func(e nbd.Extent) bool { return e.Flags&nbd.Zero == 0 }
	switch {
	case r.Scope == Compare:
		return 0, nil
	case r.Scope == "":
		name, counts = d.Context, func(e nbd.Extent) bool { return e.Flags&nbd.Dirty != 0 }
	case !d.Allocation:
		return d.Size, nil
	}
	limited, cancel := context.WithTimeout(ctx, exportPatience)
	defer cancel()
	bytes, seen := int64(0), 0
	for e, err := range c.Extents(limited, name, all) {
		if err != nil && limited.Err() != nil && ctx.Err() == nil && seen > 0 {
			return bytes, nil
		}
		if err != nil {
			return 0, err
		}
		if counts(e) {
			bytes += e.Len
		}
		if seen++; seen >= countedExtents {
			return bytes, nil
		}
	}
	return bytes, nil
}

// joiner emits chunks and joins neighbours: zeros up to zeroMost, data up to chunkSize. Reads may be small, messages are
// not to be.
type joiner struct {
	emit    func(Chunk) error
	pending extent.Range     // neighbours not yet emitted
	data    *[chunkSize]byte // holds them; nil when they are zeros
	failed  error            // of emit
}

func (j *joiner) zero(at extent.Range) error { return j.put(Chunk{Range: at}) }

func (j *joiner) put(c Chunk) error {
	if c.Empty() {
		return nil
	}
	most := int64(chunkSize)
	if c.Data == nil {
		most = zeroMost
	}
	joins := !j.pending.Empty() && j.pending.End() == c.Off && (j.data == nil) == (c.Data == nil) && j.pending.Len+c.Len <= most
	if !joins {
		if err := j.flush(); err != nil {
			return err
		}
		if c.Len >= most {
			j.failed = j.emit(c)
			return j.failed
		}
		j.pending = extent.Range{Off: c.Off}
		if c.Data != nil {
			j.data = chunkPool.Get().(*[chunkSize]byte)
		}
	}
	if c.Data != nil {
		copy(j.data[j.pending.Len:], c.Data)
	}
	j.pending.Len += c.Len
	return nil
}

// flush emits what is pending.
func (j *joiner) flush() error {
	defer j.drop()
	if j.pending.Empty() {
		return nil
	}
	c := Chunk{Range: j.pending}
	if j.data != nil {
		c.Data = j.data[:c.Len]
	}
	j.failed = j.emit(c)
	return j.failed
}

// drop forgets what is pending.
func (j *joiner) drop() {
	if j.data != nil {
		chunkPool.Put(j.data)
	}
	j.pending, j.data = extent.Range{}, nil
}
