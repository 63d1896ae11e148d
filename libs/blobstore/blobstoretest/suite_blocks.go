package blobstoretest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func testContainers(e *env) {
	for _, n := range []string{"lfj-b", "lfj-a", "lfr-a", "lfj-a"} {
		require.NoError(e, e.s.CreateContainer(e.ctx, n))
	}
	list := func(prefix string) []string {
		out := []string{}
		for n, err := range e.s.ListContainers(e.ctx, prefix) {
			require.NoError(e, err)
			out = append(out, n)
		}
		return out
	}
	require.Equal(e, []string{"lfj-a", "lfj-b"}, list("lfj-"))
	require.Equal(e, []string{"lfj-a", "lfj-b", "lfr-a", "test-container"}, list(""))
	require.Empty(e, list("x"))
	for _, n := range []string{"", "ab", "Upper", "a_b", "-ab", "ab-", "a--b", "../x", "a/b", strings.Repeat("a", 64)} {
		e.is(e.s.CreateContainer(e.ctx, n), blobstore.ErrInvalid)
	}

	require.Equal(e, "nowhere", e.s.Container("nowhere").Name())
	e.c = e.s.Container("nowhere")
	missing := func(err error) {
		e.Helper()
		e.is(err, blobstore.ErrNotFound)
		require.ErrorIs(e, err, blobstore.ErrNoContainer)
	}
	_, err := e.put("a", "x", blobstore.Conditions{})
	missing(err)
	_, err = e.c.CreatePages(e.ctx, "a", 512, nil, blobstore.Conditions{})
	missing(err)
	_, _, err = e.c.Get(e.ctx, "a", 0, -1)
	missing(err)
	_, err = e.c.Stat(e.ctx, "a", "")
	missing(err)
	missing(lastError(e.c.List(e.ctx, "", "")))
	missing(lastError(e.c.List(e.ctx, "a/b", "")))
}

func testNames(e *env) {
	for _, n := range []string{
		"", "/", "a/", "/a", "a//b", ".", "..", "../a", "a/../b", "a/.", "a.", "a b", "a\\b", "a\x00b", "ä", "a@b", "a+b",
		strings.Repeat("a", 1025), strings.Repeat("b", 201),
	} {
		_, err := e.put(n, "x", blobstore.Conditions{})
		e.is(err, blobstore.ErrInvalid)
		_, err = e.c.Stat(e.ctx, n, "")
		e.is(err, blobstore.ErrInvalid)
		_, err = e.c.CreatePages(e.ctx, n, 512, nil, blobstore.Conditions{})
		e.is(err, blobstore.ErrInvalid)
		e.is(e.c.Delete(e.ctx, n, blobstore.Conditions{}), blobstore.ErrInvalid)
	}
	// A name and a longer one that continues it with a slash may both exist, and case matters.
	good := []string{"A", "B.json", "a", "a-b", "a.b/c", "a/A", "a/a/a", "a/b", "log/0001.json", "x/" + strings.Repeat("y", 200)}
	for _, n := range good {
		e.mustPut(n, "body of "+n)
	}
	for _, n := range good {
		require.Equal(e, "body of "+n, e.get(n, 0, -1))
		require.Equal(e, n, e.stat(n).Name)
	}
	require.Equal(e, good, e.names("", ""))
}

func testPutGet(e *env) {
	before, err := e.s.Now(e.ctx)
	require.NoError(e, err)
	p := e.mustPut("a/b", "0123456789")
	require.Equal(e, "a/b", p.Name)
	require.EqualValues(e, 10, p.Size)
	require.NotEmpty(e, p.ETag)
	require.False(e, p.IsPages)
	require.Zero(e, p.Sequence)
	require.False(e, p.LastModified.Before(before.Add(-time.Second)), "storage time")
	require.Equal(e, p, e.stat("a/b"))

	require.Equal(e, "0123456789", e.get("a/b", 0, -1))
	require.Equal(e, "3456", e.get("a/b", 3, 4))
	require.Equal(e, "89", e.get("a/b", 8, 100))
	require.Empty(e, e.get("a/b", 5, 0))
	r, gp, err := e.c.Get(e.ctx, "a/b", 2, 1)
	require.NoError(e, err)
	require.Equal(e, p, gp, "properties are of the whole blob")
	require.NoError(e, r.Close())
	for _, off := range []int64{-1, 11} {
		_, _, err = e.c.Get(e.ctx, "a/b", off, -1)
		e.is(err, blobstore.ErrInvalid)
	}

	e.mustPut("empty", "")
	require.Empty(e, e.get("empty", 0, -1))
	require.Zero(e, e.stat("empty").Size)

	body := bytes.NewReader([]byte("skip this|payload"))
	_, err = body.Seek(10, io.SeekStart)
	require.NoError(e, err)
	_, err = e.c.Put(e.ctx, "from-position", body, 7, blobstore.Conditions{})
	require.NoError(e, err)
	require.Equal(e, "payload", e.get("from-position", 0, -1))

	big := bytes.Repeat(page("big", 1), 3<<20/512+1)
	_, err = e.c.Put(e.ctx, "big", bytes.NewReader(big), int64(len(big)), blobstore.Conditions{})
	require.NoError(e, err)
	require.Equal(e, string(big), e.get("big", 0, -1))

	_, _, err = e.c.Get(e.ctx, "none", 0, -1)
	e.is(err, blobstore.ErrNotFound)
	_, err = e.c.Stat(e.ctx, "none", "")
	e.is(err, blobstore.ErrNotFound)
	_, err = e.c.Stat(e.ctx, "a", "")
	e.is(err, blobstore.ErrNotFound)
	e.is(e.c.Delete(e.ctx, "none", blobstore.Conditions{}), blobstore.ErrNotFound)
	_, err = e.c.Stat(e.ctx, "a/b", "0000000000000001")
	e.is(err, blobstore.ErrNotFound)
}

func testPutConditions(e *env) {
	_, err := e.put("a", "x", blobstore.Conditions{IfMatch: "nonsense"})
	e.is(err, blobstore.ErrConditionFailed)
	p1, err := e.put("a", "1", blobstore.Conditions{CreateOnly: true})
	require.NoError(e, err)
	_, err = e.put("a", "2", blobstore.Conditions{CreateOnly: true})
	e.is(err, blobstore.ErrExists)
	require.Equal(e, "1", e.get("a", 0, -1))

	seen := map[blobstore.ETag]bool{p1.ETag: true}
	last := p1
	for i := range 5 {
		p, err := e.put("a", fmt.Sprint(i), blobstore.Conditions{IfMatch: last.ETag})
		require.NoError(e, err)
		require.False(e, seen[p.ETag], "an ETag came back")
		require.False(e, p.LastModified.Before(last.LastModified))
		seen[p.ETag] = true
		_, err = e.put("a", "stale", blobstore.Conditions{IfMatch: last.ETag})
		e.is(err, blobstore.ErrConditionFailed)
		require.Equal(e, p, e.stat("a"))
		last = p
	}
	p := e.mustPut("a", "same")
	require.False(e, seen[p.ETag])
	again := e.mustPut("a", "same")
	require.NotEqual(e, p.ETag, again.ETag, "the same bytes are a new version")
	require.NoError(e, e.c.Delete(e.ctx, "a", blobstore.Conditions{}))
	reborn := e.mustPut("a", "same")
	require.NotEqual(e, again.ETag, reborn.ETag)
	_, err = e.put("a", "x", blobstore.Conditions{IfSequence: ptr(0)})
	e.is(err, blobstore.ErrInvalid)
}

func testShortBody(e *env) {
	_, err := e.c.Put(e.ctx, "short", strings.NewReader("abc"), 4, blobstore.Conditions{})
	e.is(err, blobstore.ErrInvalid)
	_, err = e.c.Put(e.ctx, "short", strings.NewReader("abc"), -1, blobstore.Conditions{})
	e.is(err, blobstore.ErrInvalid)
	_, err = e.c.Stat(e.ctx, "short", "")
	e.is(err, blobstore.ErrNotFound)
	_, err = e.c.Put(e.ctx, "long", strings.NewReader("abcdef"), 4, blobstore.Conditions{})
	require.NoError(e, err)
	require.Equal(e, "abcd", e.get("long", 0, -1))
}

// race runs fn n times at once and returns the errors.
func race(n int, fn func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = fn(i)
		})
	}
	close(start)
	wg.Wait()
	return errs
}

// oneWinner asserts that exactly one call succeeded and all others met the sentinel; it returns the winner.
func (e *env) oneWinner(errs []error, loser error) int {
	e.Helper()
	winner := -1
	for i, err := range errs {
		if err == nil {
			require.Equal(e, -1, winner, "two winners")
			winner = i
		} else {
			e.is(err, loser)
		}
	}
	require.NotEqual(e, -1, winner, "no winner")
	return winner
}

func testPutRace(e *env) {
	for round := range 10 {
		name := fmt.Sprintf("race/%d", round)
		errs := race(16, func(i int) error {
			_, err := e.put(name, fmt.Sprintf("body %d", i), blobstore.Conditions{CreateOnly: true})
			return err
		})
		require.Equal(e, fmt.Sprintf("body %d", e.oneWinner(errs, blobstore.ErrExists)), e.get(name, 0, -1))
	}
}

func testConditionalRace(e *env) {
	p := e.mustPut("counter", "start")
	for range 10 {
		errs := race(8, func(i int) error {
			_, err := e.put("counter", fmt.Sprint(i), blobstore.Conditions{IfMatch: p.ETag})
			return err
		})
		require.Equal(e, fmt.Sprint(e.oneWinner(errs, blobstore.ErrConditionFailed)), e.get("counter", 0, -1))
		p = e.stat("counter")
	}
	// A delete and an overwrite under the same ETag: one of them.
	for range 10 {
		p := e.mustPut("fate", "x")
		errs := race(2, func(i int) error {
			if i == 0 {
				return e.c.Delete(e.ctx, "fate", blobstore.Conditions{IfMatch: p.ETag})
			}
			_, err := e.put("fate", "y", blobstore.Conditions{IfMatch: p.ETag})
			return err
		})
		require.NotEqual(e, errs[0] == nil, errs[1] == nil, "delete: %v, put: %v", errs[0], errs[1])
	}
}

func testGetKeepsVersion(e *env) {
	e.mustPut("v", strings.Repeat("old", 1000))
	r, _, err := e.c.Get(e.ctx, "v", 0, -1)
	require.NoError(e, err)
	defer r.Close()
	e.mustPut("v", "new")
	require.NoError(e, e.c.Delete(e.ctx, "v", blobstore.Conditions{}))
	data, err := io.ReadAll(r)
	require.NoError(e, err)
	require.Equal(e, strings.Repeat("old", 1000), string(data))
}

func testListOrder(e *env) {
	// '-' and '.' sort before '/', digits and letters after it: folders must not sort as their names.
	names := []string{"a", "a-b", "a-b/c", "a.b", "a/b", "a/b-c", "a/b/c", "a0", "ab", "b/0001", "b/0002", "b/0010"}
	for _, i := range []int{5, 0, 11, 3, 8, 1, 9, 2, 7, 4, 10, 6} {
		e.mustPut(names[i], names[i])
	}
	e.mustPages("b/0003.vhd", 1024)
	names = append(names[:11:11], "b/0003.vhd", "b/0010")
	require.Equal(e, names, e.names("", ""))
	require.Equal(e, names[9:], e.names("b/", ""))
	require.Equal(e, names[10:], e.names("b/", "b/0001"))
	require.Equal(e, names[10:], e.names("", "b/0001"))
	require.Equal(e, []string{"b/0010"}, e.names("b/001", "b/0001"))
	require.Equal(e, []string{"a-b/c", "a.b", "a/b", "a/b-c", "a/b/c", "a0", "ab"}, e.names("a", "a-b"))
	require.Equal(e, []string{"a/b-c", "a/b/c"}, e.names("a/", "a/b"))
	require.Equal(e, []string{"a/b/c"}, e.names("a/b/", "a"))
	require.Empty(e, e.names("zz", ""))
	require.Empty(e, e.names("a/b/c/d/", ""))
	require.Empty(e, e.names("", "zz"))
	require.Empty(e, e.names("no such/", ""))
	for p, err := range e.c.List(e.ctx, "", "") {
		require.NoError(e, err)
		require.Equal(e, e.stat(p.Name), p)
		require.Equal(e, p.Name == "b/0003.vhd", p.IsPages)
	}
	for range e.c.List(e.ctx, "", "") {
		break // stopping early is allowed
	}
}

func testListModel(e *env) {
	var all []string
	round := 0
	rapid.Check(e, func(t *rapid.T) {
		round++
		e.mk(fmt.Sprintf("list-%d", round))
		seg := rapid.StringOfN(rapid.RuneFrom([]rune("ab0-_A")), 1, 2, -1)
		all = nil
		for range rapid.IntRange(0, 12).Draw(t, "n") {
			n := strings.Join(rapid.SliceOfN(seg, 1, 3).Draw(t, "name"), "/")
			if !slices.Contains(all, n) {
				e.mustPut(n, "")
				all = append(all, n)
			}
		}
		slices.Sort(all)
		some := rapid.StringOfN(rapid.RuneFrom([]rune("ab0-_A/")), 0, 4, -1)
		for range 4 {
			prefix, after := some.Draw(t, "prefix"), some.Draw(t, "after")
			want := []string{}
			for _, n := range all {
				if strings.HasPrefix(n, prefix) && n > after {
					want = append(want, n)
				}
			}
			require.Equal(t, want, e.names(prefix, after), "prefix %q after %q", prefix, after)
		}
	})
}

func testLargeList(e *env) {
	const n = 1200
	errs := race(4, func(w int) error {
		for i := w; i < n; i += 4 {
			if _, err := e.put(fmt.Sprintf("log/%08d.json", i), "{}", blobstore.Conditions{CreateOnly: true}); err != nil {
				return err
			}
		}
		return nil
	})
	require.NoError(e, errors.Join(errs...))
	got := e.names("log/", "")
	require.Len(e, got, n)
	require.True(e, slices.IsSorted(got))
	require.Len(e, e.names("log/", "log/00000999.json"), n-1000)
	for i := range n {
		require.Equal(e, fmt.Sprintf("log/%08d.json", i), got[i])
	}
	seen := 0 // a consumer may change the store while it lists
	for p, err := range e.c.List(e.ctx, "log/", "log/00000999.json") {
		require.NoError(e, err)
		require.NoError(e, e.c.Delete(e.ctx, p.Name, blobstore.Conditions{}))
		seen++
	}
	require.Equal(e, n-1000, seen)
	require.Len(e, e.names("", ""), 1000)
}

func testDelete(e *env) {
	p := e.mustPut("d/e/f", "x")
	e.mustPut("d/e", "y")
	e.is(e.c.Delete(e.ctx, "d/e/f", blobstore.Conditions{IfMatch: "nonsense"}), blobstore.ErrConditionFailed)
	e.is(e.c.Delete(e.ctx, "d", blobstore.Conditions{}), blobstore.ErrNotFound)
	require.NoError(e, e.c.Delete(e.ctx, "d/e/f", blobstore.Conditions{IfMatch: p.ETag}))
	_, err := e.c.Stat(e.ctx, "d/e/f", "")
	e.is(err, blobstore.ErrNotFound)
	require.Equal(e, []string{"d/e"}, e.names("", ""))
	// The last blob of a folder goes while others arrive.
	errs := race(8, func(w int) error {
		for i := range 20 {
			name := fmt.Sprintf("busy/%d/%d", i%2, w)
			if _, err := e.put(name, "z", blobstore.Conditions{CreateOnly: true}); err != nil {
				return err
			}
			if err := e.c.Delete(e.ctx, name, blobstore.Conditions{}); err != nil {
				return err
			}
		}
		return nil
	})
	require.NoError(e, errors.Join(errs...))
	require.Equal(e, []string{"d/e"}, e.names("", ""))
}

func testCancelled(e *env) {
	e.mustPut("b", "x")
	e.mustPages("p", 4096)
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	c := e.c
	calls := map[string]func() error{
		"create container": func() error { return e.s.CreateContainer(ctx, "other") },
		"list containers":  func() error { return lastError(e.s.ListContainers(ctx, "")) },
		"now":              func() error { _, err := e.s.Now(ctx); return err },
		"put": func() error {
			_, err := c.Put(ctx, "n", strings.NewReader("x"), 1, blobstore.Conditions{})
			return err
		},
		"get":    func() error { _, _, err := c.Get(ctx, "b", 0, -1); return err },
		"stat":   func() error { _, err := c.Stat(ctx, "b", ""); return err },
		"list":   func() error { return lastError(c.List(ctx, "", "")) },
		"delete": func() error { return c.Delete(ctx, "b", blobstore.Conditions{}) },
		"create pages": func() error {
			_, err := c.CreatePages(ctx, "q", 512, nil, blobstore.Conditions{})
			return err
		},
		"write pages": func() error {
			_, err := c.WritePages(ctx, "p", 0, page("x", 1), blobstore.Conditions{})
			return err
		},
		"clear pages":  func() error { _, err := c.ClearPages(ctx, "p", 0, 512, blobstore.Conditions{}); return err },
		"read pages":   func() error { return c.ReadPages(ctx, "p", "", 0, make([]byte, 512)) },
		"page ranges":  func() error { return lastError(c.PageRanges(ctx, "p", "", 0, 4096)) },
		"set sequence": func() error { _, err := c.SetSequence(ctx, "p", 1, blobstore.Conditions{}); return err },
		"snapshot":     func() error { _, _, err := c.SnapshotPages(ctx, "p", nil, blobstore.Conditions{}); return err },
		"snapshots":    func() error { return lastError(c.ListSnapshots(ctx, "p")) },
		"delete snapshot": func() error {
			return c.DeleteSnapshot(ctx, "p", "0000000000000001")
		},
		"acquire": func() error { return c.AcquireLease(ctx, "p", leaseID("a"), time.Minute) },
		"renew":   func() error { return c.RenewLease(ctx, "p", leaseID("a")) },
		"release": func() error { return c.ReleaseLease(ctx, "p", leaseID("a")) },
		"break":   func() error { return c.BreakLease(ctx, "p") },
	}
	before := e.stat("p")
	for name, call := range calls {
		require.ErrorIs(e, call(), context.Canceled, name)
	}
	require.Equal(e, before, e.stat("p"))
	require.Equal(e, []string{"b", "p"}, e.names("", ""))
}

func testTime(e *env) {
	a, err := e.s.Now(e.ctx)
	require.NoError(e, err)
	e.mustPut("t", "x")
	b, err := e.s.Now(e.ctx)
	require.NoError(e, err)
	require.False(e, b.Before(a))
	require.WithinDuration(e, b, e.stat("t").LastModified, time.Minute)
}
