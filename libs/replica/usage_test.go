package replica

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// stored sums what a container lists.
func stored(t *testing.T, c blobstore.Container, prefix string) (objects, bytes int64) {
	t.Helper()
	for p, err := range c.List(t.Context(), prefix, "") {
		require.NoError(t, err)
		objects++
		bytes += p.Size
	}
	return objects, bytes
}

// TestUsage: the kinds add up to what is listed, what is given up is hidden until it is deleted, and nothing is written.
func TestUsage(t *testing.T) {
	s, _ := busy(t)
	mem := s.store.(*blobstoretest.Memory)
	require.NoError(t, mem.ProtectContainer(t.Context(), testLineage.JournalContainer(), blobstore.Protection{WriteOnce: 24 * time.Hour}))
	look := func() Usage {
		t.Helper()
		r, err := Open(t.Context(), blobstoretest.Restrict(mem, Rights(RoleRecover)), testLineage)
		require.NoError(t, err)
		u, err := r.Usage(t.Context())
		require.NoError(t, err)
		objects, bytes := stored(t, s.r.journal, "")
		require.Equal(t, objects, u.Kinds[UsageJournal].Objects+u.Kinds[UsageOrphans].Objects)
		require.Equal(t, bytes, u.Kinds[UsageJournal].Bytes+u.Kinds[UsageOrphans].Bytes)
		objects, bytes = stored(t, s.r.staging, "")
		require.Equal(t, objects, u.Kinds[UsageStaging].Objects)
		require.Equal(t, bytes, u.Kinds[UsageStaging].Bytes)
		objects, _ = stored(t, s.r.replica, "")
		require.Equal(t, objects, u.Kinds[UsageReplica].Objects)
		points, err := r.Points(t.Context())
		require.NoError(t, err)
		n := 0
		for _, c := range u.Points {
			n += c
		}
		require.Len(t, points, n)
		return u
	}
	u := look()
	require.Zero(t, u.Kinds[UsageJournal].HiddenObjects)
	require.Positive(t, u.Kinds[UsageOrphans].Bytes, "other attempts")
	require.Positive(t, u.Kinds[UsageStaging].Bytes)
	require.Positive(t, u.Kinds[UsageSnapshots].Bytes)
	require.LessOrEqual(t, u.Kinds[UsageReplica].Bytes, int64(2*(testSize+1<<20)))
	require.Positive(t, u.DayPuts)
	require.Positive(t, u.DayChanged)
	snapshots := u.Kinds[UsageSnapshots].Objects

	s.retainAll(s.other(), keepSome)
	u = look()
	require.Positive(t, u.Kinds[UsageJournal].HiddenObjects)
	require.Positive(t, u.Kinds[UsageJournal].HiddenBytes)
	require.Zero(t, u.Kinds[UsageStaging].Objects)
	require.Less(t, u.Kinds[UsageSnapshots].Objects, snapshots)

	s.points(1, time.Minute) // so that other attempts of the point before can go
	mem.Advance(25 * time.Hour)
	o := keepSome
	o.Keep.Limit = 100 * time.Hour
	s.retainAll(s.other(), o)
	u = look()
	require.Zero(t, u.Kinds[UsageJournal].HiddenObjects)
	require.Zero(t, u.Kinds[UsageOrphans].Objects)
	require.Zero(t, u.DayPuts)
}

// TestRetainWithItsRights: retention, pins and a rewind need no more than what their roles are given.
func TestRetainWithItsRights(t *testing.T) {
	s, hold := busy(t)
	at := s.seq(hold)
	as := func(role Role) *Replica {
		t.Helper()
		r, err := Open(t.Context(), blobstoretest.Restrict(s.store, Rights(role)), testLineage)
		require.NoError(t, err)
		return r
	}
	s.retainAll(as(RoleRetain), keepSome)
	s.wantTidy()
	require.NoError(t, as(RoleSchedule).Pin(t.Context(), Pin{Seq: at, Owner: "hold/b"}))
	require.NoError(t, as(RoleSchedule).Unpin(t.Context(), "hold/b", 0))
	require.NoError(t, as(RoleFailover).Pin(t.Context(), Pin{Seq: at, Owner: "restore/b", Until: testTime}))
	require.ErrorIs(t, as(RoleShip).Pin(t.Context(), Pin{Seq: at, Owner: "hold/c"}), blobstore.ErrPermission)
	r := as(RoleFailover)
	_, err := r.CloseLineage(t.Context(), FenceOptions{Failover: "f9"})
	require.NoError(t, err)
	_, err = r.Rewind(t.Context(), RewindOptions{Failover: "f9", Target: hold, Parallel: 1})
	require.NoError(t, err)
	s.apply()
	for id, w := range s.at[hold] {
		have, err := readDisk(t.Context(), s.store, id, "")
		require.NoError(t, err)
		require.True(t, w.equal(have), "%s\nwant %v\nhave %v", id, w, have)
	}
}
