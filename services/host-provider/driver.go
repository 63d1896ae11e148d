package hostprovider

import (
	"context"

	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Driver is one kind of hypervisor. Every method may be repeated: mutating ones are idempotent by
// ordinal and persisted by the driver before they return. Errors carry a reason (errcat).
type Driver interface {
	// Name is the driver's name as it stands in the host record, for example "imagedir".
	Name() string
	// Machines lists what the host holds, by name, with the problems of what cannot be read. UNAVAILABLE until
	// Refresh succeeded once.
	Machines(ctx context.Context) ([]*typesv1.Machine, []*hostproviderv1.Finding, error)
	// Machine finds one by GUID or by a display name that is unique on the host; VM_NOT_FOUND otherwise,
	// VM_DEFINITION_INVALID, or the one reason that there is, for one that is here and broken, UNAVAILABLE until
	// Refresh succeeded once.
	Machine(ctx context.Context, vm string) (*typesv1.Machine, error)
	// Check runs every prerequisite check and returns all findings. The machine is nil when it cannot be described.
	Check(ctx context.Context, vm string) ([]*hostproviderv1.Finding, *typesv1.Machine, error)
	// Establish starts change tracking of a machine for a lineage.
	Establish(ctx context.Context, vm, lineage string, epoch uint64) (*typesv1.TrackingStatus, error)
	// Dissolve ends it and removes what it left.
	Dissolve(ctx context.Context, vm, lineage string, epoch uint64) error
	// Cut fixes one instant across all disks.
	Cut(ctx context.Context, c Cut) (*typesv1.HostPoint, typesv1.Consistency, error)
	// Settle ends a point; the first settle wins.
	Settle(ctx context.Context, s Settle) (*typesv1.TrackingStatus, error)
	// Points says what the host holds of a machine.
	Points(ctx context.Context, vm string) (*typesv1.TrackingStatus, error)
	// Refresh looks for machines that came or went. It is called at start and then at every scan interval.
	Refresh(ctx context.Context) error
}

// Cut asks for one instant.
type Cut struct {
	VM          string // GUID
	Lineage     string
	Point       uint64 // ordinal
	Epoch       uint64
	Consistency typesv1.Consistency
}

// Settle ends a point.
type Settle struct {
	VM      string // GUID
	Lineage string
	Point   uint64 // ordinal
	Epoch   uint64
	Outcome typesv1.SettleOutcome
}
