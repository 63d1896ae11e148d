package qemu

import (
	"context"

	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

// Inventory gives the driver its machines. Package inventory implements it; the driver hands it the shared pool of monitor
// connections, because a QEMU monitor serves one client only.
type Inventory interface {
	// Refresh looks again. An error means that nothing could be looked at; problems of one machine are in the machine.
	Refresh(ctx context.Context) error
	// Lookup returns one machine by GUID (lower case), as it was last seen. VM_NOT_FOUND, or UNAVAILABLE until Refresh
	// succeeded once. A machine whose QEMU is not running is found as long as its definition is there.
	Lookup(id string) (*inventory.Machine, error)
	// All returns every machine, by name.
	All() []*inventory.Machine
	// Find returns one machine by GUID or by a name that is unique on the host. VM_NOT_FOUND; UNAVAILABLE until Refresh
	// succeeded once; the reason of what is wrong with one that is here and cannot be described.
	Find(vm string) (*inventory.Machine, error)
	// Problems are the findings that forbid the protection of a machine, or its description.
	Problems() ([]*hostproviderv1.Finding, error)
	// Check looks afresh and returns all findings of one machine; the machine is nil when it cannot be described, and
	// answered says that its QEMU described it just now.
	Check(ctx context.Context, vm string) (m *inventory.Machine, findings []*hostproviderv1.Finding, answered bool, err error)
}
