package replica

import (
	"context"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// CheckpointVersion is the version of the checkpoint record.
const CheckpointVersion = 1

// CheckpointRecord is ckpt/<seq>.json in the replica container: one snapshot per disk, all at rest at manifest Seq.
// A void one says that the manifest has and will have no checkpoint.
type CheckpointRecord struct {
	V       int     `json:"v"`
	Lineage Lineage `json:"lineage"`
	Seq     Seq     `json:"seq"`
	Kind    Kind             `json:"kind,omitempty"`
	Ordinal Ordinal          `json:"ordinal,omitempty"`
	Void    bool             `json:"void,omitempty"`
	Created time.Time        `json:"created"` // storage time
	Disks   []CheckpointDisk `json:"disks,omitempty"`
}

// CheckpointDisk is one disk of a checkpoint.
type CheckpointDisk struct {
	ID       string               `json:"id"`
	Gen      uint32               `json:"gen"`
	Size     int64                `json:"size"`
	Snapshot blobstore.SnapshotID `json:"snapshot"`
}

// Checkpoint marks manifest n, if every disk of n is at rest at n (ErrNotAtRest otherwise). It is idempotent: the
// checkpoint that exists is returned; a voided one is ErrVoid. Any process may call it, without a lease.
func (r *Replica) Checkpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	panic("todo")
}

// VoidCheckpoint makes sure that n never gets a checkpoint (rule 23). A checkpoint that exists is returned with
// its snapshots, and stays.
func (r *Replica) VoidCheckpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	panic("todo")
}

// ReadCheckpoint returns the checkpoint of n: ErrNotFound when there is none, ErrVoid when it is void.
func (r *Replica) ReadCheckpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	panic("todo")
}

func (r *Replica) checkpointSeqs(ctx context.Context) (map[Seq]bool, error) { panic("todo") }
func (r *Replica) processed(ctx context.Context) (Seq, error)               { panic("todo") }
