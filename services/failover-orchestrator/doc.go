// Package failoverorchestrator brings protected machines up on a recovery
// target: for a test, planned, or because their site is lost.
//
// It owns the failover records (bucket "failovers"), the jobs that run them,
// and in storage the step journal of each failover (container lff-<lineage>)
// and the close, rewind and open manifests. It reads the VMs' records and never
// writes them, and never calls a host: the scheduler follows a failover's record
// and does the source's part. Recovery targets are packages behind
// target.Target.
//
// Invariants:
//  1. A test failover changes nothing in the journal or the replica, but for
//     the pin failover/<id> that keeps its point while it is read.
//  2. What a failover made is written in the folder's marker before it is
//     made; clean-up removes exactly that, and only from the machine that made
//     it. A folder with another marker, or with files and no marker, is never
//     touched.
//  3. A file has its final name only when all its bytes are durable.
//  4. Every step may be killed at any instruction and is repeated from its
//     start by whoever holds the lease next; a step that is in the journal is
//     not repeated.
//  5. Nothing of a planned or unplanned failover is written to its target's
//     disks before its close is in the chain, and its lineage is opened only
//     when its machine is off and its copy gone: there are never two of one
//     machine because of Landfall.
//  6. Whether a failover may ever close its lineage is decided once, in storage
//     (docs/formats/failover-journal.md, the fate): one that was cancelled never
//     does, whoever still works on it.
//  7. A lineage is closed under one failover's id. One that failed after its
//     close is started again under the same id, or cancelled; none takes its place.
//     One that failed before is replaced: its fate first, then the new record, then
//     its end. A VM whose failover is over, and that has no other, has its source started.
//  8. The recovered disks come from the manifests of the chosen point, never from
//     the chain's newest state, so that a rewind by an orchestrator that does not
//     know yet that its failover was started again at another point spoils no
//     disk. It may set the state back wrongly once, if it stood still between its
//     look at the record and its commit and the new attempt found nothing to set
//     back meanwhile (otherwise rule 17 has it compute again). Commit therefore
//     sets the state to the point again, and cancel brings it forward before the
//     open, after which no rewind of this failover is valid (rule 16); one that comes
//     in between makes the source's base too new, which is a resync (rule 6). What goes
//     on from a committed lineage goes by the record's point, not by the state.
//  9. A machine that was started and has not shown in time that it is up is kept:
//     the job fails, the failover waits for a person (WAITING_CLEANUP or
//     WAITING_COMMIT with an error).
//  10. A copy that cannot be removed is left behind only where a person said so
//     (force), and never while it is seen to run. Invariant 5 is then theirs.
//
// Events out: test-failover.changed, failover.changed, job.changed. Events in:
// none.
package failoverorchestrator
