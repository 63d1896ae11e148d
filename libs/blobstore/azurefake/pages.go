package azurefake

import (
	"hash/crc64"
	"maps"
	"math/bits"
	"slices"
)

const (
	pageSize      = 512
	chunkSize     = 64 << 10
	chunkPages    = chunkSize / pageSize
	maxPageWrite  = 4 << 20
	maxPageBlob   = 8 << 40
	maxPageRanges = 10_000
)

// pages is the sparse content of a page blob or of its snapshot. Snapshots share chunks: a chunk of an older generation is
// copied before it is written.
type pages struct {
	gen     uint32
	chunks  map[int64]*chunk
	discard bool
	valid   int64 // pages
}

// chunk is 64 KiB. written has, per page, the generation of its last write or clear; it and data are nil when bytes are
// discarded.
type chunk struct {
	gen     uint32
	valid   [chunkPages / 64]uint64
	data    []byte
	written []uint32
}

func newPages(discard bool) *pages {
	return &pages{gen: 1, chunks: map[int64]*chunk{}, discard: discard}
}

// freeze returns the present state and starts a new generation.
func (p *pages) freeze() *pages {
	old := &pages{gen: p.gen, chunks: maps.Clone(p.chunks), discard: p.discard, valid: p.valid}
	p.gen++
	return old
}

// own returns the chunk ready to be written, or for set to be given data, and how many bytes of memory that took.
func (p *pages) own(i int64, set bool) (c *chunk, grown int64) {
	c = p.chunks[i]
	if c == nil || c.gen != p.gen {
		old := c
		c = &chunk{gen: p.gen}
		if !p.discard {
			c.written = make([]uint32, chunkPages)
		}
		if old != nil {
			c.valid = old.valid
			copy(c.written, old.written)
			if old.data != nil {
				c.data, grown = append([]byte(nil), old.data...), chunkSize
			}
		}
		p.chunks[i] = c
	}
	if set && c.data == nil && !p.discard {
		c.data, grown = make([]byte, chunkSize), chunkSize
	}
	return c, grown
}

// write puts data, or clears length bytes when set is false. The range is aligned and inside; data is nil when bytes are
// discarded. It returns how many bytes of memory that took.
func (p *pages) write(off, length int64, data []byte, set bool) (grown int64) {
	if !set && length > chunkSize {
		return p.clearWide(off, length)
	}
	for length > 0 {
		i, in := off/chunkSize, off%chunkSize
		n := min(length, chunkSize-in)
		if set || p.chunks[i] != nil {
			c, g := p.own(i, set)
			grown += g
			for page := in / pageSize; page < (in+n)/pageSize; page++ {
				word, bit := page/64, uint64(1)<<(page%64)
				switch {
				case set && c.valid[word]&bit == 0:
					c.valid[word] |= bit
					p.valid++
				case !set && c.valid[word]&bit != 0:
					c.valid[word] &^= bit
					p.valid--
				}
				if c.written != nil {
					c.written[page] = p.gen
				}
			}
			if c.data != nil {
				if set {
					copy(c.data[in:in+n], data)
				} else {
					clear(c.data[in : in+n])
					if c.count() == 0 {
						c.data, grown = nil, grown-chunkSize
					}
				}
			}
		}
		if data != nil && set {
			data = data[n:]
		}
		off, length = off+n, length-n
	}
	return grown
}

// clearWide clears only chunks that exist: a hole of terabytes costs nothing.
func (p *pages) clearWide(off, length int64) (grown int64) {
	end := off + length
	first, last := off/chunkSize, (end-1)/chunkSize
	visit := func(i int64) {
		from, to := max(off, i*chunkSize), min(end, (i+1)*chunkSize)
		grown += p.write(from, to-from, nil, false)
	}
	if int64(len(p.chunks)) < last-first {
		for i := range maps.Clone(p.chunks) {
			if i >= first && i <= last {
				visit(i)
			}
		}
		return grown
	}
	for i := first; i <= last; i++ {
		visit(i)
	}
	return grown
}

func (p *pages) read(buf []byte, off int64) {
	for len(buf) > 0 {
		i, in := off/chunkSize, off%chunkSize
		n := min(int64(len(buf)), chunkSize-in)
		if c := p.chunks[i]; c != nil && c.data != nil {
			copy(buf[:n], c.data[in:])
		} else {
			clear(buf[:n])
		}
		buf, off = buf[n:], off+n
	}
}

func (c *chunk) has(page int64) bool {
	return c != nil && c.valid[page/64]&(1<<(page%64)) != 0
}

func (c *chunk) count() (n int) {
	if c == nil {
		return 0
	}
	for _, w := range c.valid {
		n += bits.OnesCount64(w)
	}
	return n
}

// span is a half-open range of bytes; gone marks one of a diff's clear ranges.
type span struct {
	start, end int64
	gone       bool
}

// ranges returns at most limit valid ranges of [off, end), merged, beginning at the first page at or after off. With prev it
// returns what was written or cleared since. next is where to go on, 0 at the end.
func (p *pages) ranges(off, end int64, prev *pages, limit int) (out []span, next int64) {
	emit := func(page int64, gone bool) bool {
		start := page * pageSize
		if n := len(out); n > 0 && out[n-1].end == start && out[n-1].gone == gone {
			out[n-1].end += pageSize
			return true
		}
		if len(out) == limit {
			next = start
			return false
		}
		out = append(out, span{start: start, end: start + pageSize, gone: gone})
		return true
	}
	for _, i := range p.order(prev, off/chunkSize, (end+chunkSize-1)/chunkSize) {
		now := p.chunks[i]
		var before *chunk
		if prev != nil {
			if before = prev.chunks[i]; before == now {
				continue
			}
		}
		for page := int64(0); page < chunkPages; page++ {
			abs := i*chunkPages + page
			if abs*pageSize < off || abs*pageSize >= end {
				continue
			}
			valid := now.has(page)
			if prev != nil {
				fresh := now == nil || now.written == nil || now.written[page] > prev.gen
				if !fresh || !valid && !before.has(page) && (now == nil || now.written == nil) {
					continue
				}
			} else if !valid {
				continue
			}
			if !emit(abs, !valid) {
				return out, next
			}
		}
	}
	return out, 0
}

// order lists the numbers of the chunks in [first, last) that either side has, rising.
func (p *pages) order(prev *pages, first, last int64) []int64 {
	seen := map[int64]struct{}{}
	add := func(m map[int64]*chunk) {
		for i := range m {
			if i >= first && i < last {
				seen[i] = struct{}{}
			}
		}
	}
	add(p.chunks)
	if prev != nil {
		add(prev.chunks)
	}
	return slices.Sorted(maps.Keys(seen))
}

// PageDigest is the digest of page-aligned content at byte offset off: the sum of one 64-bit hash per 512-byte page that is
// not all zero. Digests of disjoint ranges add up, whatever the order and the size of the writes.
func PageDigest(off int64, p []byte) (sum uint64) {
	var zero [pageSize]byte
	for ; len(p) >= pageSize; p, off = p[pageSize:], off+pageSize {
		if [pageSize]byte(p[:pageSize]) == zero {
			continue
		}
		x := crc64.Checksum(p[:pageSize], crcTable) + (uint64(off)/pageSize+1)*0x9e3779b97f4a7c15
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		sum += x ^ x>>31
	}
	return sum
}
