package scheduler

import (
	"context"

	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// signalsOf is what the churn of a point looked like; nil for points of earlier versions.
func signalsOf(ctx context.Context, chain *replica.Replica, p replica.Point) (*typesv1.ChurnSignals, error) {
	return nil, nil
}
