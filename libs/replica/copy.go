package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/extent"
)

// Bounds of one unit of copying: what one worker does between two looks at the context.
const (
	unitBytes = 8 << 20
	unitItems = 4096
)

// target receives merged ranges of at most MaxPageWrite bytes. Zeros are not written: it is zero before.
type target interface {
	write(ctx context.Context, off int64, p []byte) error
}

// units cuts the map into ranges of bounded work. Long zero ranges are not cut: nothing is done for them.
func units(m *extent.Map[piece], within extent.Range) []extent.Range {
	var out []extent.Range
	var cur extent.Range
	var bytes int64
	items := 0
	flush := func() {
		if cur.Len > 0 {
			out = append(out, cur)
		}
		cur, bytes, items = extent.Range{}, 0, 0
	}
	for it := range m.In(within) {
		at := it.Off
		for at < it.End() {
			take := it.End() - at
			if it.Val.seg != pieceZero {
				take = min(take, unitBytes-bytes)
				bytes += take
			}
			if cur.Len == 0 {
				cur.Off = at
			}
			cur.Len = at + take - cur.Off
			at += take
			if bytes >= unitBytes {
				flush()
			}
		}
		if items++; items >= unitItems {
			flush()
		}
	}
	flush()
	return out
}

// copier moves ranges of an overlay, over an optional base snapshot, to a target.
type copier struct {
	o    *overlay
	base *baseDisk // where pieceBase is
	t    target
}

// baseDisk is a snapshot of a page blob.
type baseDisk struct {
	c    blobstore.Container
	name string
	snap blobstore.SnapshotID
	r    *Replica // to look at the record when the snapshot is gone
	seq  Seq      // of its checkpoint
}

// failed says why the snapshot could not be read: when retention has given its checkpoint up since it was found, that is no
// damage. Whoever reads without a pin may be that late.
func (b *baseDisk) failed(ctx context.Context, what string, err error) error {
	err = fmt.Errorf("%s of %s: %w", what, b.name, err)
	if !errors.Is(err, blobstore.ErrNotFound) || errors.Is(err, blobstore.ErrNoContainer) {
		return err
	}
	ret, _, rerr := b.r.readRetention(ctx)
	switch {
	case rerr != nil:
		return fmt.Errorf("checkpoint %d is missing, and whether it was given up is not known: %w", b.seq, rerr)
	case ret.givesUpCheckpoint(b.seq):
		return fmt.Errorf("checkpoint %d was given up meanwhile: %w", b.seq, ErrNotReachable)
	}
	return err
}

// run copies what m says within a range, by up to parallel workers; with 1 it starts no goroutine.
func (c *copier) run(ctx context.Context, m *extent.Map[piece], within extent.Range, parallel int) error {
	work := units(m, within)
	if len(work) == 0 {
		return nil
	}
	parallel = min(parallel, len(work))
	if parallel <= 1 {
		w, done := c.worker()
		defer done()
		for _, u := range work {
			if err := w.unit(ctx, m, u); err != nil {
				return err
			}
		}
		return nil
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range parallel {
		g.Go(func() error {
			w, done := c.worker()
			defer done()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(work) {
					return nil
				}
				if err := w.unit(ctx, m, work[i]); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// buffers are the merge buffers of workers, MaxPageWrite each.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, blobstore.MaxPageWrite); return &b }}

type worker struct {
	*copier
	f   fetcher
	buf []byte
	off int64 // of what is pending in buf
}

func (c *copier) worker() (w *worker, done func()) {
	buf := buffers.Get().(*[]byte)
	return &worker{copier: c, f: fetcher{o: c.o}, buf: *buf}, func() { buffers.Put(buf) }
}

func (w *worker) unit(ctx context.Context, m *extent.Map[piece], u extent.Range) error {
	w.buf = w.buf[:0]
	for it := range m.In(u) {
		if err := w.item(ctx, it); err != nil {
			return err
		}
	}
	return w.flush(ctx)
}

func (w *worker) item(ctx context.Context, it extent.Item[piece]) error {
	if it.Val.seg == pieceZero {
		return nil
	}
	pos := it.Val.pos + it.Skip
	for at := it.Off; at < it.End(); {
		if len(w.buf) == cap(w.buf) || w.off+int64(len(w.buf)) != at {
			if err := w.flush(ctx); err != nil {
				return err
			}
			w.off = at
		}
		n := min(it.End()-at, int64(cap(w.buf)-len(w.buf)))
		p := w.buf[len(w.buf) : len(w.buf)+int(n)]
		if err := w.load(ctx, it.Val.seg, at, pos, p); err != nil {
			return err
		}
		w.buf = w.buf[:len(w.buf)+int(n)]
		at, pos = at+n, pos+n
	}
	return nil
}

func (w *worker) load(ctx context.Context, seg int32, off, pos int64, p []byte) error {
	if seg == pieceBase {
		if err := w.base.c.ReadPages(ctx, w.base.name, w.base.snap, off, p); err != nil {
			return w.base.failed(ctx, "read snapshot", err)
		}
		return nil
	}
	return w.f.read(ctx, seg, pos, p)
}

func (w *worker) flush(ctx context.Context) error {
	if len(w.buf) == 0 {
		return nil
	}
	p := w.buf
	w.buf = w.buf[:0]
	return w.t.write(ctx, w.off, p)
}
