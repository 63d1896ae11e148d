// Package hostsuite is the conformance suite of a host: a hypervisor driver
// and the change source that belongs to it, seen through the two services that
// the rest of Landfall talks to. It plays scheduler, uploader and
// resync-engine by the book, keeps what the guest wrote, and compares.
//
// A new driver passes [Run] before anything else is built on it. Each case
// names the rule of the replication protocol that it stands for.
package hostsuite

import (
	"testing"

	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Rig is one host with one machine of two disks or more, all zero, powered on and not protected. Everything ends with
// the test.
type Rig interface {
	// Host and Tracker are the services as they run now: asked again after Restart.
	Host() hostproviderv1.HostServiceClient
	Tracker() changetrackerv1.ChangeTrackerServiceClient
	// VM is the machine's GUID, Disks its disks with their sizes, a multiple of 4 KiB and at least 16 MiB.
	VM() string
	Disks() []*typesv1.Disk
	// Write writes as the guest does and returns when the write is done; so does Zero, by whatever the guest's way is to
	// zero a range. An error means that the guest could not write.
	Write(disk string, off int64, p []byte) error
	Zero(disk string, off, n int64) error
	// Restart kills both services without a warning and starts them again on what they had stored. The guest goes on,
	// or finds its disks again, by the time it returns.
	Restart()
}

// Losing is a rig whose hypervisor forgets what changed when it is killed.
type Losing interface {
	Rig
	// KillHypervisor kills it and starts it again on the same disks; the guest's finished writes are kept.
	KillHypervisor()
	// Lost is the reason that the host gives from then on.
	Lost() typesv1.ResyncReason
}

// Run runs the suite; build makes a new rig for each case.
func Run(t *testing.T, build func(t *testing.T) Rig) {
	cases := []struct {
		name string
		run  func(t *testing.T, h *harness)
	}{
		{"a copy and its deltas are the disks at each cut", copyAndDeltas},
		{"what is written after a cut is not in its point", frozenAtTheCut},
		{"an abandoned point's changes are in the next", abandoned},
		{"calls repeated with an ordinal answer as the first did", repeats},
		{"the first settle wins, also before the cut", firstSettle},
		{"lower epochs are refused, also after a restart", epochs},
		{"another lineage is refused until tracking ends", lineages},
		{"one point or pass at a time", oneAtATime},
		{"no point without a copy before it", copyFirst},
		{"a comparing pass hashes and reads what the disks hold", comparing},
		{"an interrupted reader goes on where it was", resumed},
		{"restarts between any two steps lose nothing", restarts},
		{"disks are cut at one instant", oneInstant},
		{"a fenced machine cannot write and its last point is whole", fenced},
		{"a hypervisor that forgot its changes says so", forgetful},
		{"ended tracking leaves nothing", ended},
		{"any order of writes, cuts, settles and restarts", anyOrder},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, newHarness(t, build(t))) })
	}
}
