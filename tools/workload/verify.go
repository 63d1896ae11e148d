package workload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
)

// trailing is how many writes above the newest visible one may be invisible.
const trailing = 8

// Newest returns the newest write whose data stands in the copies, one per disk in the guest's order.
func (g Guest) Newest(copies []io.ReaderAt) (uint64, error) {
	var newest uint64
	buf := make([]byte, 1<<20)
	for d, disk := range g.Disks {
		for off := int64(0); off < disk.Size; off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), disk.Size-off)]
			if _, err := copies[d].ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
				return 0, fmt.Errorf("read disk %s: %w", disk.ID, err)
			}
			for b := 0; b+Block <= len(p); b += Block {
				newest = max(newest, g.number(p[b:]))
			}
		}
	}
	return newest, nil
}

// Mismatch says where a copy differs from every state that the guest may have had.
type Mismatch struct {
	Disk string
	Off  int64
	// N is the number of writes that explains most; Want and Got are the numbers of the blocks (0: not of the guest).
	N, Want, Got uint64
}

func (m *Mismatch) Error() string {
	return fmt.Sprintf("disk %s differs at byte %d from the machine after write %d: block of write %d, not of write %d", m.Disk, m.Off, m.N, m.Got, m.Want)
}

// Verify finds the n for which the copies are, byte for byte, initial content plus writes 1..n, and returns it.
// initial fills p with the first content of a disk. low and high bound n (see Record.Bounds); a copy that is right for
// an n outside is an error too: something acknowledged before the cut is missing, or something after it is there.
//
// Writes of zeros carry no number and may hide others, so a few n above the newest visible one are tried.
func (g Guest) Verify(ctx context.Context, copies []io.ReaderAt, initial func(disk int, p []byte, off int64), low, high uint64) (uint64, error) {
	newest, err := g.Newest(copies)
	if err != nil {
		return 0, err
	}
	var first, outside error
	for n := newest; n <= newest+trailing; n++ {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		err := g.compare(copies, initial, n)
		switch {
		case err == nil && n >= low && n <= high:
			return n, nil
		case err == nil:
			outside = fmt.Errorf("the copy is the machine after write %d, but the cut lies between writes %d and %d", n, low, high)
		case first == nil:
			first = err
		}
	}
	if outside != nil {
		return 0, outside
	}
	return 0, first
}

// compare checks one n: the model is built window by window, so memory is bounded.
func (g Guest) compare(copies []io.ReaderAt, initial func(int, []byte, int64), n uint64) error {
	writes := make([][]Write, len(g.Disks))
	for i := uint64(1); i <= n; i++ {
		w := g.Write(i)
		writes[w.Disk] = append(writes[w.Disk], w)
	}
	const window = 4 << 20
	want, got, data := make([]byte, window), make([]byte, window), make([]byte, maxBlocks*Block)
	for d, disk := range g.Disks {
		last := g.lastWriters(writes[d], disk.Size)
		for off := int64(0); off < disk.Size; off += window {
			size := min(window, disk.Size-off)
			initial(d, want[:size], off)
			for b := int64(0); b < size; b += Block {
				k := last[(off+b)/Block]
				if k == 0 {
					continue
				}
				w := writes[d][k-1]
				g.Fill(w, data[:w.Blocks*Block])
				copy(want[b:b+Block], data[off+b-w.Off:])
			}
			clear(got[:size])
			if _, err := copies[d].ReadAt(got[:size], off); err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("read disk %s: %w", disk.ID, err)
			}
			if bytes.Equal(want[:size], got[:size]) {
				continue
			}
			for b := int64(0); b < size; b += Block {
				if !bytes.Equal(want[b:b+Block], got[b:b+Block]) {
					return &Mismatch{Disk: disk.ID, Off: off + b, N: n, Want: g.number(want[b:]), Got: g.number(got[b:])}
				}
			}
		}
	}
	return nil
}

// lastWriters tells for each block which write (index + 1) was its last; 0 for none.
func (g Guest) lastWriters(writes []Write, size int64) []int32 {
	last := make([]int32, size/Block)
	for i, w := range writes {
		for b := range w.Blocks {
			last[w.Off/Block+int64(b)] = int32(i + 1)
		}
	}
	return last
}
