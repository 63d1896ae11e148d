package segment

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sync"
)

// Options tune a Writer.
type Options struct {
	// Target is the stored size at which Full answers true, in bytes; 0 is DefaultTarget, at most MaxTarget.
	Target int
	// Compression of frames.
	Compression Compression
	// SkipZeros leaves zeros out instead of saying that they are zeros: only right where nothing can lie under them.
	SkipZeros bool
}

// Stats of a finished segment, in bytes unless said otherwise.
type Stats struct {
	Extents int   // number of extents
	Data    int64 // raw bytes of data extents
	Zero    int64 // bytes of zero extents
	// Gaps are the bytes of short runs of zeros that stayed in data extents.
	Gaps int64
	// Incompressible is the raw bytes of the frames that a probe found not to shrink by 5 %, whatever codec was chosen.
	Incompressible int64
	Stored         int64 // size of the object
	First          int64 // offset of the first extent
	End            int64 // end of the last extent
}

// Writer builds one segment in memory. It is not safe for concurrent use.
type Writer struct {
	h       Header
	o       Options
	body    []byte
	frame   []byte // raw data of the frame being filled, at most FrameSize
	scratch []byte
	sample  [probeBytes]byte
	frames  []frame
	extents []Extent
	pos     int64 // raw bytes so far
	end     int64 // end of the last extent or pending zeros
	// zero is a run of zeros not yet written: it may turn out to be a gap between data.
	zeroOff, zeroLen int64
	stats            Stats
	done             bool
	always           bool // benchmarks: no probe

	// parts of the frame being filled, run the checksum so far of the source's run in progress: sum.go.
	parts   []part
	run     uint32
	shifts  shifts
	damaged error
}

var zeros [FrameSize]byte

var framePool = sync.Pool{New: func() any { b := make([]byte, 0, FrameSize); return &b }}

// NewWriter starts a segment in buf[:0], which is grown when too small: give it a capacity of the target plus a few
// MiB and use it again after the body was put.
func NewWriter(h Header, buf []byte, o Options) (*Writer, error) {
	if err := h.validate(); err != nil {
		return nil, fmt.Errorf("new segment: %w", err)
	}
	if o.Target == 0 {
		o.Target = DefaultTarget
	}
	if o.Target < 0 || o.Target > MaxTarget || o.Compression > None {
		return nil, fmt.Errorf("new segment: target %d, compression %d: %w", o.Target, o.Compression, ErrInvalid)
	}
	head := h.encode()
	w := &Writer{h: h, o: o, body: append(buf[:0], head[:]...)}
	w.frame = (*framePool.Get().(*[]byte))[:0]
	return w, nil
}

// Data adds the bytes p at offset off of the disk. Extents come in ascending order and do not overlap; off and
// len(p) are multiples of 512, len(p) at most MaxData. Blocks of zeros in p become zero extents. p is not kept.
func (w *Writer) Data(off int64, p []byte) error { return w.data(off, p, partFill, 0) }

// Checked adds data under the same rules, with the checksum (Sum) that was made of it beside its disk. What goes into
// the segment is checked against it; Finish fails with ErrDamaged when it is not what the source read.
func (w *Writer) Checked(off int64, p []byte, sum uint32) error {
	return w.data(off, p, partPiece, sum)
}

func (w *Writer) data(off int64, p []byte, kind partKind, sum uint32) error {
	if len(p) > MaxData {
		return fmt.Errorf("segment data of %d bytes, at most %d: %w", len(p), MaxData, ErrInvalid)
	}
	if err := w.check(off, int64(len(p))); err != nil {
		return err
	}
	whole := int64(len(p))
	for len(p) > 0 {
		// Up to the next 4 KiB boundary of the disk, then run by run.
		n, zero := run(off, p)
		if zero {
			w.addZero(off, int64(n))
			if kind == partPiece {
				w.note(part{n: int64(n), kind: partZeros})
			}
		} else {
			w.addData(off, p[:n], kind)
		}
		off, p = off+int64(n), p[n:]
	}
	if kind == partPiece && whole > 0 {
		w.note(part{n: whole, kind: partEnd, sum: sum})
	}
	return w.damaged
}

// run measures the longest prefix of p that is all zero blocks or all other blocks.
func run(off int64, p []byte) (n int, zero bool) {
	step := func(at int) int { return min(zeroBlock-int((off+int64(at))%zeroBlock), len(p)-at) }
	isZero := func(at, n int) bool { return bytes.Equal(p[at:at+n], zeros[:n]) }
	n = step(0)
	zero = isZero(0, n)
	for n < len(p) {
		s := step(n)
		if isZero(n, s) != zero {
			break
		}
		n += s
	}
	return n, zero
}

// Zero adds a range of zeros of any length, under the same rules.
func (w *Writer) Zero(off, length int64) error {
	if err := w.check(off, length); err != nil {
		return err
	}
	if length > 0 {
		w.addZero(off, length)
	}
	return nil
}

func (w *Writer) check(off, length int64) error {
	switch {
	case w.done:
		return fmt.Errorf("segment is finished: %w", ErrInvalid)
	case off < 0 || length < 0 || off%Sector != 0 || length%Sector != 0:
		return fmt.Errorf("segment extent %d+%d is not aligned to %d: %w", off, length, Sector, ErrInvalid)
	case off < w.end:
		return fmt.Errorf("segment extent %d+%d comes after %d was written: %w", off, length, w.end, ErrInvalid)
	case off > w.h.DiskSize || length > w.h.DiskSize-off:
		return fmt.Errorf("segment extent %d+%d on a disk of %d bytes: %w", off, length, w.h.DiskSize, ErrInvalid)
	case len(w.extents)+2+2*int((min(length, MaxData)+zeroBlock-1)/zeroBlock) > MaxExtents,
		len(w.body)+len(w.frame)+int(min(length, MaxData)) > MaxSize-indexRoom, len(w.frames) >= maxFrames-128:
		return fmt.Errorf("segment is full: %w", ErrInvalid)
	}
	return nil
}

// indexRoom is kept free for index and footer: 12 bytes per extent at the very most would be 768 KiB, frames 512 KiB.
const indexRoom = 2 << 20

// Full reports whether the caller should Finish and go on with a new segment. Data and Zero succeed at least once
// while it answers false.
func (w *Writer) Full() bool {
	return len(w.body)+len(w.frame) >= w.o.Target || len(w.extents) >= MaxExtents-2*MaxData/zeroBlock-2 ||
		len(w.frames) >= maxFrames-128
}

// Empty reports whether there is nothing to store.
func (w *Writer) Empty() bool { return len(w.extents) == 0 && (w.zeroLen == 0 || w.o.SkipZeros) }

func (w *Writer) addZero(off, n int64) {
	if w.zeroLen > 0 && w.zeroOff+w.zeroLen == off {
		w.zeroLen += n
	} else {
		w.flushZero()
		w.zeroOff, w.zeroLen = off, n
	}
	w.end = off + n
}

// flushZero writes the pending run of zeros as an extent.
func (w *Writer) flushZero() {
	if w.zeroLen == 0 || w.o.SkipZeros {
		w.zeroLen = 0
		return
	}
	w.extents = append(w.extents, Extent{Off: w.zeroOff, Len: w.zeroLen, Zero: true})
	w.stats.Zero += w.zeroLen
	w.zeroLen = 0
}

func (w *Writer) addData(off int64, p []byte, kind partKind) {
	if last := len(w.extents) - 1; w.zeroLen > 0 {
		gap := w.zeroLen < zeroGap && w.zeroOff+w.zeroLen == off && last >= 0 &&
			!w.extents[last].Zero && w.extents[last].End() == w.zeroOff
		if gap {
			n := w.zeroLen
			w.zeroLen = 0
			w.stats.Gaps += n
			w.appendData(w.zeroOff, zeros[:n], partFill)
		} else {
			w.flushZero()
		}
	}
	w.appendData(off, p, kind)
}

func (w *Writer) appendData(off int64, p []byte, kind partKind) {
	n := int64(len(p))
	if last := len(w.extents) - 1; last >= 0 && !w.extents[last].Zero && w.extents[last].End() == off {
		w.extents[last].Len += n
	} else {
		w.extents = append(w.extents, Extent{Off: off, Len: n, Pos: w.pos})
	}
	w.pos += n
	w.stats.Data += n
	w.end = off + n
	for len(p) > 0 {
		if len(w.frame) == 0 && len(p) >= FrameSize {
			w.parts = append(w.parts, part{n: FrameSize, kind: kind})
			w.flushFrame(p[:FrameSize])
			p = p[FrameSize:]
			continue
		}
		k := min(FrameSize-len(w.frame), len(p))
		w.frame = append(w.frame, p[:k]...)
		w.parts = append(w.parts, part{n: int64(k), kind: kind})
		p = p[k:]
		if len(w.frame) == FrameSize {
			w.flushFrame(w.frame)
			w.frame = w.frame[:0]
		}
	}
}

// Finish ends the segment. The body lies in the buffer given to NewWriter, if it was large enough, and is valid
// until that is used again. The Writer is of no further use.
func (w *Writer) Finish() (body []byte, sha [32]byte, stats Stats, err error) {
	if w.done {
		return nil, sha, stats, fmt.Errorf("segment is finished: %w", ErrInvalid)
	}
	w.done = true
	w.flushZero()
	if len(w.frame) > 0 {
		w.flushFrame(w.frame)
	}
	w.sums(nil) // zeros and ends of runs that follow the last frame
	frame := w.frame[:0]
	framePool.Put(&frame)
	w.frame = nil
	if w.damaged != nil {
		return nil, sha, stats, w.damaged
	}
	if len(w.extents) == 0 {
		return nil, sha, stats, fmt.Errorf("segment without extents: %w", ErrInvalid)
	}
	index := len(w.body)
	w.appendIndex()
	w.appendFooter(index)
	if len(w.body) > MaxSize || len(w.extents) > MaxExtents || len(w.frames) > maxFrames {
		return nil, sha, stats, fmt.Errorf("segment of %d bytes, %d extents: %w", len(w.body), len(w.extents), ErrInvalid)
	}
	w.stats.Extents, w.stats.Stored = len(w.extents), int64(len(w.body))
	w.stats.First, w.stats.End = w.extents[0].Off, w.end
	return w.body, sha256.Sum256(w.body), w.stats, nil
}

// appendIndex: the header again, the frame table, the extents as varints (gap in sectors, then length in sectors
// shifted left by one with the zero flag in bit 0).
func (w *Writer) appendIndex() {
	head := w.h.encode()
	w.body = append(w.body, head[:]...)
	for _, f := range w.frames {
		w.body = le.AppendUint32(w.body, f.stored|uint32(f.codec)<<24)
		w.body = le.AppendUint32(w.body, f.crc)
	}
	at := int64(0)
	for _, e := range w.extents {
		w.body = binary.AppendUvarint(w.body, uint64(e.Off-at)/Sector)
		flag := uint64(0)
		if e.Zero {
			flag = 1
		}
		w.body = binary.AppendUvarint(w.body, uint64(e.Len)/Sector<<1|flag)
		at = e.End()
	}
}

// appendFooter: magic 0, version 4, zero 6, index offset 8, index length 16, extents 20, frames 24, CRC32C of the
// index 28, raw data bytes 32, zero to 60, CRC32C of the first 60 bytes at 60.
func (w *Writer) appendFooter(index int) {
	var b [footerSize]byte
	copy(b[0:], footMagic[:])
	le.PutUint16(b[4:], Version)
	le.PutUint64(b[8:], uint64(index))
	le.PutUint32(b[16:], uint32(len(w.body)-index))
	le.PutUint32(b[20:], uint32(len(w.extents)))
	le.PutUint32(b[24:], uint32(len(w.frames)))
	le.PutUint32(b[28:], crc32.Checksum(w.body[index:], castag))
	le.PutUint64(b[32:], uint64(w.pos))
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castag))
	w.body = append(w.body, b[:]...)
}
