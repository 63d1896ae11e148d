package hosttest

import (
	"bytes"
	"fmt"
	"maps"
	"sync"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// BlockSize is the unit in which an image holds space, in bytes.
const BlockSize = 64 << 10

// Image is a sparse disk image in memory. Its methods may be called from any
// goroutine; each read or write of up to one block is atomic.
type Image struct {
	size int64

	mu sync.RWMutex
	// blocks are never changed in place, so that a frozen image shares them.
	blocks map[int64][]byte // by offset/BlockSize
	seed   uint64
	gen    extent.Set // space whose content is made when it is read
}

// NewImage returns an image of size bytes, all hole. It panics on a size that is
// not a positive multiple of 512.
func NewImage(size int64) *Image {
	if size <= 0 || size%512 != 0 {
		panic(fmt.Sprintf("hosttest: image of %d bytes", size))
	}
	return &Image{size: size, blocks: map[int64][]byte{}}
}

// NewGenerated returns an image whose space within ranges has the endless
// content of seed ([testkit.FillAt]) without holding it in memory. Ranges are
// grown to whole blocks.
func NewGenerated(size int64, seed uint64, ranges ...extent.Range) *Image {
	m := NewImage(size)
	m.seed = seed
	for _, r := range ranges {
		m.gen.Add(r.Align(BlockSize).Intersect(extent.Range{Len: size}))
	}
	return m
}

// Size returns the size in bytes.
func (m *Image) Size() int64 { return m.size }

// WriteAt writes p at off. It panics outside the image.
func (m *Image) WriteAt(p []byte, off int64) {
	m.check(off, int64(len(p)))
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(p) > 0 {
		i, skip := off/BlockSize, off%BlockSize
		n := min(int64(len(p)), BlockSize-skip)
		fresh := make([]byte, BlockSize)
		if n < BlockSize {
			m.block(fresh, i)
		}
		copy(fresh[skip:], p[:n])
		m.blocks[i] = fresh
		p, off = p[n:], off+n
	}
}

// Zero makes a range read as zeros; whole blocks become holes.
func (m *Image) Zero(off, n int64) {
	m.check(off, n)
	var zeros [BlockSize]byte
	for n > 0 {
		skip := off % BlockSize
		c := min(n, BlockSize-skip)
		if c == BlockSize {
			m.mu.Lock()
			delete(m.blocks, off/BlockSize)
			m.gen.Remove(extent.Range{Off: off, Len: c})
			m.mu.Unlock()
		} else {
			m.WriteAt(zeros[:c], off)
		}
		off, n = off+c, n-c
	}
}

// ReadInto fills p from off. It panics outside the image.
func (m *Image) ReadInto(p []byte, off int64) {
	m.check(off, int64(len(p)))
	m.mu.RLock()
	defer m.mu.RUnlock()
	var buf []byte
	for len(p) > 0 {
		i, skip := off/BlockSize, off%BlockSize
		n := min(int64(len(p)), BlockSize-skip)
		switch b, ok := m.blocks[i]; {
		case ok:
			copy(p[:n], b[skip:])
		case m.gen.Overlaps(extent.Range{Off: i * BlockSize, Len: 1}):
			if n == BlockSize {
				testkit.FillAt(p[:n], off, m.seed)
				break
			}
			if buf == nil {
				buf = make([]byte, BlockSize)
			}
			m.block(buf, i)
			copy(p[:n], buf[skip:])
		default:
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// block fills p with block i. It needs mu.
func (m *Image) block(p []byte, i int64) {
	switch b, ok := m.blocks[i]; {
	case ok:
		copy(p, b)
	case m.gen.Overlaps(extent.Range{Off: i * BlockSize, Len: 1}):
		testkit.FillAt(p, i*BlockSize, m.seed)
	default:
		clear(p)
	}
}

// run returns how much of r, from its start, is all hole or all space.
func (m *Image) run(r extent.Range) (n int64, hole bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	isHole := func(off int64) bool {
		_, ok := m.blocks[off/BlockSize]
		return !ok && !m.gen.Overlaps(extent.Range{Off: off, Len: 1})
	}
	hole = isHole(r.Off)
	end := r.Off - r.Off%BlockSize + BlockSize
	for end < r.End() && isHole(end) == hole {
		end += BlockSize
	}
	return min(end, r.End()) - r.Off, hole
}

// Bytes returns a whole copy of the content; for small images.
func (m *Image) Bytes() []byte {
	p := make([]byte, m.size)
	m.ReadInto(p, 0)
	return p
}

// Allocated returns the space that is not hole, in whole blocks.
func (m *Image) Allocated() *extent.Set {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.gen.Clone()
	for i := range m.blocks {
		s.Add(extent.Range{Off: i * BlockSize, Len: BlockSize}.Intersect(extent.Range{Len: m.size}))
	}
	return s
}

// Freeze returns an independent image of the present content.
func (m *Image) Freeze() *Image {
	m.mu.RLock()
	defer m.mu.RUnlock()
	f := NewImage(m.size)
	f.blocks, f.seed = maps.Clone(m.blocks), m.seed
	f.gen.AddSet(&m.gen)
	return f
}

// FirstDifference returns the offset of the first byte in which the images
// differ, or -1 when they are equal in content and size.
func (m *Image) FirstDifference(o *Image) int64 {
	if m.size != o.size {
		return min(m.size, o.size)
	}
	space := m.Allocated()
	space.AddSet(o.Allocated())
	a, b := make([]byte, BlockSize), make([]byte, BlockSize)
	for r := range space.All() {
		for off := r.Off; off < r.End(); off += BlockSize {
			n := min(BlockSize, r.End()-off)
			m.ReadInto(a[:n], off)
			o.ReadInto(b[:n], off)
			if bytes.Equal(a[:n], b[:n]) {
				continue
			}
			for i := range n {
				if a[i] != b[i] {
					return off + i
				}
			}
		}
	}
	return -1
}

func (m *Image) check(off, n int64) {
	if off < 0 || n < 0 || off > m.size-n {
		panic(fmt.Sprintf("hosttest: [%d,+%d) outside an image of %d bytes", off, n, m.size))
	}
}
