package resyncengine_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
)

// The replica is read from an older checkpoint, since another applier is at work; while it is compared the manifest gets a
// checkpoint of its own, and retention takes the older one.
func TestRetentionDuringTheComparison(t *testing.T) {
	store := blobstoretest.NewMemory()
	s := newSite(t, store)
	ctx := testkit.Context(t)
	drain := func() error {
		_, err := shipping.Drain(ctx, s.Replica(), replica.ApplierOptions{})
		return err
	}
	require.NoError(t, drain())
	_, err := s.Replica().Checkpoint(ctx, 1)
	require.NoError(t, err)
	s.Host.Write("data", 0, random(chunk, 50))
	require.EqualValues(t, 1, s.Host.Cut(2))
	_, err = s.Commit(2, 1, 1, replica.KindPoint)
	require.NoError(t, err)
	s.Host.SettlePoint(2, committed)
	s.Host.WriteUntracked("os", 1<<20, random(1<<20, 7))

	disks, lease := store.Container(s.Replica().Lineage().ReplicaContainer()), blobstore.LeaseID(uuid.NewString())
	disk := replica.DiskBlobName("os", 1)
	require.NoError(t, disks.AcquireLease(ctx, disk, lease, time.Minute))
	var once sync.Once
	s.Host.SetHook(func(hosttest.Message) (err error) {
		once.Do(func() {
			err = errors.Join(disks.ReleaseLease(ctx, disk, lease), drain())
			store.Advance(time.Hour)
			res, rerr := s.Replica().Retain(ctx, replica.RetainOptions{
				Keep: replica.Keep{All: time.Second, Hourly: time.Second, Limit: time.Second}, OrphanAge: -1, Parallel: 1,
			})
			err = errors.Join(err, rerr)
			if res.RetiredPoints != 1 {
				t.Errorf("retention took %d points: %v", res.RetiredPoints, err)
			}
		})
		return err
	})
	run(t, s, config())
	s.Host.StartPass(3, comparing, false)
	s.Publish(bus.KindResync, task(s, 3, 2))
	awaitPass(t, s, 3)
	finish(t, s, 3, 4, 2)
	requireNoFailure(t, s)
}
