// Package storagereason is the one place where an error of storage, or of a chain kept there, gets the reason that an
// operator sees. Services that touch storage ask it, so that the same refusal reads the same wherever it was met:
// expired credentials found by a shipper, by the scheduler or in a failover are STORAGE_CREDENTIALS.
//
// What a reason means and what to do about it is package errcat's.
package storagereason

import (
	"errors"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// reasons maps sentinels to reasons; the first that fits wins. Refusals of the service itself come first: whatever was
// being done, they are why it failed.
var reasons = []struct {
	err    error
	reason typesv1.ErrorReason
}{
	{blobstore.ErrClockSkew, typesv1.ErrorReason_ERROR_REASON_STORAGE_CLOCK_SKEW},
	{blobstore.ErrCredentials, typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS},
	{blobstore.ErrPermission, typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION},
	{blobstore.ErrNoContainer, typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING},
	{replica.ErrNoLineage, typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING},
	{blobstore.ErrFull, typesv1.ErrorReason_ERROR_REASON_STORAGE_FULL},
	// A write-once policy stands where Landfall has to overwrite or delete: on the replica's container, most often. What it
	// keeps in the journal is no error.
	{blobstore.ErrWriteOnce, typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION},

	{replica.ErrTampered, typesv1.ErrorReason_ERROR_REASON_REPLICA_TAMPERED},
	{replica.ErrStaleEpoch, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH},
	{replica.ErrClosed, typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED},
	{replica.ErrNotFenced, typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED},
	{replica.ErrReopened, typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED},
	{replica.ErrStaleOpen, typesv1.ErrorReason_ERROR_REASON_STALE_OPEN},
	{replica.ErrBaseAhead, typesv1.ErrorReason_ERROR_REASON_BASE_AHEAD},
	{replica.ErrNoBase, typesv1.ErrorReason_ERROR_REASON_BASE_AHEAD},
	{replica.ErrOrdinalUsed, typesv1.ErrorReason_ERROR_REASON_ORDINAL_USED},
	{replica.ErrPassOrder, typesv1.ErrorReason_ERROR_REASON_PASS_OUT_OF_ORDER},
	{replica.ErrHeadMoved, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION},
	{replica.ErrContention, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION},
	{replica.ErrRetired, typesv1.ErrorReason_ERROR_REASON_RETIRED},
	{replica.ErrNotReachable, typesv1.ErrorReason_ERROR_REASON_RETIRED},
	{replica.ErrDiskReplaced, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND},
	{replica.ErrNotFound, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND},
	{replica.ErrBusy, typesv1.ErrorReason_ERROR_REASON_LEASE_LOST},
	{replica.ErrLeaseLost, typesv1.ErrorReason_ERROR_REASON_LEASE_LOST},
	{replica.ErrNotAtRest, typesv1.ErrorReason_ERROR_REASON_LEASE_LOST},
	{segment.ErrCorrupt, typesv1.ErrorReason_ERROR_REASON_SEGMENT_CORRUPT},
	{replica.ErrCorrupt, typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN},
	{replica.ErrInvalid, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
	{blobstore.ErrInvalid, typesv1.ErrorReason_ERROR_REASON_INTERNAL},
}

// Of returns the reason of the sentinel that err wraps; false when it wraps none. blobstore.ErrNotFound has none: what a
// missing object means depends on who names it.
func Of(err error) (typesv1.ErrorReason, bool) {
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.reason, true
		}
	}
	return typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED, false
}

// Refused returns the reason when the store itself refused: credentials, rights, a missing container, no room. False for
// everything else, in particular for what the chain says.
func Refused(err error) (typesv1.ErrorReason, bool) {
	reason, _ := Of(err)
	switch reason {
	case typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS, typesv1.ErrorReason_ERROR_REASON_STORAGE_CLOCK_SKEW, typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION,
		typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING, typesv1.ErrorReason_ERROR_REASON_STORAGE_FULL:
		return reason, true
	}
	return typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED, false
}

// Wrap gives an error of storage its reason, STORAGE_UNAVAILABLE when nothing says better, and the operation. An error that
// has a reason keeps it. Wrap of nil is nil.
func Wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	reason, ok := Of(err)
	var known *errcat.Error
	if errors.As(err, &known) && !ok {
		reason, ok = known.Reason, true
	}
	if !ok {
		reason = typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE
	}
	return errcat.Wrap(reason, err, format, args...)
}
