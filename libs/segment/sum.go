package segment

import (
	"fmt"
	"hash/crc32"
)

// A CRC is linear: the checksum of two pieces together follows from the checksums of the pieces, and the checksum of
// n zeros from n alone. So the checksum that a host made of a run beside the disk can be compared with what became of
// the run here (cut into frames, zeros taken out) from the very bytes that are encoded, and the checksums of the
// frames are made of the same parts. Nothing is checksummed anew on the way from the disk to the page write.

// polynomial is Castagnoli's, reflected: bit 31 is x^0.
const polynomial = 0x82f63b78

// times multiplies two polynomials modulo the CRC's.
func times(a, b uint32) (p uint32) {
	for bit := uint32(1) << 31; bit != 0; bit >>= 1 {
		if a&bit != 0 {
			p ^= b
		}
		carry := b & 1
		b >>= 1
		if carry != 0 {
			b ^= polynomial
		}
	}
	return p
}

// squares[k] is x^(8*2^k): what 2^k bytes shift a checksum by.
var squares = func() (t [48]uint32) {
	p := uint32(1) << 30 // x
	for range 3 {
		p = times(p, p)
	}
	for k := range t {
		t[k] = p
		p = times(p, p)
	}
	return t
}()

// shifts remembers the factors of the lengths used last: runs and pieces mostly have a few lengths.
type shifts struct {
	n      [4]int64
	factor [4]uint32
	next   int
}

// of is x^(8n): the factor by which n more bytes move a checksum.
func (s *shifts) of(n int64) uint32 {
	for i, have := range s.n {
		if have == n && n != 0 {
			return s.factor[i]
		}
	}
	p := uint32(1) << 31 // x^0
	for k, left := 0, n; left != 0; k, left = k+1, left>>1 {
		if left&1 != 0 {
			p = times(squares[k], p)
		}
	}
	s.n[s.next], s.factor[s.next] = n, p
	s.next = (s.next + 1) % len(s.n)
	return p
}

// join is the checksum of two pieces, the second of n bytes.
func (s *shifts) join(first, second uint32, n int64) uint32 {
	if first == 0 { // nothing before it, or as good as that
		return second
	}
	return times(s.of(n), first) ^ second
}

// zeros is the checksum of n bytes of zeros.
func (s *shifts) zeros(n int64) uint32 { return ^times(s.of(n), ^uint32(0)) }

// part is a piece of a frame, zeros taken out of a run, or the end of a run.
type part struct {
	n    int64 // bytes
	kind partKind
	sum  uint32 // of the run, when it ends
}

type partKind uint8

const (
	partFill  partKind = iota // bytes of a frame that have no checksum from the source
	partPiece                 // bytes of a frame that belong to a run with a checksum
	partZeros                 // zeros of such a run that are not in a frame
	partEnd                   // such a run ends
)

// Sum is the checksum that runs carry from their source, CRC32C.
func Sum(p []byte) uint32 { return crc32.Checksum(p, castag) }

// note remembers a part until the frame is complete that it is in, or follows.
func (w *Writer) note(p part) {
	if len(w.parts) == 0 && p.kind >= partZeros {
		w.account(p)
		return
	}
	w.parts = append(w.parts, p)
}

// sums checksums a complete frame part by part, and checks the runs that end in it.
func (w *Writer) sums(raw []byte) (frame uint32) {
	at := int64(0)
	for _, p := range w.parts {
		if p.kind <= partPiece {
			sum := crc32.Checksum(raw[at:at+p.n], castag)
			frame = w.shifts.join(frame, sum, p.n)
			at += p.n
			p.sum = sum
		}
		w.account(p)
	}
	w.parts = w.parts[:0]
	return frame
}

// account moves the checksum of the run in progress.
func (w *Writer) account(p part) {
	switch p.kind {
	case partPiece:
		w.run = w.shifts.join(w.run, p.sum, p.n)
	case partZeros:
		w.run = w.shifts.join(w.run, w.shifts.zeros(p.n), p.n)
	case partEnd:
		if w.run != p.sum && w.damaged == nil {
			w.damaged = fmt.Errorf("run of %d bytes has checksum %08x, its source said %08x: %w", p.n, w.run, p.sum, ErrDamaged)
		}
		w.run = 0
	}
}
