// Package replica is the journal and the replica of one lineage in storage: the
// only code of Landfall that commits.
//
// A lineage is one protection of one VM. Its changes travel as segments
// (package segment), become history by a manifest (the JSON object
// log/<seq>.json, whose create-only write is the commit), are applied to one
// page blob per disk, and are marked by checkpoints. Everything is decided from
// what storage holds: there is no lock, clock or cache that a commit trusts.
//
// Start here:
//
//   - Create, Open: a lineage in a blobstore.Store.
//   - Replica.PutSegment, PutConfig, Commit: the shipper's side. Commit
//     says Committed or AlreadyCommitted, or refuses with one of the Err
//     sentinels; refusals are final for the task, other errors are not.
//   - Replica.Refresh, PassProgress, Points, Find: what the chain holds.
//   - NewApplier, Applier.Advance, Replica.Checkpoint: journal into disks.
//   - Replica.CloseLineage, Rewind, ReopenLineage: a failover's side.
//   - Replica.Materialise, SourceAt: a point's disks, or one disk's bytes.
//   - Replica.Retain, Pin, Unpin, Usage: which points stay, and what they take.
//
// design.md in this folder has the numbered invariants and the tables of
// interruptions; protocol.md has the rules they come from.
package replica
