package extent_test

import (
	"iter"
	"math"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/extent"
)

const space = 96 // bytes of the model disk: small, so that ranges meet often

func drawRange(t *rapid.T) extent.Range {
	off := rapid.Int64Range(0, space).Draw(t, "off")
	return extent.Range{Off: off, Len: rapid.Int64Range(0, space-off).Draw(t, "len")}
}

// runs returns the maximal runs of bytes in r for which in is true.
func runs(r extent.Range, in func(int64) bool) []extent.Range {
	var out []extent.Range
	for i := r.Off; i < r.End(); i++ {
		switch {
		case !in(i):
		case len(out) > 0 && out[len(out)-1].End() == i:
			out[len(out)-1].Len++
		default:
			out = append(out, extent.Range{Off: i, Len: 1})
		}
	}
	return out
}

type setModel [space]bool

func (m *setModel) fill(r extent.Range, v bool) {
	for i := r.Off; i < r.End(); i++ {
		m[i] = v
	}
}

func (m *setModel) is(v bool) func(int64) bool { return func(i int64) bool { return m[i] == v } }

func checkSet(t *rapid.T, s *extent.Set, m *setModel) {
	whole := extent.Range{Len: space}
	want := runs(whole, m.is(true))
	require.Equal(t, want, slices.Collect(s.All()))
	require.Equal(t, len(want), s.Len())
	var n int64
	for _, r := range want {
		n += r.Len
	}
	require.Equal(t, n, s.Bytes())
	q := drawRange(t)
	in := runs(q, m.is(true))
	require.Equal(t, in, slices.Collect(s.In(q)))
	require.Equal(t, runs(q, m.is(false)), slices.Collect(s.Gaps(q)))
	require.Equal(t, len(in) > 0, s.Overlaps(q))
	require.Equal(t, len(runs(q, m.is(false))) == 0, s.Covers(q))
	enc, err := s.MarshalBinary()
	require.NoError(t, err)
	var back extent.Set
	require.NoError(t, back.UnmarshalBinary(enc))
	require.True(t, back.Equal(s))
	require.Equal(t, want, slices.Collect(back.All()))
}

func TestSetAgainstByteModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sets [2]extent.Set
		var models [2]setModel
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			i := rapid.IntRange(0, 1).Draw(t, "which")
			s, m, o, om := &sets[i], &models[i], &sets[1-i], &models[1-i]
			switch rapid.IntRange(0, 6).Draw(t, "op") {
			case 0, 1:
				r := drawRange(t)
				s.Add(r)
				m.fill(r, true)
			case 2:
				r := drawRange(t)
				s.Remove(r)
				m.fill(r, false)
			case 3:
				s.AddSet(o)
				for b := range m {
					m[b] = m[b] || om[b]
				}
			case 4:
				s.RemoveSet(o)
				for b := range m {
					m[b] = m[b] && !om[b]
				}
			case 5:
				s.Intersect(o)
				for b := range m {
					m[b] = m[b] && om[b]
				}
			case 6: // a clone lives its own life
				c, cm, r := s.Clone(), *m, drawRange(t)
				c.Remove(r)
				cm.fill(r, false)
				s.Add(r)
				m.fill(r, true)
				checkSet(t, c, &cm)
			}
			require.Equal(t, models[0] == models[1], sets[0].Equal(&sets[1]))
			checkSet(t, s, m)
		}
	})
}

// cell is what the model knows of a byte: which Put gave its value, and how far it was from that Put's start.
type cell struct{ put, dist int }

func TestMapAgainstByteModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var m extent.Map[int]
		var model [space]cell
		for step := 1; step <= rapid.IntRange(1, 30).Draw(t, "steps"); step++ {
			r := drawRange(t)
			del := rapid.IntRange(0, 3).Draw(t, "op") == 0
			if del {
				m.Delete(r)
			} else {
				m.Put(r, step)
			}
			for i := r.Off; i < r.End(); i++ {
				model[i] = cell{}
				if !del {
					model[i] = cell{put: step, dist: int(i - r.Off)}
				}
			}
			kept := m.Clone()
			checkMap(t, m.All(), extent.Range{Len: space}, &model)
			q := drawRange(t)
			checkMap(t, m.In(q), q, &model)
			has := func(v bool) func(int64) bool { return func(i int64) bool { return (model[i].put != 0) == v } }
			require.Equal(t, runs(q, has(false)), slices.Collect(m.Gaps(q)))
			var n int64
			for _, r := range runs(extent.Range{Len: space}, has(true)) {
				n += r.Len
			}
			require.Equal(t, n, m.Bytes())
			require.Len(t, slices.Collect(m.All()), m.Len())
			kept.Delete(extent.Range{Len: space})
			require.Zero(t, kept.Bytes())
		}
	})
}

func checkMap(t *rapid.T, items iter.Seq[extent.Item[int]], within extent.Range, model *[space]cell) {
	var got [space]cell
	last := within.Off
	for it := range items {
		require.False(t, it.Empty())
		require.True(t, within.Contains(it.Range))
		require.GreaterOrEqual(t, it.Off, last)
		last = it.End()
		for i := it.Off; i < it.End(); i++ {
			got[i] = cell{put: it.Val, dist: int(it.Skip + i - it.Off)}
		}
	}
	for i := within.Off; i < within.End(); i++ {
		require.Equal(t, model[i], got[i], "byte %d", i)
	}
}

func TestIteratorsStopEarly(t *testing.T) {
	s := extent.NewSet(extent.Range{Off: 0, Len: 1}, extent.Range{Off: 4, Len: 1}, extent.Range{Off: 8, Len: 1})
	var m extent.Map[int]
	for r := range s.All() {
		m.Put(r, 1)
	}
	whole := extent.Range{Len: 10}
	for _, seq := range []iter.Seq[extent.Range]{s.All(), s.In(whole), s.Gaps(whole), m.Gaps(whole)} {
		n := 0
		for range seq {
			if n++; n == 2 {
				break
			}
		}
		require.Equal(t, 2, n)
	}
	for range m.All() {
		break
	}
	for range m.In(whole) {
		break
	}
}

func TestInvalidRangesPanic(t *testing.T) {
	var s extent.Set
	var m extent.Map[int]
	for _, r := range []extent.Range{{Off: -1, Len: 2}, {Off: 1, Len: -1}, {Off: math.MaxInt64, Len: 1}} {
		require.False(t, r.Valid())
		require.Panics(t, func() { s.Add(r) })
		require.Panics(t, func() { s.Remove(r) })
		require.Panics(t, func() { s.In(r) })
		require.Panics(t, func() { m.Put(r, 1) })
		require.Panics(t, func() { m.Delete(r) })
	}
	edge := extent.Range{Off: math.MaxInt64 - 1, Len: 1}
	s.Add(edge)
	require.True(t, s.Covers(edge))
}

func TestRange(t *testing.T) {
	r := extent.Range{Off: 5, Len: 10}
	require.Equal(t, extent.Range{Off: 4, Len: 12}, r.Align(4))
	require.Equal(t, r, r.Align(5))
	require.Equal(t, "[5,15)", r.String())
	require.True(t, r.Overlaps(extent.Span(14, 20)))
	require.False(t, r.Overlaps(extent.Span(15, 20)))
	require.True(t, r.Contains(extent.Span(5, 15)))
	require.False(t, r.Contains(extent.Span(5, 16)))
	require.Equal(t, extent.Span(10, 15), r.Intersect(extent.Span(10, 30)))
}

func TestUnmarshalRefusesDamage(t *testing.T) {
	s := extent.NewSet(extent.Range{Off: 0, Len: 512}, extent.Range{Off: 1 << 20, Len: 1 << 30})
	enc, err := s.MarshalBinary()
	require.NoError(t, err)
	for i := range enc {
		for _, bad := range [][]byte{enc[:i], append(slices.Clone(enc[:i]), append([]byte{enc[i] ^ 0x40}, enc[i+1:]...)...)} {
			var got extent.Set
			require.Error(t, got.UnmarshalBinary(bad))
			require.Zero(t, got.Len())
		}
	}
	enc[9] ^= 1
	require.ErrorIs(t, new(extent.Set).UnmarshalBinary(enc), extent.ErrChecksum)
	require.ErrorIs(t, new(extent.Set).UnmarshalBinary(nil), extent.ErrFormat)
}

func FuzzUnmarshalSet(f *testing.F) {
	enc, _ := extent.NewSet(extent.Range{Off: 3, Len: 4}, extent.Range{Off: 9, Len: 1}).MarshalBinary()
	f.Add(enc)
	f.Fuzz(func(t *testing.T, data []byte) {
		var s extent.Set
		if s.UnmarshalBinary(data) != nil {
			return
		}
		again, err := s.MarshalBinary()
		require.NoError(t, err)
		var back extent.Set
		require.NoError(t, back.UnmarshalBinary(again))
		require.True(t, s.Equal(&back))
	})
}

func BenchmarkMapPut(b *testing.B) {
	const slots = 1 << 18 // of 4 KiB: a 1 GiB working set
	for _, bc := range []struct {
		name string
		len  int64
	}{{"aligned-4k", 4096}, {"overlapping-10k", 10 << 10}} {
		b.Run(bc.name, func(b *testing.B) {
			var m extent.Map[int64]
			x := uint64(1)
			b.ReportAllocs()
			for i := range b.N {
				x ^= x << 13
				x ^= x >> 7
				x ^= x << 17
				m.Put(extent.Range{Off: int64(x%slots) * 4096, Len: bc.len}, int64(i))
			}
		})
	}
}

func BenchmarkSetAdd(b *testing.B) {
	var s extent.Set
	x := uint64(1)
	b.ReportAllocs()
	for range b.N {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		s.Add(extent.Range{Off: int64(x%(1<<18)) * 8192, Len: 4096})
	}
}
