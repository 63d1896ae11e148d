// Package schedulertest is a small world for the scheduler: hosts, a guest, shippers and a resync-engine that behave.
//
// [Host] keeps points, passes, epochs and the guest's blocks in memory, under the rules of the real tracker, and serves
// HostService and ChangeTrackerService. [Workers] take real tasks from a real bus and commit through the real
// libs/replica. [World] joins them, and [World.Check] compares every point of the chain with what the guest's disks held at
// its cut, so a scheduler that loses or mixes up a point is found by its result, not by its calls.
package schedulertest
