package scheduler

import (
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// windowAlign keeps windows on whole extents of the tracker.
	windowAlign = 1 << 20
	// maxWindows bounds the tasks of one pass, and with them the size of the VM's record (about 40 bytes each).
	maxWindows = 2048
)

// planWindows splits a pass into tasks. A FULL pass is cut by address: every window of every disk, windowBytes each.
// A DIRTY pass knows how much it holds of each disk, usually little: as many windows as that is worth, over the whole
// address space, none for a disk without any. A pass without a window still has one, empty, task: it must commit
// something to be complete (rule 11).
func planWindows(scope typesv1.PassScope, disks []*typesv1.DiskChange, windowBytes int64) []*schedulerv1.PassWindow {
	windowBytes = max(alignUp(windowBytes), windowAlign)
	spans := make([]int64, len(disks))
	for {
		total := int64(0)
		for i, d := range disks {
			n := ceilDiv(d.GetSizeBytes(), windowBytes)
			if scope == typesv1.PassScope_PASS_SCOPE_DIRTY {
				n = min(n, ceilDiv(d.GetChangeBytes(), windowBytes))
			}
			spans[i] = 0
			if n > 0 {
				spans[i] = alignUp(ceilDiv(d.GetSizeBytes(), n))
				total += ceilDiv(d.GetSizeBytes(), spans[i])
			}
		}
		if total <= maxWindows {
			break
		}
		windowBytes *= 2
	}
	var out []*schedulerv1.PassWindow
	for i, d := range disks {
		for off := int64(0); spans[i] > 0 && off < d.GetSizeBytes(); off += spans[i] {
			out = append(out, &schedulerv1.PassWindow{
				Disk:   d.GetDisk(),
				Window: &typesv1.ByteRange{Offset: off, Length: min(spans[i], d.GetSizeBytes()-off)},
			})
		}
	}
	if len(out) == 0 {
		out = append(out, &schedulerv1.PassWindow{})
	}
	return out
}

func ceilDiv(a, b int64) int64 {
	if a <= 0 {
		return 0
	}
	return (a + b - 1) / b
}

func alignUp(n int64) int64 { return ceilDiv(n, windowAlign) * windowAlign }
