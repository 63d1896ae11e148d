package errcat

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Detail is an error as it stands inside a resource (a job, a health reason, an event), seen at now.
// Detail of nil is nil.
func Detail(err error, now time.Time) *typesv1.ErrorDetail {
	if err == nil {
		return nil
	}
	e := of(err)
	cause, action := e.advise()
	return &typesv1.ErrorDetail{
		Reason: e.label(), What: err.Error(), Cause: cause, Action: action,
		Time: timestamppb.New(now), Recoverable: e.Recoverable(),
	}
}

// FromDetail turns a detail back into an error of its reason.
func FromDetail(d *typesv1.ErrorDetail) error {
	if d == nil {
		return nil
	}
	reason, ok := Parse(d.Reason)
	if !ok {
		reason = typesv1.ErrorReason_ERROR_REASON_INTERNAL
	}
	return New(reason, "%s", d.What)
}
