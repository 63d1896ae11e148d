package failoverorchestrator

import (
	"errors"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/storagereason"
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

// replicaError gives an error of reading a point's data its reason.
func replicaError(err error, format string, args ...any) error {
	return wrap(typesv1.ErrorReason_ERROR_REASON_SEGMENT_CORRUPT, err, format, args...)
}

// chainError gives an error of reading the chain its reason.
func chainError(err error, format string, args ...any) error {
	return wrap(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, err, format, args...)
}

// configError gives an error of reading a machine's configuration its reason.
func configError(err error, format string, args ...any) error {
	return wrap(typesv1.ErrorReason_ERROR_REASON_MANIFEST_CORRUPT, err, format, args...)
}

// wrap gives an error of the replica its reason; damaged is the reason where storage holds something wrong, or misses
// an object that the chain names.
func wrap(damaged typesv1.ErrorReason, err error, format string, args ...any) error {
	var known *errcat.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known): // of the sink
		return errcat.Wrap(known.Reason, err, format, args...)
	}
	if _, refused := storagereason.Refused(err); !refused &&
		(errors.Is(err, replica.ErrCorrupt) || errors.Is(err, segment.ErrCorrupt) || errors.Is(err, blobstore.ErrNotFound)) {
		return errcat.Wrap(damaged, err, format, args...)
	}
	return storagereason.Wrap(err, format, args...)
}
