package shipping

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

// footerTime is the creation time in the footers of replica disks: the same for all, so that every applier writes the
// same bytes.
var footerTime = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// footerSpace is the namespace of the ids in footers of replica disks.
var footerSpace = uuid.MustParse("0b1a7d0e-6f0c-5c55-8a6e-3f4b4be1c1f7")

// Footer returns the fixed VHD footer of a replica disk. It depends on its arguments alone.
func Footer(lineage replica.Lineage, diskID string, size int64) ([]byte, error) {
	padded, _ := vdisk.Pad(size) // the blob is padded, and a fixed VHD is as long as its footer says
	f, err := vdisk.NewFooter(padded, uuid.NewSHA1(footerSpace, []byte(string(lineage)+"/"+diskID)), footerTime)
	if err != nil {
		return nil, fmt.Errorf("make the VHD footer of disk %s: %w", diskID, err)
	}
	b := f.Bytes()
	return b[:], nil
}

// Drain brings the replica disks of a lineage up to the head of its chain with one applier. o.Footer is set here.
func Drain(ctx context.Context, r *replica.Replica, o replica.ApplierOptions) (replica.Progress, error) {
	st, err := r.Refresh(ctx)
	if err != nil {
		return replica.Progress{}, fmt.Errorf("read the chain: %w", err)
	}
	for _, d := range st.Disks() { // an impossible size fails here, with its name, and not in the middle of a batch
		if _, err := Footer(r.Lineage(), d.ID, d.Size); err != nil {
			return replica.Progress{}, err
		}
	}
	o.Footer = func(id string, size int64) []byte {
		b, _ := Footer(r.Lineage(), id, size) // sizes were checked above; a new one answers nil, which the applier refuses
		return b
	}
	applier, err := replica.NewApplier(r, o)
	if err != nil {
		return replica.Progress{}, err
	}
	return applier.Advance(ctx, 0)
}
