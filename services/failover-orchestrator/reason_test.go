package failoverorchestrator_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

// Which errors of storage end a failover, and at which a step is tried again.
func TestWhatEndsAFailover(t *testing.T) {
	wraps := map[string]func(error, string, ...any) error{
		"chain": failoverorchestrator.ChainError, "replica": failoverorchestrator.ReplicaError,
		"config": failoverorchestrator.ConfigError, "close": failoverorchestrator.CloseError,
	}
	for _, c := range []struct {
		again bool
		errs  []error
	}{
		// A twin of this orchestrator, an applier or retention was faster; storage did not say; a person puts it right.
		{true, []error{
			replica.ErrContention, replica.ErrHeadMoved, replica.ErrUnknownOutcome, replica.ErrBusy, replica.ErrLeaseLost, replica.ErrNotAtRest,
			blobstore.ErrConditionFailed, blobstore.ErrLeaseConflict, blobstore.ErrFull, blobstore.ErrCredentials, blobstore.ErrClockSkew,
			blobstore.ErrPermission, blobstore.ErrWriteOnce, errors.New("broken pipe"),
		}},
		// The point is gone, the lineage is another's, or storage has lost something that the chain names.
		{false, []error{
			replica.ErrClosed, replica.ErrNotFenced, replica.ErrReopened, replica.ErrRetired, replica.ErrNotReachable, replica.ErrDiskReplaced,
			replica.ErrNotFound, replica.ErrCorrupt, replica.ErrTampered, replica.ErrInvalid, replica.ErrNoLineage, segment.ErrCorrupt,
			blobstore.ErrNotFound, blobstore.ErrNoContainer,
		}},
	} {
		for name, wrap := range wraps {
			for _, err := range c.errs {
				got := wrap(fmt.Errorf("read: %w", err), "step")
				require.ErrorIs(t, got, err)
				require.Equal(t, c.again, errcat.Recoverable(got), "%s: %v is %s", name, err, errcat.Reason(got))
			}
		}
	}
	for _, err := range []error{
		bus.ErrRevision, bus.ErrUnknown, blobstore.ErrFull, blobstore.ErrCredentials, blobstore.ErrPermission, blobstore.ErrNotFound, errors.New("broken pipe"),
	} {
		require.True(t, errcat.Recoverable(failoverorchestrator.StoreError(fmt.Errorf("put: %w", err))), "%v", err)
	}
	require.False(t, errcat.Recoverable(failoverorchestrator.StoreError(blobstore.ErrNoContainer)), "the records' own container is gone")
}
