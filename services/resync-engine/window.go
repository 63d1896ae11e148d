package resyncengine

import (
	"iter"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/replica"
)

// window is what one partial of the pass covers.
type window struct {
	// index of the partial in the pass, from 2: the first is the empty one.
	index uint32
	disk  replica.Disk
	extent.Range
}

// plan splits the disks into windows. It depends on its arguments alone, so that a task that comes again, at whichever
// worker, has the same partials.
func plan(disks []replica.Disk, size int64) []window {
	var out []window
	for _, d := range disks {
		for off := int64(0); off < d.Size; off += size {
			out = append(out, window{
				index: uint32(len(out)) + 2, disk: d,
				Range: extent.Range{Off: off, Len: min(size, d.Size-off)},
			})
		}
	}
	return out
}

// digestBytes is the length of a SHA-256 digest.
const digestBytes = 32

// digests has the source's digest of every chunk of a window.
type digests struct {
	window extent.Range
	chunk  int64
	sums   []byte // digestBytes per chunk
	zero   []bool // per chunk: known to be all zero, its sum is not set
}

func newDigests(w extent.Range, chunk int64) *digests {
	n := (w.Len + chunk - 1) / chunk
	return &digests{window: w, chunk: chunk, sums: make([]byte, n*digestBytes), zero: make([]bool, n)}
}

// set takes over a run of digests; sums is nil for zero chunks.
func (d *digests) set(off, chunks int64, sums []byte) {
	first := (off - d.window.Off) / d.chunk
	if sums != nil {
		copy(d.sums[first*digestBytes:], sums[:chunks*digestBytes])
		return
	}
	for i := first; i < first+chunks; i++ {
		d.zero[i] = true
	}
}

// at is the range of chunk i on the disk.
func (d *digests) at(i int64) extent.Range {
	off := d.window.Off + i*d.chunk
	return extent.Span(off, min(off+d.chunk, d.window.End()))
}

func (d *digests) sum(i int64) [digestBytes]byte { return [digestBytes]byte(d.sums[i*digestBytes:]) }

// jobs yields runs of chunks [first, end) that must be read at the target to be judged, at most limit bytes each. present
// is where the target may hold anything but zeros; chunks outside it are judged here: differ hears those that differ.
func (d *digests) jobs(present *extent.Set, limit int64, differ func(i int64)) iter.Seq2[int64, int64] {
	most := max(limit/d.chunk, 1)
	return func(yield func(int64, int64) bool) {
		first := int64(-1)
		n := int64(len(d.zero))
		for i := range n {
			read := present.Overlaps(d.at(i))
			if !read && !d.zero[i] {
				differ(i)
			}
			if read && first < 0 {
				first = i
			}
			if first >= 0 && (!read || i+1-first == most || i+1 == n) {
				end := i
				if read {
					end = i + 1
				}
				if !yield(first, end) {
					return
				}
				first = -1
			}
		}
	}
}
