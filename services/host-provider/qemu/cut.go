package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

// granularity of the bitmaps in bytes: a bitmap takes 2 MiB of memory per TiB of disk.
const granularity = 65536

// Cut fixes one instant across all disks (design.md, "Cut").
func (d *Driver) Cut(ctx context.Context, c hostprovider.Cut) (hostprovider.CutResult, error) {
	h, err := d.hold(ctx, c.VM)
	if err != nil {
		return hostprovider.CutResult{}, err
	}
	defer h.release()
	if err := h.admit(c.Lineage, c.Epoch); err != nil {
		return hostprovider.CutResult{}, err
	}
	if o := h.rec.Open; o != nil && o.Phase == open {
		if o.Ordinal != c.Point || o.pass() {
			return hostprovider.CutResult{}, errOpen(o)
		}
		return h.again(ctx)
	}
	if err := h.fresh(c.Point); err != nil {
		return hostprovider.CutResult{}, err
	}
	if err := h.based(); err != nil {
		return hostprovider.CutResult{}, err
	}
	m, err := h.monitor(ctx)
	if err != nil {
		return hostprovider.CutResult{}, err
	}
	s, err := h.followed(ctx, m)
	if err != nil {
		return hostprovider.CutResult{}, reasoned(err, "look at machine %s", h.id)
	}
	if err := h.based(); err != nil { // it may have been found lost just now
		return hostprovider.CutResult{}, err
	}
	if what := h.rec.above(s); what != "" {
		return hostprovider.CutResult{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "machine %s: %s; it is waited for", h.id, what)
	}
	if err := h.room(s); err != nil {
		return hostprovider.CutResult{}, err
	}
	if err := h.cut(ctx, m, s, c); err != nil {
		return hostprovider.CutResult{}, reasoned(err, "cut point %d of machine %s", c.Point, h.id)
	}
	return h.result(), h.attach(ctx)
}

func errOpen(o *unsettled) error {
	what := "point"
	if o.pass() {
		what = "pass"
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_OPEN, "%s %d is open", what, o.Ordinal)
}

// again answers a repeated cut as the first was.
func (h *held) again(ctx context.Context) (hostprovider.CutResult, error) {
	if what := h.rec.Open.Broken; what != "" {
		return hostprovider.CutResult{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN, "point %d: %s", h.rec.Open.Ordinal, what)
	}
	return h.result(), h.attach(ctx)
}

func (h *held) result() hostprovider.CutResult {
	o := h.rec.Open
	return hostprovider.CutResult{Point: o.proto(), Consistency: o.Consistency, Degraded: errcat.FromDetail(o.Degraded)}
}

// based refuses when there is nothing that a point could follow.
func (h *held) based() error {
	switch r := h.rec; r.Reason {
	case none:
		return nil
	case initial:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED, "machine %s: %s", h.id, r.Detail)
	case lost, gap:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, "machine %s: %s: %s", h.id, r.Reason, r.Detail)
	default:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, "machine %s: %s", h.id, r.Detail)
	}
}

// room refuses to begin a copy that could not hold even a little. A copy never needs more than the disks, and seldom more
// than a little: only what the guest overwrites while the point is read. One that runs out of room costs the point alone.
func (h *held) room(s *seen) error {
	free, err := freeSpace(h.scratchDir())
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "scratch folder of machine %s", h.id)
	}
	var size int64
	for _, t := range h.rec.Disks {
		size += s.nodes[t.Node].size
	}
	if need := min(size, h.d.cfg.MinScratch); free < need {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE, "%s has %d bytes free, a point needs at least %d", h.scratchDir(), free, need)
	}
	return nil
}

// cut makes the point: intent, copies, the instant, exports, record.
func (h *held) cut(ctx context.Context, m *qmp.Monitor, s *seen, c hostprovider.Cut) (err error) {
	how, err := h.method(ctx, m)
	if err != nil {
		return err
	}
	var agent *qmp.Agent
	var degraded error
	if c.Consistency == typesv1.Consistency_CONSISTENCY_APPLICATION {
		if agent, degraded = h.greetAgent(ctx, m); agent != nil {
			defer func() { _ = agent.Close() }()
		}
	}
	generation := h.rec.Generation + 1
	err = h.update(func(r *record) {
		r.Generation, r.Freezing, r.Server = generation, r.Freezing || agent != nil, h.socketPath()
		r.Open = &unsettled{
			point: point{Ordinal: c.Point, Phase: making, Base: r.Base, Epoch: c.Epoch}, Old: r.Active, New: generation, Method: how,
		}
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			h.takeBack(ctx)
		}
	}()
	if err := h.serve(ctx, m); err != nil {
		return err
	}
	if err := h.prepare(ctx, m, s); err != nil {
		return err
	}
	h.flushImages(ctx)

	p := h.rec.Open.point
	thawed := false
	if agent != nil {
		var ice *frozen
		ice, degraded = h.freeze(ctx, agent)
		p.Cut, p.Pause, err = h.instant(ctx, m)
		lasted, thawErr := ice.thaw(ctx)
		if degraded == nil && !lasted {
			degraded = errors.Join(errNotFrozen, thawErr)
		}
		if thawed = thawErr == nil; !thawed {
			h.d.log.ErrorContext(ctx, "thaw the guest; it will be tried again", "vm", h.id, "error", thawErr)
			h.thawLater()
		}
	} else {
		p.Cut, p.Pause, err = h.instant(ctx, m)
	}
	if err != nil {
		return err
	}
	if err := h.exportFrozen(ctx, m); err != nil {
		return err
	}
	now, err := observe(ctx, m)
	if err != nil {
		return err
	}
	if what := h.brokenCopy(now); what != "" {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN, "%s", what)
	}
	if what := h.brokenCopy(now); what != "" { // given up while the exports were made
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN, "point %d: %s", c.Point, what)
	}
	reached := typesv1.Consistency_CONSISTENCY_CRASH
	if c.Consistency == typesv1.Consistency_CONSISTENCY_APPLICATION && degraded == nil {
		reached = typesv1.Consistency_CONSISTENCY_APPLICATION
	}
	defer func() {
		if err == nil {
			h.watchRoom()
		}
	}()
	return h.update(func(r *record) {
		r.Freezing = r.Freezing && !thawed
		p.Phase = open
		for _, t := range r.Disks {
			b := now.nodes[t.Node].bitmaps[r.bitmap(r.Open.Old)]
			p.Disks = append(p.Disks, diskSize{Disk: t.ID, Size: t.Size, Change: min(b.Count, t.Size)})
		}
		r.Open.point, r.Open.Consistency, r.Open.Degraded = p, reached, errcat.Detail(asDegraded(degraded), h.d.now())
	})
}

// asDegraded gives a reason to what kept a point from being application-consistent.
func asDegraded(err error) error {
	if err == nil || errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED) {
		return err
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "the guest could not be frozen: %v", err)
}

// thawLater goes on thawing a guest that did not answer: Refresh does too, but not soon enough.
func (h *held) thawLater() {
	socket, id, d := h.machine.AgentSocket, h.id, h.d
	if d.effect("thaw-later") != nil {
		return
	}
	d.watchers.Go(func() {
		ctx, cancel := context.WithTimeout(d.closing, 12*afterwards)
		defer cancel()
		n, err := thaw(ctx, socket)
		d.log.Warn("thawed the guest late", "vm", id, "file_systems", n, "error", err)
	})
}

// takeBack undoes a cut or begin that failed. What it cannot do now is done by the next call: the record says MAKING.
func (h *held) takeBack(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	if err := h.update((*record).undo); err != nil {
		h.d.log.ErrorContext(ctx, "undo what failed; it will be tried again", "vm", h.id, "error", err)
		return
	}
	h.followSoon(ctx)
}

// method chooses how the frozen copy is made, by what this QEMU says it can do.
func (h *held) method(ctx context.Context, m *qmp.Monitor) (method, error) {
	if h.d.cfg.ForceBackupJob {
		return byJob, nil
	}
	schema, err := m.Schema(ctx)
	if err != nil {
		return "", err
	}
	switch {
	case schema.BlockDriver("copy-before-write", "on-cbw-error", "cbw-timeout") && schema.BlockDriver("snapshot-access") &&
		schema.Command("blockdev-reopen"):
		return byFilter, nil
	case schema.Argument("blockdev-backup", "filter-node-name"):
		return byJob, nil
	}
	return "", errcat.New(typesv1.ErrorReason_ERROR_REASON_UNIMPLEMENTED,
		"machine %s: QEMU %s can make no frozen copy of a disk: version 4.2 or newer is needed", h.id, m.Version())
}

// prepare makes scratch files and nodes. The guest's writes pass through a node of ours from here on, which changes nothing
// until the instant.
func (h *held) prepare(ctx context.Context, m *qmp.Monitor, s *seen) error {
	if h.rec.Open.Method == byJob {
		return h.prepareJobs(ctx, m)
	}
	o := h.rec.Open
	for i, t := range h.rec.Disks {
		path := h.scratchPath(o.New, i)
		if err := h.makeScratch(path, t.Size); err != nil {
			return err
		}
		for _, args := range []arguments{
			{
				"driver": "raw", "node-name": name(scratchNode, o.New, i), "size": t.Size,
				"file": arguments{"driver": "file", "filename": path},
			},
			{
				"driver": "copy-before-write", "node-name": name(filterNode, o.New, i), "file": t.Node, "target": name(scratchNode, o.New, i),
				"on-cbw-error": "break-snapshot", "cbw-timeout": max(1, int(h.d.cfg.CopyTimeout/time.Second)),
			},
			{"driver": "raw", "node-name": name(topNode, o.New, i), "file": t.Node},
		} {
			if err := h.do(ctx, m, "blockdev-add", args); err != nil {
				return fmt.Errorf("prepare the copy of disk %s: %w", t.ID, err)
			}
		}
	}
	for i, t := range h.rec.Disks {
		device, ok := s.device(t.Device)
		if !ok {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "disk %s: no device %s", t.ID, t.Device)
		}
		if err := h.do(ctx, m, "qom-set", arguments{"path": device, "property": "drive", "value": name(topNode, o.New, i)}); err != nil {
			return fmt.Errorf("put a filter under disk %s: %w", t.ID, err)
		}
	}
	return nil
}

// device is the QOM path that has the drive, which for virtio is a part of the device.
func (s *seen) device(device string) (string, bool) {
	for _, f := range s.fronts {
		if f.device == device || strings.HasPrefix(f.device, device+"/") {
			return f.device, true
		}
	}
	return "", false
}

// makeScratch makes an empty sparse file. Whoever may read the disk may read it.
func (h *held) makeScratch(path string, size int64) error {
	if err := h.d.effect("make-scratch"); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN, err, "make scratch file")
	}
	return nil
}

// flushImages writes out what the host caches of the images: QEMU flushes them while it holds the guest's writes, and has
// little left to do then. Images that cannot be opened here are QEMU's to flush.
func (h *held) flushImages(ctx context.Context) {
	var all sync.WaitGroup
	for _, t := range h.rec.Disks {
		if t.Path == "" {
			continue
		}
		all.Go(func() {
			f, err := os.Open(t.Path)
			if err == nil {
				err = errors.Join(f.Sync(), f.Close())
			}
			if err != nil {
				h.d.log.DebugContext(ctx, "flush an image before the cut", "vm", h.id, "disk", t.ID, "error", err)
			}
		})
	}
	all.Wait()
}

// instant is the cut: new bitmaps, then all filters at once, then the old bitmaps stop. Both record across the instant, so
// each may only have too much; what is read comes from the copy. It returns when the instant was, at the latest the moment
// before the switch, and how long writes were held.
func (h *held) instant(ctx context.Context, m *qmp.Monitor) (time.Time, time.Duration, error) {
	all := make([]int, len(h.rec.Disks))
	for i := range all {
		all[i] = i
	}
	if !h.d.cfg.UnsafeOneTransactionPerDisk {
		return h.instantOf(ctx, m, all)
	}
	var cut time.Time
	var pause time.Duration
	for _, i := range all {
		at, p, err := h.instantOf(ctx, m, []int{i})
		if err != nil {
			return at, p, err
		}
		cut, pause = at, pause+p
	}
	return cut, pause, nil
}

func (h *held) instantOf(ctx context.Context, m *qmp.Monitor, disks []int) (time.Time, time.Duration, error) {
	r, o := h.rec, h.rec.Open
	var begin, end, options []any
	for _, i := range disks {
		t := r.Disks[i]
		begin = append(begin, action("block-dirty-bitmap-add", arguments{"node": t.Node, "name": r.bitmap(o.New), "granularity": granularity, "persistent": false}))
		end = append(end, action("block-dirty-bitmap-disable", arguments{"node": t.Node, "name": r.bitmap(o.Old)}))
		options = append(options, arguments{"driver": "raw", "node-name": name(topNode, o.New, i), "file": name(filterNode, o.New, i)})
	}
	var cut time.Time
	var pause time.Duration
	if o.Method == byJob {
		var err error
		if cut, pause, err = h.instantOfJobs(ctx, m, disks, begin); err != nil {
			return time.Time{}, 0, err
		}
	} else {
		if err := h.do(ctx, m, "transaction", arguments{"actions": begin}); err != nil {
			return time.Time{}, 0, fmt.Errorf("begin new bitmaps: %w", err)
		}
		start := time.Now() //nolint:forbidigo // a measurement
		cut = h.d.now().UTC()
		if err := h.do(ctx, m, "blockdev-reopen", arguments{"options": options}); err != nil {
			return time.Time{}, 0, fmt.Errorf("switch all disks to their filters: %w", err)
		}
		pause = time.Since(start) //nolint:forbidigo // as above
	}
	if err := h.do(ctx, m, "transaction", arguments{"actions": end}); err != nil {
		return time.Time{}, 0, fmt.Errorf("end old bitmaps: %w", err)
	}
	return cut, pause, nil
}

// exportFrozen exports the frozen copies with the bitmaps of what changed.
func (h *held) exportFrozen(ctx context.Context, m *qmp.Monitor) error {
	o := h.rec.Open
	for i := range h.rec.Disks {
		read := name(scratchNode, o.New, i)
		if o.Method == byFilter {
			read = name(accessNode, o.New, i)
			args := arguments{"driver": "snapshot-access", "node-name": read, "file": name(filterNode, o.New, i)}
			if err := h.do(ctx, m, "blockdev-add", args); err != nil {
				return fmt.Errorf("open the frozen copy: %w", err)
			}
		}
		if err := h.export(ctx, m, i, read, h.rec.bitmap(o.Old)); err != nil {
			return err
		}
	}
	return nil
}
