// Package scheduler owns the record of every protected VM: its state, its cycles and passes, retry, RPO and health. It
// decides when, and never moves data.
//
// # How it works
//
// A level-triggered reconciler, one VM at a time per worker: [reconcile] reads the record from the KV bucket "vms",
// decides the one next step from the record, what the host holds (ListPoints) and what storage holds (libs/replica),
// carries it out, writes the record by compare-and-set, and says when to look again. Events and watches only wake it up;
// losing all of them costs time, never correctness. A conflict on the record means that somebody decided meanwhile: the
// step is decided again.
//
// Start reading at [Next] (the state machine, docs/state-machine.md), then reconcile.go, cycle.go and pass.go.
//
// # Invariants
//
//   - The record says what is about to be done before the call that does it, so that every step can be repeated after a
//     kill at any line: CUTTING before CutPoint, CUT before the task, COMMITTING before SettlePoint.
//   - An ordinal is assigned once: max(record, host, chain)+1, and the record is written before the host hears of it.
//   - A point is committed only if it was seen in the chain in storage (protocol rule 9). An event never proves it.
//   - A point is given up with the epoch raised in the same write, then settled ABANDONED. If it commits late that is
//     harmless: the next base is the one that the host holds (rule 3).
//   - One cycle or pass per VM at a time. A cycle that falls due meanwhile is counted as missed.
//   - Only the holder of the lease "scheduler" reconciles; records carry compare-and-set anyway.
//
// # Interruptions of a cycle
//
//	killed after                   found at restart            next step
//	record CUTTING                 host may or may not have cut  CutPoint of the same ordinal: same answer
//	CutPoint                       the same                    the same
//	record CUT, task or not        phase CUT                   task again under the same id: dropped or harmless (rule 7)
//	manifest by the uploader       ordinal in the chain        COMMITTING
//	record COMMITTING, settle      phase COMMITTING            SettlePoint again: idempotent; apply task again, same id
//	epoch raised, ABANDONING       phase ABANDONING            SettlePoint(ABANDONED) again
//
// # Failovers
//
// The failover-orchestrator owns the record of a failover (bucket "failovers") and the fences in storage; it never calls a
// host. This service watches the bucket and walks the VM's state along the rows of the state machine until it agrees with
// the failover's phase (follow.go). It is level-triggered: a scheduler that was dead during the whole failover, or several,
// comes to the same end, and none of it can hold an unplanned failover up, because storage is the lock.
//
//	phase                       state of the VM
//	STARTING                    PlannedFailoverInProgress or UnplannedFailoverInProgress; after FailoverFailed: again
//	WAITING_COMMIT              FailedOver; from Committing: CommitFailed
//	COMMITTING, COMMITTED       Committing, Committed
//	FAILED                      FailoverFailed; not followed if it was never seen before and closed nothing
//	CANCELLING, CANCEL_FAILED   CancellingFailover
//	CANCELLED                   CancellingFailover until the source was started, then: before the close the state from
//	                            before, after the open Protected or Paused; ResyncRequired if the host needs it. Not followed if it
//	                            was never seen before.
//
// A failover that is not legal is refused once, in ProtectedVm.failover, and the state does not move.
//
// Invariants:
//
//   - An unplanned failover gives up what is in hand in the write that enters it, with the epoch raised, and without the host.
//   - stop_time is written before the host hears of a stop. Without it the host holds no fence, and a cancellation does not
//     start a machine that it never stopped.
//   - Cycles of SENDING_LAST_POINT begin after the host said OFF, so whichever of them commits is the last point; the write that
//     closes its cycle says READY_TO_CLOSE.
//   - A machine is released only once it is off and the close is in the chain; it is started only when no close stands above.
//   - The source of a VM that was failed over is asked again and again to stop, never forced, and the VM is critical until its
//     host says OFF. It goes on being looked at: one that runs again is not fenced, and before the close what was its last
//     point is not its last. A cancellation that failed changes nothing about that. Ending protection asks once more, and neither lifts a fence nor starts a machine: the fence stays
//     until a person lifts it on the host.
//   - A cancellation raises the epoch before the host hears of it: a request to stop the machine that is still on its way is
//     refused, and the machine that was started again runs on.
//   - A cancellation after the close needs no comparison just because the source ran: nothing of the recovered machine is in
//     the chain, and the host tracked every write since its base. If that base is not above the chain's state, the next delta is
//     right (protocol rules 3, 5 and 6). A host that lost track, or holds no base, is compared.
//
// # Points
//
// How long points are kept is the policy's; uploader:retain gives them up, by tasks that this service publishes when a step is
// due (retention.go): every ten minutes, earlier after a checkpoint or many points. None is published while a person has to
// look at a suspected point (suspicion.go), nor from the start of a failover until its cancellation has ended. Holds and the
// pin of the last good point are in storage (retention.json), where every process that retires points reads them; the
// record only says what is wanted, and the reconciler goes on until storage has it.
//
//	killed after                   found at restart             next step
//	retain task                    the same time in the record  task again under the same id: dropped or harmless
//	record with the suspicion      not pinned                   pin
//	pin                            not pinned                   pin again: the same pin
//	suspicion cleared              pin left                     it ends after 30 days, or by clearing again
//
// # Interruptions of a planned failover
//
//	killed after                   found at restart             next step
//	record QUIESCING               cycle or pass in hand        to its end, by its own rules
//	record STOPPING_SOURCE         guest may or may not be off  StopMachine again: idempotent
//	OFF                            stage STOPPING_SOURCE        the same
//	record SENDING_LAST_POINT      no cycle, or one             a cycle's rules above
//	settle of the last point       COMMITTING                   settle again; the write says READY_TO_CLOSE
//	record READY_TO_CLOSE          close in the chain or not    wait for it, then CLOSED
//	record CLOSED                  released or not              settle what is open, ReleaseMachine again: idempotent
//
// # Events
//
// In: recovery-point.received, recovery-point.processed, recovery-point.suspected, apply-backlog.raised,
// apply-backlog.cleared, pass-task.shipped, ship.failed, parked.*. Out: protection-state.changed, health.changed,
// recovery-point.abandoned, recovery-point.application-consistency-missed, recovery-point.held, recovery-point.released,
// replication-cycle.missed, resync.became-required, job.changed.
package scheduler
