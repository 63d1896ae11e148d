package failoverorchestrator

import (
	"context"
	"errors"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// choose finds the point that a selector means.
func choose(points []replica.Point, s *failoverv1.PointSelector) (replica.Point, error) {
	for i := len(points) - 1; i >= 0; i-- { // newest first
		p := points[i]
		switch w := s.GetSelector().(type) {
		case *failoverv1.PointSelector_Latest:
			return p, nil
		case *failoverv1.PointSelector_LatestProcessed:
			if p.Processed {
				return p, nil
			}
		case *failoverv1.PointSelector_LatestApp:
			if p.Consistency == replica.ConsistencyApp {
				return p, nil
			}
		case *failoverv1.PointSelector_Ordinal:
			if uint64(p.Ordinal) == w.Ordinal {
				return p, nil
			}
		}
	}
	what := "no recovery point was received yet"
	switch w := s.GetSelector().(type) {
	case *failoverv1.PointSelector_LatestProcessed:
		what = "no recovery point has been applied to the replica disks yet; latest works"
	case *failoverv1.PointSelector_LatestApp:
		what = "there is no application-consistent recovery point"
	case *failoverv1.PointSelector_Ordinal:
		return replica.Point{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND, "there is no recovery point %d", w.Ordinal)
	}
	return replica.Point{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND, "%s", what)
}

// replicaError gives an error of the replica its reason.
func replicaError(err error, format string, args ...any) error {
	reason := typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE
	switch {
	case err == nil:
		return nil
	case errors.Is(err, replica.ErrNotFound), errors.Is(err, replica.ErrNotReachable):
		reason = typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND
	case errors.Is(err, replica.ErrNoLineage):
		reason = typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED
	case errors.Is(err, replica.ErrCorrupt):
		reason = typesv1.ErrorReason_ERROR_REASON_SEGMENT_CORRUPT
	}
	var known *errcat.Error
	if errors.As(err, &known) {
		reason = known.Reason
	}
	if errors.Is(err, context.Canceled) {
		reason = typesv1.ErrorReason_ERROR_REASON_CANCELLED
	}
	return errcat.Wrap(reason, err, format, args...)
}
