package replica

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// TestTampered: a page blob that somebody else changed is refused by its own sentinel, and nothing is written to it.
func TestTampered(t *testing.T) {
	const name = "disk-a"
	blob := DiskBlobName(name, 1)
	meta := func(size string) map[string]string {
		return map[string]string{"lineage": string(testLineage), "disk": name, "gen": "1", "size": size, "format": "vhdfixed1"}
	}
	page := make([]byte, 512)
	for what, c := range map[string]struct {
		do func(t *testing.T, c blobstore.Container)
		// stranger: also a process that never saw the blob notices.
		stranger bool
	}{
		"number above the head": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			_, err := c.SetSequence(t.Context(), blob, joinNumber(900, 900), blobstore.Conditions{})
			require.NoError(t, err)
		}},
		"number put back": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			_, err := c.SetSequence(t.Context(), blob, joinNumber(1, 1), blobstore.Conditions{})
			require.NoError(t, err)
		}},
		"pages written": {do: func(t *testing.T, c blobstore.Container) {
			_, err := c.WritePages(t.Context(), blob, 512, page, blobstore.Conditions{})
			require.NoError(t, err)
		}},
		"blob gone": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			require.NoError(t, c.Delete(t.Context(), blob, blobstore.Conditions{}))
		}},
		"blob replaced": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			require.NoError(t, c.Delete(t.Context(), blob, blobstore.Conditions{}))
			_, err := c.CreatePages(t.Context(), blob, blobSize(testSize), meta("49152"), blobstore.Conditions{})
			require.NoError(t, err)
		}},
		"another size": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			require.NoError(t, c.Delete(t.Context(), blob, blobstore.Conditions{}))
			_, err := c.CreatePages(t.Context(), blob, 8<<20, meta("49152"), blobstore.Conditions{})
			require.NoError(t, err)
		}},
		"other metadata": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			require.NoError(t, c.Delete(t.Context(), blob, blobstore.Conditions{}))
			_, err := c.CreatePages(t.Context(), blob, blobSize(testSize), nil, blobstore.Conditions{})
			require.NoError(t, err)
		}},
		"a block blob": {stranger: true, do: func(t *testing.T, c blobstore.Container) {
			require.NoError(t, c.Delete(t.Context(), blob, blobstore.Conditions{}))
			require.NoError(t, put512(t, c, blob))
		}},
	} {
		t.Run(what, func(t *testing.T) {
			for _, stranger := range []bool{false, true} {
				if stranger && !c.stranger {
					continue
				}
				g := begun(t)
				_, err := g.applier(g.r).Advance(t.Context(), 0)
				require.NoError(t, err)
				_, err = g.r.Checkpoint(t.Context(), 4)
				require.NoError(t, err)
				store := g.store.Container(testLineage.ReplicaContainer())
				c.do(t, store)
				g.commit(g.point(KindPoint, 4, 3, 1, 0, two(content{3: 30}, content{3: 30})))
				writes := 0
				r, _ := g.other(func(op blobstoretest.Op, _, n string) blobstoretest.Fault {
					if n == blob && (op == blobstoretest.OpWritePages || op == blobstoretest.OpClearPages || op == blobstoretest.OpSetSequence || op == blobstoretest.OpCreatePages) {
						writes++
					}
					return blobstoretest.None
				})
				if !stranger {
					r.seen.blobs = g.r.seen.blobs
				}
				for range 2 { // and it stays so
					_, err = g.applier(r).Advance(t.Context(), 0)
					require.ErrorIs(t, err, ErrTampered)
					require.ErrorIs(t, err, ErrCorrupt)
				}
				require.Zero(t, writes)
				// Its lease was given back: a person can work on it.
				if p, err := store.Stat(t.Context(), blob, ""); err == nil && p.IsPages {
					require.NoError(t, store.AcquireLease(t.Context(), blob, "11111111-1111-1111-1111-111111111111", blobstore.MinLease))
				}
			}
		})
	}
}

// TestTamperedUnderTheLease: the number is changed by somebody who broke and gave back our lease's protection: the batch
// stops at once; whether it was another applier is decided only after reading again.
func TestTamperedUnderTheLease(t *testing.T) {
	for _, held := range []bool{true, false} {
		g := begun(t)
		blob := DiskBlobName("disk-a", 1)
		_, err := g.applier(g.r).Advance(t.Context(), 0)
		require.NoError(t, err)
		g.commit(g.point(KindPoint, 4, 3, 1, 0, two(content{3: 30}, content{3: 30})))
		c := g.store.Container(testLineage.ReplicaContainer())
		var lease blobstore.LeaseID
		spy := &leaseSpy{Store: g.store, lease: &lease}
		done := false
		f := blobstoretest.NewFaulty(spy, func(op blobstoretest.Op, _, n string) blobstoretest.Fault {
			if op == blobstoretest.OpWritePages && !done {
				done = true
				require.NoError(t, c.BreakLease(t.Context(), blob))
				_, err := c.SetSequence(t.Context(), blob, joinNumber(900, 900), blobstore.Conditions{})
				require.NoError(t, err)
				if held { // and the thief gives the lease back under our id
					require.NoError(t, c.AcquireLease(t.Context(), blob, lease, blobstore.MinLease))
				}
			}
			return blobstoretest.None
		})
		r, err := Open(t.Context(), f, testLineage)
		require.NoError(t, err)
		_, err = g.applier(r).Advance(t.Context(), 0)
		if held {
			require.ErrorIs(t, err, ErrTampered)
		} else {
			require.ErrorIs(t, err, ErrLeaseLost)
			require.NotErrorIs(t, err, ErrTampered)
		}
		_, err = g.applier(r).Advance(t.Context(), 0)
		require.ErrorIs(t, err, ErrTampered, "read again: the number is above the head")
	}
}

// leaseSpy notes the lease id that was last acquired.
type leaseSpy struct {
	blobstore.Store
	lease *blobstore.LeaseID
}

func (s *leaseSpy) Container(name string) blobstore.Container {
	return leaseSpyContainer{s.Store.Container(name), s.lease}
}

type leaseSpyContainer struct {
	blobstore.Container
	lease *blobstore.LeaseID
}

func (c leaseSpyContainer) AcquireLease(ctx context.Context, name string, id blobstore.LeaseID, d time.Duration) error {
	if name == DiskBlobName("disk-a", 1) {
		*c.lease = id
	}
	return c.Container.AcquireLease(ctx, name, id, d)
}

func put512(t *testing.T, c blobstore.Container, name string) error {
	_, err := c.Put(t.Context(), name, bytes.NewReader(make([]byte, 512)), 512, blobstore.Conditions{CreateOnly: true})
	return err
}
