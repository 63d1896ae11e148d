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
	Cut(ctx context.Context, c Cut) (CutResult, error)
	// Settle ends a point; the first settle wins.
	Settle(ctx context.Context, s Settle) (*typesv1.TrackingStatus, error)
	// BeginPass fixes the start of a pass: every later write is covered by the next pass or cut.
	BeginPass(ctx context.Context, p Pass) (*typesv1.HostPoint, error)
	// SettlePass ends a pass; the first settle wins.
	SettlePass(ctx context.Context, s Settle) (*typesv1.TrackingStatus, error)
	// Stop fences a machine for a failover, durably, and asks its guest to power down. It waits at most a few seconds and
	// says how the machine is then; it is called again until the machine is off. What a last cut needs stays.
	Stop(ctx context.Context, f Fence) (typesv1.PowerState, error)
	// Release ends what is left of a fenced machine that is off. INVALID_STATE while the guest runs.
	Release(ctx context.Context, f Fence) error
	// Start lifts the fence of a failover and starts the machine where the driver can.
	Start(ctx context.Context, f Fence) (typesv1.PowerState, error)
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

// CutResult is a point and how consistent it is.
type CutResult struct {
	Point       *typesv1.HostPoint
	Consistency typesv1.Consistency
	// Degraded says why the point is only crash-consistent although more was asked for; nil when it is what was asked for.
	Degraded error
}

// Pass asks for the start of a pass.
type Pass struct {
	VM      string // GUID
	Lineage string
	Pass    uint64 // ordinal
	Epoch   uint64
	Scope   typesv1.PassScope
}

// Fence names a machine and the failover that wants it stopped, or that has been cancelled.
type Fence struct {
	VM       string // GUID
	Lineage  string
	Epoch    uint64
	Failover string // failovers/{failover}
}
