package extent

import (
	"fmt"
	"math"
)

// Range is the half-open span of bytes [Off, Off+Len). The zero Range is empty.
type Range struct {
	// Off is the first byte of the range, in bytes from the start of the disk.
	Off int64
	// Len is the number of bytes.
	Len int64
}

// Span returns the range [start, end).
func Span(start, end int64) Range { return Range{Off: start, Len: end - start} }

// End returns the first byte after the range.
func (r Range) End() int64 { return r.Off + r.Len }

// Empty reports whether the range holds no byte.
func (r Range) Empty() bool { return r.Len == 0 }

// Valid reports whether the range lies in [0, MaxInt64) and has no negative length. Everything in this package
// panics when given a range that is not valid.
func (r Range) Valid() bool { return r.Off >= 0 && r.Len >= 0 && r.Off <= math.MaxInt64-r.Len }

// Intersect returns the bytes common to both ranges, or the zero Range if there are none.
func (r Range) Intersect(o Range) Range {
	start, end := max(r.Off, o.Off), min(r.End(), o.End())
	if start >= end {
		return Range{}
	}
	return Span(start, end)
}

// Overlaps reports whether the two ranges have a byte in common.
func (r Range) Overlaps(o Range) bool { return !r.Intersect(o).Empty() }

// Contains reports whether every byte of o is in r. An empty o is contained in everything.
func (r Range) Contains(o Range) bool {
	return o.Empty() || (r.Off <= o.Off && o.End() <= r.End())
}

// Align grows the range outwards to multiples of unit bytes (unit > 0). An empty range stays as it is.
func (r Range) Align(unit int64) Range {
	r.mustBeValid()
	if r.Empty() {
		return r
	}
	start := r.Off - r.Off%unit
	end := r.End()
	if rest := end % unit; rest != 0 {
		end += unit - rest
	}
	return Span(start, end)
}

// String prints the range as [start,end).
func (r Range) String() string { return fmt.Sprintf("[%d,%d)", r.Off, r.End()) }

func (r Range) mustBeValid() {
	if !r.Valid() {
		panic(fmt.Sprintf("extent: invalid range {Off:%d Len:%d}", r.Off, r.Len))
	}
}
