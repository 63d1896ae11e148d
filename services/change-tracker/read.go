package changetracker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

const (
	// chunkSize bounds the data of one chunk, in bytes.
	chunkSize = 1 << 20
	// zeroUnit is the granularity, in bytes, at which zeros are told from data; zeroRun is the shortest run of them
	// worth a chunk of its own.
	zeroUnit = 4096
	zeroRun  = 32 << 10
	// digestsPerRun bounds one run of digests: 32 KiB of them.
	digestsPerRun = 1024
	// zeroMost bounds a run of zeros that is gathered before it is emitted, in bytes: readers that hear nothing for long
	// take the stream for broken.
	zeroMost = 256 << 20
)

// Chunk is one run of bytes of a disk. Data is valid during the call that gets it; nil means that all is zero.
type Chunk struct {
	extent.Range
	Data []byte
}

// Hashes is a run of SHA-256 digests of consecutive chunks. Digests is nil if all chunks are zero, and is valid during
// the call that gets it.
type Hashes struct {
	Off     int64
	Chunks  int64
	Digests []byte
}

var chunkPool = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// place says where the newest data of a range lies; log -1 means zero.
type place struct {
	log int
	pos int64
}

// readChanges emits what one disk of an open point changed since its base, ascending from offset from, coalesced. It
// holds the entries of the logs in memory, never their data.
func (m *machine) readChanges(ctx context.Context, lineage string, ordinal uint64, diskID string, from int64,
	emit func(Chunk) error,
) error {
	d, o, err := m.openPointOf(lineage, ordinal, diskID)
	if err != nil {
		return err
	}
	var index extent.Map[place]
	var readers []logReader
	defer func() {
		for _, r := range readers {
			_ = r.Close() // only read
		}
	}()
	for i, l := range o.logs[diskID] {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := openSealed(m.t.files, d.dir, l.rec)
		if err != nil {
			return m.orSettled(ordinal, err)
		}
		readers = append(readers, r)
		err = changes(m.t.files, d.dir, l.rec, r, d.size, func(c change) {
			if c.zero {
				index.Put(c.r, place{log: -1})
			} else {
				index.Put(c.r, place{log: i, pos: c.pos})
			}
		})
		if err != nil {
			return m.orSettled(ordinal, err)
		}
	}
	buf := chunkPool.Get().(*[chunkSize]byte)
	defer chunkPool.Put(buf)
	c := Chunk{}
	flush := func() error {
		if c.Len == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		err := emit(c)
		c = Chunk{}
		return err
	}
	if from >= d.size {
		return nil
	}
	for item := range index.In(extent.Span(from, d.size)) {
		if item.Val.log < 0 {
			if c.Len > 0 && (c.Data != nil || c.End() != item.Off) {
				if err := flush(); err != nil {
					return err
				}
			}
			if c.Len == 0 {
				c.Off = item.Off
			}
			c.Len += item.Len
			continue
		}
		pos := item.Val.pos + item.Skip
		for at := item.Range; at.Len > 0; {
			if c.Len > 0 && (c.Data == nil || c.End() != at.Off || c.Len == chunkSize) {
				if err := flush(); err != nil {
					return err
				}
			}
			if c.Len == 0 {
				c.Off = at.Off
			}
			n := min(at.Len, chunkSize-c.Len)
			if err := readFull(readers[item.Val.log], buf[c.Len:c.Len+n], pos); err != nil {
				return fmt.Errorf("%w: log data: %w", ErrBroken, err)
			}
			c.Len += n
			c.Data = buf[:c.Len]
			at.Off, at.Len, pos = at.Off+n, at.Len-n, pos+n
		}
	}
	return flush()
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (m *machine) openPointOf(lineage string, ordinal uint64, diskID string) (*disk, *openPoint, error) {
	d, err := m.readable(lineage, diskID)
	if err != nil {
		return nil, nil, err
	}
	o := m.open.Load()
	if o == nil || o.Point.Ordinal != ordinal {
		return nil, nil, m.orSettled(ordinal, fmt.Errorf("%w: %d", ErrNotCut, ordinal))
	}
	return d, o, nil
}

// orSettled replaces err if the point was settled meanwhile: then its logs are gone for a good reason.
func (m *machine) orSettled(ordinal uint64, err error) error {
	if p, ok := m.rec.Load().outcome(ordinal); ok {
		return fmt.Errorf("%w: point %d is %s", ErrSettled, ordinal, p.Phase)
	}
	return err
}

// readable finds a disk for a reading call.
func (m *machine) readable(lineage, diskID string) (*disk, error) {
	switch r := m.rec.Load(); {
	case r.Lineage == "":
		return nil, fmt.Errorf("%w: machine %s", ErrNotTracking, m.id)
	case r.Lineage != lineage:
		return nil, fmt.Errorf("%w: %s, the call names %s", ErrLineage, r.Lineage, lineage)
	}
	return m.disk(diskID)
}

// readRanges emits live data of one disk, ascending: the open pass's ranges within window, or the ranges named. A range
// that is being written while it is read may come torn; the write is in the chain.
func (m *machine) readRanges(ctx context.Context, lineage string, pass uint64, diskID string, window extent.Range,
	ranges []extent.Range, emit func(Chunk) error,
) error {
	d, err := m.readable(lineage, diskID)
	if err != nil {
		return err
	}
	r := m.rec.Load()
	if r.Pass == nil || r.Pass.Phase != Open || r.Pass.Ordinal != pass {
		return fmt.Errorf("%w: %d", ErrPassNotOpen, pass)
	}
	if len(ranges) == 0 && r.Pass.Scope != Compare {
		ranges = d.table.Load().Ranges(sidecar.Pass, window)
	}
	return readLive(ctx, d.walk, d.size, ranges, emit)
}

// walker visits ranges of a disk in order: absent runs, which read as zeros, and data in pieces of at most chunkSize that
// end at multiples of step or of the disk's own runs.
type walker func(ctx context.Context, wants []extent.Range, step int64, absent func(extent.Range) error,
	present func(extent.Range, []byte) error) error

// readLive emits ranges of a disk of size bytes, ascending: every byte of them as data or as zero.
func readLive(ctx context.Context, walk walker, size int64, ranges []extent.Range, emit func(Chunk) error) error {
	for _, want := range ranges {
		if !want.Valid() || want.End() > size {
			return fmt.Errorf("%w: range [%d, %d) of a disk of %d bytes", ErrInvalidState, want.Off, want.End(), size)
		}
	}
	zero := func(at extent.Range) error {
		if at.Empty() {
			return nil
		}
		return emit(Chunk{Range: at})
	}
	return walk(ctx, ranges, chunkSize, zero, func(at extent.Range, data []byte) error {
		return split(at, data, emit, zero)
	})
}

func (d *disk) walk(ctx context.Context, wants []extent.Range, step int64, absent func(extent.Range) error,
	present func(extent.Range, []byte) error,
) error {
	for _, want := range wants {
		if err := d.walkOne(ctx, want, step, absent, present); err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) walkOne(ctx context.Context, want extent.Range, step int64, absent func(extent.Range) error,
	present func(extent.Range, []byte) error,
) error {
	const mapAhead = 64 << 20 // asking for the map of all of a fragmented disk would take memory
	buf := chunkPool.Get().(*[chunkSize]byte)
	defer chunkPool.Put(buf)
	for want.Len > 0 {
		part := extent.Span(want.Off, min(want.End(), want.Off+mapAhead))
		want = extent.Span(part.End(), want.End())
		set, err := d.img.Allocated(part)
		if err != nil {
			return fmt.Errorf("map image of %s: %w", d.id, err)
		}
		at := part.Off
		for run := range set.In(part) {
			if run.Off > at {
				if err := absent(extent.Span(at, run.Off)); err != nil {
					return err
				}
			}
			for at = run.Off; at < run.End(); {
				if err := ctx.Err(); err != nil {
					return err
				}
				piece := extent.Span(at, min(run.End(), (at/step+1)*step))
				if err := readFull(d.img, buf[:piece.Len], piece.Off); err != nil {
					return fmt.Errorf("read image of %s: %w", d.id, err)
				}
				if err := present(piece, buf[:piece.Len]); err != nil {
					return err
				}
				at = piece.End()
			}
		}
		if at < part.End() {
			if err := absent(extent.Span(at, part.End())); err != nil {
				return err
			}
		}
	}
	return nil
}

// split tells long runs of zeros from data.
func split(at extent.Range, data []byte, emit func(Chunk) error, zero func(extent.Range) error) error {
	start, n := int64(0), int64(len(data)) // of the data not yet emitted
	out := func(end int64) error {
		if end == start {
			return nil
		}
		return emit(Chunk{Range: extent.Range{Off: at.Off + start, Len: end - start}, Data: data[start:end]})
	}
	for i := int64(0); i < n; {
		if !isZero(data[i:min(n, i+zeroUnit)]) {
			i += zeroUnit
			continue
		}
		end := i
		for end < n && isZero(data[end:min(n, end+zeroUnit)]) {
			end += zeroUnit
		}
		end = min(end, n)
		if end-i >= zeroRun || end-i == n {
			if err := out(i); err != nil {
				return err
			}
			if err := zero(extent.Range{Off: at.Off + i, Len: end - i}); err != nil {
				return err
			}
			start = end
		}
		i = end
	}
	return out(n)
}

func isZero(p []byte) bool { return bytes.Equal(p, zeroes[:len(p)]) }

func (m *machine) hashRanges(ctx context.Context, lineage, diskID string, window extent.Range, step int64,
	emit func(Hashes) error,
) error {
	d, err := m.readable(lineage, diskID)
	if err != nil {
		return err
	}
	return hashLive(ctx, d.walk, d.size, window, step, emit)
}

// hashLive emits SHA-256 digests of the live data in window by chunks of step bytes, ascending. window begins at a
// multiple of step and ends at one or at the end of the disk; a short last chunk is hashed as it is.
func hashLive(ctx context.Context, walk walker, size int64, window extent.Range, step int64, emit func(Hashes) error) error {
	window = window.Intersect(extent.Range{Len: size})
	if step < zeroUnit || step > chunkSize || step&(step-1) != 0 || window.Off%step != 0 ||
		window.End()%step != 0 && window.End() != size {
		return fmt.Errorf("%w: window [%d, %d) does not fit chunks of %d", ErrInvalidState, window.Off, window.End(), step)
	}
	run := Hashes{Off: window.Off}
	flush := func() error {
		if run.Chunks == 0 {
			return nil
		}
		err := emit(run)
		run = Hashes{Off: run.Off + run.Chunks*step, Digests: run.Digests[:0]}
		return err
	}
	add := func(digest []byte) error {
		if run.Chunks > 0 && (len(run.Digests) == 0) != (digest == nil) || len(run.Digests) >= digestsPerRun*sha256.Size ||
			run.Chunks*step >= zeroMost {
			if err := flush(); err != nil {
				return err
			}
		}
		run.Chunks++
		run.Digests = append(run.Digests, digest...)
		return nil
	}
	// A chunk may be part data, part absent: collect each one whole.
	whole := make([]byte, step)
	at, blank := window.Off, true
	finish := func(n int64) error {
		if blank {
			return add(nil)
		}
		sum := sha256.Sum256(whole[:n])
		clear(whole)
		blank = true
		return add(sum[:])
	}
	piece := func(r extent.Range, data []byte) error {
		for r.Len > 0 {
			n := min(r.Len, step-at%step)
			if data != nil {
				if !isZero(data[:n]) {
					copy(whole[at%step:], data[:n])
					blank = false
				}
				data = data[n:]
			}
			at += n
			r.Len -= n
			if at%step == 0 || at == size {
				if err := finish((at-1)%step + 1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	absent := func(r extent.Range) error { return piece(r, nil) }
	if err := walk(ctx, []extent.Range{window}, step, absent, piece); err != nil {
		return err
	}
	return flush()
}

// clip returns window, or the whole disk for an empty one.
func clip(window extent.Range) extent.Range {
	if window.Empty() {
		return extent.Range{Len: 1<<63 - 1}
	}
	return window
}

func sortedCopy(points []Point) []Point {
	out := slices.Clone(points)
	slices.SortFunc(out, func(a, b Point) int { return int(int64(a.Ordinal) - int64(b.Ordinal)) })
	return out
}
