package replica

import (
	"context"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
)

// Bounds of building a rewind.
const (
	// rewindData and rewindExtents end a job: what one worker makes into one segment, seldom two.
	rewindData    = segment.DefaultTarget - 1<<20
	rewindExtents = 32 << 10
	// rewindRead is the longest read of the target, in bytes. Ranges that a snapshot holds are read together when less
	// than rewindGap lies between them: a request costs more than the bytes.
	rewindRead = 1 << 20
	rewindGap  = 32 << 10
)

// packer stores what the target holds of the ranges to set back.
type packer struct {
	r           *Replica
	o           *RewindOptions
	tx          Tx
	buffers     chan []byte // idle segment buffers, at most one per worker
	total       int64
	done, zeros atomic.Int64
}

// packJob is a run of ranges of one disk, ascending, that makes about one segment.
type packJob struct {
	b     *back
	src   *Source // at the target; nil: the target had no such disk, which reads as zeros
	items []packItem
	data  int64
	k     int // number of its first segment
	segs  []Segment
}

type packItem struct {
	extent.Range
	zero bool
}

// packRewind builds and stores the segments of every disk, and leaves them in backs.
func (r *Replica) packRewind(ctx context.Context, o *RewindOptions, backs []*back, res *RewindResult) error {
	p := &packer{r: r, o: o, tx: NewTx(), buffers: make(chan []byte, o.Parallel)}
	for _, b := range backs {
		p.total += b.changed.Bytes()
	}
	var jobs []*packJob
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Parallel)
	emit := func(j *packJob) error {
		j.k = len(jobs) * maxJobSegments
		jobs = append(jobs, j)
		if o.Parallel == 1 {
			return p.run(ctx, j)
		}
		g.Go(func() error { return p.run(gctx, j) })
		return gctx.Err()
	}
	var err error
	for _, b := range backs {
		if err = p.jobs(gctx, b, emit); err != nil {
			break
		}
	}
	if werr := g.Wait(); werr != nil { // a worker's error is why the rest was cancelled
		err = werr
	}
	if err != nil {
		return err
	}
	for _, j := range jobs {
		j.b.segs = append(j.b.segs, j.segs...)
	}
	res.SetBack, res.Zeros = p.total, p.zeros.Load()
	return nil
}

// maxJobSegments spaces the numbers of the segments of a job: rewindData of data in at most rewindExtents ranges is one
// segment, or a few when it falls apart into many extents by the zeros inside.
const maxJobSegments = 100

// jobs cuts a disk's ranges into jobs: where the target has data, and where it is zero. What the target's snapshot
// holds is listed window by window.
func (p *packer) jobs(ctx context.Context, b *back, emit func(*packJob) error) error {
	if b.changed.Len() == 0 {
		return nil
	}
	var src *Source
	if b.at != 0 {
		var err error
		if src, err = p.r.SourceAt(ctx, b.at, b.d.ID); err != nil {
			return err
		}
	}
	j := &packJob{b: b, src: src}
	flush := func() error {
		full := j
		j = &packJob{b: b, src: src}
		if len(full.items) == 0 {
			return nil
		}
		return emit(full)
	}
	add := func(r extent.Range, zero bool) error {
		for r.Len > 0 {
			part := r
			if !zero {
				part.Len = min(part.Len, rewindData-j.data)
				j.data += part.Len
			}
			if n := len(j.items) - 1; n >= 0 && j.items[n].zero == zero && j.items[n].End() == part.Off {
				j.items[n].Len += part.Len
			} else {
				j.items = append(j.items, packItem{part, zero})
			}
			r = extent.Span(part.End(), r.End())
			if j.data >= rewindData || len(j.items) >= rewindExtents {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for w := range windows(wholeDisk(b.d)) {
		if !b.changed.Overlaps(w) {
			continue
		}
		m := &extent.Map[piece]{}
		if src != nil {
			var err error
			if m, err = src.window(ctx, w); err != nil {
				return err
			}
		}
		for c := range b.changed.In(w) {
			at := c.Off
			for it := range m.In(c) {
				if it.Val.seg == pieceZero {
					continue
				}
				if err := add(extent.Span(at, it.Off), true); err != nil {
					return err
				}
				if err := add(it.Range, false); err != nil {
					return err
				}
				at = it.End()
			}
			if err := add(extent.Span(at, c.End()), true); err != nil {
				return err
			}
		}
	}
	return flush()
}

// jobWriter turns one job into segments.
type jobWriter struct {
	p   *packer
	j   *packJob
	w   *segment.Writer
	buf []byte // of the segment
}

func (p *packer) run(ctx context.Context, j *packJob) error {
	jw := &jobWriter{p: p, j: j}
	select {
	case jw.buf = <-p.buffers:
	default: // the first of this worker
	}
	defer func() { p.buffers <- jw.buf }() // room for all: at most Parallel jobs run
	if err := jw.run(ctx); err != nil {
		return fmt.Errorf("disk %s: %w", j.b.d.ID, err)
	}
	j.items, j.src = nil, nil
	return nil
}

func (jw *jobWriter) run(ctx context.Context) error {
	src, items := jw.j.src, jw.j.items
	var f *fetcher
	var gap int64
	if src != nil {
		f = src.fetcher()
		defer src.idle(f)
		if src.base != nil {
			gap = rewindGap
		}
	}
	var have extent.Range // what is in read
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	read := (*pooled)[:rewindRead]
	for i, it := range items {
		for r := it.Range; r.Len > 0; {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := jw.room(ctx); err != nil {
				return err
			}
			part := r
			if it.zero {
				if err := jw.w.Zero(part.Off, part.Len); err != nil {
					return err
				}
				jw.p.zeros.Add(part.Len)
			} else {
				if !have.Contains(extent.Range{Off: part.Off, Len: 1}) {
					have = span(items[i:], part.Off, gap)
					if err := src.read(ctx, f, read[:have.Len], have.Off); err != nil {
						return err
					}
				}
				part = part.Intersect(have)
				if err := jw.w.Data(part.Off, read[part.Off-have.Off:][:part.Len]); err != nil {
					return err
				}
			}
			if n := jw.p.done.Add(part.Len); jw.p.o.Progress != nil {
				jw.p.o.Progress(n, jw.p.total)
			}
			r = extent.Span(part.End(), r.End())
		}
	}
	return jw.finish(ctx)
}

// span is what to read at once from off, which lies in the first item: up to rewindRead, over the items that follow
// within gap.
func span(items []packItem, off, gap int64) extent.Range {
	end := min(items[0].End(), off+rewindRead)
	for _, it := range items[1:] {
		if it.Off-end > gap || it.End()-off > rewindRead {
			break
		}
		if !it.zero {
			end = it.End()
		}
	}
	return extent.Span(off, end)
}

// room makes sure that the writer takes one more call.
func (jw *jobWriter) room(ctx context.Context) error {
	if jw.w != nil && jw.w.Full() {
		if err := jw.finish(ctx); err != nil {
			return err
		}
	}
	if jw.w != nil {
		return nil
	}
	if want := int(jw.j.data + jw.j.data/32 + 64<<10); cap(jw.buf) < want {
		jw.buf = make([]byte, 0, want)
	}
	d := jw.j.b.d
	h := segment.Header{Lineage: jw.p.r.lineage.Bytes(), DiskID: d.ID, Gen: d.Gen, DiskSize: d.Size,
		Kind: segment.KindRewind, Ordinal: uint64(jw.p.o.Target)}
	var err error
	jw.w, err = segment.NewWriter(h, jw.buf, segment.Options{Compression: jw.p.o.Compression})
	return err
}

func (jw *jobWriter) finish(ctx context.Context) error {
	if jw.w == nil || jw.w.Empty() {
		return nil
	}
	body, sha, _, err := jw.w.Finish()
	if err != nil {
		return err
	}
	jw.w, jw.buf = nil, body[:0]
	key := SegmentKey{Kind: KindRewind, Failover: jw.p.o.Failover, Tx: jw.p.tx, DiskID: jw.j.b.d.ID, K: jw.j.k + len(jw.j.segs)}
	s, err := jw.p.r.PutSegment(ctx, key, body, sha)
	if err != nil {
		return err
	}
	jw.j.segs = append(jw.j.segs, s)
	return nil
}
