package replica

import (
	"context"
	"math"
	"slices"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
)

// Bounds of a plan.
const (
	// planAtoms is how many extents are planned and written before the next ones are looked at.
	planAtoms = 64 << 10
	// maxPatch is the longest span that is read, changed and written back, in bytes: it is in memory twice.
	maxPatch = 2 << 20
	// rangesWindow is the part of a disk whose written ranges are asked for at once, in bytes; rangesKept bounds what
	// is kept of an answer. Beyond it pages count as written, which is always safe.
	rangesWindow = 256 << 20
	rangesKept   = 8 << 10
	// rangesWorth is how many requests an answer must be able to save before it is asked for: it is a request too.
	rangesWorth = 4
)

// atom is a run of the overlay that is treated alike.
type atom struct {
	off, end int64
	zero     bool
	probe    bool // data of a pass, which often equals what is there
}

func (a atom) len() int64 { return a.end - a.off }

// opKind is what a page operation does.
type opKind uint8

const (
	opClear opKind = iota // one request of any length
	opWrite               // one request: the overlay's data, and zeros between it that are known to be there
	opPatch               // one read, the overlay's data laid over it, and the writes of what differs
)

// pageOp is one request to a page blob, or a read with the writes that follow from it.
type pageOp struct {
	extent.Range
	kind opKind
}

// layout says where a page blob has pages, as far as that is known.
type layout struct {
	fresh          bool // it has none below the batch
	known, present extent.Set
}

// absent reports that nothing was ever written in r: it reads as zeros.
func (l *layout) absent(r extent.Range) bool {
	return r.Len == 0 || l.fresh || l.known.Covers(r) && !l.present.Overlaps(r)
}

// shrink cuts absent space off the ends of r; empty when all of it is.
func (l *layout) shrink(r extent.Range) extent.Range {
	if l.fresh {
		return extent.Range{}
	}
	if !l.known.Covers(r) {
		return r
	}
	var out extent.Range
	for p := range l.present.In(r) {
		if out.Len == 0 {
			out.Off = p.Off
		}
		out.Len = p.End() - out.Off
	}
	return out
}

// planner turns an overlay into page operations.
type planner struct {
	cost  int64 // bytes that one request is worth; 0: requests are free
	trust bool  // the blob was at rest: what is there may be believed and kept
	fresh bool  // the blob holds nothing below the batch
	// ranges lists written ranges of the blob; nil: not to be asked.
	ranges func(ctx context.Context, r extent.Range, yield func(extent.Range) bool) error
	asked  int64
}

// slabs cuts the overlay into lists of atoms, ascending, none overlapping.
func (p *planner) slabs(o *overlay, emit func([]atom) error) error {
	var list []atom
	var cur atom
	var err error
	flush := func() {
		if cur.end > cur.off {
			list = p.split(list, cur)
		}
	}
	for it := range o.m.All() {
		zero := it.Val.seg == pieceZero
		probe := !zero && p.cost > 0 && p.trust && !p.fresh && o.segs[it.Val.seg].ix.Header.Kind == segment.KindPass
		if it.Off == cur.end && zero == cur.zero && probe == cur.probe && cur.end > cur.off {
			cur.end = it.End()
			continue
		}
		flush()
		cur = atom{it.Off, it.End(), zero, probe}
		if len(list) >= planAtoms {
			if err = emit(list); err != nil {
				return err
			}
			list = list[:0]
		}
	}
	flush()
	if len(list) == 0 {
		return nil
	}
	return emit(list)
}

// split cuts long data into requests: at multiples of the longest one when that costs no request more.
func (p *planner) split(list []atom, a atom) []atom {
	most := int64(blobstore.MaxPageWrite)
	if a.probe {
		most = maxPatch
	}
	if a.zero || a.len() <= most {
		return append(list, a)
	}
	aligned := (a.end-1)/most-a.off/most+1 <= (a.len()+most-1)/most
	for a.off < a.end {
		next := a
		next.end = min(a.end, a.off+most)
		if aligned {
			next.end = min(a.end, a.off-a.off%most+most)
		}
		list = append(list, next)
		a.off = next.end
	}
	return list
}

// look asks for the written ranges where knowing them can save requests.
func (p *planner) look(ctx context.Context, atoms []atom) (*layout, error) {
	l := &layout{fresh: p.fresh}
	if p.fresh || p.cost == 0 || p.ranges == nil {
		return l, nil
	}
	var ask extent.Range
	worth, window := 0, int64(-1)
	flush := func() error {
		if worth < rangesWorth {
			return nil
		}
		return p.ask(ctx, ask, l)
	}
	for i, a := range atoms {
		points, from := 0, a.off
		if a.zero || a.probe {
			points++
		}
		if i > 0 && a.off > atoms[i-1].end && a.off-atoms[i-1].end < 2*p.cost {
			points, from = points+1, atoms[i-1].end
		}
		if points == 0 {
			continue
		}
		if w := from / rangesWindow; w != window {
			if err := flush(); err != nil {
				return nil, err
			}
			window, worth, ask = w, 0, extent.Span(from, a.end)
		}
		worth += points
		ask.Len = a.end - ask.Off
	}
	return l, flush()
}

func (p *planner) ask(ctx context.Context, r extent.Range, l *layout) error {
	p.asked++
	n, end := 0, r.Off
	err := p.ranges(ctx, r, func(have extent.Range) bool {
		have = have.Intersect(r)
		if n++; n > rangesKept {
			r.Len = end - r.Off
			return false
		}
		l.present.Add(have)
		end = have.End()
		return true
	})
	l.known.Add(r)
	return err
}

// States of an atom in the plan.
const (
	alone   = iota // cleared by itself
	inWrite        // in a write that may go on
	inPatch        // in a patch that may go on
	states
	extend = states // in place of a predecessor: the state goes on
)

// path is the cheapest way to have an atom in each state.
type path struct {
	cost  [states]int64
	start [states]int64 // of the open write or patch
}

const never = math.MaxInt64 / 4

func (p *path) best() (state uint8, cost int64) {
	for s := range uint8(states) {
		if p.cost[s] < p.cost[state] {
			state = s
		}
	}
	return state, p.cost[state]
}

// plan decides how atoms become requests, by the least sum of bytes moved and of requests, each worth cost bytes. It is
// exact but for the longest request, which it treats greedily. Its cost is linear in the atoms.
func (p *planner) plan(atoms []atom, l *layout) []pageOp {
	if p.trust && (p.cost > 0 || p.fresh) {
		kept := atoms[:0]
		for _, a := range atoms {
			if r := l.shrink(extent.Span(a.off, a.end)); a.zero {
				if r.Len == 0 {
					continue // already absent: known zeros between its neighbours
				}
				a.off, a.end = r.Off, r.End()
			} else if a.probe && r.Len == 0 {
				a.probe = false
			}
			kept = append(kept, a)
		}
		atoms = kept
	}
	if len(atoms) == 0 {
		return nil
	}
	from := make([][states]uint8, len(atoms))
	prev := path{cost: [states]int64{never, never, never}}
	for i, a := range atoms {
		base, before := int64(0), uint8(alone)
		gap, known := int64(0), false
		if i > 0 {
			before, base = prev.best()
			gap = a.off - atoms[i-1].end
			known = gap == 0 || l.absent(extent.Span(atoms[i-1].end, a.off))
		}
		next := path{cost: [states]int64{never, never, never}}
		if a.zero {
			next.cost[alone], from[i][alone] = base+p.cost, before
		}
		if !a.probe && a.len() <= blobstore.MaxPageWrite {
			next.cost[inWrite], next.start[inWrite], from[i][inWrite] = base+p.cost+a.len(), a.off, before
			if c := prev.cost[inWrite] + gap + a.len(); known && c <= next.cost[inWrite] && a.end-prev.start[inWrite] <= blobstore.MaxPageWrite {
				next.cost[inWrite], next.start[inWrite], from[i][inWrite] = c, prev.start[inWrite], extend
			}
		}
		if p.cost > 0 && a.len() <= maxPatch {
			first, more := 2*p.cost+2*a.len(), 2*a.len()
			if a.probe { // it is read for the sake of what snapshots cost
				first, more = p.cost+a.len(), a.len()
			}
			next.cost[inPatch], next.start[inPatch], from[i][inPatch] = base+first, a.off, before
			if c := prev.cost[inPatch] + 2*gap + more; c <= next.cost[inPatch] && a.end-prev.start[inPatch] <= maxPatch {
				next.cost[inPatch], next.start[inPatch], from[i][inPatch] = c, prev.start[inPatch], extend
			}
		}
		prev = next
	}
	return trace(atoms, from, prev)
}

// trace follows the cheapest path back.
func trace(atoms []atom, from [][states]uint8, last path) []pageOp {
	state, _ := last.best()
	var ops []pageOp
	end := int64(0)
	for i := len(atoms) - 1; i >= 0; i-- {
		end = max(end, atoms[i].end)
		pred := from[i][state]
		if pred == extend {
			continue
		}
		ops = append(ops, pageOp{extent.Span(atoms[i].off, end), opKind(state)})
		state, end = pred, 0
	}
	slices.Reverse(ops)
	return ops
}
