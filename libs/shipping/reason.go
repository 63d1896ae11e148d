package shipping

import (
	"errors"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/storagereason"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// reasons maps the sentinels of this package; those of storage are package storagereason's.
var reasons = []struct {
	err    error
	reason typesv1.ErrorReason
}{
	{ErrContract, typesv1.ErrorReason_ERROR_REASON_INTERNAL},
	{ErrStalled, typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE},
	{ErrDamaged, typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE},
}

// Reason returns the reason under which an error of a worker is reported to operators: the one it has (errors of
// hosts do), or the one of the sentinel it wraps. An error of storage without a sentinel is STORAGE_UNAVAILABLE,
// because everything else that workers touch names its errors.
func Reason(err error) typesv1.ErrorReason {
	if reason, ok := storagereason.Of(err); ok {
		return reason
	}
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
