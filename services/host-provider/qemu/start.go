package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

const (
	// startWait is how long a QEMU may take until its monitor answers.
	startWait = 20 * time.Second
	// resetWait is how long a reset may take.
	resetWait = 5 * time.Second
	// maxLogTail is how much of what a QEMU wrote before it ended goes into an error, in bytes.
	maxLogTail = 2000
)

// Start lifts the fence of a failover, durably and first, and lets the machine run: a QEMU that outlived its guest is reset
// and continued, so that its bitmaps go on; one that is gone is started by the definition's command. Without a command the
// machine stays OFF, and an operator starts it.
func (d *Driver) Start(ctx context.Context, f hostprovider.Fence) (typesv1.PowerState, error) {
	const nothing = typesv1.PowerState_POWER_STATE_UNSPECIFIED
	h, err := d.hold(ctx, f.VM)
	if err != nil {
		return nothing, err
	}
	defer h.release()
	if err := h.permit(f); err != nil {
		return nothing, err
	}
	if err := h.fence(""); err != nil {
		return nothing, err
	}
	m, status, err := h.runState(ctx)
	if err == nil {
		return h.resume(ctx, m, status)
	}
	if err := h.gone(ctx, err); err != nil {
		return nothing, err
	}
	if len(h.machine.Start) == 0 {
		d.log.InfoContext(ctx, "the fence is lifted; nobody told how to start the machine, so an operator must", "vm", h.id)
		return typesv1.PowerState_POWER_STATE_OFF, nil
	}
	if err := h.launch(ctx); err != nil {
		return nothing, err
	}
	if m, status, err = h.runState(ctx); err != nil {
		return nothing, err
	}
	return h.resume(ctx, m, status)
}

// resume lets the guest of a live QEMU run, from wherever it is.
func (h *held) resume(ctx context.Context, m *qmp.Monitor, status string) (typesv1.PowerState, error) {
	const nothing = typesv1.PowerState_POWER_STATE_UNSPECIFIED
	var err error
	switch status {
	case "shutdown":
		if err = reset(ctx, m); err == nil {
			err = m.Execute(ctx, "cont", nil, nil)
		}
	case "prelaunch", "paused", "io-error":
		err = m.Execute(ctx, "cont", nil, nil)
	case "suspended":
		err = m.Execute(ctx, "system_wakeup", nil, nil)
	}
	if err != nil {
		return nothing, unknown(err, "continue the guest")
	}
	// From here on the machine ends with its guest again, as QEMU does by default.
	if err := setAction(ctx, m, "shutdown", "poweroff"); err != nil {
		return nothing, err
	}
	_, state, err := h.power(ctx)
	if err == nil {
		h.d.log.InfoContext(ctx, "machine started", "vm", h.id, "before", status, "now", stateName(state))
	}
	return state, err
}

// reset resets a guest that is off. A QEMU with -no-reboot takes a reset as a shutdown: it is told otherwise, for good, since
// firmware that starts for the second time may reset the machine once more itself (SeaBIOS does).
func reset(ctx context.Context, m *qmp.Monitor) error {
	done, err := tryReset(ctx, m)
	if err != nil || done {
		return err
	}
	if err := setAction(ctx, m, "reboot", "reset"); err != nil {
		return err
	}
	done, err = tryReset(ctx, m)
	if err == nil && !done {
		err = errors.New("QEMU does not reset the machine")
	}
	return err
}

// tryReset says whether the machine was reset; it was not when QEMU took it for a shutdown.
func tryReset(ctx context.Context, m *qmp.Monitor) (bool, error) {
	events := m.Subscribe(64)
	defer events.Close()
	if err := m.Execute(ctx, "system_reset", nil, nil); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, resetWait)
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("wait for the reset: %w", ctx.Err())
		case e, ok := <-events.Events():
			switch {
			case !ok:
				return false, qmp.ErrClosed
			case e.Name == "RESET":
				return true, nil
			case e.Name == "SHUTDOWN":
				return false, nil
			}
		}
	}
}

// launch starts the machine's command, which survives this process, and waits for its monitor. What it writes goes to
// <state>/<vm>.log.
func (h *held) launch(ctx context.Context) error {
	program, err := exec.LookPath(h.machine.Start[0])
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, err, "start machine %s", h.id)
	}
	log := filepath.Join(h.d.cfg.StateDir, h.id+".log")
	pid, err := startDetached(ctx, append([]string{program}, h.machine.Start[1:]...), h.machine.StartDir, log)
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "start machine %s", h.id)
	}
	h.d.log.InfoContext(ctx, "QEMU started", "vm", h.id, "pid", pid, "log", log)
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	for {
		alive := running(pid)
		h.d.pool.Forget(h.machine.QMPSocket)
		_, err := h.monitor(ctx)
		if err == nil {
			return nil
		}
		if !alive { // it may have put itself into the background: then its monitor answers
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, "the command that starts machine %s ended: %s", h.id, tail(log))
		}
		if waited := pause(ctx, lookAgain); waited != nil {
			return unknown(errors.Join(err, waited), "wait for the monitor of the machine that was started")
		}
	}
}

// tail is the end of a log, in one line.
func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > maxLogTail {
		_, _ = f.Seek(-maxLogTail, io.SeekEnd)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxLogTail))
	if err != nil {
		return err.Error()
	}
	text := strings.Join(strings.Fields(string(b)), " ")
	if text == "" {
		return "it wrote nothing"
	}
	return text
}
