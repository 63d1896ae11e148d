package replica

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/extent"
)

// Sink receives the disks of a point.
type Sink interface {
	// Disk starts one disk, all zero. It is called once per disk, before any of its bytes, in order of the disks' ids.
	Disk(ctx context.Context, d DiskState) (DiskSink, error)
}

// DiskSink receives one disk. WriteAt is called from several goroutines, in no order, never twice for a byte, and not
// at all for absent space.
type DiskSink interface {
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Finish is called once, after the last write succeeded; not after an error.
	Finish(ctx context.Context) error
}

// MaterialiseOptions tune Materialise.
type MaterialiseOptions struct {
	// Parallel is how many ranges are read at once; default 4. With 1 no goroutine is started.
	Parallel int
	// Progress, when set, hears the bytes written to the sink so far, from any goroutine.
	Progress func(written int64)
}

// Materialised describes what Materialise wrote.
type Materialised struct {
	Manifest *Manifest
	// Checkpoint the copy began from; 0 when every disk replayed the chain from its beginning.
	Checkpoint Seq
	// Disks written, in order of their ids.
	Disks []DiskState
	// Bytes written to the sink.
	Bytes int64
}

// Materialise writes the disks as they were at a point: the nearest checkpoint at or below it, and the journals
// above that. Nothing in the replica changes. Pin the point first (owner "restore/…" or "failover/…"): retention may
// take it at any time otherwise. ErrNotFound: no such point. ErrNotReachable: retention took what it needs.
func (r *Replica) Materialise(ctx context.Context, point Ordinal, sink Sink, o MaterialiseOptions) (Materialised, error) {
	out, err := r.materialise(ctx, point, sink, o)
	if err != nil {
		return out, fmt.Errorf("materialise point %d of lineage %s: %w", point, r.lineage, err)
	}
	return out, nil
}

func (r *Replica) materialise(ctx context.Context, point Ordinal, sink Sink, o MaterialiseOptions) (out Materialised, err error) {
	if o.Parallel == 0 {
		o.Parallel = 4
	}
	if out.Manifest, err = r.Find(ctx, point); err != nil {
		return out, err
	}
	e, err := r.entryAt(ctx, out.Manifest.Seq)
	if err != nil {
		return out, err
	}
	var written atomic.Int64
	for _, d := range sortedDisks(e.disks) {
		src, err := r.SourceAt(ctx, e.Seq, d.ID)
		if err != nil {
			return out, err
		}
		out.Checkpoint = max(out.Checkpoint, src.checkpoint)
		ds, err := sink.Disk(ctx, d)
		if err != nil {
			return out, err
		}
		t := sinkTarget{ds, &written, o.Progress}
		if err := src.copyTo(ctx, t, o.Parallel); err != nil {
			return out, fmt.Errorf("disk %s: %w", d.ID, err)
		}
		if err := ds.Finish(ctx); err != nil {
			return out, fmt.Errorf("disk %s: %w", d.ID, err)
		}
		out.Disks = append(out.Disks, d)
		out.Bytes = written.Load()
	}
	return out, nil
}

type sinkTarget struct {
	s        DiskSink
	written  *atomic.Int64
	progress func(int64)
}

func (t sinkTarget) write(ctx context.Context, off int64, p []byte) error {
	if err := t.s.WriteAt(ctx, p, off); err != nil {
		return err
	}
	if n := t.written.Add(int64(len(p))); t.progress != nil {
		t.progress(n)
	}
	return nil
}

// openParallel is how many segment indexes SourceAt fetches at a time.
const openParallel = 4

// Source is one disk at one manifest, read-only and safe for concurrent use.
type Source struct {
	d          DiskState
	o          overlay
	base       *baseDisk // nil: nothing below the overlay
	checkpoint Seq
	fetchers   chan *fetcher // idle ones, bounded
}

// SourceAt opens a disk as it is at manifest seq: any kind, not only points, so that a comparing pass can read the
// state it compares with (rules 13, 14). It reads the nearest checkpoint at or below seq and the journals above it,
// never the live page blob. Pin the manifest first and keep the pin while the source is read: retention deletes what
// nothing pins.
func (r *Replica) SourceAt(ctx context.Context, seq Seq, diskID string) (*Source, error) {
	e, err := r.entryAt(ctx, seq)
	if err != nil {
		return nil, err
	}
	d, ok := e.disks[diskID]
	if !ok {
		return nil, fmt.Errorf("disk %s at manifest %d: %w", diskID, seq, ErrNotFound)
	}
	s := &Source{d: d, fetchers: make(chan *fetcher, 8)}
	ret, above, err := r.basis(ctx, s, seq)
	if err != nil {
		return nil, fmt.Errorf("disk %s at manifest %d: %w", diskID, seq, err)
	}
	if s.base == nil && ret != nil && ret.Floor >= d.First {
		return nil, fmt.Errorf("disk %s at manifest %d: floor is %d: %w", diskID, seq, ret.Floor, ErrNotReachable)
	}
	var list []named
	want := max(s.checkpoint+1, d.First)
	for _, e := range above {
		if e.Seq != want {
			if e.Seq < want {
				continue
			}
			return nil, fmt.Errorf("disk %s at manifest %d: manifests %d to %d are retired: %w", diskID, seq, want, e.Seq-1, ErrNotReachable)
		}
		want++
		if e.Kind.IsFence() {
			continue
		}
		if ret.released(e.Seq) {
			return nil, fmt.Errorf("disk %s at manifest %d: segments of %d are given up: %w", diskID, seq, e.Seq, ErrNotReachable)
		}
		m, err := r.Manifest(ctx, e.Seq)
		if err != nil {
			return nil, r.orRetired(ctx, e.Seq, err)
		}
		list = collect(list, m, d)
	}
	if want <= seq {
		return nil, fmt.Errorf("disk %s at manifest %d: manifests %d to %d are retired: %w", diskID, seq, want, seq, ErrNotReachable)
	}
	if err := s.o.add(ctx, r, d, list, r.opens, func() error { return ctx.Err() }); err != nil {
		return nil, fmt.Errorf("disk %s: %w", diskID, err)
	}
	return s, nil
}

// basis finds the nearest checkpoint with the disk in its generation, and the entries above it up to seq, which obey ret.
func (r *Replica) basis(ctx context.Context, s *Source, seq Seq) (ret *Retention, above []Entry, err error) {
	if err := r.lock(ctx); err != nil {
		return nil, nil, err
	}
	defer r.unlock()
	all, err := r.checkpoints(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range slices.Backward(all) {
		if c.Seq > seq {
			continue
		}
		i := slices.IndexFunc(c.Disks, func(d CheckpointDisk) bool { return d.ID == s.d.ID && d.Gen == s.d.Gen })
		if i >= 0 {
			s.base = &baseDisk{c: r.replica, name: DiskBlobName(s.d.ID, s.d.Gen), snap: c.Disks[i].Snapshot, r: r, seq: c.Seq}
			s.checkpoint = c.Seq
			break
		}
	}
	from, to := r.chain.above(s.checkpoint), r.chain.above(seq)
	return r.chain.retention, slices.Clone(r.chain.entries[from:to]), nil
}

// Disk describes the disk.
func (s *Source) Disk() DiskState { return s.d }

// Checkpoint is the manifest whose checkpoint lies under the source; 0 when there is none.
func (s *Source) Checkpoint() Seq { return s.checkpoint }

func wholeDisk(d DiskState) extent.Range { return extent.Range{Len: d.Size} }

// ReadAt fills p from off; absent space reads as zeros. off and len(p) need no alignment, but must lie in the disk.
func (s *Source) ReadAt(ctx context.Context, p []byte, off int64) error {
	r := extent.Range{Off: off, Len: int64(len(p))}
	if off < 0 || r.Len > s.d.Size || off > s.d.Size-r.Len {
		return fmt.Errorf("read %d bytes at %d of a disk of %d: %w", len(p), off, s.d.Size, ErrInvalid)
	}
	f := s.fetcher()
	defer s.idle(f)
	return s.read(ctx, f, p, off)
}

// read is ReadAt for callers that keep a fetcher.
func (s *Source) read(ctx context.Context, f *fetcher, p []byte, off int64) error {
	r := extent.Range{Off: off, Len: int64(len(p))}
	if s.base == nil {
		clear(p)
	} else {
		for gap := range s.o.m.Gaps(r) {
			if err := s.base.read(ctx, p[gap.Off-off:][:gap.Len], gap.Off); err != nil {
				return err
			}
		}
	}
	for it := range s.o.m.In(r) {
		q := p[it.Off-off:][:it.Len]
		if it.Val.seg == pieceZero {
			clear(q)
		} else if err := f.read(ctx, it.Val.seg, it.Val.pos+it.Skip, q); err != nil {
			return err
		}
	}
	return nil
}

func (b *baseDisk) read(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(len(p), blobstore.MaxPageWrite)
		if err := b.c.ReadPages(ctx, b.name, b.snap, off, p[:n]); err != nil {
			return b.failed(ctx, "read snapshot", err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (s *Source) fetcher() *fetcher {
	select {
	case f := <-s.fetchers:
		return f
	default:
		return &fetcher{o: &s.o}
	}
}

func (s *Source) idle(f *fetcher) {
	select {
	case s.fetchers <- f:
	default:
	}
}

// Extents yields the ranges in [off, off+length) that may hold anything but zeros, ascending, cut at windows of
// 256 MiB.
func (s *Source) Extents(ctx context.Context, off, length int64) iter.Seq2[extent.Range, error] {
	return func(yield func(extent.Range, error) bool) {
		for w := range windows(extent.Range{Off: off, Len: length}.Intersect(wholeDisk(s.d))) {
			m, err := s.window(ctx, w)
			if err != nil {
				yield(extent.Range{}, err)
				return
			}
			var cur extent.Range
			for it := range m.All() {
				if it.Val.seg == pieceZero {
					continue
				}
				if cur.Len > 0 && cur.End() == it.Off {
					cur.Len += it.Len
					continue
				}
				if cur.Len > 0 && !yield(cur, nil) {
					return
				}
				cur = it.Range
			}
			if cur.Len > 0 && !yield(cur, nil) {
				return
			}
		}
	}
}

// windowSize bounds how much of the base's page ranges is in memory at once, in bytes of the disk.
const windowSize = 256 << 20

func windows(r extent.Range) iter.Seq[extent.Range] {
	return func(yield func(extent.Range) bool) {
		for at := r.Off; at < r.End(); {
			n := min(r.End()-at, windowSize-at%windowSize)
			if !yield(extent.Range{Off: at, Len: n}) {
				return
			}
			at += n
		}
	}
}

// window is the overlay over the base's written ranges, within w.
func (s *Source) window(ctx context.Context, w extent.Range) (*extent.Map[piece], error) {
	var m extent.Map[piece]
	if s.base != nil {
		for pr, err := range s.base.c.PageRanges(ctx, s.base.name, s.base.snap, w.Off, w.Len) {
			if err != nil {
				return nil, s.base.failed(ctx, "page ranges", err)
			}
			m.Put(extent.Range{Off: pr.Offset, Len: pr.Length}.Intersect(w), piece{seg: pieceBase})
		}
	}
	for it := range s.o.m.In(w) {
		m.Put(it.Range, piece{seg: it.Val.seg, pos: it.Val.pos + it.Skip})
	}
	return &m, nil
}

// copyTo writes what is not zero to t. Workers take units of work over the borders of windows: the end of one is not waited
// for, and the page ranges of the next are asked for meanwhile. No more windows are in memory than have units in work.
func (s *Source) copyTo(ctx context.Context, t target, parallel int) error {
	c := copier{o: &s.o, base: s.base, t: t}
	if parallel <= 1 {
		for w := range windows(wholeDisk(s.d)) {
			m, err := s.window(ctx, w)
			if err != nil {
				return err
			}
			if err := c.run(ctx, m, w, 1); err != nil {
				return err
			}
		}
		return nil
	}
	type job struct {
		m *extent.Map[piece]
		u extent.Range
	}
	jobs := make(chan job)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(jobs)
		for w := range windows(wholeDisk(s.d)) {
			m, err := s.window(ctx, w)
			if err != nil {
				return err
			}
			for _, u := range units(m, w) {
				select {
				case jobs <- job{m, u}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	for range parallel {
		g.Go(func() error {
			j, ok := <-jobs
			if !ok {
				return nil // there was less to do than workers to do it
			}
			w, done := c.worker()
			defer done()
			for ; ok; j, ok = <-jobs {
				if err := w.unit(ctx, j.m, j.u); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}
