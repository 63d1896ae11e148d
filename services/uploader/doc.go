// Package uploader turns changes into history, and history into disks.
//
// Role "ship" runs in the site. It pulls ShipTasks from the site's work queue,
// streams a cut point or one task of a pass from the host's change tracker into
// segments, commits them by one manifest, and says so with an event. Role
// "apply" runs near storage. It pulls ApplyTasks and brings the replica disks
// of a VM up to the head of its chain, with checkpoints where the protocol
// demands them and where policy wants them. Role "retain" runs near storage too.
// It pulls RetainTasks and gives up what the policy no longer keeps, by the
// engine of package replica, which any number of processes may run at once.
//
// It owns no state. Position is read from storage for every task (package
// replica is the only code that commits), so any number of uploaders may run,
// take the same task, or die at any instruction. It never decides when a point
// is cut, never settles one, never raises an epoch, never calls a hypervisor.
//
// # A task ends in one of three ways
//
//   - Its effect is durable: an event recovery-point.received, pass-task.shipped,
//     recovery-point.processed or recovery-points.retired, then the task is acknowledged. A redelivered
//     task finds itself in the chain and publishes the same event with the same
//     id, which heals an event that was lost.
//   - It cannot succeed here and now (the host does not answer, the commit is
//     refused): an event ship.failed with the reason, then it is acknowledged.
//     The scheduler's ladder decides about another try.
//   - The worker is lost or is being stopped: nothing is acknowledged, the queue
//     delivers the task again.
//
// design.md has the table of interruptions and the memory budget.
package uploader
