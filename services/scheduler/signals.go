package scheduler

import (
	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// signalsOf is what the churn of a point looked like; nil for points of earlier versions.
func signalsOf(p replica.Point) *typesv1.ChurnSignals {
	if p.Signals == nil {
		return nil
	}
	return &typesv1.ChurnSignals{
		ChangedBytes: p.Signals.Changed, ZeroBytes: p.Signals.Zero, StoredBytes: p.Signals.Stored, IncompressibleBytes: p.Signals.Incompressible,
	}
}
