package qemu

import (
	"cmp"
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

const (
	// agentWait is how long the guest agent is given: it is silent when it does what it is asked.
	agentWait = 2 * time.Second
	// stopWait is how long Stop waits for a guest that was asked to power down; the caller asks again.
	stopWait = 4 * time.Second
	// pressAgain is when a power button is taken as lost: one that is pressed before the guest listens leaves no trace.
	pressAgain = 10 * time.Second
	// quitWait is how long a QEMU may take to end: it flushes its disks.
	quitWait = 20 * time.Second
	// lookAgain is the pause between two questions while something is waited for.
	lookAgain = 50 * time.Millisecond
)

// errAnswers: a monitor that did not answer does now. The caller asks again.
var errAnswers = errors.New("its monitor answers again")

// power is what Stop and Start remember in memory. The fence itself is in the record.
type power struct {
	mu      sync.Mutex
	fences  map[string]string // by machine, as in the records that were read
	presses map[string]press
	told    map[string]bool // fenced machines that were reported to run
}

// press is the newest power button of a machine.
type press struct {
	at    time.Time
	count int
}

// fence is the failover that holds a machine; empty when none does. It does not wait for a call that changes the machine.
func (d *Driver) fence(id string) string {
	d.power.mu.Lock()
	defer d.power.mu.Unlock()
	if f, ok := d.power.fences[id]; ok {
		return f
	}
	r, err := loadRecord(d.cfg.StateDir, id)
	if err != nil {
		d.log.Warn("the record is unreadable, so a fence cannot be told", "vm", id, "error", err)
		return ""
	}
	d.power.keep(id, r.Fence)
	return r.Fence
}

// keep needs p.mu.
func (p *power) keep(id, fence string) {
	if p.fences == nil {
		p.fences = map[string]string{}
	}
	p.fences[id] = fence
}

func (p *power) set(id, fence string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keep(id, fence)
	delete(p.presses, id)
}

// fence makes the fence durable, or lifts it.
func (h *held) fence(failover string) error {
	if h.rec.Fence == failover {
		return nil
	}
	if err := h.update(func(r *record) { r.Fence = failover }); err != nil {
		return err
	}
	h.d.power.set(h.id, failover)
	return nil
}

// permit checks a call that names a failover. A machine that is not tracked, for example because the host lost its records,
// can be fenced all the same: that only ever stops it.
func (h *held) permit(f hostprovider.Fence) error {
	if h.rec.Lineage != "" {
		if err := h.admit(f.Lineage, f.Epoch); err != nil {
			return err
		}
	}
	if h.rec.Fence != "" && h.rec.Fence != f.Failover {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED, "machine %s is fenced by %s", h.id, h.rec.Fence).With("failover", h.rec.Fence)
	}
	return nil
}

// watchFences reports machines that somebody started although a failover holds them. They are not stopped here: the
// scheduler calls Stop as long as the failover wants it.
func (d *Driver) watchFences(ctx context.Context) {
	for _, m := range d.inv.All() {
		fence := d.fence(m.ID)
		runs := fence != "" && m.Description.GetPowerState() == typesv1.PowerState_POWER_STATE_RUNNING
		d.power.mu.Lock()
		told := d.power.told[m.ID]
		if d.power.told == nil {
			d.power.told = map[string]bool{}
		}
		d.power.told[m.ID] = runs
		d.power.mu.Unlock()
		if runs && !told {
			d.log.WarnContext(ctx, "a fenced machine runs: its disks and the recovered machine's part ways", "vm", m.ID, "name", m.Name, "failover", fence)
		}
	}
}

// Stop fences a machine, durably, and presses its power button. The QEMU is told to outlive its guest, because the bitmaps of
// the last point are in it. A button that has no effect is pressed again, and then the guest agent is asked too.
//
// OFF is answered when it is sure: the guest powered down, or QEMU is gone and nobody else has the disks open.
func (d *Driver) Stop(ctx context.Context, f hostprovider.Fence) (typesv1.PowerState, error) {
	h, err := d.hold(ctx, f.VM)
	if err != nil {
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED, err
	}
	released := false
	release := func() {
		if !released {
			released = true
			h.release()
		}
	}
	defer release()
	if err := h.permit(f); err != nil {
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED, err
	}
	if err := h.fence(f.Failover); err != nil {
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED, err
	}
	m, state, err := h.power(ctx)
	if err != nil || state == typesv1.PowerState_POWER_STATE_OFF {
		return state, err
	}
	if err := setAction(ctx, m, "shutdown", "pause"); err != nil {
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED, err
	}
	if state == typesv1.PowerState_POWER_STATE_PAUSED {
		return state, nil // a stopped guest cannot hear; it is not continued, because that would let it write
	}
	if n, due := d.power.due(h.id, d.now()); due {
		if err := m.Execute(ctx, "system_powerdown", nil, nil); err != nil {
			return typesv1.PowerState_POWER_STATE_UNSPECIFIED, unknown(err, "press the power button")
		}
		d.log.InfoContext(ctx, "power button pressed", "vm", h.id, "failover", f.Failover, "times", n)
		if n > 1 {
			h.askAgent(ctx)
		}
	}
	release() // a guest takes its time; others may look at the machine meanwhile
	return h.awaitOff(ctx)
}

// due says whether the power button is to be pressed now, and the how-manieth time it is.
func (p *power) due(id string, now time.Time) (int, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := p.presses[id]
	if last.count > 0 && now.Sub(last.at) < pressAgain {
		return last.count, false
	}
	if p.presses == nil {
		p.presses = map[string]press{}
	}
	p.presses[id] = press{at: now, count: last.count + 1}
	return last.count + 1, true
}

// askAgent is the second means of a shutdown. It may fail: the button stays.
func (h *held) askAgent(ctx context.Context) {
	if h.machine.AgentSocket == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, agentWait)
	defer cancel()
	a, err := qmp.DialAgent(ctx, h.machine.AgentSocket)
	if err == nil {
		err = errors.Join(a.Shutdown(ctx), a.Close())
	}
	if err != nil {
		h.d.log.WarnContext(ctx, "ask the guest agent for a shutdown", "vm", h.id, "error", err)
		return
	}
	h.d.log.InfoContext(ctx, "guest agent asked for a shutdown", "vm", h.id)
}

// awaitOff waits for at most stopWait, and less when the caller has less time.
func (h *held) awaitOff(ctx context.Context) (typesv1.PowerState, error) {
	limit := time.Now().Add(stopWait) //nolint:forbidigo // the caller's deadline is by the real clock
	if end, ok := ctx.Deadline(); ok && end.Add(-time.Second).Before(limit) {
		limit = end.Add(-time.Second)
	}
	for {
		_, state, err := h.power(ctx)
		if err != nil || state == typesv1.PowerState_POWER_STATE_OFF || time.Until(limit) <= 0 { //nolint:forbidigo // as above
			return state, err
		}
		if err := pause(ctx, lookAgain); err != nil {
			return state, nil //nolint:nilerr // the state is the answer; the caller asks again
		}
	}
}

// power is the guest's state now. A QEMU that is surely gone is OFF, without a monitor.
func (h *held) power(ctx context.Context) (*qmp.Monitor, typesv1.PowerState, error) {
	m, status, err := h.runState(ctx)
	if err != nil {
		if gone := h.gone(ctx, err); gone != nil {
			return nil, typesv1.PowerState_POWER_STATE_UNSPECIFIED, gone
		}
		return nil, typesv1.PowerState_POWER_STATE_OFF, nil
	}
	return m, inventory.PowerState(status), nil
}

// runState asks on a live connection. One that breaks is asked anew once: QEMU may have been restarted.
func (h *held) runState(ctx context.Context) (m *qmp.Monitor, status string, err error) {
	var s struct{ Status string }
	for range 2 {
		if m, err = h.monitor(ctx); err != nil {
			return nil, "", err
		}
		if err = m.Execute(ctx, "query-status", nil, &s); err == nil {
			return m, s.Status, nil
		}
		if qmp.Refused(err) || ctx.Err() != nil {
			break
		}
		select {
		case <-m.Done():
		default: // it hangs: a new connection would not help
			return nil, "", unknown(err, "ask for the guest's state")
		}
	}
	return nil, "", unknown(err, "ask for the guest's state")
}

// gone returns nil when the machine's process is surely gone: its monitor's socket refuses connections, or is not there and
// no disk is open for writing. Otherwise it returns why that is not known.
func (h *held) gone(ctx context.Context, cause error) error {
	if h.machine == nil || ctx.Err() != nil {
		return unknown(cause, "ask for the guest's state")
	}
	refused, absent := errors.Is(cause, syscall.ECONNREFUSED), errors.Is(cause, os.ErrNotExist)
	if !refused && !absent {
		return unknown(cause, "ask for the guest's state")
	}
	h.d.pool.Forget(h.machine.QMPSocket) // the failure may be a remembered one
	if _, err := h.monitor(ctx); !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
		return unknown(cmp.Or(err, errAnswers), "ask for the guest's state")
	}
	checked := 0
	for _, k := range h.machine.Disks {
		writer, err := openForWriting(k.Path)
		switch {
		case err != nil:
		case writer:
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE,
				"nothing listens at %s, but a process has disk %s (%s) open for writing", h.machine.QMPSocket, k.ID, k.Path)
		default:
			checked++
		}
	}
	if absent && (checked == 0 || checked < len(h.machine.Disks)) {
		return unknown(cause, "the monitor's socket is gone, and whether a process still has the disks open cannot be seen")
	}
	return nil
}

// unknown gives an error that has no reason yet HYPERVISOR_UNREACHABLE.
func unknown(err error, what string) error {
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, err, "%s", what)
}

// setAction says what QEMU does at an event of its guest. A QEMU before 6.0 has no choice; that was a finding of the checks.
func setAction(ctx context.Context, m *qmp.Monitor, event, action string) error {
	err := m.Execute(ctx, "set-action", arguments{event: action}, nil)
	var refused *qmp.CommandError
	if errors.As(err, &refused) && refused.Class == "CommandNotFound" {
		return nil
	}
	if err != nil {
		return unknown(err, "set what QEMU does when its guest ends")
	}
	return nil
}

// Release ends the QEMU of a fenced machine that is off. What its bitmaps knew goes with it, and the record says so first.
func (d *Driver) Release(ctx context.Context, f hostprovider.Fence) error {
	h, err := d.hold(ctx, f.VM)
	if err != nil {
		return err
	}
	defer h.release()
	if err := h.permit(f); err != nil {
		return err
	}
	if h.rec.Fence == "" {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "machine %s is not fenced: only a stopped machine is released", h.id)
	}
	m, state, err := h.power(ctx)
	if err != nil {
		return err
	}
	if state != typesv1.PowerState_POWER_STATE_OFF {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "the guest of machine %s is %s", h.id, stateName(state))
	}
	if m == nil {
		return nil
	}
	if o := h.rec.Open; o != nil && o.Phase == open && o.Broken == "" {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "ordinal %d of machine %s is open: its data is read from the machine's QEMU", o.Ordinal, h.id)
	}
	if h.rec.Active != 0 {
		if err := h.update(func(r *record) { r.lose(lost, "the machine was released for %s", f.Failover) }); err != nil {
			return err
		}
	}
	if err := m.Execute(ctx, "quit", nil, nil); err != nil && qmp.Refused(err) {
		return unknown(err, "end QEMU")
	}
	return h.awaitGone(ctx, m)
}

// awaitGone waits until the QEMU that was told to quit has ended.
func (h *held) awaitGone(ctx context.Context, m *qmp.Monitor) error {
	ctx, cancel := context.WithTimeout(ctx, quitWait)
	defer cancel()
	select {
	case <-m.Done():
	case <-ctx.Done():
		return unknown(ctx.Err(), "wait for QEMU to end")
	}
	for {
		h.d.pool.Forget(h.machine.QMPSocket)
		_, err := h.monitor(ctx)
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
			h.d.log.InfoContext(ctx, "machine released", "vm", h.id)
			return nil
		}
		if err == nil {
			err = errAnswers
		}
		if waited := pause(ctx, lookAgain); waited != nil {
			return unknown(errors.Join(err, waited), "wait for QEMU to end")
		}
	}
}

func stateName(s typesv1.PowerState) string {
	switch s {
	case typesv1.PowerState_POWER_STATE_RUNNING:
		return "running"
	case typesv1.PowerState_POWER_STATE_OFF:
		return "off"
	case typesv1.PowerState_POWER_STATE_PAUSED:
		return "paused"
	}
	return "in an unknown state"
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
