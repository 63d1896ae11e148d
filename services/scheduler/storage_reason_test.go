package scheduler

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
)

// At which errors of storage, its own or those that workers report, the ladder goes on, and which end replication.
func TestStorageErrorsAndTheLadder(t *testing.T) {
	for _, c := range []struct {
		class Class
		errs  []error
	}{
		{ClassRecoverable, []error{
			replica.ErrContention, replica.ErrHeadMoved, replica.ErrUnknownOutcome, replica.ErrBusy, replica.ErrLeaseLost, replica.ErrNotAtRest,
			blobstore.ErrConditionFailed, blobstore.ErrLeaseConflict, blobstore.ErrFull, blobstore.ErrCredentials, blobstore.ErrClockSkew,
			blobstore.ErrPermission, blobstore.ErrWriteOnce, blobstore.ErrNotFound, blobstore.ErrInvalid, errors.New("broken pipe"),
		}},
		{ClassReopen, []error{replica.ErrStaleEpoch, replica.ErrStaleOpen, replica.ErrOrdinalUsed, replica.ErrPassOrder}},
		{ClassResync, []error{replica.ErrBaseAhead, replica.ErrNoBase}},
		{ClassFatal, []error{
			replica.ErrClosed, replica.ErrNotFenced, replica.ErrCorrupt, replica.ErrTampered, replica.ErrNoLineage, segment.ErrCorrupt, blobstore.ErrNoContainer,
		}},
	} {
		for _, err := range c.errs {
			reason := errcat.Reason(storageError(fmt.Errorf("read: %w", err), "read the chain"))
			require.Equal(t, c.class, Classify(reason), "%v is %s", err, reason)
		}
	}
}
