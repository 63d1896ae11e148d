package replica

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// story is a lineage whose disks are known at every point.
type story struct {
	t       testing.TB
	store   blobstore.Store
	r       *Replica
	rng     *rand.Rand
	now     parcel             // the guest's disks
	at      map[Ordinal]parcel // by point
	next    Ordinal
	base    Ordinal
	epoch   Epoch
	open    Seq
	every   int // a checkpoint at each point whose ordinal is a multiple
	advance func(time.Duration)
}

func newStory(t testing.TB, store blobstore.Store, seed uint64) *story {
	s := &story{t: t, store: store, rng: rand.New(rand.NewPCG(seed, 7)), next: 1, epoch: 1, every: 6,
		now: two(content{}, content{}), at: map[Ordinal]parcel{}, advance: func(time.Duration) {}}
	if m, ok := store.(*blobstoretest.Memory); ok {
		s.advance = m.Advance
	}
	r, err := Create(t.Context(), store, testLineage)
	require.NoError(t, err)
	s.r = r
	return s
}

// write changes some blocks of both disks and returns what changed.
func (s *story) write(blocks int) parcel {
	p := two(content{}, content{})
	for range blocks {
		id := []string{"disk-a", "disk-b"}[s.rng.IntN(2)]
		b, v := s.rng.Int64N(testBlocks), s.rng.Uint64()|1
		p[id][b], s.now[id][b] = v, v
	}
	return p
}

func (s *story) commit(p Proposal) Result {
	s.t.Helper()
	res, err := s.r.Commit(s.t.Context(), p)
	require.NoError(s.t, err)
	return res
}

// pass copies everything in two partials and ends the run with a base.
func (s *story) pass() {
	s.t.Helper()
	ctx := s.t.Context()
	o := s.next
	s.next++
	for i, id := range []string{"disk-a", "disk-b"} {
		d, err := ship(ctx, s.r, KindPartial, o, uint32(i+1), NewTx(), parcel{id: maps.Clone(s.now[id])})
		require.NoError(s.t, err)
		s.commit(Proposal{Kind: KindPartial, Epoch: s.epoch, Open: s.open, Pass: &Pass{o, uint32(i + 1), 2}, Base: s.base, Disks: d})
	}
	s.base = o
	s.point(KindBase, ConsistencyCrash, 2)
}

// point commits one, some of whose attempts left segments that nothing names.
func (s *story) point(k Kind, c Consistency, blocks int) Ordinal {
	s.t.Helper()
	ctx := s.t.Context()
	o := s.next
	s.next++
	p := s.write(blocks)
	if o%5 == 0 {
		_, err := ship(ctx, s.r, k, o, 0, NewTx(), p)
		require.NoError(s.t, err)
	}
	d, err := ship(ctx, s.r, k, o, 0, NewTx(), p)
	require.NoError(s.t, err)
	s.commit(Proposal{Kind: k, Epoch: s.epoch, Open: s.open, Point: o, Base: s.base, CutTime: testTime, Consistency: c, Disks: d})
	s.base = o
	s.at[o] = parcel{"disk-a": maps.Clone(s.now["disk-a"]), "disk-b": maps.Clone(s.now["disk-b"])}
	return o
}

func (s *story) apply() {
	s.t.Helper()
	a, err := NewApplier(s.r, ApplierOptions{Footer: testFooter, Parallel: 1, Takeover: true,
		Stop: func(e Entry) bool { return e.Kind.IsPoint() && int(e.Ordinal)%s.every == 0 }})
	require.NoError(s.t, err)
	_, err = a.Advance(s.t.Context(), 0)
	require.NoError(s.t, err)
}

// points every step for a time, each applied now and then.
func (s *story) points(n int, step time.Duration) {
	s.t.Helper()
	for i := range n {
		s.advance(step)
		s.point(KindPoint, ConsistencyCrash, 3)
		if i%4 == 3 {
			s.apply()
		}
	}
	s.apply()
}

// other opens the lineage as another process.
func (s *story) other() *Replica {
	s.t.Helper()
	r, err := Open(s.t.Context(), s.store, testLineage)
	require.NoError(s.t, err)
	return r
}

// want reads a point and compares every byte.
func (s *story) want(r *Replica, o Ordinal) {
	s.t.Helper()
	sink := memSink{}
	_, err := r.Materialise(s.t.Context(), o, sink, MaterialiseOptions{Parallel: 1})
	require.NoError(s.t, err, "point %d", o)
	for id, w := range s.at[o] {
		require.True(s.t, w.equal(contentOf(sink[id])), "point %d, disk %s\nwant %v\nhave %v", o, id, w, contentOf(sink[id]))
	}
}

// wantAll reads every listed point as a fresh process, and returns their ordinals.
func (s *story) wantAll() (have []Ordinal) {
	s.t.Helper()
	r := s.other()
	points, err := r.Points(s.t.Context())
	require.NoError(s.t, err)
	for _, p := range points {
		s.want(r, p.Ordinal)
		have = append(have, p.Ordinal)
	}
	return have
}

// retainAll runs steps until one has nothing more to do.
func (s *story) retainAll(r *Replica, o RetainOptions) RetainResult {
	s.t.Helper()
	for range 200 {
		res, err := r.Retain(s.t.Context(), o)
		require.NoError(s.t, err)
		if !res.More {
			return res
		}
	}
	s.t.Fatal("retention has no end")
	return RetainResult{}
}

// names lists a container.
func blobNames(ctx context.Context, t testing.TB, c blobstore.Container, prefix string) (out []string) {
	t.Helper()
	for p, err := range c.List(ctx, prefix, "") {
		require.NoError(t, err)
		out = append(out, p.Name)
	}
	return out
}

// wantTidy compares what is stored with what the chain needs: nothing is missing and nothing is left.
func (s *story) wantTidy() {
	s.t.Helper()
	ctx := s.t.Context()
	r := s.other()
	st, entries, ret, err := r.viewChain(ctx)
	require.NoError(s.t, err)
	var logs, segs, staged []string
	for _, e := range entries {
		logs = append(logs, manifestName(e.Seq))
		m, err := r.Manifest(ctx, e.Seq)
		require.NoError(s.t, err)
		for _, d := range m.Disks {
			for _, g := range d.Segments {
				switch {
				case g.Container == Journal:
					segs = append(segs, g.Name)
				case !ret.released(e.Seq):
					staged = append(staged, g.Name)
				}
			}
		}
	}
	slices.Sort(segs)
	require.Equal(s.t, logs, blobNames(ctx, s.t, r.journal, logPrefix), "manifests")
	have := slices.DeleteFunc(blobNames(ctx, s.t, r.journal, segPrefix), func(n string) bool {
		a, _ := attemptOf(n)
		return a.ordinal == st.Highest // attempts of the newest may still be at work
	})
	segs = slices.DeleteFunc(segs, func(n string) bool { a, _ := attemptOf(n); return a.ordinal == st.Highest })
	require.Equal(s.t, segs, have, "segments")
	require.ElementsMatch(s.t, staged, blobNames(ctx, s.t, r.staging, segPrefix), "staging")
	require.NoError(s.t, r.lock(ctx))
	ckpts, err := r.checkpoints(ctx)
	r.unlock()
	require.NoError(s.t, err)
	named := map[string][]blobstore.SnapshotID{}
	var records []string
	for _, c := range ckpts {
		records = append(records, checkpointName(c.Seq))
		for _, d := range c.Disks {
			named[DiskBlobName(d.ID, d.Gen)] = append(named[DiskBlobName(d.ID, d.Gen)], d.Snapshot)
		}
	}
	require.Equal(s.t, records, slices.DeleteFunc(blobNames(ctx, s.t, r.replica, ckptPrefix), func(name string) bool {
		b, err := readAll(ctx, r.replica, name, maxCheckpoint)
		require.NoError(s.t, err)
		c, err := DecodeCheckpoint(b)
		require.NoError(s.t, err)
		return c.Void // those stay
	}), "checkpoints")
	for blob, ids := range named {
		var have []blobstore.SnapshotID
		for p, err := range r.replica.ListSnapshots(ctx, blob) {
			require.NoError(s.t, err)
			have = append(have, p.Snapshot)
		}
		require.Equal(s.t, ids, have, "snapshots of %s", blob)
	}
}

// TestTiers is the table of what stays: a point every 30 minutes for 60 hours and one a day before, as one run after the other
// sees them.
func TestTiers(t *testing.T) {
	now := time.Date(2026, 3, 10, 12, 20, 0, 0, time.UTC)
	var entries []Entry
	add := func(age time.Duration, app bool) {
		e := Entry{Seq: Seq(len(entries) + 1), Kind: KindPoint, Ordinal: Ordinal(len(entries) + 1), Stored: now.Add(-age), Consistency: ConsistencyCrash}
		if app {
			e.Consistency = ConsistencyApp
		}
		entries = append(entries, e)
	}
	for d := 12; d > 2; d-- {
		add(time.Duration(d)*24*time.Hour+6*time.Hour, d == 9)
		add(time.Duration(d)*24*time.Hour, false)
	}
	for m := 60 * 60; m >= 0; m -= 30 {
		add(time.Duration(m)*time.Minute, m == 40*60+30)
	}
	st := &State{Head: Seq(len(entries))}
	show := func(k Keep) string {
		var b strings.Builder
		for i, tier := range k.normal().tiers(st, entries, nil, now) {
			if tier != TierNone && (tier != TierAll || now.Sub(entries[i].Stored) >= 3*time.Hour+30*time.Minute) {
				fmt.Fprintf(&b, "%s %s %s %s\n", now.Sub(entries[i].Stored), entries[i].Stored.Format("02 15:04"), entries[i].Consistency, tier)
			}
		}
		return b.String()
	}
	golden(t, "retention-tiers-24h.txt", show(Keep{}))
	golden(t, "retention-tiers-10d.txt", show(Keep{Limit: 240 * time.Hour}))

	// What a run drops, no later run wants: the tiers of what the first keeps are the tiers of all.
	keep := Keep{Limit: 240 * time.Hour}.normal()
	for step := range 200 {
		now := now.Add(time.Duration(step) * 20 * time.Minute)
		var rest []Entry
		for i, tier := range keep.tiers(st, entries, nil, now) {
			if tier != TierNone {
				rest = append(rest, entries[i])
			}
		}
		later := now.Add(20 * time.Minute)
		stays := func(entries []Entry) (out []string) {
			for i, tier := range keep.tiers(st, entries, nil, later) {
				if tier != TierNone {
					out = append(out, fmt.Sprint(entries[i].Seq, tier))
				}
			}
			return out
		}
		all, of := stays(entries), stays(rest)
		require.Subset(t, all, of, "step %d", step)
		require.LessOrEqual(t, len(all)-len(of), 2, "step %d: only where an hour or a day is cut by an age", step)
	}
}

// TestRetainStory is three days of points every ten minutes, with retention every hour: what is listed is as the policy says and
// byte-exact all the time, what is stored is what that needs, and a new process opens the chain with few requests.
func TestRetainStory(t *testing.T) {
	mem := blobstoretest.NewMemory()
	s := newStory(t, mem, 1)
	s.write(20)
	s.pass()
	s.apply()
	o := RetainOptions{Keep: Keep{All: 2 * time.Hour, Hourly: 12 * time.Hour, Limit: 72 * time.Hour}, OrphanAge: 15 * time.Minute, Parallel: 1}
	retainer := s.other()
	for hour := range 60 {
		s.points(6, 10*time.Minute)
		if hour == 30 { // a resync in between
			s.write(6)
			s.pass()
			s.apply()
		}
		res := s.retainAll(retainer, o)
		require.LessOrEqual(t, res.Points[TierAll], 14)
		require.LessOrEqual(t, res.Points[TierHourly], 12)
		require.LessOrEqual(t, res.Points[TierDaily], 4)
		if hour%10 == 9 {
			s.wantAll()
		}
	}
	s.advance(5 * time.Minute) // no point is just at an age
	s.retainAll(retainer, o)
	res := s.retainAll(retainer, o)
	require.Empty(t, res.Deleted)
	require.Zero(t, res.Hidden)
	require.Greater(t, res.Points[TierAll]+res.Points[TierHourly]+res.Points[TierDaily], 22)
	s.wantTidy()
	points, err := s.other().Points(t.Context())
	require.NoError(t, err)
	require.Len(t, points, len(s.wantAll()))
	through := slices.DeleteFunc(slices.Clone(points), func(p Point) bool { return p.Tier != TierNone })
	require.Less(t, len(through), s.every, "only those that another is reached through")

	f := blobstoretest.NewFaulty(mem, nil)
	_, err = Open(t.Context(), f, testLineage)
	require.NoError(t, err)
	require.Less(t, f.Calls(), int64(60), "366 manifests, some 30 in the chain")

	// An idle step reads the record and lists; it puts and deletes nothing.
	f = blobstoretest.NewFaulty(mem, nil)
	r, err := Open(t.Context(), f, testLineage)
	require.NoError(t, err)
	writes := 0
	f.SetHook(func(op blobstoretest.Op, _, _ string) blobstoretest.Fault {
		if op.Writes() {
			writes++
		}
		return blobstoretest.None
	})
	before := f.Calls()
	_, err = r.Retain(t.Context(), o)
	require.NoError(t, err)
	require.Zero(t, writes)
	t.Logf("an idle step takes %d requests", f.Calls()-before)
}
