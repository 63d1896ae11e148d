package qemu

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// probeTimeout bounds the look whether an NBD server answers.
const probeTimeout = time.Second

// serverAnswers reports whether an NBD server answers at the path. The path is this machine's alone and QEMU has one NBD
// server, so one that answers there is the one that we started; nothing else tells ours from a foreign one.
func serverAnswers(path string) bool {
	conn, err := net.DialTimeout("unix", path, probeTimeout)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(probeTimeout)) //nolint:forbidigo // a socket's deadline is by the real clock
	magic := make([]byte, 8)
	_, err = io.ReadFull(conn, magic)
	return err == nil && string(magic) == "NBDMAGIC"
}

// serve starts the NBD server if it does not run. The record names its path already.
func (h *held) serve(ctx context.Context, m *qmp.Monitor) error {
	if serverAnswers(h.rec.Server) {
		return nil
	}
	err := h.do(ctx, m, "nbd-server-start", arguments{"addr": arguments{"type": "unix", "data": arguments{"path": h.rec.Server}}})
	if qmp.Refused(err) && !serverAnswers(h.rec.Server) {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID, err,
			"machine %s: QEMU has one NBD server, and another program has started it; it is left alone", h.id)
	}
	if qmp.Refused(err) {
		return nil
	}
	return err
}

// stopServer stops our NBD server, so that other programs can have theirs. One that serves other programs too is left.
//
// served says that exports of ours were just removed: they were on no server but ours, so it is known even when its socket was
// deleted, or the record lost.
func (h *held) stopServer(ctx context.Context, m *qmp.Monitor, served bool) (bool, error) {
	path := h.rec.Server
	if path == "" {
		path = h.socketPath()
	}
	if _, err := os.Lstat(path); !served && (err != nil || !serverAnswers(path)) {
		return false, nil
	}
	var exports []exported
	if err := m.Execute(ctx, "query-block-exports", nil, &exports); err != nil {
		return false, err
	}
	if slices.ContainsFunc(exports, func(e exported) bool { return !ours(e.ID) }) {
		h.d.log.InfoContext(ctx, "the NBD server stays: another program has an export on it", "vm", h.id)
		return false, nil
	}
	if err := h.do(ctx, m, "nbd-server-stop", nil); err != nil && !qmp.Refused(err) {
		return false, fmt.Errorf("stop the NBD server: %w", err)
	}
	_ = os.Remove(path) // QEMU may have done it
	return true, nil
}

// export makes one export of ours.
func (h *held) export(ctx context.Context, m *qmp.Monitor, i int, node string, bitmap string) error {
	o, t := h.rec.Open, h.rec.Disks[i]
	args := arguments{
		"type": "nbd", "id": name(exportID, o.New, i), "node-name": node, "name": exportName(o.New, t.ID), "writable": false,
	}
	switch {
	case bitmap == "":
	case o.Method == byJob:
		args["bitmaps"] = []any{bitmap} // older QEMUs take names only, and find it in the backing chain
	default:
		args["bitmaps"] = []any{arguments{"node": t.Node, "name": bitmap}}
	}
	if err := h.do(ctx, m, "block-export-add", args); err != nil {
		return fmt.Errorf("export disk %s: %w", t.ID, err)
	}
	return nil
}

// filterCluster is the unit in which copy-before-write copies, at least: a raw target names none. A read of the frozen copy
// that spans copied and uncopied clusters gets wrong data from QEMU 7.2, without an error; one within a cluster is right.
const filterCluster = 64 << 10

// source is what the change-tracker needs to read the open point or pass.
func (h *held) source() *changetrackerv1.AttachSourceRequest {
	r, o := h.rec, h.rec.Open
	out := &changetrackerv1.AttachSourceRequest{Vm: h.id, Lineage: r.Lineage, Ordinal: o.Ordinal, Epoch: o.Epoch, Scope: o.Scope}
	for _, t := range r.Disks {
		uri := url.URL{
			Scheme: "nbd+unix", Path: "/" + exportName(o.New, t.ID), RawQuery: url.Values{"socket": {r.Server}}.Encode(), OmitHost: false,
		}
		d := &changetrackerv1.ExportedDisk{Disk: t.ID, SizeBytes: t.Size, Uri: "nbd+unix://" + uri.EscapedPath() + "?" + uri.RawQuery}
		if o.pass() {
			d.Allocation = t.Map
		} else {
			d.ChangeContext = "qemu:dirty-bitmap:" + r.bitmap(o.Old)
			if o.Method == byFilter {
				d.ReadUnitBytes = filterCluster
			}
		}
		out.Disks = append(out.Disks, d)
	}
	return out
}

// attach gives the change-tracker the source of what is open. It is repeated by every Refresh, since the change-tracker may
// have been restarted, or replaced.
func (h *held) attach(ctx context.Context) error {
	o := h.rec.Open
	if o == nil || o.Phase != open || o.Broken != "" {
		return nil
	}
	if err := h.d.effect("attach"); err != nil {
		return err
	}
	r, err := h.d.tracker.AttachSource(ctx, h.source())
	if err != nil {
		return err
	}
	if err := h.d.effect("attach-done"); err != nil {
		return err
	}
	if !o.pass() {
		return nil // the bitmaps were counted at the cut
	}
	sizes := map[string]int64{}
	for _, d := range r.Disks {
		sizes[d.Disk] = d.ChangeBytes
	}
	// Only in memory: what is not known again is asked for again.
	c := h.rec.clone()
	for i := range c.Open.Disks {
		if n, ok := sizes[c.Open.Disks[i].Disk]; ok {
			c.Open.Disks[i].Change = n
		}
	}
	h.rec = c
	return nil
}

// detach tells the change-tracker to forget. A source that it keeps can only fail its readers, and the next one replaces it.
func (h *held) detach(ctx context.Context, lineage string, ordinal uint64) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	if h.d.effect("detach") != nil {
		return
	}
	_, err := h.d.tracker.DetachSource(ctx, &changetrackerv1.DetachSourceRequest{Vm: h.id, Lineage: lineage, Ordinal: ordinal})
	if err != nil {
		h.d.log.WarnContext(ctx, "the change-tracker was not told that a source ended", "vm", h.id, "ordinal", ordinal, "error", err)
	}
}
