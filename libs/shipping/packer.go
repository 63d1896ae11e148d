package shipping

import (
	"context"
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
)

// PackOptions describe the segments of one disk in one attempt of a task.
type PackOptions struct {
	// Key places the segments; K is counted by the packer.
	Key replica.SegmentKey
	// Header says whose changes they are.
	Header segment.Header
	// Codec, when not nil, chooses the compression of each segment and hears how long it took to put.
	Codec *Codec
	// Compression of their frames, without a Codec.
	Compression segment.Compression
	// SkipZeros leaves out blocks of zeros: only right where nothing can lie under them. Otherwise they become zero
	// extents.
	SkipZeros bool
	// Bulk says that others go first: the pool's last buffer is not for this packer, so that segments that a bandwidth limit
	// holds up do not keep those waiting.
	Bulk bool
	// Put stores a finished segment (replica.Replica.PutSegment, with whatever must happen around it).
	Put func(ctx context.Context, key replica.SegmentKey, body []byte, sha [32]byte) (replica.Segment, error)
}

// Packed is what a packer made, in bytes.
type Packed struct {
	// Segments in order.
	Segments []replica.Segment
	// Changed is the length of all runs that were added.
	Changed int64
	// Data and Zero are the bytes of data extents and of zero extents.
	Data, Zero int64
	// Blank is the bytes that are zero, in zero extents or not; without those that were left out.
	Blank int64
	// Incompressible is the bytes of data in blocks of 64 KiB that a sample found not to shrink by 5 %.
	Incompressible int64
	// Stored is the size of the segments.
	Stored int64
}

// Packer turns the ascending runs of one disk into segments. While a full segment is stored, the next one fills;
// never more than two buffers of the pool are held. It is not safe for concurrent use. Finish or Abort ends it.
type Packer struct {
	pool *Pool
	o    PackOptions

	w       *segment.Writer // nil when no segment is open
	buf     []byte          // of w
	storing chan stored     // nil when no segment is being stored
	out     Packed
	k       int
	err     error // sticky
}

type stored struct {
	seg   replica.Segment
	stats segment.Stats
	err   error
}

// NewPacker returns a packer that has no buffer yet.
func NewPacker(pool *Pool, o PackOptions) *Packer { return &Packer{pool: pool, o: o} }

// Add packs one run. Runs ascend, do not overlap, and are aligned to 512 bytes. It waits while the pool has no
// buffer. After an error the packer can only be aborted.
func (p *Packer) Add(ctx context.Context, r Run) error {
	if p.err != nil {
		return p.err
	}
	p.out.Changed += r.Len
	p.err = p.add(ctx, r)
	return p.err
}

func (p *Packer) add(ctx context.Context, r Run) error {
	switch {
	case r.Data == nil && p.o.SkipZeros && p.w == nil:
		return nil
	case r.Data == nil:
		return p.write(ctx, func(w *segment.Writer) error { return w.Zero(r.Off, r.Len) })
	case !r.Summed:
		return p.write(ctx, func(w *segment.Writer) error { return w.Data(r.Off, r.Data) })
	}
	return p.write(ctx, func(w *segment.Writer) error { return w.Checked(r.Off, r.Data, r.Sum) })
}

// write calls do with a segment that has room.
func (p *Packer) write(ctx context.Context, do func(w *segment.Writer) error) error {
	if p.w == nil {
		buf, err := p.pool.get(ctx, p.o.Bulk)
		if err != nil {
			return fmt.Errorf("wait for a segment buffer: %w", err)
		}
		o := segment.Options{Target: p.pool.target, Compression: p.o.Compression, SkipZeros: p.o.SkipZeros}
		if p.o.Codec != nil {
			o.Compression = p.o.Codec.Choose()
		}
		w, err := segment.NewWriter(p.o.Header, buf, o)
		if err != nil {
			p.pool.put(buf, p.o.Bulk)
			return err
		}
		p.w, p.buf = w, buf
	}
	if err := do(p.w); err != nil {
		return damaged(err)
	}
	if !p.w.Full() {
		return nil
	}
	return p.seal(ctx)
}

// seal finishes the open segment and begins to store it, after the one before is stored.
func (p *Packer) seal(ctx context.Context) error {
	w, buf := p.w, p.buf
	p.w, p.buf = nil, nil
	if w.Empty() {
		p.pool.put(buf, p.o.Bulk)
		return nil
	}
	body, sha, stats, err := w.Finish()
	if err != nil {
		p.pool.put(buf, p.o.Bulk)
		return damaged(err)
	}
	if err := p.settle(); err != nil {
		p.pool.put(body, p.o.Bulk)
		return err
	}
	key := p.o.Key
	key.K = p.k
	p.k++
	done := make(chan stored, 1)
	p.storing = done
	go func() { // waited for by settle, which Finish and Abort call
		ended := func(int64) {}
		if p.o.Codec != nil {
			ended = p.o.Codec.Begin()
		}
		seg, err := p.o.Put(ctx, key, body, sha)
		if err != nil {
			ended(0)
		} else {
			ended(int64(len(body)))
		}
		p.pool.put(body, p.o.Bulk)
		done <- stored{seg, stats, err}
	}()
	return nil
}

// settle waits for the segment that is being stored.
func (p *Packer) settle() error {
	if p.storing == nil {
		return nil
	}
	s := <-p.storing
	p.storing = nil
	if s.err != nil {
		return s.err
	}
	p.out.Segments = append(p.out.Segments, s.seg)
	p.out.Data += s.stats.Data
	p.out.Zero += s.stats.Zero
	p.out.Stored += s.stats.Stored
	p.out.Blank += s.stats.Zero + s.stats.Gaps
	p.out.Incompressible += s.stats.Incompressible
	return nil
}

// damaged names the error of data that changed between the host's checksum and the segment as the one of damage on the
// way: both are healed by reading again.
func damaged(err error) error {
	if errors.Is(err, segment.ErrDamaged) {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// Finish stores what is left and returns what was made. The packer is of no further use.
func (p *Packer) Finish(ctx context.Context) (Packed, error) {
	err := p.err
	if err == nil && p.w != nil {
		err = p.seal(ctx)
	}
	if err = errors.Join(err, p.settle()); err != nil {
		p.err = err
		p.Abort()
		return Packed{}, err
	}
	return p.out, nil
}

// Abort gives up: it waits for a segment that is being stored and gives back all buffers. It may be called at any
// time, after Finish too.
func (p *Packer) Abort() {
	if p.err == nil {
		p.err = errAborted
	}
	_ = p.settle() // its segment is an orphan, whatever became of it
	if p.w != nil {
		p.pool.put(p.buf, p.o.Bulk)
		p.w, p.buf = nil, nil
	}
}

var errAborted = errors.New("packer was aborted")
