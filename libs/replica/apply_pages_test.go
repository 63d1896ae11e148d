package replica

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
)

// yard is a lineage with one disk of any size, a reference of its content, and a count of the page requests made on it.
type yard struct {
	t     testing.TB
	mem   *blobstoretest.Memory
	store *costly
	r     *Replica
	size  int64
	image []byte
	o     Ordinal
}

// costly is a store whose page requests are worth cost bytes, and are counted.
type costly struct {
	*blobstoretest.Faulty
	cost int64

	mu    sync.Mutex
	calls map[blobstoretest.Op]int
}

func (c *costly) BytesPerRequest() int64 { return c.cost }

func newCostly(s blobstore.Store, cost int64) *costly {
	c := &costly{cost: cost, calls: map[blobstoretest.Op]int{}}
	c.Faulty = blobstoretest.NewFaulty(s, func(op blobstoretest.Op, _, _ string) blobstoretest.Fault {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.calls[op]++
		return blobstoretest.None
	})
	return c
}

// pages returns how many requests moved or listed pages since the last call.
func (c *costly) pages() (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, op := range []blobstoretest.Op{blobstoretest.OpWritePages, blobstoretest.OpClearPages, blobstoretest.OpReadPages, blobstoretest.OpPageRanges} {
		n += c.calls[op]
	}
	clear(c.calls)
	return n
}

func newYard(t testing.TB, size, cost int64) *yard {
	y := &yard{t: t, mem: blobstoretest.NewMemory(), size: size, image: make([]byte, size)}
	y.store = newCostly(y.mem, cost)
	var err error
	y.r, err = Create(context.Background(), y.store, testLineage)
	require.NoError(t, err)
	return y
}

// put is one extent: data, or zeros when it has none.
type put struct {
	off, n int64
	data   []byte
}

// commit ships puts as one manifest, and lays them over the reference.
func (y *yard) commit(kind Kind, puts []put) {
	y.t.Helper()
	ctx := context.Background()
	p := Proposal{Kind: kind, Epoch: 1, CutTime: testTime, Consistency: ConsistencyCrash}
	h := segment.Header{Lineage: testLineage.Bytes(), DiskID: "disk-a", Gen: 1, DiskSize: y.size, Kind: segment.KindPoint}
	y.o++
	p.Point, p.Base = y.o, y.o-1
	if kind == KindPartial {
		p.Pass, p.Point, p.CutTime, p.Consistency = &Pass{y.o, 1, 1}, 0, time.Time{}, ConsistencyNone
		h.Kind, h.Task = segment.KindPass, 1
	}
	h.Ordinal = uint64(y.o)
	d := Disk{ID: "disk-a", Gen: 1, Size: y.size}
	tx := NewTx()
	var w *segment.Writer
	writer := func() *segment.Writer {
		w, err := segment.NewWriter(h, nil, segment.Options{})
		require.NoError(y.t, err)
		return w
	}
	flush := func() {
		if w == nil || w.Empty() {
			return
		}
		body, sha, _, err := w.Finish()
		require.NoError(y.t, err)
		s, err := y.r.PutSegment(ctx, SegmentKey{Kind: kind, Ordinal: y.o, Tx: tx, DiskID: "disk-a", K: len(d.Segments)}, body, sha)
		require.NoError(y.t, err)
		d.Segments, w = append(d.Segments, s), nil
	}
	for _, u := range puts {
		if w == nil {
			w = writer()
		}
		if u.data == nil {
			require.NoError(y.t, w.Zero(u.off, u.n))
			clear(y.image[u.off:][:u.n])
		} else {
			copy(y.image[u.off:], u.data)
			for at := int64(0); at < u.n; at += 1 << 20 {
				if w == nil {
					w = writer()
				}
				require.NoError(y.t, w.Data(u.off+at, u.data[at:min(at+1<<20, u.n)]))
				if w.Full() {
					flush()
				}
			}
		}
	}
	flush()
	p.Disks = []Disk{d}
	_, err := y.r.Commit(ctx, p)
	require.NoError(y.t, err)
}

func (y *yard) applier(parallel int) *Applier {
	a, err := NewApplier(y.r, ApplierOptions{Footer: testFooter, Parallel: parallel, Takeover: true})
	require.NoError(y.t, err)
	return a
}

// apply brings the disk to the head, checks it, and returns what it took.
func (y *yard) apply() Progress {
	y.t.Helper()
	p, err := y.applier(8).Advance(context.Background(), 0)
	require.NoError(y.t, err)
	y.check()
	return p
}

func (y *yard) check() {
	y.t.Helper()
	c := y.mem.Container(testLineage.ReplicaContainer())
	buf := make([]byte, 4<<20)
	for off := int64(0); off < y.size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), y.size-off)]
		require.NoError(y.t, c.ReadPages(context.Background(), DiskBlobName("disk-a", 1), "", off, p))
		require.True(y.t, bytes.Equal(y.image[off:][:len(p)], p), "page blob differs from the chain in [%d, %d)", off, off+int64(len(p)))
	}
}

// scatter returns n blocks of size bytes at random places, ascending.
func scatter(rng *rand.Rand, n int, size, within int64) (out []put) {
	seen := map[int64]bool{}
	for len(out) < n {
		if b := rng.Int64N(within / size); !seen[b] {
			seen[b] = true
			out = append(out, put{off: b * size, n: size, data: noise(rng, size)})
		}
	}
	slices.SortFunc(out, func(a, b put) int { return int(a.off - b.off) })
	return out
}

func noise(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32())}).Read(p)
	return p
}

const azureCost = 60 << 20 / 500 // bytes that one request is worth

// TestScatteredRequests is the arithmetic of the plan: what 10485 scattered 4 KiB blocks of a 4 GiB disk cost.
func TestScatteredRequests(t *testing.T) {
	const n, disk = 10485, 4 << 30
	rng := rand.New(rand.NewPCG(1, 2))
	var atoms []atom
	for _, u := range scatter(rng, n, 4096, disk) {
		atoms = append(atoms, atom{off: u.off, end: u.off + u.n})
	}
	runs := 1
	short := 0 // gaps that are cheaper to write than another request
	for i := range atoms[1:] {
		if g := atoms[i+1].off - atoms[i].end; g < azureCost {
			short++
		}
		if atoms[i+1].off != atoms[i].end {
			runs++
		}
	}
	weigh := func(ops []pageOp) (requests int, moved int64) {
		at := int64(0)
		for _, op := range ops {
			require.GreaterOrEqual(t, op.Off, at)
			require.LessOrEqual(t, op.Len, int64(blobstore.MaxPageWrite))
			at = op.End()
			requests, moved = requests+1, moved+op.Len
			if op.kind == opPatch {
				requests, moved = requests+1, moved+op.Len
			}
		}
		return requests, moved
	}
	everything := extent.NewSet(extent.Range{Len: disk})
	for name, c := range map[string]struct {
		l        *layout
		cost     int64
		from, to int
	}{
		"requests are free":      {l: &layout{}, from: runs, to: runs},
		"gaps are absent":        {l: &layout{known: *everything}, cost: azureCost, from: n - short, to: n - short + 10},
		"gaps hold pages":        {l: &layout{known: *everything, present: *everything}, cost: azureCost, from: n * 9 / 10, to: n},
		"nothing is known":       {l: &layout{}, cost: azureCost, from: n * 9 / 10, to: n},
		"requests are very dear": {l: &layout{}, cost: 4 << 20, from: 2 * disk / maxPatch / 2, to: n / 2},
	} {
		t.Run(name, func(t *testing.T) {
			p := planner{cost: c.cost, trust: true}
			requests, moved := weigh(p.plan(slices.Clone(atoms), c.l))
			plain := n*c.cost + n*4096
			t.Logf("%d requests, %d MiB moved, %.1f s at 500 requests/s", requests, moved>>20, float64(requests)/500)
			require.LessOrEqual(t, int64(requests)*c.cost+moved, plain, "never dearer than one request per block")
			require.GreaterOrEqual(t, requests, c.from)
			require.LessOrEqual(t, requests, c.to)
		})
	}
}

// TestRequestCounts applies churn to a counting store whose requests cost something.
func TestRequestCounts(t *testing.T) {
	const disk = 256 << 20
	blocks := scatter(rand.New(rand.NewPCG(3, 4)), 655, 4096, disk) // the density of 10485 in 4 GiB
	measure := func(cost int64, whole bool) (int, Progress) {
		y := newYard(t, disk, cost)
		if whole { // every page is there
			y.commit(KindBase, []put{{off: 0, n: disk, data: noise(rand.New(rand.NewPCG(5, 6)), disk)}})
		} else {
			y.commit(KindBase, []put{{off: 0, n: 4096, data: bytes.Repeat([]byte{1}, 4096)}})
		}
		y.apply()
		y.store.pages()
		y.commit(KindPoint, blocks)
		p := y.apply()
		n := y.store.pages()
		require.EqualValues(t, n, p.Requests)
		return n, p
	}
	prompt, p := measure(0, false)
	require.InDelta(t, len(blocks), prompt, 20, "neighbours are one request")
	require.EqualValues(t, len(blocks)*4096, p.Written)
	require.Zero(t, p.Read)
	sparse, p := measure(azureCost, false)
	t.Logf("%d blocks: %d requests over absent gaps", len(blocks), sparse)
	require.Less(t, sparse, len(blocks)*8/10)
	require.Zero(t, p.Read, "absent gaps are known without reading them")
	if testing.Short() {
		return
	}
	full, p := measure(azureCost, true)
	t.Logf("%d blocks: %d requests over written gaps, %d MiB read", len(blocks), full, p.Read>>20)
	require.LessOrEqual(t, full, len(blocks)+2)
}

// TestDenseChurnIsPatched: many small changes near each other are one read and one write.
func TestDenseChurnIsPatched(t *testing.T) {
	y := newYard(t, 16<<20, azureCost)
	rng := rand.New(rand.NewPCG(1, 2))
	y.commit(KindBase, []put{{off: 0, n: y.size, data: noise(rng, y.size)}})
	y.apply()
	y.store.pages()
	var puts []put
	for off := int64(0); off < y.size; off += 16 << 10 {
		puts = append(puts, put{off: off, n: 4096, data: noise(rng, 4096)})
	}
	y.commit(KindPoint, puts)
	p := y.apply()
	n := y.store.pages()
	t.Logf("%d blocks: %d requests, %d KiB written, %d KiB read", len(puts), n, p.Written>>10, p.Read>>10)
	require.LessOrEqual(t, n, 2*8+rangesAsked)
	require.LessOrEqual(t, p.Written, y.size)
	// With free requests only what changed is written.
	y.store.cost = 0
	y.commit(KindPoint, puts)
	require.EqualValues(t, len(puts)*4096, y.apply().Written)
}

const rangesAsked = 1

// TestNeverAnUnchangedPage: a pass that sends again what is there writes nothing of it, and not for long reads in vain.
func TestNeverAnUnchangedPage(t *testing.T) {
	y := newYard(t, 64<<20, azureCost)
	rng := rand.New(rand.NewPCG(1, 2))
	all := []put{{off: 1 << 20, n: 40 << 20, data: noise(rng, 40<<20)}}
	y.commit(KindBase, all)
	y.apply()
	// A DIRTY pass of hot extents: most of it equals what is there.
	pass := []put{}
	for off := int64(1 << 20); off < 40<<20; off += 2 << 20 {
		pass = append(pass, put{off: off, n: 1 << 20, data: slices.Clone(y.image[off:][:1<<20])})
	}
	changed := pass[7].data[300<<10:][:8<<10]
	copy(changed, noise(rng, 8<<10))
	y.commit(KindPartial, pass)
	p := y.apply()
	require.LessOrEqual(t, p.Written, int64(8<<10)+512)
	require.GreaterOrEqual(t, p.Unchanged, int64(19<<20))
	// Everything differs: after a while it is not compared any more.
	pass = []put{{off: 0, n: 41 << 20, data: noise(rng, 41<<20)}}
	y.commit(KindPartial, pass)
	p = y.apply()
	require.EqualValues(t, 41<<20, p.Written)
	require.LessOrEqual(t, p.Read, int64(probeBytes+10*maxPatch))
	// Requests are free: nothing is read at all.
	y.store.cost = 0
	y.commit(KindPartial, pass)
	p = y.apply()
	require.EqualValues(t, 41<<20, p.Written)
	require.Zero(t, p.Read)
}

// TestClears: zeros are cleared by one request, small ones between data stay data, absent space costs nothing.
func TestClears(t *testing.T) {
	y := newYard(t, 512<<20, azureCost)
	rng := rand.New(rand.NewPCG(1, 2))
	y.commit(KindBase, []put{
		{off: 0, n: 8 << 20, data: noise(rng, 8<<20)}, {off: 16 << 20, n: 100 << 20}, // the zeros were never written
		{off: 300 << 20, n: 1 << 20, data: noise(rng, 1<<20)},
	})
	p := y.apply()
	require.Zero(t, p.Cleared, "nothing is below the base")
	y.store.pages()

	y.commit(KindPoint, []put{{off: 1 << 20, n: 6 << 20}})
	p = y.apply()
	require.Equal(t, 1, y.store.pages())
	require.EqualValues(t, 6<<20, p.Cleared)
	require.Zero(t, p.Written)

	var absent []put
	for off := int64(20 << 20); off < 200<<20; off += 10 << 20 {
		absent = append(absent, put{off: off, n: 1 << 20})
	}
	y.commit(KindPoint, slices.Insert(absent, 0, put{off: 8<<20 - 4096, n: 1<<20 + 4096}))
	p = y.apply()
	require.EqualValues(t, 4096, p.Cleared, "only what is there")
	require.Equal(t, 2, y.store.pages(), "the window's written ranges were asked for, one range cleared")

	var data, zeros []put
	for off := int64(0); off < 1<<20; off += 32 << 10 {
		data, zeros = append(data, put{off: off, n: 16 << 10, data: noise(rng, 16<<10)}), append(zeros, put{off: off + 16<<10, n: 16 << 10})
	}
	y.commit(KindPoint, data)
	y.commit(KindPoint, zeros)
	p = y.apply()
	require.Equal(t, 2, y.store.pages(), "page ranges, and one write of data with the zeros between")
	require.EqualValues(t, 1<<20, p.Written)
	require.Zero(t, p.Cleared)
}

// TestLazyMerge: a hot set written over and over costs its last content once.
func TestLazyMerge(t *testing.T) {
	const disk, rounds = 64 << 20, 12
	run := func(lazy bool) (requests int, written int64) {
		y := newYard(t, disk, azureCost)
		rng := rand.New(rand.NewPCG(7, 8))
		y.commit(KindBase, []put{{off: 0, n: 4096, data: noise(rng, 4096)}})
		y.apply()
		y.store.pages()
		for range rounds {
			seen := map[int64]bool{}
			var puts []put
			for range 400 { // 80 % of writes on 5 % of the disk
				within := int64(disk)
				if rng.IntN(5) > 0 {
					within = disk / 20
				}
				if b := rng.Int64N(within / 8192); !seen[b] {
					seen[b] = true
					puts = append(puts, put{off: b * 8192, n: 8192, data: noise(rng, 8192)})
				}
			}
			slices.SortFunc(puts, func(a, b put) int { return int(a.off - b.off) })
			y.commit(KindPoint, puts)
			if !lazy {
				written += y.apply().Written
			}
		}
		if lazy {
			written += y.apply().Written
		}
		return y.store.pages(), written
	}
	promptRequests, promptBytes := run(false)
	lazyRequests, lazyBytes := run(true)
	t.Logf("prompt: %d requests, %d KiB; lazy: %d requests, %d KiB", promptRequests, promptBytes>>10, lazyRequests, lazyBytes>>10)
	require.Less(t, lazyRequests, promptRequests/4)
	require.Less(t, lazyBytes, promptBytes*9/10, "both with the gaps that merging fills")
}

// TestPagesEqualFold is S4 by random chains, costs and crashes: at rest the page blob is the fold of the chain, whatever a
// batch that was cut short left, and however much the next one adds.
func TestPagesEqualFold(t *testing.T) {
	const blocks = 256
	seeds := uint64(60)
	if raceEnabled {
		seeds = 15
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 9))
		cost := []int64{0, 4 << 10, 32 << 10, azureCost, 4 << 20}[rng.IntN(5)]
		y := newYard(t, blocks*blockSize, cost)
		random := func() (out []put) {
			for b := int64(rng.IntN(8)); b < blocks; {
				n := min(1+rng.Int64N(1+rng.Int64N(24)), blocks-b)
				u := put{off: b * blockSize, n: n * blockSize}
				switch rng.IntN(4) {
				case 0: // zeros
				case 1: // what is there
					u.data = slices.Clone(y.image[u.off:][:u.n])
				default:
					u.data = noise(rng, u.n)
				}
				if u.data == nil || !zeros(u.data) {
					out = append(out, u)
				}
				b += n + rng.Int64N(1+rng.Int64N(16))
			}
			return out
		}
		y.commit(KindBase, random())
		for round := range 8 {
			if round > 0 || rng.IntN(2) == 0 {
				kind := KindPoint
				if rng.IntN(3) == 0 {
					kind = KindPartial
				}
				y.commit(kind, random())
			}
			fault := []blobstoretest.Fault{blobstoretest.Before, blobstoretest.After, blobstoretest.Crash, blobstoretest.CrashAfter}[rng.IntN(4)]
			f := blobstoretest.NewFaulty(y.mem, nil)
			r, err := Open(t.Context(), f, testLineage)
			require.NoError(t, err)
			f.SetHook(blobstoretest.FailNth(1+rng.Int64N(60), fault))
			dying, err := NewApplier(r, ApplierOptions{Footer: testFooter, Parallel: 1 + 7*rng.IntN(2), Takeover: true, RequestBytes: max(cost, -1+2*min(cost, 1))})
			require.NoError(t, err)
			if _, err = dying.Advance(t.Context(), 0); err == nil {
				y.check()
			}
			if rng.IntN(2) == 0 {
				y.apply()
			}
		}
		y.apply()
		_, err := y.applier(1).Advance(t.Context(), 0)
		require.NoError(t, err, fmt.Sprint("seed ", seed))
		y.check()
	}
}

func zeros(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

// TestStalePatch: an applier that read what lies between its ranges, and was overtaken before it wrote, writes nothing: old
// bytes never go over newer ones.
func TestStalePatch(t *testing.T) {
	y := newYard(t, 1<<20, azureCost)
	rng := rand.New(rand.NewPCG(1, 2))
	y.commit(KindBase, []put{{off: 0, n: y.size, data: noise(rng, y.size)}})
	y.apply()
	dense := func(at int64) (out []put) {
		for off := at; off < y.size; off += 16 << 10 {
			out = append(out, put{off: off, n: 4096, data: noise(rng, 4096)})
		}
		return out
	}
	y.commit(KindPoint, dense(0))
	reads, stolen := 0, false
	f := blobstoretest.NewFaulty(y.mem, nil)
	slow, err := Open(t.Context(), f, testLineage)
	require.NoError(t, err)
	f.SetHook(func(op blobstoretest.Op, _, _ string) blobstoretest.Fault {
		switch {
		case op == blobstoretest.OpReadPages:
			reads++
		case op == blobstoretest.OpWritePages && reads > 0 && !stolen:
			stolen = true // it holds old bytes of the gaps; they change now
			y.commit(KindPoint, dense(8<<10))
			y.apply()
		}
		return blobstoretest.None
	})
	a, err := NewApplier(slow, ApplierOptions{Footer: testFooter, Parallel: 1, RequestBytes: azureCost})
	require.NoError(t, err)
	_, err = a.Advance(t.Context(), 0)
	require.ErrorIs(t, err, ErrLeaseLost)
	require.True(t, stolen)
	y.check()
	_, err = a.Advance(t.Context(), 0)
	require.NoError(t, err, "it reads again and goes on")
	y.check()
}

// TestYield: Advance ends between batches when it is asked to, at rest, and goes on where it was.
func TestYield(t *testing.T) {
	y := newYard(t, 1<<20, 0)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 4 {
		y.commit(map[bool]Kind{true: KindBase, false: KindPoint}[y.o == 0], []put{{off: 4096 * int64(y.o), n: 4096, data: noise(rng, 4096)}})
	}
	a, err := NewApplier(y.r, ApplierOptions{Footer: testFooter, Parallel: 1, MaxBatchBytes: 1, Yield: func() bool { return true }})
	require.NoError(t, err)
	for want := Seq(1); want <= 4; want++ {
		p, err := a.Advance(t.Context(), 0)
		require.NoError(t, err)
		require.Equal(t, want, p.Applied)
		require.Equal(t, want < 4, p.Yielded)
		require.EqualValues(t, 1, p.Batches)
		b, err := y.r.Backlog(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, b.Applied)
		require.Equal(t, 4-int(want), b.Manifests)
		require.Equal(t, 4-int(want), b.Points)
		require.Equal(t, want < 4, b.Bytes > 0)
		require.True(t, b.Based)
		require.False(t, b.Due)
	}
	y.check()
}

// TestPace: estimates follow what batches took, and assume the limits of a page blob before the first.
func TestPace(t *testing.T) {
	var p pace
	requests, took := p.estimate(600 << 20)
	require.InDelta(t, 5000, requests, 1)
	require.Equal(t, 10*time.Second, took)
	for range 20 {
		p.observe(64<<20, 1<<14, 32*time.Second) // 2 MiB/s, 4 KiB a request
	}
	requests, took = p.estimate(1 << 30)
	require.InDelta(t, 1<<18, requests, 1<<10)
	require.InDelta(t, 512, took.Seconds(), 1)
	for range 20 {
		p.observe(256<<20, 64, 4*time.Second)
	}
	_, took = p.estimate(1 << 30)
	require.InDelta(t, 16, took.Seconds(), 2, "what is old is forgotten")
}

// BenchmarkApplyScattered applies 64 MiB of 4 KiB blocks over a store that answers at once, by what a request is worth.
func BenchmarkApplyScattered(b *testing.B) {
	const disk = 512 << 20
	for _, cost := range []int64{0, azureCost} {
		b.Run(fmt.Sprintf("request-worth-%dK", cost>>10), func(b *testing.B) {
			y := newYard(b, disk, cost)
			rng := rand.New(rand.NewPCG(1, 2))
			y.commit(KindBase, []put{{off: 0, n: 4096, data: noise(rng, 4096)}})
			y.apply()
			puts := scatter(rng, 64<<20/4096, 4096, disk)
			var requests int64
			b.SetBytes(64 << 20)
			for b.Loop() {
				b.StopTimer()
				y.commit(KindPoint, puts)
				b.StartTimer()
				p, err := y.applier(16).Advance(context.Background(), 0)
				require.NoError(b, err)
				requests += p.Requests
			}
			b.ReportMetric(float64(requests)/float64(b.N), "requests/op")
		})
	}
}
