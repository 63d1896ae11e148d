package replica

import (
	"context"
	"time"
)

// ApplierOptions configure an Applier. The zero value of each field but Footer is a sensible default.
type ApplierOptions struct {
	// Footer returns the 512-byte fixed VHD footer of a disk of size bytes. Required.
	Footer func(diskID string, size int64) []byte
	// Clock decides when leases are renewed; default time.Now.
	Clock func() time.Time
	// Parallel is how many page writes are in flight per disk; default 4. With 1 no goroutine is started.
	Parallel int
	// Lease is the duration of the leases, 15 s to 60 s; default 60 s.
	Lease time.Duration
	// Takeover breaks another applier's lease instead of answering ErrBusy. Safe at any time; it costs the other
	// its batch.
	Takeover bool
	// Stop names further manifests to checkpoint: only those of kind base, point or rewind count. It must answer the
	// same for the same entry. nil: only those that the protocol wants.
	Stop func(Entry) bool
	// MaxBatchBytes bounds the stored bytes of the segments merged in one batch; default 1 GiB.
	MaxBatchBytes int64
}

// Applier brings the page blobs of one lineage up to the chain. One Applier works at a time per lineage, by leases;
// several may exist. It is not safe for concurrent use.
type Applier struct {
	r *Replica
	o ApplierOptions
}

// Progress says where Advance got to.
type Progress struct {
	// Applied: all disks are at rest at it.
	Applied Seq
	// Head of the chain when Advance ended.
	Head Seq
	// Points lists what became processed in this call, oldest first.
	Points []Ordinal
	// Checkpoints taken or found at stops, ascending.
	Checkpoints []Seq
	// Batches written, page bytes written and page bytes cleared.
	Batches, Written, Cleared int64
}

// NewApplier returns an applier for r. Close it to release its leases early.
func NewApplier(r *Replica, o ApplierOptions) (*Applier, error) { panic("todo") }

// Advance applies the chain up to manifest to (0: the head), taking the checkpoints that are due on the way. It may
// go further than to when an earlier batch did. ErrBusy: another applier is at work. ErrLeaseLost: another took
// over. After any error the applier can be used again: it starts from what storage says, under new leases. Progress
// is valid with an error too, as far as it got.
func (a *Applier) Advance(ctx context.Context, to Seq) (Progress, error) { panic("todo") }

// Close releases the leases.
func (a *Applier) Close(ctx context.Context) error { panic("todo") }
