// Package resyncengine makes a replica equal to its source again by sending
// only what differs.
//
// It pulls CompareTasks from the site's work queue. A task is one comparing
// pass over all disks of a machine: the state of the chain at its head n is the
// side to compare with, an empty partial is committed at exactly n+1, then
// window by window the host's digests are compared with digests of that state,
// chunks that differ are read from the host, and committed as one partial per
// window. What the guest writes meanwhile is in the cut that follows the pass.
//
// It owns no state: which windows are done is read from the chain, so a task
// that comes again goes on where the chain ends. It never begins or settles a
// pass, never raises an epoch, never decides that a resynchronisation is due.
//
// Events out: pass-task.shipped for each partial, ship.failed with the reason.
// How a task ends, and who retries, is as in the uploader: the effect is
// durable and said, or the failure is said, and then the task is acknowledged;
// a lost worker's task comes again.
//
// design.md has the argument and the table of interruptions.
package resyncengine
