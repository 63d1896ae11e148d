// Package inventory knows which QEMU machines a host has: what a definition says of each, and what its QEMU says of its
// disks. It changes nothing in a QEMU.
package inventory

import (
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Machine is one QEMU process as the driver needs it to take points: sockets, and disks by node and device. It is never
// changed after it was handed out. What only a running QEMU can tell (sizes, nodes, devices) is kept as it was last seen
// while QEMU does not answer, and is empty until it answered once.
type Machine struct {
	// ID is the machine's GUID, lower case.
	ID string
	// Name is what people call it.
	Name string
	// QMPSocket is the path of the monitor that belongs to Landfall alone.
	QMPSocket string
	// AgentSocket is the path of the guest agent's socket; empty when the guest has none.
	AgentSocket string
	// ScratchDir is the folder for the frozen copies of points; empty means the driver's own.
	ScratchDir string
	// Disks in order. Only those that are replicated.
	Disks []Disk
	// Start is the program and its arguments that start the machine; empty when only an operator can.
	Start []string
	// StartDir is the folder in which Start runs.
	StartDir string
	// Description is the machine as callers of the host see it, with the power state of the last look: unspecified when QEMU
	// did not answer. Nil until QEMU answered once. Its fence is not filled in. Clone it before changing it.
	Description *typesv1.Machine
	// Problem says why the machine cannot be used now, for example that the definition names a disk that QEMU does not
	// have; nil when nothing is known against it.
	Problem error
}

// Disk is one replicated disk of a machine.
type Disk struct {
	// ID is stable within the machine, for example "os".
	ID string
	// Node is the name of the disk's format node (driver vhdx, qcow2, vpc, raw): bitmaps are kept there. It must be given by
	// the user (-blockdev node-name=), since generated names change with every start.
	Node string
	// Device is the QOM path of the guest device in front of it, for example /machine/peripheral/dev-os.
	Device string
	// Size that the guest sees, in bytes.
	Size int64
	// Format of the image.
	Format typesv1.DiskFormat
	// Path of the image on the host.
	Path string
	// OSDisk: the machine boots from it.
	OSDisk bool
}
