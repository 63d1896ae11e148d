package qemu

import (
	"context"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/qmp"
)

// The frozen copy of an open point grows with what the guest overwrites, and others live in its file system too: by default our
// own records, and perhaps the guest's images. So it gives way: before they run out of room the copy is given up, which
// costs the point alone. A point that nobody reads or settles would otherwise take all there is.

const (
	// roomInterval is how often the room that is left beside an open point's copy is looked at.
	roomInterval = 500 * time.Millisecond
	// leastRoom is what is left to others in any case, in bytes.
	leastRoom = 64 << 10
)

// crowded says why the frozen copy must give way; empty when there is none, or room enough.
func (h *held) crowded() string {
	o := h.rec.Open
	if o == nil || o.pass() || o.Broken != "" {
		return ""
	}
	var size int64
	for _, t := range h.rec.Disks {
		size += t.Size
	}
	free, err := freeSpace(h.scratchDir())
	if limit := max(leastRoom, min(size, h.d.cfg.MinScratch)/2); err == nil && free < limit {
		return fmt.Sprintf("%s has %d bytes free, fewer than %d: the frozen copy was given up", h.scratchDir(), free, limit)
	}
	return ""
}

// giveWay ends the frozen copy: its readers, its nodes, its files. The record follows, since there may be no room for it
// before. A guest that was stopped because its images could not grow goes on.
func (h *held) giveWay(ctx context.Context, m *qmp.Monitor, why string) error {
	h.d.log.WarnContext(ctx, "the frozen copy of a point is given up for want of room", "vm", h.id, "point", h.rec.Open.Ordinal, "why", why)
	s, err := observe(ctx, m)
	if err != nil {
		return err
	}
	if _, err := h.removeExports(ctx, m, s, ours); err != nil {
		return err
	}
	if _, err := h.removeNodes(ctx, m, s, ours); err != nil {
		return err
	}
	h.removeScratch(ctx, 0)
	var status struct {
		Status string `json:"status"`
	}
	if err := m.Execute(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if status.Status == "io-error" {
		if err := h.do(ctx, m, "cont", nil); err != nil {
			return err
		}
	}
	if h.rec.Open.Phase == making {
		return nil // it is undone anyway
	}
	return h.update(func(r *record) { r.Open.Broken = why })
}

// watchRoom watches the room beside the open point's copy until the point is settled, or has given way.
func (h *held) watchRoom() {
	o := h.rec.Open
	if o == nil || o.pass() || o.Broken != "" || h.roomWatched == o.New {
		return
	}
	h.roomWatched = o.New
	d, id, generation := h.d, h.id, o.New
	d.watchers.Go(func() {
		tick := time.NewTicker(roomInterval)
		defer tick.Stop()
		for {
			select {
			case <-d.closing.Done():
				return
			case <-tick.C:
			}
			ctx, cancel := context.WithTimeout(d.closing, perMachine)
			going := d.lookForRoom(ctx, id, generation)
			cancel()
			if !going {
				return
			}
		}
	})
}

// lookForRoom looks once, and reports whether the point is still there.
func (d *Driver) lookForRoom(ctx context.Context, id string, generation uint64) bool {
	h, err := d.holdRecord(ctx, id)
	if err != nil {
		return true
	}
	defer h.release()
	h.machine, _ = d.inv.Lookup(id) // without it there is no way to its QEMU, and follow says so
	if o := h.rec.Open; o == nil || o.New != generation || o.Broken != "" {
		return false
	}
	if h.crowded() == "" {
		return true
	}
	m, err := h.monitor(ctx)
	if err == nil {
		err = h.follow(ctx, m)
	}
	if err != nil && ctx.Err() == nil {
		d.log.WarnContext(ctx, "give a frozen copy up for want of room; it will be tried again", "vm", id, "error", err)
	}
	return true
}
