package qemu

import (
	"context"

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
}
