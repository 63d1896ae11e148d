package extent

import (
	"iter"

	"github.com/tidwall/btree"
)

// Set is a set of bytes, kept as disjoint ranges with adjacent ones joined. The zero value is an empty set ready
// for use. A Set must not be copied by value; see Clone.
type Set struct {
	m     btree.Map[int64, int64] // first byte -> first byte after
	bytes int64
}

// NewSet returns a set holding the given ranges.
func NewSet(ranges ...Range) *Set {
	s := new(Set)
	for _, r := range ranges {
		s.Add(r)
	}
	return s
}

// Add puts every byte of r into the set.
func (s *Set) Add(r Range) {
	r.mustBeValid()
	if r.Empty() {
		return
	}
	start, end := r.Off, r.End()
	if k, e, ok := floor(&s.m, start); ok && e >= start {
		if e >= end {
			return
		}
		start = k
	}
	for {
		k, e, ok := ceil(&s.m, start)
		if !ok || k > end {
			break
		}
		s.m.Delete(k)
		s.bytes -= e - k
		end = max(end, e)
	}
	s.m.Set(start, end)
	s.bytes += end - start
}

// Remove takes every byte of r out of the set.
func (s *Set) Remove(r Range) {
	r.mustBeValid()
	if r.Empty() {
		return
	}
	start, end := r.Off, r.End()
	if k, e, ok := floor(&s.m, start); ok && k < start && e > start {
		s.m.Set(k, start)
		s.bytes -= min(e, end) - start
		if e > end {
			s.m.Set(end, e)
			return
		}
	}
	for {
		k, e, ok := ceil(&s.m, start)
		if !ok || k >= end {
			return
		}
		s.m.Delete(k)
		s.bytes -= min(e, end) - k
		if e > end {
			s.m.Set(end, e)
			return
		}
	}
}

// AddSet puts every byte of o into the set. A nil o is empty.
func (s *Set) AddSet(o *Set) {
	if o == nil || o == s {
		return
	}
	for r := range o.All() {
		s.Add(r)
	}
}

// RemoveSet takes every byte of o out of the set. A nil o is empty.
func (s *Set) RemoveSet(o *Set) {
	switch o {
	case nil:
		return
	case s:
		s.Clear()
		return
	}
	for r := range o.All() {
		s.Remove(r)
	}
}

// Intersect keeps only the bytes that are also in o. A nil o is empty. It changes s; clone first to keep it.
func (s *Set) Intersect(o *Set) {
	switch {
	case o == s:
		return
	case o == nil || o.Len() == 0:
		s.Clear()
		return
	}
	_, end, _ := s.m.Max()
	for gap := range o.Gaps(Span(0, end)) {
		s.Remove(gap)
	}
}

// Clear empties the set.
func (s *Set) Clear() {
	s.m.Clear()
	s.bytes = 0
}

// Overlaps reports whether any byte of r is in the set.
func (s *Set) Overlaps(r Range) bool {
	for range s.In(r) {
		return true
	}
	return false
}

// Covers reports whether every byte of r is in the set; an empty r is always covered.
func (s *Set) Covers(r Range) bool {
	r.mustBeValid()
	if r.Empty() {
		return true
	}
	_, e, ok := floor(&s.m, r.Off)
	return ok && e >= r.End()
}

// In yields, ascending, the parts of the set that lie in r.
func (s *Set) In(r Range) iter.Seq[Range] {
	r.mustBeValid()
	return func(yield func(Range) bool) {
		if r.Empty() {
			return
		}
		from := r.Off
		if k, e, ok := floor(&s.m, r.Off); ok && k < r.Off {
			if e > r.Off && !yield(Span(r.Off, min(e, r.End()))) {
				return
			}
			from = k + 1
		}
		s.m.Ascend(from, func(k, e int64) bool {
			return k < r.End() && yield(Span(k, min(e, r.End())))
		})
	}
}

// Gaps yields, ascending, the parts of r that are not in the set.
func (s *Set) Gaps(r Range) iter.Seq[Range] {
	in := s.In(r)
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

// All yields every range of the set, ascending.
func (s *Set) All() iter.Seq[Range] {
	return func(yield func(Range) bool) {
		s.m.Scan(func(k, e int64) bool { return yield(Span(k, e)) })
	}
}

// Len returns the number of ranges.
func (s *Set) Len() int { return s.m.Len() }

// Bytes returns the number of bytes in the set, in constant time.
func (s *Set) Bytes() int64 { return s.bytes }

// Clone returns an independent copy in constant time.
func (s *Set) Clone() *Set { return &Set{m: *s.m.Copy(), bytes: s.bytes} }

// Equal reports whether both sets hold the same bytes. A nil o is empty.
func (s *Set) Equal(o *Set) bool {
	if o == nil {
		return s.Len() == 0
	}
	if s.Len() != o.Len() || s.bytes != o.bytes {
		return false
	}
	a, b := s.m.Iter(), o.m.Iter()
	for ok := a.First() && b.First(); ok; ok = a.Next() && b.Next() {
		if a.Key() != b.Key() || a.Value() != b.Value() {
			return false
		}
	}
	return true
}

// floor returns the entry with the greatest key <= k.
func floor[V any](m *btree.Map[int64, V], k int64) (key int64, val V, ok bool) {
	m.Descend(k, func(fk int64, fv V) bool {
		key, val, ok = fk, fv, true
		return false
	})
	return key, val, ok
}

// ceil returns the entry with the least key >= k.
func ceil[V any](m *btree.Map[int64, V], k int64) (key int64, val V, ok bool) {
	m.Ascend(k, func(ck int64, cv V) bool {
		key, val, ok = ck, cv, true
		return false
	})
	return key, val, ok
}
