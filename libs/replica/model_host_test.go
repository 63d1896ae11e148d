package replica

import (
	"maps"
	"math/rand/v2"
)

var modelDisks = []string{"disk-a", "disk-b"}

// blockSet is blocks per disk.
type blockSet map[string]map[int64]bool

func (s blockSet) add(disk string, b int64) {
	if s[disk] == nil {
		s[disk] = map[int64]bool{}
	}
	s[disk][b] = true
}

func (s blockSet) addAll(o blockSet) {
	for d, bs := range o {
		for b := range bs {
			s.add(d, b)
		}
	}
}

func (s blockSet) empty() bool {
	for _, bs := range s {
		if len(bs) > 0 {
			return false
		}
	}
	return true
}

func (p parcel) clone() parcel {
	out := parcel{}
	for d, c := range p {
		out[d] = maps.Clone(c)
	}
	return out
}

// pick returns the blocks of s with the values they have in p. Every disk is present.
func (p parcel) pick(s blockSet) parcel {
	out := parcel{}
	for _, d := range modelDisks {
		out[d] = content{}
		for b := range s[d] {
			out[d][b] = p[d][b]
		}
	}
	return out
}

// modelHost is a guest and a change tracker that keeps its rules (1 to 4): the host's own faults are the
// change-tracker's tests.
type modelHost struct {
	guest   parcel
	value   uint64
	base    Ordinal
	highest Ordinal
	changed blockSet // with data, since base
	dirty   blockSet // without data: a pass must read them
	point   *hostPoint
	pass    *hostPass
	settled map[Ordinal]bool
	cuts    map[Ordinal]parcel // the guest at each cut: the truth
}

type hostPoint struct {
	ordinal Ordinal
	base    Ordinal
	delta   blockSet
	data    parcel
}

type hostPass struct {
	ordinal Ordinal
	base    Ordinal
	ranges  blockSet
	tasks   []blockSet
}

func newModelHost() *modelHost {
	h := &modelHost{guest: parcel{}, changed: blockSet{}, dirty: blockSet{}, settled: map[Ordinal]bool{}, cuts: map[Ordinal]parcel{}}
	for _, d := range modelDisks {
		h.guest[d] = content{}
	}
	return h
}

func (h *modelHost) write(rng *rand.Rand) {
	d, b := modelDisks[rng.IntN(len(modelDisks))], int64(rng.IntN(testBlocks))
	h.value++
	v := h.value + 10
	switch rng.IntN(6) {
	case 0:
		v = 0
	case 1, 2: // content comes back: what is equal now need not have been equal all along
		v = 1 + rng.Uint64N(2)
	}
	h.guest[d][b] = v
	h.changed.add(d, b)
}

// crash: what was logged but not sealed is not trusted.
func (h *modelHost) crash() {
	h.dirty.addAll(h.changed)
	h.changed = blockSet{}
	if h.pass != nil {
		h.settlePass(h.pass.ordinal, false)
	}
}

// cut returns the base; ok is false when the host wants a pass first, or refuses.
func (h *modelHost) cut(o Ordinal) (Ordinal, bool) {
	if h.point != nil && h.point.ordinal == o {
		return h.point.base, true
	}
	if h.point != nil || h.pass != nil || h.settled[o] || h.base == 0 || !h.dirty.empty() {
		return 0, false
	}
	h.point = &hostPoint{ordinal: o, base: h.base, delta: h.changed, data: h.guest.clone()}
	h.cuts[o] = h.point.data
	h.changed = blockSet{}
	h.highest = max(h.highest, o)
	return h.base, true
}

func (h *modelHost) settle(o Ordinal, committed bool) {
	if h.settled[o] {
		return // the first settle wins
	}
	h.settled[o] = true
	if h.point == nil || h.point.ordinal != o {
		return
	}
	if committed {
		h.base = o
	} else {
		h.changed.addAll(h.point.delta)
	}
	h.point = nil
}

// beginPass reads everything at first, then what is dirty; k tasks.
// A comparing pass looks at everything.
func (h *modelHost) beginPass(o Ordinal, k int, full bool) (Ordinal, bool) {
	if h.point != nil || h.pass != nil || h.settled[o] {
		return 0, false
	}
	p := &hostPass{ordinal: o, base: h.base, ranges: blockSet{}, tasks: make([]blockSet, k)}
	if h.base == 0 || full {
		for _, d := range modelDisks {
			for b := range int64(testBlocks) {
				p.ranges.add(d, b)
			}
		}
	}
	p.ranges.addAll(h.dirty)
	p.ranges.addAll(h.changed)
	for i := range p.tasks {
		p.tasks[i] = blockSet{}
	}
	h.split(p, k)
	h.pass = p
	h.changed = blockSet{} // every write from here on is in the next pass or the cut (rule 12)
	h.highest = max(h.highest, o)
	return h.base, true
}

func (h *modelHost) split(p *hostPass, k int) {
	for di, d := range modelDisks {
		for b := range p.ranges[d] {
			p.tasks[(di*testBlocks+int(b))*k/(2*testBlocks)].add(d, b)
		}
	}
}

func (h *modelHost) settlePass(o Ordinal, complete bool) {
	if h.settled[o] {
		return
	}
	h.settled[o] = true
	if h.pass == nil || h.pass.ordinal != o {
		return
	}
	if complete {
		h.base = o
		h.dirty = blockSet{}
	} else {
		h.dirty.addAll(h.pass.ranges)
	}
	h.pass = nil
}

// read gives a task's data: a frozen cut, or live ranges of a pass. ok is false when the host no longer has it.
func (h *modelHost) read(t *modelTask) (parcel, bool) {
	if t.pass != nil {
		if h.pass == nil || h.pass.ordinal != t.pass.Ordinal {
			return nil, false
		}
		p := h.guest.pick(h.pass.tasks[t.pass.I-1])
		for d := range p {
			if len(p[d]) == 0 {
				delete(p, d)
			}
		}
		return p, true
	}
	if h.point == nil || h.point.ordinal != t.point {
		return nil, false
	}
	return h.point.data.pick(h.point.delta), true
}
