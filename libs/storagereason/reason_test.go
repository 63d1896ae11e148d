package storagereason_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/storagereason"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestOf(t *testing.T) {
	for _, c := range []struct {
		err     error
		want    string
		refused bool
	}{
		{blobstore.ErrCredentials, "STORAGE_CREDENTIALS", true},
		{blobstore.ErrClockSkew, "STORAGE_CLOCK_SKEW", true},
		{blobstore.ErrPermission, "STORAGE_PERMISSION", true},
		{blobstore.ErrNoContainer, "STORAGE_CONTAINER_MISSING", true},
		{replica.ErrNoLineage, "STORAGE_CONTAINER_MISSING", true},
		{blobstore.ErrFull, "STORAGE_FULL", true},
		{blobstore.ErrWriteOnce, "STORAGE_PERMISSION", true},
		{replica.ErrRetired, "RETIRED", false},
		{replica.ErrNotReachable, "RETIRED", false},
		{fmt.Errorf("%w: %w", replica.ErrCorrupt, segment.ErrCorrupt), "SEGMENT_CORRUPT", false},
		{fmt.Errorf("%w: %w", replica.ErrCorrupt, replica.ErrInvalid), "CHAIN_BROKEN", false},
		// The store's refusal is why, whatever the chain made of it.
		{fmt.Errorf("%w: %w", replica.ErrUnknownOutcome, blobstore.ErrCredentials), "STORAGE_CREDENTIALS", true},
		{fmt.Errorf("%w: %w", replica.ErrNotFound, blobstore.ErrNoContainer), "STORAGE_CONTAINER_MISSING", true},
	} {
		got, ok := storagereason.Of(fmt.Errorf("put: %w", c.err))
		require.True(t, ok, c.want)
		require.Equal(t, c.want, errcat.Code(got))
		_, refused := storagereason.Refused(c.err)
		require.Equal(t, c.refused, refused, c.want)
	}
	for _, err := range []error{nil, errors.New("broken pipe"), blobstore.ErrNotFound} {
		_, ok := storagereason.Of(err)
		require.False(t, ok)
	}
}

func TestWrap(t *testing.T) {
	require.NoError(t, storagereason.Wrap(nil, "read"))
	require.True(t, errcat.Is(storagereason.Wrap(errors.New("broken pipe"), "read the chain"), typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE))
	own := errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, "no room")
	require.True(t, errcat.Is(storagereason.Wrap(own, "copy"), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE))
	err := storagereason.Wrap(fmt.Errorf("list: %w", blobstore.ErrPermission), "read the points of %s", "vm")
	require.ErrorIs(t, err, blobstore.ErrPermission)
	require.ErrorContains(t, err, "read the points of vm")
}

// What work meets that is tried again, and what ends it, whoever meets it: a failover, a task, a step of the scheduler.
func TestTriedAgain(t *testing.T) {
	for _, c := range []struct {
		again bool
		errs  []error
	}{
		// Somebody was faster, storage did not say, or a person puts it right while Landfall goes on trying.
		{true, []error{
			replica.ErrContention, replica.ErrHeadMoved, replica.ErrUnknownOutcome, replica.ErrBusy, replica.ErrLeaseLost, replica.ErrNotAtRest,
			blobstore.ErrExists, blobstore.ErrConditionFailed, blobstore.ErrLeaseConflict, blobstore.ErrFull, blobstore.ErrWriteOnce,
			blobstore.ErrCredentials, blobstore.ErrClockSkew, blobstore.ErrPermission, blobstore.ErrNotFound,
			context.DeadlineExceeded, errors.New("broken pipe"),
		}},
		// The chain has decided, or storage has lost something: the same again would meet the same.
		{false, []error{
			replica.ErrStaleEpoch, replica.ErrStaleOpen, replica.ErrClosed, replica.ErrNotFenced, replica.ErrReopened, replica.ErrBaseAhead,
			replica.ErrNoBase, replica.ErrOrdinalUsed, replica.ErrPassOrder, replica.ErrRetired, replica.ErrNotReachable, replica.ErrDiskReplaced,
			replica.ErrNotFound, replica.ErrCorrupt, replica.ErrTampered, replica.ErrInvalid, replica.ErrNoLineage,
			segment.ErrCorrupt, blobstore.ErrNoContainer, blobstore.ErrInvalid,
		}},
	} {
		for _, err := range c.errs {
			wrapped := storagereason.Wrap(fmt.Errorf("commit: %w", err), "work")
			require.Equal(t, c.again, errcat.Recoverable(wrapped), "%v", err)
			require.Equal(t, c.again, errcat.Recoverable(storagereason.Wrap(wrapped, "again")), "%v", err)
		}
	}
}
