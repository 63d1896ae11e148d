package failoverorchestrator

import (
	"context"

	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// What a recovery from storage alone (tools/recovery) shares with a failover, so that both make the same copy.

// ChoosePoint finds the point that a selector means, as a failover does (POINT_NOT_FOUND).
func ChoosePoint(points []replica.Point, s *failoverv1.PointSelector) (replica.Point, error) {
	return choose(points, s)
}

// MachineAt is the machine as it was at a point, with exactly the disks that the point holds. present stands in where the
// point has no configuration; it may be nil.
func MachineAt(ctx context.Context, r *replica.Replica, m *replica.Manifest, present *typesv1.Machine) (*typesv1.Machine, error) {
	return machineAt(ctx, r, m, present)
}

// DescribeCopy is vm.json of a copy: failover is the id that owns the folder.
func DescribeCopy(t target.Target, failover string, lineage replica.Lineage, m *replica.Manifest, machine *typesv1.Machine) ([]byte, error) {
	return describe(t, &failoverv1.Failover{Name: "failovers/" + failover, Lineage: string(lineage), Point: uint64(m.Point)}, m, machine)
}

// PointError gives an error of reading a point's data its reason, ChainError one of reading the chain.
func PointError(err error, format string, args ...any) error {
	return replicaError(err, format, args...)
}

// ChainError gives an error of reading the chain its reason.
func ChainError(err error, format string, args ...any) error { return chainError(err, format, args...) }
