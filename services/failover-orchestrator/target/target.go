// Package target says what a recovery target is: something that turns the disks
// of a recovery point into a copy of a machine, boots it if it can, and takes
// all of it away again.
//
// The failover-orchestrator drives every target by the same steps:
//
//	Check, Claim, Sink (filled by replica.Materialise), Describe, Boot   ... Shutdown, Remove
//
// It writes a step to the failover's journal after the step returned, and does
// not repeat a step that is in the journal. So every method may be killed with
// its process (SIGKILL) at any instruction and is then called again from its
// start with the same Plan, by another process, perhaps while a frozen
// predecessor still runs a part of it. What each promises under that is in its
// comment; package targettest holds targets to it.
//
// Rules for all:
//   - The folder's marker (docs/formats/vhd-target.md) names the failover that
//     owns the folder and every file that it will make. Nothing is made, in the
//     folder or anywhere else, before the marker is durable, except by Check.
//   - Nothing is ever removed or overwritten that the marker does not name, and
//     a folder with another failover's marker is never touched.
//   - A process that outlives the orchestrator (a booted machine) is found
//     again from what is in the folder alone. It is never taken for ours by its
//     pid alone: pids are used again, also after the machine restarted.
//   - Errors carry a reason of errcat. TARGET_NOT_EMPTY, TARGET_UNWRITABLE,
//     TARGET_UNAVAILABLE, TARGET_DID_NOT_BOOT and INVALID_ARGUMENT are the
//     target's own. Which of them is tried again is errcat's to say.
package target

import (
	"context"

	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Plan is one copy of one machine. It is the same for all calls of one failover, except that Machine is not known yet
// when Check is called before the point was chosen: then it is the machine of the newest record.
type Plan struct {
	// Failover is the failover's id, without "failovers/".
	Failover string
	// Dir is the folder, absolute and clean.
	Dir string
	// Machine as it was at the point, with exactly the point's disks in the machine's order. Shutdown and Remove may get
	// one without disks, or nil: they go by the marker and what is in the folder.
	Machine *typesv1.Machine
	// Qemu are the settings of target qemu; nil for others, and where the caller gave none.
	Qemu *failoverv1.QemuTarget
}

// Sink receives the disks of a point. Close it after Materialise, whatever that returned.
type Sink interface {
	replica.Sink
	// Close closes what a failed Materialise left open. It removes nothing.
	Close() error
}

// Target is one kind of recovery target on this machine. It holds no state of failovers: all of it is in the folders.
// Methods are safe for concurrent use with different plans.
type Target interface {
	// Kind is what callers ask for.
	Kind() failoverv1.TargetKind

	// Boots says whether Boot starts a machine. When not, the orchestrator calls neither Boot nor Shutdown, and a copy may
	// be removed from any machine that sees the folder's marker.
	Boots() bool

	// Check says whether the copy can be made: settings and machine make sense to this target (INVALID_ARGUMENT,
	// TARGET_UNSUPPORTED), what it needs on this machine is there (TARGET_UNAVAILABLE), and the folder is absent with a
	// writable parent, empty, or already claimed by this failover (else TARGET_NOT_EMPTY, TARGET_UNWRITABLE). existed
	// reports whether the folder was there. It leaves nothing behind, except a probe file when it is killed, which never
	// makes a folder occupied. It is also called by request handlers, long before the failover runs.
	Check(ctx context.Context, p Plan) (existed bool, err error)

	// Claim makes the folder this failover's, durably, and answers the names of all files that the copy may consist of, in
	// the folder, in the order in which people want to read them. existed is what Check said before the folder was made:
	// the marker keeps it, so that Remove knows whether to remove the folder. Of several failovers that claim one folder
	// at once exactly one succeeds, the others get TARGET_NOT_EMPTY. A repeat by the owner changes nothing and answers the
	// same. A Claim that fails leaves nothing.
	Claim(ctx context.Context, p Plan, existed bool) (files []string, err error)

	// Sink prepares to receive the disks. It is an error (TARGET_UNWRITABLE) unless this failover owns the folder: one that
	// was replaced or unmounted since the claim would never be cleaned up. A disk has its final name only when all its
	// bytes are durable; it is made under a name that no other attempt uses, and finishing it after the context ended is
	// an error, so that a stale orchestrator cannot change a finished disk. What earlier attempts left is removed or
	// replaced.
	Sink(ctx context.Context, p Plan) (Sink, error)

	// DiskFile is the name of a disk's file as Sink makes it, for vm.json.
	DiskFile(disk string) string

	// Describe writes vm.json, whole or not at all, and everything else that Boot needs and that can be made before it (for
	// target qemu: overlays are made here or in Boot). The folder must be owned, as for Sink. A repeat gives the same.
	Describe(ctx context.Context, p Plan, vm []byte) error

	// Boot starts the machine and waits until it has shown that it is up, as the plan's settings say. It never changes the
	// disks that Sink made. A repeat finds a machine that runs already and only waits for its proof, again or still; it
	// never runs two for one folder, also when a predecessor was killed between the start of the process and the record
	// of it. A machine that is off is started from what its disks hold now: nothing that the guest wrote since a first
	// successful Boot is thrown away. When the proof does not come in time the error is TARGET_DID_NOT_BOOT, the machine
	// is left as it is (Remove ends it), and the evidence says what was seen. progress hears one line for people, now and
	// then. When ctx ends Boot returns soon; the machine goes on.
	// Targets that boot nothing return nil, nil.
	Boot(ctx context.Context, p Plan, progress func(line string)) (*typesv1.BootEvidence, error)

	// Running says whether the machine of this copy runs now, on this machine.
	Running(ctx context.Context, p Plan) (bool, error)

	// Shutdown powers the machine down: asks the guest first, and ends it by force when it has not gone after the target's
	// own bound. Its files stay. When it returns nil the machine does not run and holds no file open. A machine that does
	// not run, and a folder that is gone or not ours, is success.
	Shutdown(ctx context.Context, p Plan) error

	// Remove takes away everything that the failover made: the machine (ended by force if it runs), its files, the marker
	// last, and the folder if the failover made it and it is empty then. Afterwards nothing of it runs or is open, on this
	// machine. existed is what Check said first, or true when that is not known: when there is no marker any more, but an
	// empty folder that this failover made (a predecessor was killed between the two removals), the folder goes too. A
	// folder that is gone or was never claimed is success; so is one of another failover, which is left alone. Files
	// that others put there are left. detail is one line for people: what was removed, or left, or not found.
	Remove(ctx context.Context, p Plan, existed bool) (detail string, err error)

	// Owner is the id of the failover that claimed the folder; "" when none did, or the folder is not there.
	Owner(p Plan) (string, error)
}
