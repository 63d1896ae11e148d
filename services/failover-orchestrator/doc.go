// Package failoverorchestrator brings protected machines up on a recovery
// target.
//
// It owns the failover records (bucket "failovers"), the jobs that run them,
// and in storage the step journal of each failover (container lff-<lineage>).
// It reads the replica and never changes it, and never writes the VM's record.
// This version has test failovers to target "vhd": one fixed VHD per disk and
// vm.json in a folder.
//
// Invariants:
//  1. A test failover changes nothing in the journal or the replica.
//  2. What a failover made is written in the folder's marker before it is
//     made; clean-up removes exactly that. A folder with another marker, or
//     with files and no marker, is never touched.
//  3. A file has its final name only when all its bytes are durable.
//  4. Every step may be killed at any instruction and is repeated from its
//     start by whoever holds the lease next; a step that is in the journal is
//     not repeated.
//
// Events out: test-failover.changed, job.changed. Events in: none.
package failoverorchestrator
