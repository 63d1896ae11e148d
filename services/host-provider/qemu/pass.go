package qemu

import (
	"context"
	"fmt"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

// BeginPass begins fresh bitmaps on all disks in one transaction and exports the disks live (design.md, "Pass"). What was
// recorded before goes: FULL and COMPARE look at everything.
func (d *Driver) BeginPass(ctx context.Context, p hostprovider.Pass) (*typesv1.HostPoint, error) {
	h, err := d.hold(ctx, p.VM)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if err := h.admit(p.Lineage, p.Epoch); err != nil {
		return nil, err
	}
	if o := h.rec.Open; o != nil && o.Phase == open {
		if o.Ordinal != p.Pass || o.Scope != p.Scope {
			return nil, errOpen(o)
		}
		if err := h.attach(ctx); err != nil {
			return nil, err
		}
		return h.rec.Open.proto(), nil
	}
	if err := h.fresh(p.Pass); err != nil {
		return nil, err
	}
	if p.Scope == typesv1.PassScope_PASS_SCOPE_DIRTY {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "driver qemu has no ranges that are dirty without data: take a FULL or a COMPARE pass")
	}
	if err := h.machine.Problem; err != nil {
		return nil, err
	}
	m, err := h.monitor(ctx)
	if err != nil {
		return nil, err
	}
	s, err := h.followed(ctx, m)
	if err != nil {
		return nil, reasoned(err, "look at machine %s", h.id)
	}
	disks, err := h.disks(ctx, m, s)
	if err != nil {
		return nil, err
	}
	if err := h.begin(ctx, m, p, disks); err != nil {
		return nil, reasoned(err, "begin pass %d of machine %s", p.Pass, h.id)
	}
	if err := h.attach(ctx); err != nil {
		return nil, err
	}
	return h.rec.Open.proto(), nil
}

// disks are the machine's disks as QEMU has them now.
func (h *held) disks(ctx context.Context, m *qmp.Monitor, s *seen) ([]tracked, error) {
	invalid := func(format string, args ...any) error {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, "machine %s: %s", h.id, fmt.Sprintf(format, args...))
	}
	if len(h.machine.Disks) == 0 {
		return nil, invalid("it has no disk")
	}
	var out []tracked
	for _, d := range h.machine.Disks {
		n := s.nodes[d.Node]
		if n == nil {
			return nil, invalid("disk %s: QEMU has no node %q", d.ID, d.Node)
		}
		root, ok := s.root(d.Device)
		if !ok {
			return nil, invalid("disk %s: the guest has no device %s with a medium", d.ID, d.Device)
		}
		if top := s.nodes[root]; root != d.Node && top != nil && filters[top.driver] {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "machine %s: another program has node %q over disk %s; it is waited for", h.id, root, d.ID)
		}
		if root != d.Node {
			return nil, invalid("disk %s: the guest writes to node %q, not to %q", d.ID, root, d.Node)
		}
		thread, err := iothread(ctx, m, d.Device)
		if err != nil {
			return nil, err
		}
		if thread != "" {
			return nil, invalid("disk %s is served by the iothread %s, and QEMU %s would end when it is read: use QEMU %d or newer, or a device without iothread",
				d.ID, thread, m.Version(), safeIOThread)
		}
		out = append(out, tracked{ID: d.ID, Node: d.Node, Device: d.Device, Size: n.size, Path: d.Path, Map: n.driver != "vhdx"})
	}
	return out, nil
}

// begin makes the pass: the decision to drop what was recorded, fresh bitmaps, exports, record.
func (h *held) begin(ctx context.Context, m *qmp.Monitor, p hostprovider.Pass, disks []tracked) (err error) {
	generation := h.rec.Generation + 1
	err = h.update(func(r *record) {
		r.Generation, r.Active, r.Server, r.Disks = generation, 0, h.socketPath(), disks
		r.Open = &unsettled{
			point: point{Ordinal: p.Pass, Phase: making, Scope: p.Scope, Base: r.Base, Epoch: p.Epoch}, New: generation,
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
	s, err := observe(ctx, m)
	if err != nil {
		return err
	}
	if _, err := h.clean(ctx, m, s); err != nil { // the record has no use for older bitmaps any more
		return err
	}
	if err := h.serve(ctx, m); err != nil {
		return err
	}
	var add []any
	for _, t := range disks {
		add = append(add, action("block-dirty-bitmap-add", arguments{"node": t.Node, "name": h.rec.bitmap(generation), "granularity": granularity, "persistent": false}))
	}
	if err := h.do(ctx, m, "transaction", arguments{"actions": add}); err != nil {
		return fmt.Errorf("begin bitmaps: %w", err)
	}
	if err := h.exportLive(ctx, m, s); err != nil {
		return err
	}
	return h.update(func(r *record) {
		r.Open.Phase = open
		for _, t := range r.Disks {
			r.Open.Disks = append(r.Open.Disks, diskSize{Disk: t.ID, Size: t.Size, Change: t.Size})
		}
	})
}

// exportLive exports the disks as they are, those that are not exported yet.
func (h *held) exportLive(ctx context.Context, m *qmp.Monitor, s *seen) error {
	for i, t := range h.rec.Disks {
		want := name(exportID, h.rec.Open.New, i)
		there := false
		for _, e := range s.exports {
			there = there || e.ID == want
		}
		if there {
			continue
		}
		if err := h.export(ctx, m, i, t.Node, ""); err != nil {
			return err
		}
	}
	return nil
}
