package qemu

import (
	"context"
	"regexp"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

// vm is one machine's record and the lock that every change of it, and of its QEMU, is made under.
type vm struct {
	id   string
	lock chan struct{} // holds one

	// rec is replaced as a whole by update, under lock.
	rec *record
	// stopWatch ends the watcher of a point made by a job; nil when none runs.
	stopWatch func()
	// roomWatched is the generation whose frozen copy is watched for room.
	roomWatched uint64
	// thawTried is when the agent was last asked to thaw what may have been left frozen.
	thawTried time.Time
	// watched is the connection that the watcher uses.
	watched *qmp.Monitor
}

// held is a machine under its lock.
type held struct {
	d *Driver
	*vm
	// machine as the inventory has it now; nil when it has none and only the record is there.
	machine *inventory.Machine
	release func()
}

var vmID = regexp.MustCompile(`^[0-9a-f-]{1,64}$`)

// hold takes the lock of a machine. The caller calls release. The machine must be in the inventory.
func (d *Driver) hold(ctx context.Context, id string) (*held, error) {
	id = strings.ToLower(id)
	m, err := d.inv.Lookup(id)
	if err != nil {
		return nil, err
	}
	h, err := d.holdRecord(ctx, id)
	if err != nil {
		return nil, err
	}
	h.machine = m
	return h, nil
}

// holdRecord is hold for a machine that may be gone from the inventory.
func (d *Driver) holdRecord(ctx context.Context, id string) (*held, error) {
	if !vmID.MatchString(id) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "%q is no machine id", id)
	}
	d.mu.Lock()
	v := d.vms[id]
	if v == nil {
		v = &vm{id: id, lock: make(chan struct{}, 1)}
		d.vms[id] = v
	}
	d.mu.Unlock()
	select {
	case v.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, ctx.Err(), "machine %s is busy with another call", id)
	}
	h := &held{d: d, vm: v, release: func() { <-v.lock }}
	if v.rec == nil {
		r, err := loadRecord(d.cfg.StateDir, id)
		if err != nil {
			h.release()
			return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN, err, "record of machine %s", id)
		}
		v.rec = r
	}
	return h, nil
}

// update changes the record durably. change works on a copy; when the copy cannot be written the record stays as it was.
//
// A replaced file whose rename did not become durable is no harm: every step that follows a record is repeated from
// whichever record is found, and nothing is answered before update returned.
func (h *held) update(change func(*record)) error {
	c := h.rec.clone()
	change(c)
	if err := h.d.effect("save-record"); err != nil {
		return err
	}
	if err := saveRecord(h.d.cfg.StateDir, c); err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "write the record of machine %s", h.id)
	}
	h.rec = c
	return h.d.effect("save-record-done")
}

// effect is called around everything that changes something outside this process, so that tests can end the driver there.
func (d *Driver) effect(name string) error {
	if d.step != nil {
		if err := d.step(name); err != nil {
			return err
		}
	}
	return failpoint.Hit("host-provider/qemu-" + name)
}

// do executes a command that changes something in QEMU.
func (h *held) do(ctx context.Context, m *qmp.Monitor, command string, args any) error {
	if err := h.d.effect(command); err != nil {
		return err
	}
	if err := m.Execute(ctx, command, args, nil); err != nil {
		return err
	}
	return h.d.effect(command + "-done")
}

// arguments of a QMP command.
type arguments = map[string]any

// admit checks lineage and epoch, and makes a higher epoch durable (rule 4).
func (h *held) admit(lineage string, epoch uint64) error {
	r := h.rec
	switch {
	case r.Lineage == "":
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED, "machine %s is not tracked", h.id)
	case r.Lineage != lineage:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH, "machine %s is tracked for %s, the call names %s", h.id, r.Lineage, lineage)
	case epoch < r.Epoch:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH, "epoch %d, the highest seen is %d", epoch, r.Epoch)
	case epoch > r.Epoch:
		return h.update(func(r *record) { r.Epoch = epoch })
	}
	return nil
}

// fresh refuses an ordinal that was met before.
func (h *held) fresh(ordinal uint64) error {
	r := h.rec
	if p, ok := r.outcome(ordinal); ok {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "ordinal %d is %s", ordinal, p.Phase)
	}
	if limit := max(r.Base, r.Floor); ordinal <= limit {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "ordinal %d is not above %d", ordinal, limit)
	}
	return nil
}

// monitor returns the machine's connection. Errors have the reason HYPERVISOR_UNREACHABLE.
func (h *held) monitor(ctx context.Context) (*qmp.Monitor, error) {
	if h.machine == nil {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, "machine %s is not in the inventory", h.id)
	}
	return h.d.pool.Get(ctx, h.machine.QMPSocket)
}

// reasoned gives an error without a reason one that says: try again. A command that QEMU refused although everything was
// looked at before is such a one: somebody else changed something in between.
func reasoned(err error, format string, args ...any) error {
	if err == nil || errcat.Reason(err) != typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		return err
	}
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, format, args...)
}
