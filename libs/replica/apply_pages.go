package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// Bounds of writing a plan.
const (
	// assemblers is how many goroutines build requests of one disk; each has a buffer of MaxPageWrite and a fetcher.
	// Requests in flight are more: a buffer may hold a thousand small ones.
	assemblers = 4
	// unitOps ends a unit of one assembler, so that the journal is read with locality.
	unitOps = 2048
	// probeBytes is how much of a batch's passes is compared with what is there before the share of equal bytes decides
	// whether to go on; under 1/probeShare it is not worth it.
	probeBytes = 8 << 20
	probeShare = 8
)

// pageWriter carries out page operations of one disk under its lease and number.
type pageWriter struct {
	a     *Applier
	d     *appliedDisk
	o     *overlay
	cost  int64
	trust bool
	sem   chan struct{} // requests in flight; nil: everything in the caller's goroutine

	compared, equal atomic.Int64
}

// run carries out operations that do not overlap, in no order.
func (w *pageWriter) run(ctx context.Context, ops []pageOp) error {
	units := unitsOf(ops)
	if w.sem == nil {
		as := w.assembler()
		defer as.done()
		for _, u := range units {
			if err := as.unit(ctx, u); err != nil {
				return err
			}
		}
		return nil
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(assemblers, cap(w.sem), len(units)) {
		g.Go(func() error {
			as := w.assembler()
			defer as.done()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(units) {
					return nil
				}
				if err := as.unit(ctx, units[i]); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// unitsOf cuts operations into what one assembler does at a time.
func unitsOf(ops []pageOp) (out [][]pageOp) {
	var bytes int64
	from := 0
	for i, op := range ops {
		if op.kind != opClear {
			bytes += op.Len
		}
		if bytes >= unitBytes || i-from+1 >= unitOps {
			out = append(out, ops[from:i+1])
			from, bytes = i+1, 0
		}
	}
	if from < len(ops) {
		out = append(out, ops[from:])
	}
	return out
}

// assembler fills requests with the overlay's data, one buffer at a time, and has them sent.
type assembler struct {
	*pageWriter
	f       fetcher
	slab    *[]byte
	used    int64
	pending []request
}

// request is an operation with its content: data as the overlay says, and for a patch as much room for what is there.
type request struct {
	pageOp
	data, there []byte
}

func (w *pageWriter) assembler() *assembler {
	return &assembler{pageWriter: w, f: fetcher{o: w.o}, slab: buffers.Get().(*[]byte)}
}

func (as *assembler) done() { buffers.Put(as.slab) }

func (as *assembler) unit(ctx context.Context, ops []pageOp) error {
	for _, op := range ops {
		need := int64(0)
		switch op.kind {
		case opWrite:
			need = op.Len
		case opPatch:
			need = 2 * op.Len
		}
		if as.used+need > blobstore.MaxPageWrite {
			if err := as.drain(ctx); err != nil {
				return err
			}
		}
		r := request{pageOp: op}
		if need > 0 {
			buf := (*as.slab)[:cap(*as.slab)][as.used:][:need]
			r.data, r.there = buf[:op.Len], buf[op.Len:]
			as.used += need
			if err := as.load(ctx, op, r.data); err != nil {
				return err
			}
		}
		as.pending = append(as.pending, r)
	}
	return as.drain(ctx)
}

// load lays what the overlay has of op into p; the rest of p is zeros.
func (as *assembler) load(ctx context.Context, op pageOp, p []byte) error {
	at := op.Off
	for it := range as.o.m.In(op.Range) {
		clear(p[at-op.Off : it.Off-op.Off])
		q := p[it.Off-op.Off:][:it.Len]
		if it.Val.seg == pieceZero {
			clear(q)
		} else if err := as.f.read(ctx, it.Val.seg, it.Val.pos+it.Skip, q); err != nil {
			return err
		}
		at = it.End()
	}
	clear(p[at-op.Off:])
	return nil
}

// drain sends what is pending and waits for it.
func (as *assembler) drain(ctx context.Context) error {
	list := as.pending
	defer func() { as.pending, as.used = as.pending[:0], 0 }()
	if as.sem == nil {
		for i := range list {
			if err := as.send(ctx, &list[i]); err != nil {
				return err
			}
		}
		return nil
	}
	g, gctx := errgroup.WithContext(ctx)
	for i := range list {
		select {
		case as.sem <- struct{}{}:
		case <-gctx.Done():
			return errors.Join(g.Wait(), ctx.Err())
		}
		if len(list) == 1 { // a large one: this goroutine has nothing else to do
			defer func() { <-as.sem }()
			return as.send(ctx, &list[i])
		}
		g.Go(func() error {
			defer func() { <-as.sem }()
			return as.send(gctx, &list[i])
		})
	}
	return g.Wait()
}

func (w *pageWriter) send(ctx context.Context, r *request) error {
	t := pageTarget{a: w.a, d: w.d}
	switch r.kind {
	case opClear:
		return t.zero(ctx, r.Off, r.Len)
	case opWrite:
		return t.write(ctx, r.Off, r.data)
	}
	return w.patch(ctx, t, r)
}

// patch reads what is there, fills the gaps of the overlay with it, and writes what differs. What is read is the state
// below the batch wherever the overlay says nothing: only the holder of the lease writes, only pages of the overlay and
// gaps with what they held, and each write fails when another took the lease since.
func (w *pageWriter) patch(ctx context.Context, t pageTarget, r *request) error {
	gaps := slices.Collect(w.o.m.Gaps(r.Range))
	if len(gaps) == 0 && (!w.trust || !w.worthComparing()) {
		return t.write(ctx, r.Off, r.data)
	}
	if err := t.read(ctx, r.Off, r.there); err != nil {
		return err
	}
	for _, g := range gaps {
		copy(r.data[g.Off-r.Off:][:g.Len], r.there[g.Off-r.Off:])
	}
	if !w.trust { // a batch was in flight: what is there may not be durable (blobstore.SetSequence), so write all of it
		return t.write(ctx, r.Off, r.data)
	}
	wanted := r.Len
	for _, g := range gaps {
		wanted -= g.Len
	}
	same := wanted
	for d := range differing(r.data, r.there, w.cost) {
		if err := t.write(ctx, r.Off+d.Off, r.data[d.Off:d.End()]); err != nil {
			return err
		}
		same -= d.Len
	}
	same = max(same, 0) // gaps inside a write were no saving
	w.a.unchanged.Add(same)
	w.compared.Add(wanted)
	w.equal.Add(same)
	return nil
}

// worthComparing decides by what was found so far.
func (w *pageWriter) worthComparing() bool {
	c := w.compared.Load()
	return c < probeBytes || w.equal.Load()*probeShare >= c
}

// differing yields the ranges of pages in which a and b differ, joined when what lies between is cheaper to write than
// another request.
func differing(a, b []byte, cost int64) func(yield func(extent.Range) bool) {
	return func(yield func(extent.Range) bool) {
		var cur extent.Range
		for off := 0; off < len(a); off += blobstore.PageSize {
			end := min(off+blobstore.PageSize, len(a))
			if bytes.Equal(a[off:end], b[off:end]) {
				continue
			}
			if cur.Len > 0 && int64(off)-cur.End() < cost {
				cur.Len = int64(end) - cur.Off
				continue
			}
			if cur.Len > 0 && !yield(cur) {
				return
			}
			cur = extent.Span(int64(off), int64(end))
		}
		if cur.Len > 0 {
			yield(cur)
		}
	}
}

// pageTarget makes page requests under lease and number.
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
	t.a.requests.Add(1)
	if _, err := t.a.r.replica.WritePages(ctx, t.d.name, off, p, cond); err != nil {
		return t.a.refused(ctx, t.d, "write pages", err)
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
	t.a.requests.Add(1)
	if _, err := t.a.r.replica.ClearPages(ctx, t.d.name, off, length, cond); err != nil {
		return t.a.refused(ctx, t.d, "clear pages", err)
	}
	t.a.cleared.Add(length)
	return failpoint.Hit(fpAfterPageWrite)
}

func (t pageTarget) read(ctx context.Context, off int64, p []byte) error {
	if _, err := t.cond(ctx); err != nil { // renews the lease
		return err
	}
	t.a.requests.Add(1)
	if err := t.a.r.replica.ReadPages(ctx, t.d.name, "", off, p); err != nil {
		return t.a.refused(ctx, t.d, "read pages", err)
	}
	t.a.read.Add(int64(len(p)))
	return nil
}

// ranges lists the written ranges of the blob.
func (t pageTarget) ranges(ctx context.Context, r extent.Range, yield func(extent.Range) bool) error {
	if _, err := t.cond(ctx); err != nil {
		return err
	}
	t.a.requests.Add(1)
	for p, err := range t.a.r.replica.PageRanges(ctx, t.d.name, "", r.Off, r.Len) {
		if err != nil {
			return fmt.Errorf("page ranges of disk %s: %w", t.d.d.ID, err)
		}
		if !yield(extent.Range{Off: p.Offset, Len: p.Length}) {
			return nil
		}
	}
	return nil
}
