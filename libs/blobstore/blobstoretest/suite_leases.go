package blobstoretest

import (
	"fmt"
	"sync"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func testLease(e *env) {
	a, b := leaseID("a"), leaseID("b")
	e.mustPut("x", "0")
	e.is(e.c.AcquireLease(e.ctx, "none", a, time.Minute), blobstore.ErrNotFound)
	for _, d := range []time.Duration{0, 14 * time.Second, 61 * time.Second} {
		e.is(e.c.AcquireLease(e.ctx, "x", a, d), blobstore.ErrInvalid)
	}
	for _, id := range []blobstore.LeaseID{"", "me", "{" + a + "}"} {
		e.is(e.c.AcquireLease(e.ctx, "x", id, time.Minute), blobstore.ErrInvalid)
	}
	before := e.stat("x")
	require.NoError(e, e.c.AcquireLease(e.ctx, "x", a, time.Minute))
	require.NoError(e, e.c.AcquireLease(e.ctx, "x", a, 15*time.Second), "again by the holder")
	e.is(e.c.AcquireLease(e.ctx, "x", b, time.Minute), blobstore.ErrLeaseConflict)
	require.NoError(e, e.c.RenewLease(e.ctx, "x", a))
	e.is(e.c.RenewLease(e.ctx, "x", b), blobstore.ErrLeaseConflict)
	e.is(e.c.ReleaseLease(e.ctx, "x", b), blobstore.ErrLeaseConflict)
	require.Equal(e, before, e.stat("x"), "leases do not change the blob")

	for _, id := range []blobstore.LeaseID{"", b} {
		_, err := e.put("x", "1", blobstore.Conditions{Lease: id})
		e.is(err, blobstore.ErrLeaseConflict)
		e.is(e.c.Delete(e.ctx, "x", blobstore.Conditions{Lease: id}), blobstore.ErrLeaseConflict)
	}
	_, err := e.put("x", "1", blobstore.Conditions{Lease: a})
	require.NoError(e, err)
	_, err = e.put("x", "2", blobstore.Conditions{})
	e.is(err, blobstore.ErrLeaseConflict) // the lease survived the overwrite
	require.NoError(e, e.c.ReleaseLease(e.ctx, "x", a))
	e.is(e.c.ReleaseLease(e.ctx, "x", a), blobstore.ErrLeaseConflict)
	e.is(e.c.RenewLease(e.ctx, "x", a), blobstore.ErrLeaseConflict)
	_, err = e.put("x", "3", blobstore.Conditions{Lease: a})
	e.is(err, blobstore.ErrLeaseConflict)
	e.mustPut("x", "4")

	require.NoError(e, e.c.AcquireLease(e.ctx, "x", b, time.Minute))
	require.NoError(e, e.c.Delete(e.ctx, "x", blobstore.Conditions{Lease: b}))
	e.mustPut("x", "5") // the lease died with the blob
	_, err = e.put("new", "x", blobstore.Conditions{Lease: a})
	e.is(err, blobstore.ErrLeaseConflict)
	require.NoError(e, e.c.BreakLease(e.ctx, "x"))
	e.is(e.c.BreakLease(e.ctx, "none"), blobstore.ErrNotFound)
}

func testPagesLease(e *env) {
	a, b := leaseID("a"), leaseID("b")
	e.mustPages("p", 4096)
	before := e.stat("p")
	require.NoError(e, e.c.AcquireLease(e.ctx, "p", a, time.Minute))
	require.Equal(e, before, e.stat("p"), "leases do not change the blob")
	refused := func(id blobstore.LeaseID) {
		e.Helper()
		cond := blobstore.Conditions{Lease: id}
		_, err := e.write("p", 0, page("no", 1), cond)
		e.is(err, blobstore.ErrLeaseConflict)
		_, err = e.c.ClearPages(e.ctx, "p", 0, 512, cond)
		e.is(err, blobstore.ErrLeaseConflict)
		_, err = e.c.SetSequence(e.ctx, "p", 77, cond)
		e.is(err, blobstore.ErrLeaseConflict)
		e.is(e.c.Delete(e.ctx, "p", cond), blobstore.ErrLeaseConflict)
	}
	refused("")
	refused(b)
	_, err := e.write("p", 0, page("a", 1), blobstore.Conditions{Lease: a})
	require.NoError(e, err)
	_, err = e.c.SetSequence(e.ctx, "p", 1, blobstore.Conditions{Lease: a, IfSequence: ptr(0)})
	require.NoError(e, err)

	// Take-over: break and acquire. The old holder is out.
	require.NoError(e, e.c.BreakLease(e.ctx, "p"))
	refused(a)
	e.mustWrite("p", 512, page("nobody", 1))
	require.NoError(e, e.c.AcquireLease(e.ctx, "p", b, time.Minute))
	refused(a)
	refused("")
	e.is(e.c.RenewLease(e.ctx, "p", a), blobstore.ErrLeaseConflict)
	_, err = e.write("p", 0, page("b", 1), blobstore.Conditions{Lease: b})
	require.NoError(e, err)
	require.EqualValues(e, 1, e.stat("p").Sequence)
	require.NoError(e, e.c.Delete(e.ctx, "p", blobstore.Conditions{Lease: b}))
}

func testLeaseExpiry(e *env) {
	clock, ok := e.s.(Advancer)
	if !ok {
		e.Skip("storage time cannot be moved")
	}
	a, b := leaseID("a"), leaseID("b")
	e.mustPut("x", "0")
	e.mustPages("p", 4096)
	for _, name := range []string{"x", "p"} {
		require.NoError(e, e.c.AcquireLease(e.ctx, name, a, 20*time.Second))
		clock.Advance(15 * time.Second)
		e.is(e.c.AcquireLease(e.ctx, name, b, time.Minute), blobstore.ErrLeaseConflict)
		require.NoError(e, e.c.RenewLease(e.ctx, name, a), "renewing counts from now")
		clock.Advance(15 * time.Second)
		e.is(e.c.AcquireLease(e.ctx, name, b, time.Minute), blobstore.ErrLeaseConflict)
		require.NoError(e, e.c.AcquireLease(e.ctx, name, a, 20*time.Second))
		clock.Advance(19 * time.Second)
		e.is(e.c.AcquireLease(e.ctx, name, b, time.Minute), blobstore.ErrLeaseConflict)
		clock.Advance(2 * time.Second)
		e.is(e.c.Delete(e.ctx, name, blobstore.Conditions{Lease: a}), blobstore.ErrLeaseConflict)
		require.NoError(e, e.c.AcquireLease(e.ctx, name, b, time.Minute))
		e.is(e.c.RenewLease(e.ctx, name, a), blobstore.ErrLeaseConflict)
		e.is(e.c.Delete(e.ctx, name, blobstore.Conditions{Lease: a}), blobstore.ErrLeaseConflict)
		clock.Advance(time.Hour)
		require.NoError(e, e.c.Delete(e.ctx, name, blobstore.Conditions{}), "an expired lease hinders nobody")
	}
}

func testSnapshotLease(e *env) {
	a := leaseID("a")
	e.mustPages("p", 4096)
	require.NoError(e, e.c.AcquireLease(e.ctx, "p", a, time.Minute))
	id, _, err := e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{})
	require.NoError(e, err, "a checkpointer needs no lease")
	_, _, err = e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{Lease: a})
	require.NoError(e, err)
	_, _, err = e.c.SnapshotPages(e.ctx, "p", nil, blobstore.Conditions{Lease: leaseID("b")})
	e.is(err, blobstore.ErrLeaseConflict)
	require.NoError(e, e.c.DeleteSnapshot(e.ctx, "p", id))
}

func testLeaseRace(e *env) {
	e.mustPages("p", 4096)
	for round := range 10 {
		errs := race(8, func(i int) error {
			return e.c.AcquireLease(e.ctx, "p", leaseID(fmt.Sprint(round, i)), time.Minute)
		})
		w := e.oneWinner(errs, blobstore.ErrLeaseConflict)
		// Take over while the holder writes: nothing of its lands after the new one is in.
		old, now := leaseID(fmt.Sprint(round, w)), leaseID(fmt.Sprint("taker", round))
		var wg sync.WaitGroup
		for k := range 3 {
			wg.Go(func() {
				for {
					if _, err := e.write("p", int64(k)*512, page(fmt.Sprint("old", round), 1), blobstore.Conditions{Lease: old}); err != nil {
						return
					}
				}
			})
		}
		require.NoError(e, e.c.BreakLease(e.ctx, "p"))
		require.NoError(e, e.c.AcquireLease(e.ctx, "p", now, time.Minute))
		for k := range int64(3) {
			_, err := e.write("p", k*512, page("new", 1), blobstore.Conditions{Lease: now})
			require.NoError(e, err)
		}
		wg.Wait()
		require.Equal(e, page("new", 3), e.read("p", "", 0, 3*512))
		require.NoError(e, e.c.ReleaseLease(e.ctx, "p", now))
	}
}
