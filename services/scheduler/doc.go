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
// # Events
//
// In: recovery-point.received, recovery-point.processed, pass-task.shipped, ship.failed, parked.*. Out:
// protection-state.changed, health.changed, recovery-point.abandoned, replication-cycle.missed, resync.became-required,
// job.changed.
package scheduler
