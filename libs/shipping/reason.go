package shipping

import (
	"errors"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// reasons maps sentinels to reasons; the first that fits wins.
var reasons = []struct {
	err    error
	reason typesv1.ErrorReason
}{
	{replica.ErrStaleEpoch, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH},
	{replica.ErrClosed, typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED},
	{replica.ErrStaleOpen, typesv1.ErrorReason_ERROR_REASON_STALE_OPEN},
	{replica.ErrBaseAhead, typesv1.ErrorReason_ERROR_REASON_BASE_AHEAD},
	{replica.ErrNoBase, typesv1.ErrorReason_ERROR_REASON_BASE_AHEAD},
	{replica.ErrOrdinalUsed, typesv1.ErrorReason_ERROR_REASON_ORDINAL_USED},
	{replica.ErrPassOrder, typesv1.ErrorReason_ERROR_REASON_PASS_OUT_OF_ORDER},
	{replica.ErrHeadMoved, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION},
	{replica.ErrContention, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION},
	{replica.ErrNotFenced, typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED},
	{replica.ErrRetired, typesv1.ErrorReason_ERROR_REASON_RETIRED},
	{replica.ErrNoLineage, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH},
	{replica.ErrNotFound, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND},
	{replica.ErrNotReachable, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND},
	{replica.ErrBusy, typesv1.ErrorReason_ERROR_REASON_LEASE_LOST},
	{replica.ErrLeaseLost, typesv1.ErrorReason_ERROR_REASON_LEASE_LOST},
	{replica.ErrNotAtRest, typesv1.ErrorReason_ERROR_REASON_LEASE_LOST},
	{replica.ErrCorrupt, typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN},
	{replica.ErrInvalid, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT},
	{blobstore.ErrFull, typesv1.ErrorReason_ERROR_REASON_STORAGE_FULL},
	{blobstore.ErrInvalid, typesv1.ErrorReason_ERROR_REASON_INTERNAL},
	{ErrContract, typesv1.ErrorReason_ERROR_REASON_INTERNAL},
	{ErrStalled, typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE},
	{ErrDamaged, typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE},
}

// Reason returns the reason under which an error of a worker is reported to operators: the one it has (errors of
// hosts do), or the one of the sentinel it wraps. An error of storage without a sentinel is STORAGE_UNAVAILABLE,
// because everything else that workers touch names its errors.
func Reason(err error) typesv1.ErrorReason {
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.reason
		}
	}
	reason := errcat.Reason(errcat.FromError(err))
	if reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		return typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE
	}
	return reason
}

// Detail is an error as events carry it, without the time: the event has its own.
func Detail(err error) *typesv1.ErrorDetail {
	d := errcat.Detail(errcat.New(Reason(err), "%s", err), time.Time{})
	d.Time = nil
	return d
}
