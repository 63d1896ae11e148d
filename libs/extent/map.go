package extent

import (
	"iter"

	"github.com/tidwall/btree"
)

// Map gives each byte of a disk at most one value; the last Put wins. The zero value is an empty map ready for
// use. Neighbouring ranges with equal values are not joined: each keeps its own Skip. A Map must not be copied by
// value; see Clone.
type Map[V any] struct {
	m     btree.Map[int64, piece[V]] // keyed by first byte
	bytes int64
}

// piece is what is left of one put range.
type piece[V any] struct {
	end  int64 // first byte after
	skip int64 // bytes cut off at the front since the Put
	val  V
}

// Item is one range of a Map with its value.
type Item[V any] struct {
	Range
	// Val is the value given to Put.
	Val V
	// Skip is how many bytes of the range originally put are missing at its front, in bytes. If Val says where
	// the data of the whole put range begins, the data of this item begins Skip bytes further on.
	Skip int64
}

// Put gives every byte of r the value v, whatever it was before.
func (m *Map[V]) Put(r Range, v V) {
	r.mustBeValid()
	if r.Empty() {
		return
	}
	m.carve(r)
	m.m.Set(r.Off, piece[V]{end: r.End(), val: v})
	m.bytes += r.Len
}

// Delete takes the value from every byte of r.
func (m *Map[V]) Delete(r Range) {
	r.mustBeValid()
	if !r.Empty() {
		m.carve(r)
	}
}

// carve leaves no value in r, cutting the pieces that reach over its ends. A piece that begins exactly at r.Off
// and ends inside r is removed too, although Put would overwrite its key.
func (m *Map[V]) carve(r Range) {
	end := r.End()
	if k, p, ok := floor(&m.m, r.Off); ok && k < r.Off && p.end > r.Off {
		left := p
		left.end = r.Off
		m.m.Set(k, left)
		m.bytes -= min(p.end, end) - r.Off
		if p.end > end {
			p.skip += end - k
			m.m.Set(end, p)
			return
		}
	}
	for {
		k, p, ok := ceil(&m.m, r.Off)
		if !ok || k >= end {
			return
		}
		m.m.Delete(k)
		m.bytes -= min(p.end, end) - k
		if p.end > end {
			p.skip += end - k
			m.m.Set(end, p)
			return
		}
	}
}

// In yields, ascending, the items that lie in r, clipped to it; Skip counts what clipping cut off too.
func (m *Map[V]) In(r Range) iter.Seq[Item[V]] {
	r.mustBeValid()
	return func(yield func(Item[V]) bool) {
		if r.Empty() {
			return
		}
		from := r.Off
		if k, p, ok := floor(&m.m, r.Off); ok && k < r.Off {
			if p.end > r.Off {
				cut := Item[V]{Range: Span(r.Off, min(p.end, r.End())), Val: p.val, Skip: p.skip + r.Off - k}
				if !yield(cut) {
					return
				}
			}
			from = k + 1
		}
		m.m.Ascend(from, func(k int64, p piece[V]) bool {
			return k < r.End() && yield(Item[V]{Range: Span(k, min(p.end, r.End())), Val: p.val, Skip: p.skip})
		})
	}
}

// Gaps yields, ascending, the parts of r that have no value.
func (m *Map[V]) Gaps(r Range) iter.Seq[Range] {
	in := m.In(r)
	return func(yield func(Range) bool) {
		at := r.Off
		for have := range in {
			if have.Off > at && !yield(Span(at, have.Off)) {
				return
			}
			at = have.End()
		}
		if at < r.End() {
			yield(Span(at, r.End()))
		}
	}
}

// All yields every item, ascending.
func (m *Map[V]) All() iter.Seq[Item[V]] {
	return func(yield func(Item[V]) bool) {
		m.m.Scan(func(k int64, p piece[V]) bool {
			return yield(Item[V]{Range: Span(k, p.end), Val: p.val, Skip: p.skip})
		})
	}
}

// Len returns the number of items.
func (m *Map[V]) Len() int { return m.m.Len() }

// Bytes returns the number of bytes that have a value, in constant time.
func (m *Map[V]) Bytes() int64 { return m.bytes }

// Clear empties the map.
func (m *Map[V]) Clear() {
	m.m.Clear()
	m.bytes = 0
}

// Clone returns an independent copy in constant time; values are copied as by assignment.
func (m *Map[V]) Clone() *Map[V] { return &Map[V]{m: *m.m.Copy(), bytes: m.bytes} }
