package blobstoretest

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func testCreatePages(e *env) {
	p := e.mustPages("d.vhd", 1<<20)
	require.True(e, p.IsPages)
	require.EqualValues(e, 1<<20, p.Size)
	require.Zero(e, p.Sequence)
	require.NotEmpty(e, p.ETag)
	require.Equal(e, map[string]string{"kind": "disk"}, p.Metadata)
	require.Equal(e, p, e.stat("d.vhd"))
	require.Equal(e, make([]byte, 1<<20), e.read("d.vhd", "", 0, 1<<20))
	require.NoError(e, lastError(e.c.PageRanges(e.ctx, "d.vhd", "", 0, 1<<20)))

	for _, cond := range []blobstore.Conditions{{}, {CreateOnly: true}} {
		_, err := e.c.CreatePages(e.ctx, "d.vhd", 512, nil, cond)
		e.is(err, blobstore.ErrExists)
	}
	for _, size := range []int64{-512, 1, 511, 513, blobstore.MaxPageBlob + 512} {
		_, err := e.c.CreatePages(e.ctx, "bad", size, nil, blobstore.Conditions{})
		e.is(err, blobstore.ErrInvalid)
	}
	for _, md := range []map[string]string{{"Upper": "x"}, {"": "x"}, {"a-b": "x"}, {"1a": "x"}, {"a": "ü"}, {"a": "x\n"}} {
		_, err := e.c.CreatePages(e.ctx, "bad", 512, md, blobstore.Conditions{})
		e.is(err, blobstore.ErrInvalid)
	}
	e.mustPages("huge.vhd", 4<<40) // costs nothing
	require.Equal(e, make([]byte, 512), e.read("huge.vhd", "", 4<<40-512, 512))
	e.mustPages("empty.vhd", 0)

	e.mustPut("block", "x")
	_, err := e.c.CreatePages(e.ctx, "block", 512, nil, blobstore.Conditions{})
	e.is(err, blobstore.ErrExists)
	_, err = e.put("d.vhd", "x", blobstore.Conditions{CreateOnly: true})
	e.is(err, blobstore.ErrExists)
	_, err = e.write("none", 0, page("x", 1), blobstore.Conditions{})
	e.is(err, blobstore.ErrNotFound)
	_, err = e.c.SetSequence(e.ctx, "none", 1, blobstore.Conditions{})
	e.is(err, blobstore.ErrNotFound)
	_, _, err = e.c.SnapshotPages(e.ctx, "none", nil, blobstore.Conditions{})
	e.is(err, blobstore.ErrNotFound)
	e.is(e.c.ReadPages(e.ctx, "none", "", 0, make([]byte, 1)), blobstore.ErrNotFound)
	e.is(lastError(e.c.PageRanges(e.ctx, "none", "", 0, 512)), blobstore.ErrNotFound)
	e.is(lastError(e.c.ListSnapshots(e.ctx, "none")), blobstore.ErrNotFound)
}

func testCreatePagesRace(e *env) {
	for round := range 5 {
		name := fmt.Sprintf("disks/%d.vhd", round)
		errs := race(8, func(i int) error {
			_, err := e.c.CreatePages(e.ctx, name, int64(i+1)*512, nil, blobstore.Conditions{CreateOnly: true})
			return err
		})
		require.EqualValues(e, (e.oneWinner(errs, blobstore.ErrExists)+1)*512, e.stat(name).Size)
	}
}

func testPageBounds(e *env) {
	const size = 8 << 20
	e.mustPages("p", size)
	e.mustWrite("p", 0, page("first", 1))
	e.mustWrite("p", 4<<20, page("most", blobstore.MaxPageWrite/512))
	e.mustWrite("p", size-512, page("last", 1))
	before := e.stat("p")
	bad := []struct {
		off int64
		len int
	}{{0, 0}, {0, 1}, {0, 511}, {1, 512}, {512, 513}, {-512, 512}, {size, 512}, {size - 512, 1024}, {1 << 62, 512}, {0, blobstore.MaxPageWrite + 512}}
	for _, b := range bad {
		_, err := e.write("p", b.off, make([]byte, b.len), blobstore.Conditions{})
		e.is(err, blobstore.ErrInvalid)
		if b.len <= blobstore.MaxPageWrite {
			_, err = e.c.ClearPages(e.ctx, "p", b.off, int64(b.len), blobstore.Conditions{})
			e.is(err, blobstore.ErrInvalid)
		}
	}
	for _, r := range [][2]int64{{-1, 1}, {size, 1}, {size - 1, 2}} {
		e.is(e.c.ReadPages(e.ctx, "p", "", r[0], make([]byte, r[1])), blobstore.ErrInvalid)
		e.is(lastError(e.c.PageRanges(e.ctx, "p", "", r[0], r[1])), blobstore.ErrInvalid)
	}
	require.Equal(e, before, e.stat("p"), "a refused write changes nothing")
	require.Equal(e, page("last", 1)[511:], e.read("p", "", size-1, 1), "reads need no alignment")
	_, err := e.c.ClearPages(e.ctx, "p", 0, size, blobstore.Conditions{})
	require.NoError(e, err, "a clear may have any length")
	require.Equal(e, make([]byte, size), e.read("p", "", 0, size))
	e.mustPut("block", "x")
	_, err = e.write("block", 0, page("x", 1), blobstore.Conditions{})
	e.is(err, blobstore.ErrInvalid)
	_, _, err = e.c.Get(e.ctx, "p", 0, -1)
	e.is(err, blobstore.ErrInvalid)
}

// testPagesModel compares random writes, clears and snapshots with a plain byte slice.
func testPagesModel(e *env) {
	round := 0
	rapid.Check(e, func(t *rapid.T) {
		round++
		name := fmt.Sprintf("m%d", round)
		const pages = 200
		e.mustPages(name, pages*512)
		model := make([]byte, pages*512)
		snaps := map[blobstore.SnapshotID][]byte{}
		check := func(id blobstore.SnapshotID, want []byte) {
			require.True(t, bytes.Equal(want, e.read(name, id, 0, pages*512)), "content of %q", id)
			from := rapid.Int64Range(0, pages*512).Draw(t, "from")
			end := rapid.Int64Range(from, pages*512).Draw(t, "to")
			at := from
			for r, err := range e.c.PageRanges(e.ctx, name, id, from, end-from) {
				require.NoError(t, err)
				require.Positive(t, r.Length)
				require.GreaterOrEqual(t, r.Offset, at, "in order, no overlap")
				require.Equal(t, make([]byte, r.Offset-at), want[at:r.Offset], "data outside the ranges")
				at = r.Offset + r.Length
				require.LessOrEqual(t, at, end)
			}
			require.Equal(t, make([]byte, end-at), want[at:end], "data after the ranges")
		}
		for i := range rapid.IntRange(1, 12).Draw(t, "steps") {
			from := rapid.Int64Range(0, pages-1).Draw(t, "page")
			n := rapid.Int64Range(1, min(pages-from, 40)).Draw(t, "n")
			switch rapid.IntRange(0, 5).Draw(t, "op") {
			case 0:
				id, _, err := e.c.SnapshotPages(e.ctx, name, nil, blobstore.Conditions{})
				require.NoError(t, err)
				snaps[id] = bytes.Clone(model)
			case 1, 2:
				_, err := e.c.ClearPages(e.ctx, name, from*512, n*512, blobstore.Conditions{})
				require.NoError(t, err)
				clear(model[from*512 : (from+n)*512])
			default:
				data := page(fmt.Sprint(i), int(n))
				e.mustWrite(name, from*512, data)
				copy(model[from*512:], data)
			}
		}
		check("", model)
		for id, want := range snaps {
			check(id, want)
		}
	})
}

func testSequence(e *env) {
	e.mustPages("p", 4096)
	p, err := e.c.SetSequence(e.ctx, "p", 7<<20|3, blobstore.Conditions{IfSequence: ptr(0)})
	require.NoError(e, err)
	require.EqualValues(e, 7<<20|3, p.Sequence)
	require.Equal(e, p, e.stat("p"))
	_, err = e.write("p", 0, page("x", 1), blobstore.Conditions{IfSequence: ptr(7<<20 | 3)})
	require.NoError(e, err)
	for _, n := range []int64{0, 7 << 20, 7<<20 | 4} {
		cond := blobstore.Conditions{IfSequence: &n}
		_, err = e.write("p", 0, page("y", 1), cond)
		e.is(err, blobstore.ErrConditionFailed)
		_, err = e.c.ClearPages(e.ctx, "p", 0, 512, cond)
		e.is(err, blobstore.ErrConditionFailed)
		_, err = e.c.SetSequence(e.ctx, "p", 9, cond)
		e.is(err, blobstore.ErrConditionFailed)
		_, _, err = e.c.SnapshotPages(e.ctx, "p", nil, cond)
		e.is(err, blobstore.ErrConditionFailed)
		e.is(e.c.Delete(e.ctx, "p", cond), blobstore.ErrConditionFailed)
	}
	require.Equal(e, page("x", 1), e.read("p", "", 0, 512))
	_, err = e.c.SetSequence(e.ctx, "p", -1, blobstore.Conditions{})
	e.is(err, blobstore.ErrInvalid)
	top := int64(1 << 62)
	if l, ok := e.s.(SequenceLimiter); ok {
		top = l.MaxSequence()
	}
	require.Equal(e, top, e.setSeq("p", top).Sequence)
	require.Zero(e, e.setSeq("p", 0).Sequence)

	// One of several changes of the number wins.
	for n := int64(0); n < 10; n++ {
		errs := race(6, func(int) error {
			_, err := e.c.SetSequence(e.ctx, "p", n+1, blobstore.Conditions{IfSequence: ptr(n)})
			return err
		})
		e.oneWinner(errs, blobstore.ErrConditionFailed)
	}
	// A write that was accepted under n is never seen to land after the number changed.
	e.setSeq("p", 0)
	var phase, late atomic.Int64
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for phase.Load() < 20 {
				n := phase.Load()
				_, err := e.write("p", int64(w)*512, page(fmt.Sprint(n), 1), blobstore.Conditions{IfSequence: &n})
				if err != nil && !errors.Is(err, blobstore.ErrConditionFailed) {
					late.Add(1)
				}
			}
		})
	}
	for n := int64(1); n <= 20; n++ {
		e.setSeq("p", n)
		one := e.read("p", "", 0, 2048)
		require.Equal(e, one, e.read("p", "", 0, 2048), "pages changed although every writer holds an old number")
		phase.Store(n)
	}
	wg.Wait()
	require.Zero(e, late.Load())
}

func testPagesETag(e *env) {
	p := e.mustPages("p", 1<<20)
	seen := map[blobstore.ETag]bool{p.ETag: true}
	fresh := func(p blobstore.Properties, err error) {
		e.Helper()
		require.NoError(e, err)
		require.False(e, seen[p.ETag], "an ETag came back")
		require.Equal(e, p, e.stat("p"))
		seen[p.ETag] = true
	}
	for i := range 4 {
		fresh(e.write("p", 0, page("x", 1), blobstore.Conditions{}))
		fresh(e.write("p", 0, page("x", 1), blobstore.Conditions{})) // the same bytes
		fresh(e.c.ClearPages(e.ctx, "p", 512, 512, blobstore.Conditions{}))
		fresh(e.c.SetSequence(e.ctx, "p", int64(i), blobstore.Conditions{}))
		last := e.stat("p")
		fresh(e.write("p", 0, page("y", 1), blobstore.Conditions{IfMatch: last.ETag}))
		_, err := e.write("p", 0, page("z", 1), blobstore.Conditions{IfMatch: last.ETag})
		e.is(err, blobstore.ErrConditionFailed)
		_, err = e.c.SetSequence(e.ctx, "p", 99, blobstore.Conditions{IfMatch: last.ETag})
		e.is(err, blobstore.ErrConditionFailed)
		e.is(e.c.Delete(e.ctx, "p", blobstore.Conditions{IfMatch: last.ETag}), blobstore.ErrConditionFailed)
	}
	last := e.stat("p")
	errs := race(6, func(i int) error {
		_, err := e.write("p", int64(i)*512, page("race", 1), blobstore.Conditions{IfMatch: last.ETag})
		return err
	})
	e.oneWinner(errs, blobstore.ErrConditionFailed)
	// Writers without conditions do not hinder each other, and each moves the ETag.
	before := e.stat("p")
	require.NoError(e, errors.Join(race(8, func(i int) error {
		for k := range 20 {
			if _, err := e.write("p", int64(i*20+k)*512, page(fmt.Sprint(i, k), 1), blobstore.Conditions{}); err != nil {
				return err
			}
		}
		return nil
	})...))
	require.NotEqual(e, before.ETag, e.stat("p").ETag)
	for i := range 8 {
		for k := range 20 {
			require.Equal(e, page(fmt.Sprint(i, k), 1), e.read("p", "", int64(i*20+k)*512, 512))
		}
	}
	require.NoError(e, e.c.Delete(e.ctx, "p", blobstore.Conditions{}))
	require.False(e, seen[e.mustPages("p", 1<<20).ETag], "a blob made again is another version")
}

func testSnapshots(e *env) {
	e.mustPages("p", 1<<20)
	e.mustWrite("p", 4096, page("one", 2))
	base := e.setSeq("p", 5)
	id1, s1, err := e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{})
	require.NoError(e, err)
	require.Equal(e, base, e.stat("p"), "a snapshot does not change its blob")
	require.Equal(e, id1, s1.Snapshot)
	require.Equal(e, map[string]string{"kind": "disk"}, s1.Metadata, "copied from the blob")
	require.EqualValues(e, 5, s1.Sequence)
	require.EqualValues(e, 1<<20, s1.Size)
	require.True(e, s1.IsPages)
	require.Equal(e, "p", s1.Name)
	got, err := e.c.Stat(e.ctx, "p", id1)
	require.NoError(e, err)
	require.Equal(e, s1, got)

	e.mustWrite("p", 4096, page("two", 1))
	_, err = e.c.ClearPages(e.ctx, "p", 4096+512, 512, blobstore.Conditions{})
	require.NoError(e, err)
	e.setSeq("p", 6)
	id2, s2, err := e.c.SnapshotPages(e.ctx, "p", map[string]string{"seq": "6"}, blobstore.Conditions{})
	require.NoError(e, err)
	require.Greater(e, id2, id1, "ids sort by age")
	require.Equal(e, map[string]string{"seq": "6"}, s2.Metadata)
	require.Equal(e, page("one", 2), e.read("p", id1, 4096, 1024))
	require.Equal(e, append(page("two", 1), make([]byte, 512)...), e.read("p", id2, 4096, 1024))
	require.Equal(e, make([]byte, 4096), e.read("p", id1, 0, 4096))

	list := func() (out []blobstore.Properties) {
		for p, err := range e.c.ListSnapshots(e.ctx, "p") {
			require.NoError(e, err)
			out = append(out, p)
		}
		return out
	}
	require.Equal(e, []blobstore.Properties{s1, s2}, list())
	require.Equal(e, []string{"p"}, e.names("", ""), "List shows live blobs only")
	require.NoError(e, e.c.DeleteSnapshot(e.ctx, "p", id1))
	require.Equal(e, []blobstore.Properties{s2}, list())
	e.is(e.c.ReadPages(e.ctx, "p", id1, 0, make([]byte, 512)), blobstore.ErrNotFound)
	e.is(lastError(e.c.PageRanges(e.ctx, "p", id1, 0, 512)), blobstore.ErrNotFound)
	_, err = e.c.Stat(e.ctx, "p", id1)
	e.is(err, blobstore.ErrNotFound)
	e.is(e.c.DeleteSnapshot(e.ctx, "p", id1), blobstore.ErrNotFound)
	e.is(e.c.DeleteSnapshot(e.ctx, "p", "../../x"), blobstore.ErrNotFound)
	require.Equal(e, append(page("two", 1), make([]byte, 512)...), e.read("p", id2, 4096, 1024))
	_, _, err = e.c.SnapshotPages(e.ctx, "p", map[string]string{"Bad": "x"}, blobstore.Conditions{})
	e.is(err, blobstore.ErrInvalid)
}

func testSnapshotETag(e *env) {
	e.mustPages("p", 1<<20)
	e.mustWrite("p", 0, page("one", 1))
	p := e.setSeq("p", 1)
	id, s, err := e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{IfMatch: p.ETag, IfSequence: ptr(1)})
	require.NoError(e, err)
	require.Equal(e, p.ETag, s.ETag)
	_, _, err = e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{IfMatch: p.ETag})
	require.NoError(e, err, "the ETag holds until something changes")
	e.mustWrite("p", 0, page("stray", 1))
	_, _, err = e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{IfMatch: p.ETag})
	e.is(err, blobstore.ErrConditionFailed)
	require.Equal(e, page("one", 1), e.read("p", id, 0, 512))
	q := e.setSeq("p", 1)
	require.NotEqual(e, p.ETag, q.ETag, "setting the same number is a new version")
	_, _, err = e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{IfMatch: p.ETag})
	e.is(err, blobstore.ErrConditionFailed)
}

// testSnapshotRace: writers fill the whole blob with one value after another; a snapshot never mixes the
// two halves of one write.
func testSnapshotRace(e *env) {
	const size = blobstore.MaxPageWrite
	e.mustPages("p", size)
	var stop atomic.Bool
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	wg.Go(func() {
		for i := byte(1); !stop.Load(); i++ {
			if _, err := e.write("p", 0, bytes.Repeat([]byte{i}, size), blobstore.Conditions{}); err != nil {
				failed.Store(&err)
				return
			}
		}
	})
	for range 8 {
		id, _, err := e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{})
		require.NoError(e, err)
		data := e.read("p", id, 0, size)
		require.True(e, bytes.Equal(bytes.Repeat(data[:1], size), data), "a torn snapshot")
		require.NoError(e, e.c.DeleteSnapshot(e.ctx, "p", id))
	}
	stop.Store(true)
	wg.Wait()
	require.Nil(e, failed.Load())
}

func testDeletePages(e *env) {
	e.mustPages("d/p", 1<<20)
	e.mustWrite("d/p", 0, page("x", 1))
	id, _, err := e.c.SnapshotPages(e.ctx, "d/p", nil, blobstore.Conditions{})
	require.NoError(e, err)
	p := e.setSeq("d/p", 3)
	require.NoError(e, e.c.Delete(e.ctx, "d/p", blobstore.Conditions{IfMatch: p.ETag, IfSequence: ptr(3)}))
	_, err = e.c.Stat(e.ctx, "d/p", "")
	e.is(err, blobstore.ErrNotFound)
	_, err = e.write("d/p", 0, page("x", 1), blobstore.Conditions{})
	e.is(err, blobstore.ErrNotFound)
	e.is(e.c.ReadPages(e.ctx, "d/p", id, 0, make([]byte, 512)), blobstore.ErrNotFound)
	e.is(e.c.Delete(e.ctx, "d/p", blobstore.Conditions{}), blobstore.ErrNotFound)
	require.Empty(e, e.names("", ""))

	e.mustPages("d/p", 2048)
	require.Equal(e, make([]byte, 2048), e.read("d/p", "", 0, 2048), "nothing of the old one is left")
	require.Zero(e, e.stat("d/p").Sequence)
	require.NoError(e, lastError(e.c.ListSnapshots(e.ctx, "d/p")))
	e.is(e.c.ReadPages(e.ctx, "d/p", id, 0, make([]byte, 512)), blobstore.ErrNotFound)
	require.NoError(e, e.c.Delete(e.ctx, "d/p", blobstore.Conditions{}))
	e.mustPut("d/p", "now a block blob")
	require.Equal(e, []string{"d/p"}, e.names("", ""))
}
