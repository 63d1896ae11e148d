package replica

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
)

// keepSome keeps the last hour, one point an hour for three and one a day for five hours.
var keepSome = RetainOptions{Keep: Keep{All: time.Hour, Hourly: 3 * time.Hour, Limit: 5 * time.Hour}, OrphanAge: -1, Parallel: 1}

// busy is a lineage with everything that retention has to deal with: two runs of partials, points of all tiers, a pin, an
// expired pin, other attempts, a rewind, an unnamed snapshot.
func busy(t testing.TB) (*story, Ordinal) {
	s := newStory(t, blobstoretest.NewMemory(), 3)
	s.every = 4
	s.write(12)
	s.pass()
	s.apply()
	s.points(8, 13*time.Minute)
	pinned := s.next - 3
	require.NoError(t, s.r.Pin(t.Context(), Pin{Seq: s.seq(pinned), Owner: "hold/case-7"}))
	require.NoError(t, s.r.Pin(t.Context(), Pin{Seq: s.seq(pinned - 2), Owner: "restore/a", Until: testTime.Add(-24 * time.Hour)}))
	s.points(3, 13*time.Minute)
	s.write(4)
	s.pass()
	s.apply()
	s.failover(s.next - 3)
	s.points(9, 13*time.Minute)
	// A checkpointer that died before its record.
	a := DiskBlobName("disk-a", 1)
	p, err := s.r.replica.Stat(t.Context(), a, "")
	require.NoError(t, err)
	_, _, err = s.r.replica.SnapshotPages(t.Context(), a, map[string]string{"seq": "4"}, blobstore.Conditions{IfMatch: p.ETag})
	require.NoError(t, err)
	s.points(6, 13*time.Minute)
	return s, pinned
}

func (s *story) seq(o Ordinal) Seq {
	s.t.Helper()
	m, err := s.r.Find(s.t.Context(), o)
	require.NoError(s.t, err)
	return m.Seq
}

// failover closes, rewinds and reopens; the source goes on from the target.
func (s *story) failover(target Ordinal) {
	s.t.Helper()
	ctx := s.t.Context()
	_, err := s.r.CloseLineage(ctx, FenceOptions{Failover: "f1"})
	require.NoError(s.t, err)
	_, err = s.r.Rewind(ctx, RewindOptions{Failover: "f1", Target: target, Parallel: 1})
	require.NoError(s.t, err)
	res, err := s.r.ReopenLineage(ctx, ReopenOptions{FenceOptions: FenceOptions{Failover: "f1"}})
	require.NoError(s.t, err)
	s.epoch, s.open, s.base = res.Epoch, res.Seq, target
	for id := range s.now {
		clear(s.now[id])
		for b, v := range s.at[target][id] {
			s.now[id][b] = v
		}
	}
}

// TestRetainFailsAtEveryCall stops a step before and after each of its calls; whatever it left, the points that stay are
// byte-exact at once, and the next steps leave nothing but what they need.
func TestRetainFailsAtEveryCall(t *testing.T) {
	ref, pinned := busy(t)
	ref.retainAll(ref.other(), keepSome)
	want := ref.wantAll()
	require.Contains(t, want, pinned)
	require.Greater(t, len(want), 6)
	require.Less(t, len(want), 16)
	ref.wantTidy()
	pins, err := ref.r.Pins(t.Context())
	require.NoError(t, err)
	require.Len(t, pins, 1)
	ret, _, err := ref.r.readRetention(t.Context())
	require.NoError(t, err)
	require.NotZero(t, ret.Floor)
	require.NotEmpty(t, ret.Retired)

	calls := int64(0)
	for i, fault := range []blobstoretest.Fault{blobstoretest.CrashAfter, blobstoretest.Crash, blobstoretest.Before, blobstoretest.After} {
		step := int64(1) // each of them with LANDFALL_RETAIN_ALL=1: 20 s
		if os.Getenv("LANDFALL_RETAIN_ALL") == "" {
			step = []int64{3, 7, 11, 11}[i]
		}
		for n := int64(i + 1); ; n += step {
			s, _ := busy(t)
			f := blobstoretest.NewFaulty(s.store, nil)
			r, err := Open(t.Context(), f, testLineage)
			require.NoError(t, err)
			before := f.Calls()
			f.SetHook(blobstoretest.FailNth(n, fault))
			_, err = r.Retain(t.Context(), keepSome)
			quiet := f.Calls()-before < n
			if quiet {
				require.NoError(t, err)
				calls = max(calls, n)
				break
			}
			f.Revive()
			f.SetHook(nil)
			require.Subset(t, s.wantAll(), want, "fault %d at call %d", fault, n)
			if n%2 == 0 { // the same process, or the next
				r = s.other()
			}
			s.retainAll(r, keepSome)
			require.Equal(t, want, s.wantAll(), "fault %d at call %d", fault, n)
			s.wantTidy()
		}
	}
	t.Logf("a step of %d calls", calls)
}

// TestRetainInSmallSteps: bounds only make more steps of it.
func TestRetainInSmallSteps(t *testing.T) {
	ref, _ := busy(t)
	ref.retainAll(ref.other(), keepSome)
	s, _ := busy(t)
	o := keepSome
	o.MaxDeletes, o.MaxReads = 3, 2
	steps := 0
	for more := true; more; steps++ {
		res, err := s.r.Retain(t.Context(), o)
		require.NoError(t, err)
		deleted := 0
		for _, n := range res.Deleted {
			deleted += n
		}
		require.LessOrEqual(t, deleted, o.MaxDeletes+2, "a snapshot set is not torn")
		require.Less(t, steps, 200)
		more = res.More
	}
	require.Equal(t, ref.wantAll(), s.wantAll())
	s.wantTidy()
	require.Greater(t, steps, 20)
}

// TestRetainAtTheSameTime runs steps, an applier, a shipper and a reader of a pinned point beside each other.
func TestRetainAtTheSameTime(t *testing.T) {
	s, _ := busy(t)
	mem := s.store.(*blobstoretest.Memory)
	reader, target := s.other(), s.next-14
	require.NoError(t, reader.Pin(t.Context(), Pin{Seq: s.seq(target), Owner: "restore/x"}))
	src, err := reader.SourceAt(t.Context(), s.seq(target), "disk-a")
	require.NoError(t, err)
	want := s.at[target]["disk-a"]
	var g errgroup.Group
	done := make(chan struct{})
	for i := range 3 {
		r := s.other()
		g.Go(func() error {
			for {
				o := keepSome
				o.Parallel = 1 + i
				if _, err := r.Retain(context.Background(), o); err != nil {
					return err
				}
				select {
				case <-done:
					return nil
				default:
				}
			}
		})
	}
	g.Go(func() error {
		for {
			p := make([]byte, testSize)
			if err := src.ReadAt(context.Background(), p, 0); err != nil {
				return err
			}
			if have := contentOf(p); !want.equal(have) {
				return fmt.Errorf("point %d: %v", target, have)
			}
			select {
			case <-done:
				return nil
			default:
			}
		}
	})
	for range 10 {
		s.points(2, 17*time.Minute)
		mem.Advance(time.Minute)
	}
	close(done)
	require.NoError(t, g.Wait())
	require.Contains(t, s.wantAll(), target)
	require.NoError(t, s.r.Unpin(t.Context(), "restore/x", 0))
	s.retainAll(s.other(), keepSome)
	require.NotContains(t, s.wantAll(), target)
	s.wantTidy()
}

// TestRetainSleepers: a committer, an applier and a checkpointer that slept since before a floor rose change nothing.
func TestRetainSleepers(t *testing.T) {
	s := newStory(t, blobstoretest.NewMemory(), 5)
	s.write(9)
	s.pass()
	s.apply()
	s.points(2, time.Minute)
	sleeper := s.other()
	late := s.next
	d, err := ship(t.Context(), sleeper, KindPoint, late, 0, NewTx(), two(content{3: 99}, nil))
	require.NoError(t, err)
	s.next++
	s.points(12, 20*time.Minute)
	hour := keepSome
	hour.Keep = Keep{All: time.Hour, Limit: time.Hour}
	s.retainAll(s.r, hour)
	st, _, ret, err := s.r.viewChain(t.Context())
	require.NoError(t, err)
	require.Greater(t, ret.Floor, Seq(5))
	_, err = sleeper.Commit(t.Context(), Proposal{Kind: KindPoint, Epoch: 1, Point: late, Base: late - 1, CutTime: testTime,
		Consistency: ConsistencyCrash, Disks: d})
	require.ErrorIs(t, err, ErrOrdinalUsed)
	require.Contains(t, blobNames(t.Context(), t, s.r.journal, logPrefix), manifestName(6), "the number was refilled")
	require.Equal(t, st.Head, must(s.other().Refresh(t.Context())).Head)
	s.wantAll()
	res := must(s.other().Retain(t.Context(), hour))
	require.Equal(t, 1, res.Deleted[sweptManifests])
	s.wantTidy()
	s.points(3, time.Minute)
	s.wantAll()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestRewindOverRetired: extent maps say what to set back where manifests are gone; without them it is whole disks.
func TestRewindOverRetired(t *testing.T) {
	for _, mapped := range []bool{true, false} {
		t.Run(fmt.Sprintf("mapped=%t", mapped), func(t *testing.T) {
			s := newStory(t, blobstoretest.NewMemory(), 9)
			s.every = 4
			s.write(9)
			s.pass()
			s.apply()
			s.points(4, time.Minute)
			target := s.next - 1
			require.NoError(t, s.r.Pin(t.Context(), Pin{Seq: s.seq(target), Owner: "hold/a"}))
			// From here on little of the disks changes, by points and by a pass.
			before := s.at[target]
			for i := range 40 {
				s.advance(6 * time.Minute)
				if i == 20 {
					s.now["disk-a"][1] = 5
					o := s.next
					s.next += 2
					d, err := ship(t.Context(), s.r, KindPartial, o, 1, NewTx(), parcel{"disk-a": {1: 5}})
					require.NoError(t, err)
					s.commit(Proposal{Kind: KindPartial, Epoch: 1, Pass: &Pass{o, 1, 1}, Base: s.base, Disks: d})
					d, err = ship(t.Context(), s.r, KindBase, o+1, 0, NewTx(), two(nil, nil))
					require.NoError(t, err)
					s.commit(Proposal{Kind: KindBase, Epoch: 1, Point: o + 1, Base: o, CutTime: testTime, Consistency: ConsistencyCrash, Disks: d})
					s.base = o + 1
					s.apply()
					continue
				}
				d, err := ship(t.Context(), s.r, KindPoint, s.next, 0, NewTx(), two(content{2: uint64(i + 1)}, nil))
				require.NoError(t, err)
				s.commit(Proposal{Kind: KindPoint, Epoch: 1, Point: s.next, Base: s.base, CutTime: testTime, Consistency: ConsistencyCrash, Disks: d})
				s.base = s.next
				s.next++
			}
			s.apply()
			res := s.retainAll(s.r, keepSome)
			require.Positive(t, res.Ranges)
			if !mapped {
				for _, n := range blobNames(t.Context(), t, s.r.replica, mapPrefix) {
					require.NoError(t, s.r.replica.Delete(t.Context(), n, blobstore.Conditions{}))
				}
			}
			r := s.other()
			_, err := r.CloseLineage(t.Context(), FenceOptions{Failover: "f"})
			require.NoError(t, err)
			back, err := r.Rewind(t.Context(), RewindOptions{Failover: "f", Target: target, Parallel: 1})
			require.NoError(t, err)
			require.Equal(t, Committed, back.Outcome)
			want := int64(2 * blockSize)
			if !mapped {
				want = 2 * testSize
			}
			require.Equal(t, want, back.SetBack)
			s.apply()
			for id, w := range before {
				have, err := readDisk(t.Context(), s.store, id, "")
				require.NoError(t, err)
				require.True(t, w.equal(have), "%s\nwant %v\nhave %v", id, w, have)
			}
			pins, err := r.Pins(t.Context())
			require.NoError(t, err)
			require.Len(t, pins, 1, "the rewind's own is gone")

			// While the lineage is closed nothing is retired, unless protection ended.
			s.advance(100 * time.Hour)
			res = s.retainAll(r, keepSome)
			require.Zero(t, res.RetiredManifests)
			o := keepSome
			o.Ended = true
			require.Positive(t, must(r.Retain(t.Context(), o)).RetiredManifests)
			s.retainAll(r, o)
			require.NoError(t, r.Unpin(t.Context(), "hold/a", 0))
			s.retainAll(r, o)
		})
	}
}

// TestRetainWriteOnce: what a policy keeps is hidden, found again, and deleted once the store allows it; a hidden object is
// not asked for again and again.
func TestRetainWriteOnce(t *testing.T) {
	s, _ := busy(t)
	mem := s.store.(*blobstoretest.Memory)
	require.NoError(t, mem.ProtectContainer(t.Context(), testLineage.JournalContainer(), blobstore.Protection{WriteOnce: 30 * 24 * time.Hour}))
	for _, plain := range []bool{true, false} { // a store that tells its policy, and one that does not
		store := blobstore.Store(mem)
		refused := 0
		if !plain {
			f := blobstoretest.NewFaulty(mem, nil)
			f.SetHook(func(op blobstoretest.Op, c, _ string) blobstoretest.Fault {
				if op == blobstoretest.OpDelete && c == testLineage.JournalContainer() {
					refused++
				}
				return blobstoretest.None
			})
			store = struct{ blobstore.Store }{f}
		}
		r, err := Open(t.Context(), store, testLineage)
		require.NoError(t, err)
		res := s.retainAll(r, keepSome)
		require.Zero(t, res.Deleted[sweptManifests]+res.Deleted[sweptSegments]+res.Deleted[sweptOrphans])
		require.Greater(t, res.Hidden, 20)
		require.Positive(t, res.HiddenBytes)
		if !plain {
			require.Less(t, refused, res.Hidden)
		}
	}
	want := s.wantAll()
	require.Less(t, len(want), 16)
	mem.Advance(29 * 24 * time.Hour)
	o := keepSome
	o.Keep.Limit = 31 * 24 * time.Hour
	require.Positive(t, s.retainAll(s.other(), o).Hidden)
	mem.Advance(2 * 24 * time.Hour)
	res := s.retainAll(s.other(), o)
	require.Zero(t, res.Hidden)
	s.wantTidy()
	s.wantAll()
}

// TestRetainDir is the story in a folder, where files carry the time: everything is of one hour.
func TestRetainDir(t *testing.T) {
	store, err := dir.Open(t.TempDir(), dir.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	s := newStory(t, store, 11)
	s.write(9)
	s.pass()
	s.apply()
	s.points(14, 0)
	hold := s.next - 9
	require.NoError(t, s.r.Pin(t.Context(), Pin{Seq: s.seq(hold), Owner: "hold/a"}))
	now, err := store.Now(t.Context())
	require.NoError(t, err)
	o := keepSome
	o.Now = now.Add(90 * time.Minute)
	s.retainAll(s.r, o)
	have := s.wantAll()
	require.Contains(t, have, hold)
	require.Less(t, len(have), 10)
	s.wantTidy()
	s.points(5, 0)
	require.NoError(t, s.r.Unpin(t.Context(), "hold/a", 0))
	s.retainAll(s.other(), o)
	require.Less(t, len(s.wantAll()), 8)
	s.wantTidy()
}

func TestPins(t *testing.T) {
	s, hold := busy(t)
	ctx := t.Context()
	at := s.seq(hold)
	for owner, seq := range map[string]Seq{"": at, "x y": at, "a/b/c/d/e": at, "hold/": at, "hold/a": 0} {
		require.ErrorIs(t, s.r.Pin(ctx, Pin{Seq: seq, Owner: owner}), ErrInvalid, owner)
	}
	require.ErrorIs(t, s.r.Pin(ctx, Pin{Seq: 9999, Owner: "hold/a"}), ErrNotFound)
	gone := s.seq(hold - 1)
	s.retainAll(s.r, keepSome)
	require.ErrorIs(t, s.other().Pin(ctx, Pin{Seq: gone, Owner: "hold/a"}), ErrRetired)
	require.ErrorIs(t, s.other().Pin(ctx, Pin{Seq: 1, Owner: "hold/a"}), ErrRetired)

	// Again is the same, with another end; Unpin is idempotent; other pins stay.
	until := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	require.NoError(t, s.r.Pin(ctx, Pin{Seq: at, Owner: "restore/b", Until: until, Reason: "one"}))
	require.NoError(t, s.r.Pin(ctx, Pin{Seq: at, Owner: "restore/b", Until: until.Add(time.Hour), Reason: "two"}))
	pins, err := s.r.Pins(ctx)
	require.NoError(t, err)
	require.Len(t, pins, 2)
	require.Equal(t, "two", pins[1].Reason)
	require.Equal(t, until.Add(time.Hour), pins[1].Until)
	require.Equal(t, pins[0].From, pins[1].From)
	points, err := s.r.Points(ctx)
	require.NoError(t, err)
	i := slices.IndexFunc(points, func(p Point) bool { return p.Ordinal == hold })
	require.Contains(t, []Tier{TierPinned, TierDaily}, points[i].Tier)
	require.Len(t, points[i].Pins, 2)
	require.NoError(t, s.r.Unpin(ctx, "hold/case-7", at))
	require.NoError(t, s.r.Unpin(ctx, "hold/case-7", at))
	s.retainAll(s.r, keepSome)
	require.Contains(t, s.wantAll(), hold)
	res := s.retainAll(s.r, RetainOptions{Keep: keepSome.Keep, Now: until.Add(2 * time.Hour), OrphanAge: -1})
	require.Len(t, res.Dropped, 1)
	require.NotContains(t, s.wantAll(), hold)

	// Two processes pin at the same time: both pins are there.
	var g errgroup.Group
	for i := range 6 {
		r := s.other()
		g.Go(func() error {
			return r.Pin(context.Background(), Pin{Seq: points[len(points)-1].Seq, Owner: fmt.Sprintf("restore/%d", i)})
		})
	}
	require.NoError(t, g.Wait())
	pins, err = s.r.Pins(ctx)
	require.NoError(t, err)
	require.Len(t, pins, 6)
}
