package qemu

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// The method for a QEMU whose filter cannot give up its copy: blockdev-backup copies what the guest overwrites into a qcow2
// file that has the disk as its backing. Everything happens in one transaction, but a copy that cannot be written stops the
// guest. A watcher then ends the job and lets the guest go on: its write is done again and nothing is lost but the point.

// prepareJobs makes the files that the jobs write to.
func (h *held) prepareJobs(ctx context.Context, m *qmp.Monitor) error {
	o := h.rec.Open
	for i, t := range h.rec.Disks {
		path := h.scratchPath(o.New, i)
		if err := h.d.effect("make-scratch"); err != nil {
			return err
		}
		if err := writeQcow2(path, t.Size); err != nil {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN, err, "make scratch file")
		}
		args := arguments{
			"driver": "qcow2", "node-name": name(scratchNode, o.New, i), "backing": t.Node,
			"file": arguments{"driver": "file", "filename": path},
		}
		if err := h.do(ctx, m, "blockdev-add", args); err != nil {
			return fmt.Errorf("prepare the copy of disk %s: %w", t.ID, err)
		}
	}
	h.watch(m)
	return nil
}

// instantOfJobs is one transaction: new bitmaps, copies begin. The old bitmaps stop after it: a transaction does its actions
// one after the other, and a write between two of them must be in both bitmaps or in the copy's past.
func (h *held) instantOfJobs(ctx context.Context, m *qmp.Monitor, disks []int, actions []any) (time.Time, time.Duration, error) {
	o := h.rec.Open
	for _, i := range disks {
		actions = append(actions, action("blockdev-backup", arguments{
			"job-id": name(jobID, o.New, i), "device": h.rec.Disks[i].Node, "target": name(scratchNode, o.New, i), "sync": "none",
			"filter-node-name": name(filterNode, o.New, i),
		}))
	}
	cut, start := h.d.now().UTC(), time.Now() //nolint:forbidigo // the second is a measurement
	if err := h.do(ctx, m, "transaction", arguments{"actions": actions}); err != nil {
		return time.Time{}, 0, fmt.Errorf("switch all disks: %w", err)
	}
	return cut, time.Since(start), nil //nolint:forbidigo // as above
}

// watch begins to watch over the guest on this connection, unless that is done already.
func (h *held) watch(m *qmp.Monitor) {
	if h.watched == m && h.stopWatch != nil {
		return
	}
	if h.stopWatch != nil {
		h.stopWatch()
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.watched, h.stopWatch = m, cancel
	events, d, id := m.Subscribe(256), h.d, h.id
	d.watchers.Go(func() {
		defer events.Close()
		// A full queue drops events, and one that came before the subscription was never seen: so it also looks by itself.
		tick := time.NewTicker(watchInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-m.Done():
				return // the next call, or Refresh, watches on a new connection
			case e := <-events.Events():
				if e.Name != "BLOCK_IO_ERROR" && e.Name != "STOP" {
					continue
				}
			case <-tick.C:
			}
			if err := d.rescue(ctx, m, id); err != nil && ctx.Err() == nil {
				d.log.Error("rescue a guest that was stopped by its frozen copy; it will be tried again", "vm", id, "error", err)
			}
		}
	})
}

// watchInterval is how often the watcher looks without having been told.
const watchInterval = 500 * time.Millisecond

// rescue lets a guest go on that QEMU stopped for an I/O error while jobs of ours run: they go first. When it was not their
// fault, the guest is stopped again by its own error, and only the point is lost.
func (d *Driver) rescue(ctx context.Context, m *qmp.Monitor, id string) error {
	ctx, cancel := context.WithTimeout(ctx, afterwards)
	defer cancel()
	var status struct {
		Status string `json:"status"`
	}
	if err := m.Execute(ctx, "query-status", nil, &status); err != nil || status.Status != "io-error" {
		return err
	}
	s, err := observe(ctx, m)
	if err != nil || len(s.jobs) == 0 {
		return err
	}
	d.log.Warn("the frozen copy cannot be written, so QEMU stopped the guest: the copy is given up and the guest goes on", "vm", id)
	// The readers go first: without its job the copy shows what the guest writes from now on.
	if err := dropReaders(ctx, m); err != nil {
		return err
	}
	for _, j := range s.jobs {
		if err := m.Execute(ctx, "block-job-cancel", arguments{"device": j, "force": true}, nil); err != nil && !qmp.Refused(err) {
			return err
		}
	}
	err = poll(ctx, "jobs to end", func() (bool, error) {
		s, err := observe(ctx, m)
		return err == nil && !slices.ContainsFunc(s.jobs, ours), err
	})
	if err != nil {
		return err
	}
	// Without its job a copy shows what the guest writes next, and no error: its readers go before the guest does. A cut that
	// is under way and comes with an export later than this looks whether the jobs still run.
	if err := endExports(ctx, m); err != nil {
		return err
	}
	if err := dropReaders(ctx, m); err != nil { // a cut may have made exports meanwhile
		return err
	}
	return m.Execute(ctx, "cont", nil, nil)
}

// dropReaders removes our exports.
func dropReaders(ctx context.Context, m *qmp.Monitor) error {
	return poll(ctx, "exports to end", func() (bool, error) {
		var exports []exported
		if err := m.Execute(ctx, "query-block-exports", nil, &exports); err != nil {
			return false, err
		}
		gone := true
		for _, e := range exports {
			if !ours(e.ID) {
				continue
			}
			gone = false
			if e.Stopping {
				continue
			}
			if err := m.Execute(ctx, "block-export-del", arguments{"id": e.ID, "mode": "hard"}, nil); err != nil && !qmp.Refused(err) {
				return false, err
			}
		}
		return gone, nil
	})
}

// endExports removes every export of ours and waits until it is gone.
func endExports(ctx context.Context, m *qmp.Monitor) error {
	return poll(ctx, "exports to end", func() (bool, error) {
		s, err := observe(ctx, m)
		if err != nil {
			return false, err
		}
		left := false
		for _, e := range s.exports {
			if !ours(e.ID) {
				continue
			}
			left = true
			if e.Stopping {
				continue
			}
			if err := m.Execute(ctx, "block-export-del", arguments{"id": e.ID, "mode": "hard"}, nil); err != nil && !qmp.Refused(err) {
				return false, err
			}
		}
		return !left, nil
	})
}

// qcow2 layout: header, refcount table, refcount block, L1 table, each from a cluster of its own.
const (
	qcow2Cluster = 65536
	// qcow2L1 is what one entry of the L1 table covers: a cluster of L2 entries.
	qcow2L1 = qcow2Cluster / 8 * qcow2Cluster
)

// writeQcow2 makes an empty image without a backing file in its header: QEMU is told the backing node.
func writeQcow2(path string, size int64) error {
	entries := (size + qcow2L1 - 1) / qcow2L1
	clusters := 3 + (entries*8+qcow2Cluster-1)/qcow2Cluster
	if clusters > qcow2Cluster/2 {
		return fmt.Errorf("a disk of %d bytes is too large", size)
	}
	b := make([]byte, 3*qcow2Cluster)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 3)                         // version
	be.PutUint32(b[20:], 16)                       // cluster bits
	be.PutUint64(b[24:], uint64(size))             //nolint:gosec // positive
	be.PutUint32(b[36:], uint32(entries))          //nolint:gosec // bounded above
	be.PutUint64(b[40:], 3*qcow2Cluster)           // L1 table
	be.PutUint64(b[48:], qcow2Cluster)             // refcount table
	be.PutUint32(b[56:], 1)                        // its clusters
	be.PutUint32(b[96:], 4)                        // refcounts of 16 bits
	be.PutUint32(b[100:], 104)                     // length of this header
	be.PutUint64(b[qcow2Cluster:], 2*qcow2Cluster) // the refcount block
	for i := range clusters {
		be.PutUint16(b[2*qcow2Cluster+2*i:], 1)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Truncate(clusters*qcow2Cluster), f.Close())
}
