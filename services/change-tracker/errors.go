package changetracker

import "errors"

// Sentinel errors of the domain. The server maps each to one reason of the catalogue.
var (
	// ErrMachineNotFound: no such machine is attached.
	ErrMachineNotFound = errors.New("machine is not attached")
	// ErrUnavailable: the machine may be here, but not now.
	ErrUnavailable = errors.New("change-tracker is starting or stopping")
	// ErrDiskNotFound: the machine has no such disk.
	ErrDiskNotFound = errors.New("disk not found")
	// ErrDiskDuplicate: one image is named twice, here or by another machine.
	ErrDiskDuplicate = errors.New("disk image is attached already")
	// ErrDiskInUse: another process serves the machine.
	ErrDiskInUse = errors.New("disk image is in use")
	// ErrDiskMissing: the image does not exist.
	ErrDiskMissing = errors.New("disk image does not exist")
	// ErrDiskTruncated: the image is shorter than its format says, or not whole sectors.
	ErrDiskTruncated = errors.New("disk image is truncated")
	// ErrFormat: the image's format is not supported.
	ErrFormat = errors.New("disk format is not supported")
	// ErrFenced: a failover has closed the machine's exports.
	ErrFenced = errors.New("machine is fenced")
	// ErrSourceLost: the hypervisor that exports a source does not answer.
	ErrSourceLost = errors.New("export of the source cannot be reached")
	// ErrExportInvalid: an export of a source is not what it must be.
	ErrExportInvalid = errors.New("export of the source is not valid")
	// ErrSnapshotBroken: the frozen copy that a point is read from is gone.
	ErrSnapshotBroken = errors.New("frozen copy of the disk is broken")
	// ErrInvalidState: the call is not legal now.
	ErrInvalidState = errors.New("not possible in this state")
	// ErrNotTracking: the machine has no tracking.
	ErrNotTracking = errors.New("tracking was not started")
	// ErrLineage: the call names another lineage.
	ErrLineage = errors.New("another lineage is tracked")
	// ErrStaleEpoch: the epoch is below the highest seen.
	ErrStaleEpoch = errors.New("epoch is stale")
	// ErrSettled: the ordinal has an outcome already, or is too old to have one.
	ErrSettled = errors.New("ordinal was settled")
	// ErrOpen: another point or pass is unsettled.
	ErrOpen = errors.New("another point or pass is open")
	// ErrNotCut: the point was never cut here.
	ErrNotCut = errors.New("point was never cut")
	// ErrPassRequired: dirty extents must be copied before the next cut.
	ErrPassRequired = errors.New("a pass is required first")
	// ErrPassNotOpen: the pass is not the open one.
	ErrPassNotOpen = errors.New("pass is not open")
	// ErrResyncRequired: there is no trusted baseline.
	ErrResyncRequired = errors.New("resynchronisation is required")
	// ErrBroken: the logs of an open point, or the sidecar, cannot be read.
	ErrBroken = errors.New("tracking is broken")
	// ErrSpace: the volume has no room for what the call must store.
	ErrSpace = errors.New("volume is full")
)
