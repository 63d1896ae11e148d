package replica

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strings"
)

var modelDisks = []string{"disk-a", "disk-b"}

// allBlocks counts the blocks of all disks: block i is block i%testBlocks of disk i/testBlocks.
const allBlocks = 2 * testBlocks

// image is all disks of the guest at one instant.
type image [allBlocks]uint64

// is says whether a disk reads as c.
func (m *image) is(disk int, c content) bool {
	for b := range testBlocks {
		if m[disk*testBlocks+b] != c[int64(b)] {
			return false
		}
	}
	return true
}

func (m *image) String() string {
	var s strings.Builder
	for i, v := range m {
		if i == testBlocks {
			s.WriteString("| ")
		}
		fmt.Fprintf(&s, "%d ", v)
	}
	return s.String()
}

// blockSet is a set of blocks of all disks.
type blockSet uint32

const everyBlock = blockSet(1<<allBlocks - 1)

func (s blockSet) has(b int) bool { return s>>b&1 != 0 }

func (s *blockSet) add(b int) { *s |= 1 << b }

func (s blockSet) each(do func(b int)) {
	for ; s != 0; s &= s - 1 {
		do(bits.TrailingZeros32(uint32(s)))
	}
}

// source is how a host tracks changes (design section 5).
type source int

const (
	writeLog source = iota // logs with data; marks beside the disk (rules 1 and 2)
	frozen                 // ranges changed since a reference, read from a frozen file: RCT
	bitmap                 // a bitmap in the hypervisor's memory, gone with it: QEMU
)

// hostBugs break a rule of the host. The change-tracker has tests of its own; these show that the model would notice.
type hostBugs struct {
	CooledBySeal  bool // rule 1
	CooledByFlush bool // rule 1: although the log that holds the write is not sealed
	OldLogData    bool // rule 2
	CutAfterGiven bool // rule 4: a point that was given up before its cut can be cut
}

// modelHost is a guest and its change tracker.
type modelHost struct {
	kind source
	rng  *rand.Rand
	bugs hostBugs
	hit  func(string)

	now       int // counts what happens: the order of writes, marks and flushes
	guest     image
	value     uint64
	platter   image // what a power loss leaves, but for unflushed blocks that made it
	unflushed blockSet
	written   [allBlocks]int // when last
	flush     int            // when the flush under way began; 0: none
	flushing  image

	fenced  bool // powered off, and stays so
	base    Ordinal
	highest Ordinal
	epoch   Epoch
	point   *hostPoint
	pass    *hostPass
	settled map[Ordinal]bool
	given   map[Ordinal]bool // settled ABANDONED
	cuts    map[Ordinal]*image

	// The write log's.
	hot      blockSet
	dirty    blockSet       // without data: a pass must read them
	mark     [allBlocks]int // when a block last became dirty without data
	log      []logged       // not sealed
	pending  []logged       // sealed, of points given up
	lowSpace bool

	changed blockSet // since the last cut or pass: the other two kinds
}

type logged struct {
	at, block int
	value     uint64
}

type hostPoint struct {
	ordinal, base Ordinal
	logs          []logged // write log: valid at the cut
	delta         blockSet
	data          *image // what a read of delta gives
}

type hostPass struct {
	ordinal, base Ordinal
	began         int
	ranges        blockSet
	tasks         []blockSet
}

func newModelHost(kind source, rng *rand.Rand, b hostBugs, hit func(string)) *modelHost {
	return &modelHost{kind: kind, rng: rng, bugs: b, hit: hit, settled: map[Ordinal]bool{}, given: map[Ordinal]bool{}, cuts: map[Ordinal]*image{}}
}

// write is one write of the guest.
func (h *modelHost) write() {
	if h.fenced {
		return
	}
	b := h.rng.IntN(allBlocks)
	h.value++
	v := h.value + 10
	switch h.rng.IntN(6) {
	case 0:
		v = 0
	case 1, 2: // content comes back: what is equal now need not have been equal all along
		v = 1 + h.rng.Uint64N(2)
	}
	h.now++
	h.guest[b], h.written[b] = v, h.now
	h.unflushed.add(b)
	if h.pass != nil {
		h.hit("R12 write during a pass")
	}
	if h.kind != writeLog {
		h.changed.add(b)
		return
	}
	h.hot.add(b)
	if h.lowSpace {
		h.markDirty(1 << b)
		return
	}
	h.log = append(h.log, logged{h.now, b, v})
}

func (h *modelHost) markDirty(s blockSet) {
	h.dirty |= s
	h.now++
	s.each(func(b int) { h.mark[b] = h.now })
}

// step moves what the host does by itself: flushes begin and end, space gets low.
func (h *modelHost) step() {
	switch h.rng.IntN(6) {
	case 0:
		if h.flush == 0 {
			h.now++
			h.flush, h.flushing = h.now, h.guest
		}
	case 1:
		h.endFlush()
	case 2:
		h.lowSpace = h.rng.IntN(6) == 0
	}
}

func (h *modelHost) endFlush() {
	if h.flush == 0 {
		return
	}
	h.unflushed.each(func(b int) {
		if h.written[b] < h.flush {
			h.unflushed &^= 1 << b
		}
	})
	for b := range h.platter {
		h.platter[b] = h.flushing[b]
	}
	h.flush = 0
	h.cool()
}

// cool is rule 1: a block stays hot until a flush that began after its last write is done, and its write is sealed.
func (h *modelHost) cool() {
	if !h.bugs.CooledByFlush {
		for _, e := range h.log {
			if h.hot.has(e.block) && !h.unflushed.has(e.block) {
				h.hit("R1 flushed but not sealed stays hot")
			}
		}
		h.hot &= h.unflushed | blocksOf(h.log)
		return
	}
	h.hot &= h.unflushed
}

func blocksOf(l []logged) (s blockSet) {
	for _, e := range l {
		s.add(e.block)
	}
	return s
}

// flushAll: everything is on the platter.
func (h *modelHost) flushAll() {
	h.flush, h.platter, h.unflushed = 0, h.guest, 0
	h.cool()
}

// crash is the end of the change tracker's process, or with power of the machine.
func (h *modelHost) crash(power bool) {
	if power {
		h.unflushed.each(func(b int) {
			if h.rng.IntN(2) == 0 {
				h.platter[b] = h.guest[b]
			} else if h.platter[b] != h.guest[b] {
				h.hit("R1 a power loss takes a write back")
			}
		})
		h.guest, h.unflushed, h.flush = h.platter, 0, 0
	}
	switch h.kind {
	case writeLog: // what was logged but not sealed, or given up, is not trusted; a point in transit is
		if len(h.log)+len(h.pending) > 0 {
			h.hit("R2 logs collapse into dirty extents")
		}
		h.markDirty(h.hot | blocksOf(h.pending))
		if !h.bugs.OldLogData {
			h.log, h.pending = nil, nil
		}
		if power {
			h.hot = 0
		}
	case bitmap:
		if power {
			h.base, h.changed, h.point = 0, 0, nil
			h.hit("source: bitmap lost")
		}
	}
	if h.pass != nil {
		h.endPass(h.pass.ordinal, false)
	}
}

// refuses is rule 4: the highest epoch seen is kept, lower ones are refused.
func (h *modelHost) refuses(e Epoch) bool {
	if e < h.epoch {
		h.hit("R4 host refuses a lower epoch")
		return true
	}
	h.epoch = e
	return false
}

// cut returns the base; ok is false when the host wants a pass first, or refuses.
func (h *modelHost) cut(o Ordinal, e Epoch) (base Ordinal, ok bool) {
	if h.refuses(e) {
		return 0, false
	}
	if h.point != nil && h.point.ordinal == o {
		h.hit("R4 cut repeated")
		return h.point.base, true
	}
	if h.settled[o] && !h.bugs.CutAfterGiven {
		h.hit("R4 no cut after its settle")
		return 0, false
	}
	if h.point != nil || h.pass != nil || h.base == 0 || h.dirty != 0 {
		return 0, false
	}
	p := &hostPoint{ordinal: o, base: h.base, data: &image{}}
	h.point = p
	at := h.guest
	h.cuts[o] = &at
	h.highest = max(h.highest, o)
	if h.kind != writeLog {
		p.delta, p.data = h.changed, &at
		h.changed = 0
		if h.kind == frozen {
			h.flushAll()
		}
		return h.base, true
	}
	for _, e := range append(h.pending, h.log...) {
		if e.at < h.mark[e.block] && !h.bugs.OldLogData {
			h.hit("R2 log data older than its mark is void")
			continue
		}
		p.logs = append(p.logs, e)
		p.delta.add(e.block)
		p.data[e.block] = e.value
	}
	if h.bugs.CooledBySeal {
		h.hot &^= blocksOf(h.log)
	} else if h.unflushed&blocksOf(h.log) != 0 {
		h.hit("R1 sealed but not flushed stays hot")
	}
	h.log, h.pending = nil, nil
	if !h.bugs.CooledBySeal {
		h.cool()
	}
	return h.base, true
}

// settle ends a point; false when the host refuses the epoch.
func (h *modelHost) settle(o Ordinal, committed bool, e Epoch) bool {
	if h.refuses(e) {
		return false
	}
	if h.settled[o] {
		h.hit("R4 settle repeated: the first wins")
		return true
	}
	h.settled[o], h.given[o] = true, !committed
	if h.point == nil || h.point.ordinal != o {
		return true
	}
	switch {
	case committed:
		h.base = o
	case h.kind == writeLog:
		h.pending = h.point.logs
	default:
		h.changed |= h.point.delta
	}
	h.point = nil
	return true
}

// beginPass reads everything when there is no base or full is set, else what is dirty; k tasks.
func (h *modelHost) beginPass(o Ordinal, k int, full bool, e Epoch) (Ordinal, bool) {
	if h.refuses(e) || h.point != nil || h.pass != nil || h.settled[o] {
		return 0, false
	}
	h.now++
	p := &hostPass{ordinal: o, base: h.base, began: h.now, ranges: h.dirty, tasks: make([]blockSet, k)}
	if h.base == 0 || full || h.kind != writeLog {
		p.ranges = everyBlock
		h.changed, h.log, h.pending = 0, nil, nil // every write from here on is in the next pass or the cut (rule 12)
		if h.kind == frozen {
			h.flushAll()
		}
		if h.kind == writeLog { // until the pass is settled its ranges have no data anywhere else
			h.dirty = everyBlock
			h.hot &= h.unflushed
		}
	}
	p.ranges.each(func(b int) { p.tasks[b*k/allBlocks].add(b) })
	h.pass = p
	h.highest = max(h.highest, o)
	return h.base, true
}

func (h *modelHost) settlePass(o Ordinal, complete bool, e Epoch) bool {
	if h.refuses(e) {
		return false
	}
	h.endPass(o, complete)
	return true
}

func (h *modelHost) endPass(o Ordinal, complete bool) {
	if h.settled[o] {
		return
	}
	h.settled[o] = true
	if h.pass == nil || h.pass.ordinal != o {
		return
	}
	p := h.pass
	h.pass = nil
	switch {
	case complete:
		h.base = o
		p.ranges.each(func(b int) {
			if h.mark[b] <= p.began {
				h.dirty &^= 1 << b
			}
		})
	case h.kind != writeLog:
		h.base = 0
	}
}

// disconnect makes the host start over: what it has is not what the chain has.
func (h *modelHost) disconnect() { h.base = 0 }

// read gives a task's data: a frozen cut, or live ranges of a pass. ok is false when the host no longer has it.
func (h *modelHost) read(t *modelTask) (parcel, bool) {
	if t.pass != nil {
		if h.pass == nil || h.pass.ordinal != t.pass.Ordinal {
			return nil, false
		}
		return pick(h.pass.tasks[t.pass.I-1], &h.guest), true
	}
	if h.point == nil || h.point.ordinal != t.point {
		return nil, false
	}
	p := pick(h.point.delta, h.point.data)
	for _, d := range modelDisks { // a point lists every disk
		if p[d] == nil {
			p[d] = content{}
		}
	}
	return p, true
}

// pick returns the blocks of s with the values they have in m, disks without any left out.
func pick(s blockSet, m *image) parcel {
	out := parcel{}
	s.each(func(b int) {
		d := modelDisks[b/testBlocks]
		if out[d] == nil {
			out[d] = content{}
		}
		out[d][int64(b%testBlocks)] = m[b]
	})
	return out
}
