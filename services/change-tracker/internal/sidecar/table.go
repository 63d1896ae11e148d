// Package sidecar keeps the marks of every extent of one disk: hot, dirty, part of a pass.
//
// A Table holds the marks in memory and in a file of fixed size that is rewritten in place, one 512-byte sector
// at a time, each with its checksum. Because the file never grows, marking cannot meet a full volume. Because a mark
// too many only costs a re-read, no two sectors ever have to change together.
//
// Marks become durable by group commit: whoever needs a mark waits for the write and fdatasync of the round that
// contains it, and all who wait in one round share them.
//
// All methods may be called from several goroutines at once.
package sidecar

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"

	"github.com/landfall-dr/landfall/libs/extent"
)

// markAhead is how many extents a sequential writer marks beyond the one it writes: one fdatasync per 16 MiB.
const markAhead = 16

// File is what a Table needs of its file. Sync makes all earlier writes durable.
type File interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Close() error
}

// hot is what memory knows of an extent marked Hot.
type hot struct {
	writers int32  // guest writes between Heat and Done
	done    uint64 // clock when the last write was done
	gen     uint64 // newest log that holds a write of it; 0 for none
	round   uint64 // commit that makes the mark durable
}

// Table holds the marks of one disk.
type Table struct {
	mu   sync.Mutex
	cond sync.Cond

	file  File
	size  int64
	marks []Flag
	hot   map[int]*hot
	count [3]int // extents with Hot, Dirty, Pass

	clock   uint64 // counts finished writes
	flushed uint64 // writes done at or before this clock are on stable storage
	last    int    // extent heated last, to see sequential writers

	stale   map[int]struct{} // sectors whose file content is behind
	round   uint64           // the round that a mark made now belongs to
	durable uint64           // newest finished round
	leading bool
	err     error // first failed commit; the file is not trusted from then on
}

// Create writes a fresh sidecar without marks into f, which must have room for FileSize(size) bytes, and makes it
// durable.
func Create(f File, size int64, lineage [16]byte) (*Table, error) {
	t := newTable(f, size)
	b := make([]byte, FileSize(size))
	copy(b, encodeHeader(size, lineage))
	for i := range sectors(len(t.marks)) {
		encodeSector(b[headerSize+i*sectorSize:], i, nil)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return nil, fmt.Errorf("write sidecar: %w", err)
	}
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("sync sidecar: %w", err)
	}
	return t, nil
}

// Open reads the sidecar of a disk of size bytes. Damaged sectors read as Dirty; their number is returned. Errors are
// ErrCorrupt, ErrVersion and those of f.
func Open(f File, size int64, lineage [16]byte) (*Table, int, error) {
	t := newTable(f, size)
	b := make([]byte, FileSize(size))
	if n, err := f.ReadAt(b, 0); err != nil && (!errors.Is(err, io.EOF) || n < len(b)) {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: %d bytes of %d", ErrCorrupt, n, len(b))
		}
		return nil, 0, fmt.Errorf("read sidecar: %w", err)
	}
	if err := decodeHeader(b, size, lineage); err != nil {
		return nil, 0, err
	}
	damaged := 0
	for i := range sectors(len(t.marks)) {
		lo := i * perSector
		if !decodeSector(b[headerSize+i*sectorSize:], i, t.marks[lo:min(lo+perSector, len(t.marks))]) {
			damaged++
			t.stale[i] = struct{}{}
		}
	}
	for i, m := range t.marks {
		t.tally(0, m)
		if m&Hot != 0 {
			t.hot[i] = &hot{}
		}
	}
	return t, damaged, nil
}

func newTable(f File, size int64) *Table {
	t := &Table{
		file: f, size: size, marks: make([]Flag, Extents(size)), hot: map[int]*hot{},
		stale: map[int]struct{}{}, round: 1, last: -2,
	}
	t.cond.L = &t.mu
	return t
}

// Close closes the file without writing anything.
func (t *Table) Close() error { return t.file.Close() }

// Span returns the extents that r touches: first and one past the last.
func Span(r extent.Range) (first, end int) {
	return int(r.Off / ExtentSize), int((r.End() + ExtentSize - 1) / ExtentSize)
}

// set changes the marks of extent i. It needs t.mu.
func (t *Table) set(i int, add, remove Flag) bool {
	was := t.marks[i]
	now := was&^remove | add
	if now == was {
		return false
	}
	t.tally(was, now)
	t.marks[i] = now
	t.stale[i/perSector] = struct{}{}
	return true
}

func (t *Table) tally(was, now Flag) {
	for b := range t.count {
		t.count[b] += int(now>>b&1) - int(was>>b&1)
	}
}

// Heat registers a write of r and returns once every extent it touches is Hot in the file. On an error (that of the
// first failed commit, ever after) the write is registered all the same, and the caller decides what a lost mark means.
// Each Heat is followed by one Done.
func (t *Table) Heat(r extent.Range) error {
	first, end := Span(r)
	t.mu.Lock()
	defer t.mu.Unlock()
	need := uint64(0)
	for i := first; i < end; i++ {
		h := t.heat(i)
		h.writers++
		need = max(need, h.round)
	}
	if need == t.round && t.last >= first-1 && t.last < end {
		for i := end; i < min(end+markAhead, len(t.marks)); i++ {
			t.heat(i)
		}
	}
	t.last = end - 1
	return t.await(need)
}

func (t *Table) heat(i int) *hot {
	h := t.hot[i]
	if h == nil {
		h = &hot{round: t.round}
		t.hot[i] = h
		t.set(i, Hot, 0)
		// Also when memory already said Hot: the commit of this round must include the sector.
		t.stale[i/perSector] = struct{}{}
	}
	return h
}

// Done ends a write that was begun with Heat. gen is the log that holds it; 0 if none does.
func (t *Table) Done(r extent.Range, gen uint64) {
	first, end := Span(r)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.clock++
	for i := first; i < end; i++ {
		h := t.hot[i]
		h.writers--
		h.done = t.clock
		h.gen = max(h.gen, gen)
	}
}

// Hold marks the extents of bits Hot as if log gen held writes of them. Commit makes it durable.
func (t *Table) Hold(bits Bits, gen uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range bits.All() {
		h := t.heat(i)
		h.gen = max(h.gen, gen)
	}
}

// HoldAll makes log gen the holder of all Hot extents, after a clean start.
func (t *Table) HoldAll(gen uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.hot {
		h.gen = gen
	}
}

// FlushBegins returns a token for FlushEnds. Call it before the flush of the image begins.
func (t *Table) FlushBegins() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.clock
}

// FlushEnds says that the flush which began at token has completed.
func (t *Table) FlushEnds(token uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flushed = max(t.flushed, token)
}

// Cool takes Hot from every extent that no writer holds, whose last write was flushed and whose newest log is gen or
// older. The file follows with the next commit; until then it says too much, which is harmless.
func (t *Table) Cool(gen uint64) int { return t.cool(gen, false) }

// CoolUnflushed is Cool with the bug of rule 1 planted: it does not ask for a flush. Tests only.
func (t *Table) CoolUnflushed(gen uint64) int { return t.cool(gen, true) }

func (t *Table) cool(gen uint64, unflushed bool) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for i, h := range t.hot {
		if h.writers == 0 && h.gen <= gen && (h.done <= t.flushed || unflushed) && h.round <= t.durable {
			delete(t.hot, i)
			t.set(i, 0, Hot)
			n++
		}
	}
	return n
}

// Mark adds flags to the extents that r touches, in memory.
func (t *Table) Mark(r extent.Range, add Flag) {
	first, end := Span(r)
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := first; i < end; i++ {
		t.set(i, add, 0)
	}
}

// MarkBits adds flags to the extents of bits, in memory.
func (t *Table) MarkBits(bits Bits, add Flag) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range bits.All() {
		t.set(i, add, 0)
	}
}

// MarkAll adds flags to every extent, in memory.
func (t *Table) MarkAll(add Flag) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.marks {
		t.set(i, add, 0)
	}
}

// Move replaces the flags from by the flags to on every extent that has any of from, in memory. Hot cannot be added.
func (t *Table) Move(from, to Flag) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, m := range t.marks {
		if m&from == 0 {
			continue
		}
		t.set(i, to, from)
		// A writer that entered before keeps its count; its Done comes.
		if h := t.hot[i]; from&Hot != 0 && h != nil {
			if h.writers == 0 {
				delete(t.hot, i)
			} else {
				h.round = t.round
				t.set(i, Hot, 0)
			}
		}
	}
}

// Commit makes all marks as they are now durable.
func (t *Table) Commit() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.stale) == 0 && !t.leading {
		return t.err
	}
	return t.await(t.round)
}

// await returns when round is durable, doing the work of a round itself if nobody does. It needs t.mu.
func (t *Table) await(round uint64) error {
	for t.durable < round && t.err == nil {
		if t.leading {
			t.cond.Wait()
			continue
		}
		t.leading = true
		mine := t.round
		t.round++
		writes := t.snapshot()
		t.mu.Unlock()
		err := t.write(writes)
		t.mu.Lock()
		t.leading = false
		t.durable = mine
		if err != nil {
			t.err = fmt.Errorf("write sidecar: %w", err)
		}
		t.cond.Broadcast()
	}
	return t.err
}

type run struct {
	off  int64
	data []byte
}

// snapshot takes the stale sectors as they are now, joined into runs.
func (t *Table) snapshot() []run {
	list := make([]int, 0, len(t.stale))
	for s := range t.stale {
		list = append(list, s)
	}
	clear(t.stale)
	slices.Sort(list)
	var runs []run
	for n, s := range list {
		if n == 0 || list[n-1] != s-1 {
			runs = append(runs, run{off: headerSize + int64(s)*sectorSize})
		}
		r := &runs[len(runs)-1]
		r.data = append(r.data, make([]byte, sectorSize)...)
		lo := s * perSector
		encodeSector(r.data[len(r.data)-sectorSize:], s, t.marks[lo:min(lo+perSector, len(t.marks))])
	}
	return runs
}

func (t *Table) write(runs []run) error {
	for _, r := range runs {
		if _, err := t.file.WriteAt(r.data, r.off); err != nil {
			return err
		}
	}
	return t.file.Sync()
}

// Err returns the error of the first failed commit. From then on the file is not to be trusted.
func (t *Table) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Any reports whether any extent has f, one flag.
func (t *Table) Any(f Flag) bool { return t.Bytes(f) > 0 }

// Bytes returns the bytes in extents that have f, one flag; the last extent of a disk counts whole.
func (t *Table) Bytes(f Flag) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := int64(0)
	for b := range t.count {
		if f>>b&1 != 0 {
			n += int64(t.count[b])
		}
	}
	return n * ExtentSize
}

// Bits returns the extents that have any of f.
func (t *Table) Bits(f Flag) Bits {
	t.mu.Lock()
	defer t.mu.Unlock()
	bits := NewBits(len(t.marks))
	for i, m := range t.marks {
		if m&f != 0 {
			bits.Set(i)
		}
	}
	return bits
}

// Ranges returns the bytes in extents that have any of f, clipped to window and to the disk, ascending and joined.
func (t *Table) Ranges(f Flag, window extent.Range) []extent.Range {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []extent.Range
	window = window.Intersect(extent.Range{Len: t.size})
	if window.Empty() {
		return nil
	}
	first, end := Span(window)
	for i := first; i < end; i++ {
		if t.marks[i]&f == 0 {
			continue
		}
		r := extent.Range{Off: int64(i) * ExtentSize, Len: ExtentSize}.Intersect(window)
		if n := len(out); n > 0 && out[n-1].End() == r.Off {
			out[n-1].Len += r.Len
		} else {
			out = append(out, r)
		}
	}
	return out
}

// Bits is a set of extents. It is not safe for concurrent use.
type Bits []uint64

// NewBits returns an empty set with room for extents 0 to n-1.
func NewBits(n int) Bits { return make(Bits, (n+63)/64) }

// Set adds extent i.
func (b Bits) Set(i int) { b[i/64] |= 1 << (i % 64) }

// Has reports whether extent i is in the set.
func (b Bits) Has(i int) bool { return b[i/64]>>(i%64)&1 != 0 }

// Add adds the extents that r touches.
func (b Bits) Add(r extent.Range) {
	first, end := Span(r)
	for i := first; i < end; i++ {
		b.Set(i)
	}
}

// Or adds all of o, which has the same size.
func (b Bits) Or(o Bits) {
	for i, w := range o {
		b[i] |= w
	}
}

// All yields the extents of the set, ascending.
func (b Bits) All() iter.Seq[int] {
	return func(yield func(int) bool) {
		for w, word := range b {
			for j := 0; word != 0; j, word = j+1, word>>1 {
				if word&1 != 0 && !yield(w*64+j) {
					return
				}
			}
		}
	}
}
