package shipping

import (
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Geometry returns a task's disks as manifests name them, with the generations that the chain has; a disk that the
// chain does not know starts at generation 1. A disk whose size is not the chain's is refused: nothing resizes a
// generation.
func Geometry(st *replica.State, disks []*typesv1.Disk) ([]replica.Disk, error) {
	known := map[string]replica.DiskState{}
	for _, d := range st.Disks() {
		known[d.ID] = d
	}
	out := make([]replica.Disk, 0, len(disks))
	for _, d := range disks {
		disk := replica.Disk{ID: d.GetId(), Gen: 1, Size: d.GetSizeBytes()}
		if was, ok := known[d.GetId()]; ok {
			if was.Size != d.GetSizeBytes() {
				return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_CHANGED_OFFLINE,
					"disk %s has %d bytes on its host and %d in the replica; a protected disk cannot be resized", d.GetId(), d.GetSizeBytes(), was.Size)
			}
			disk.Gen = was.Gen
		}
		out = append(out, disk)
	}
	return out, nil
}
