package qemutarget

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// look is the pause between two looks at something that is waited for.
const look = 50 * time.Millisecond

// machine is the QEMU of one folder, if it runs.
type machine struct{ failover, dir, id string }

func machineOf(p target.Plan) machine {
	return machine{failover: p.Failover, dir: p.Dir, id: identity(p)}
}

// alive reports whether a process of the machine is there, at whatever stage.
func (m machine) alive() (bool, error) {
	locked, err := held(m.dir)
	if err == nil && locked {
		locked, err = m.ours()
	}
	if err != nil || locked {
		return locked, err
	}
	return len(processes(m.id)) > 0, nil
}

// ours reports whether who holds the folder's lock works for this failover, as far as the folder says.
func (m machine) ours() (bool, error) {
	f, err := vhdtarget.New(m.dir, m.failover)
	if err != nil {
		return false, err
	}
	owner, err := f.Owner()
	if err != nil || owner != "" {
		return owner == m.failover, err
	}
	s, err := readState(m.dir) // a folder that lost its marker
	return err == nil && s.UUID == m.id, nil
}

// launch starts QEMU with the lock and waits until it is a daemon, which it is when disks are open and the monitor
// listens. What QEMU says goes to the log. When ctx ends QEMU is left to go on: the next look finds it by its lock.
func (m machine) launch(ctx context.Context, program string, args []string, lock *os.File, limit time.Duration) error {
	log, err := os.OpenFile(filepath.Join(m.dir, logFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "make QEMU's log")
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = m.dir, log, log
	detach(cmd, lock)
	if err := cmd.Start(); err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, err, "start QEMU")
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // it ends soon: here by its limit, else by its parent's end or its own
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-ended:
		if err != nil {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT, "QEMU did not start (%v): %s", err, complaint(log.Name()))
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		_ = cmd.Process.Kill() // a child that was not waited for: the pid is its own
		<-ended                //nolint:errcheck // how it ended does not matter any more
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT, "QEMU was not ready after %s: %s", limit, complaint(log.Name()))
	}
}

// tell connects to the monitor, does one thing and lets go of it.
func (m machine) tell(ctx context.Context, do func(*monitor) error) error {
	mon, err := dialMonitor(ctx, m.dir, m.id)
	if err != nil {
		return err
	}
	defer mon.close()
	return do(mon)
}

// shutdown asks the guest to power down, again and again: a guest that has not started yet hears nothing.
func (m machine) shutdown(ctx context.Context, limit time.Duration) error {
	end := time.Now().Add(limit) //nolint:forbidigo // a process is waited for by the real clock
	for time.Now().Before(end) { //nolint:forbidigo // a process is waited for by the real clock
		alive, err := m.alive()
		if err != nil || !alive {
			return err
		}
		_ = m.tell(ctx, func(mon *monitor) error { return mon.do(ctx, "system_powerdown", nil, nil) }) // ends by force if nobody listens
		if gone, err := m.gone(ctx, min(5*time.Second, time.Until(end))); err != nil || gone {         //nolint:forbidigo // the caller's deadline is by the real clock
			return err
		}
	}
	return nil
}

// end ends the machine by force: QEMU is told to quit, and killed when it does not listen. limit bounds each.
func (m machine) end(ctx context.Context, limit time.Duration) error {
	alive, err := m.alive()
	if err != nil || !alive {
		return m.trouble(err)
	}
	told := m.tell(ctx, func(mon *monitor) error { return mon.do(ctx, "quit", nil, nil) })
	wait := limit
	if told != nil && len(processes(m.id)) > 0 {
		wait = time.Second // it may have been starting, or ending
	}
	if gone, err := m.gone(ctx, wait); err != nil || gone {
		return m.trouble(err)
	}
	var problems []error
	for _, pid := range processes(m.id) {
		problems = append(problems, kill(pid, m.id))
	}
	if gone, err := m.gone(ctx, limit); err != nil || gone {
		return m.trouble(err)
	}
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, errors.Join(append(problems, told)...),
		"a process that holds %s does not end", filepath.Join(m.dir, lockFile))
}

// gone waits until no process of the machine is there.
func (m machine) gone(ctx context.Context, limit time.Duration) (bool, error) {
	end := time.Now().Add(limit) //nolint:forbidigo // a process is waited for by the real clock
	for {
		alive, err := m.alive()
		if err != nil || !alive {
			return err == nil, err
		}
		if !time.Now().Before(end) { //nolint:forbidigo // a process is waited for by the real clock
			return false, nil
		}
		if err := pause(ctx, look); err != nil {
			return false, err
		}
	}
}

func (m machine) trouble(err error) error {
	if err == nil {
		return nil
	}
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "look for the machine of %s", m.dir)
}

// screenshot keeps what the screen shows and answers the file's name; "" when QEMU gives none.
func (m machine) screenshot(ctx context.Context) string {
	var made string
	_ = m.tell(ctx, func(mon *monitor) error { // evidence, without which the rest is still true
		for _, kind := range []struct{ name, format string }{{ScreenshotFile, "png"}, {ScreenshotPPMFile, ""}} {
			path := filepath.Join(m.dir, kind.name)
			args := map[string]any{"filename": path}
			if kind.format != "" {
				args["format"] = kind.format
			}
			if err := mon.do(ctx, "screendump", args, nil); err != nil {
				continue
			}
			if info, err := os.Stat(path); err == nil && info.Size() > 0 {
				made = kind.name
				return nil
			}
		}
		return nil
	})
	return made
}

// pause waits, or returns the context's error.
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

// run runs a program that ends by itself and answers its complaint. It keeps the lock as long as it runs: when this
// process is killed, the next one waits until nobody writes what it would write.
func run(ctx context.Context, lock *os.File, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.ExtraFiles = []*os.File{lock}
	out, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s: %w: %s", filepath.Base(program), err, tail(plain(out), 1000))
	}
	return nil
}
