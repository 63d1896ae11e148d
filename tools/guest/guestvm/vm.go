package guestvm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/tools/guest"
)

// Program is QEMU.
const Program = "qemu-system-x86_64"

// Times of the lab.
const (
	connectTimeout = 30 * time.Second      // for QEMU to open its sockets
	pollEach       = 20 * time.Millisecond // between looks at the console
	pressAgain     = 15 * time.Second      // a power button that the guest did not see
	killTimeout    = 10 * time.Second      // for a killed process to be gone
)

// VM is a running machine.
type VM struct {
	cfg       Config
	own       bool // Sockets is ours
	process   *os.Process
	exited    chan struct{} // closed when QEMU is gone; nil when somebody else started it
	exitState string

	monitor *monitor
	agent   sync.Mutex // one exchange with the lab's agent at a time
	ack     net.Conn
	acked   atomic.Uint64
	readers sync.WaitGroup
}

// Start starts a machine and connects the lab to it. It does not wait for the
// guest. Close it in any case.
func Start(ctx context.Context, cfg Config) (*VM, error) {
	v := &VM{cfg: cfg, exited: make(chan struct{})}
	if cfg.Sockets == "" {
		dir, err := os.MkdirTemp("", "lfg-")
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", cfg.Name, err)
		}
		v.cfg.Sockets, v.own = dir, true
	}
	if err := v.start(ctx); err != nil {
		v.Close()
		return nil, fmt.Errorf("start %s: %w", cfg.Name, err)
	}
	return v, nil
}

// Attach connects the lab to a machine that somebody else started with
// Config.Args. Kill and Close then do not end it.
func Attach(ctx context.Context, cfg Config) (*VM, error) {
	v := &VM{cfg: cfg}
	if err := v.connect(ctx); err != nil {
		v.Close()
		return nil, fmt.Errorf("attach to %s: %w", cfg.Name, err)
	}
	return v, nil
}

func (v *VM) start(ctx context.Context) error {
	args, err := v.cfg.Args()
	if err != nil {
		close(v.exited)
		return err
	}
	stderr, err := os.Create(v.cfg.stderrPath())
	if err != nil {
		close(v.exited)
		return err
	}
	cmd := exec.Command(Program, args...)
	cmd.Stdout, cmd.Stderr = stderr, stderr
	cmd.SysProcAttr = dieWithParent()
	started := make(chan error)
	go func() {
		// Where the child dies with its parent, the parent is this very thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer stderr.Close()
		defer close(v.exited)
		err := cmd.Start()
		v.process = cmd.Process
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait()
		v.exitState = cmd.ProcessState.String()
	}()
	if err := <-started; err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			err = fmt.Errorf("%w (Debian package qemu-system-x86)", err)
		}
		return err
	}
	return v.connect(ctx)
}

func (v *VM) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if v.exited != nil { // do not wait for the sockets of a process that is gone
		go func() {
			select {
			case <-v.exited:
				cancel()
			case <-ctx.Done():
			}
		}()
	}
	var err error
	if v.monitor, err = dialMonitor(ctx, v.cfg.labQMPPath()); err != nil {
		return v.explain(err)
	}
	if v.cfg.NoLab {
		return nil
	}
	if v.ack, err = dial(ctx, v.cfg.ackPath()); err != nil {
		return v.explain(err)
	}
	v.readers.Go(v.follow)
	return nil
}

// follow keeps the newest acknowledged step.
func (v *VM) follow() {
	lines := bufio.NewScanner(v.ack)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if n, ok := guest.ParseAck(lines.Text()); ok {
			v.acked.Store(n)
		}
	}
}

// explain adds what QEMU said last.
func (v *VM) explain(err error) error {
	b, _ := os.ReadFile(v.cfg.stderrPath())
	if text := strings.TrimSpace(tail(string(b), 1000)); text != "" {
		return fmt.Errorf("%w: QEMU says: %s", err, text)
	}
	return err
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// Config is the machine's configuration, with its sockets' folder filled in.
func (v *VM) Config() Config { return v.cfg }

// PID is QEMU's process id, 0 when somebody else started it.
func (v *VM) PID() int {
	if v.process == nil {
		return 0
	}
	return v.process.Pid
}

// Console is the text of the serial console so far.
func (v *VM) Console() string {
	b, _ := os.ReadFile(v.cfg.ConsolePath()) // not there yet: no text
	return string(b)
}

// waitConsole waits until the console has what done looks for.
func (v *VM) waitConsole(ctx context.Context, what string, done func(text string) bool) error {
	return v.poll(ctx, what, func() bool { return done(v.Console()) })
}

// poll waits for a condition; the end of QEMU or of the context is an error.
func (v *VM) poll(ctx context.Context, what string, done func() bool) error {
	tick := time.NewTicker(pollEach)
	defer tick.Stop()
	for {
		if done() {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("machine %s: wait for %s: %w; console: %s", v.cfg.Name, what, ctx.Err(), tail(v.Console(), 1500))
		case <-v.exited:
			if done() {
				return nil
			}
			return v.explain(fmt.Errorf("machine %s: wait for %s: QEMU ended (%s); console: %s",
				v.cfg.Name, what, v.exitState, tail(v.Console(), 1500)))
		case <-tick.C:
		}
	}
}

// WaitReady waits for the READY line: from then on the power button and the agents work.
func (v *VM) WaitReady(ctx context.Context) error {
	return v.waitConsole(ctx, guest.ReadyLine, func(text string) bool { return strings.Contains(text, guest.ReadyLine) })
}

// WaitReport waits for the verification of this boot.
func (v *VM) WaitReport(ctx context.Context) (guest.Report, error) {
	var r guest.Report
	err := v.waitConsole(ctx, guest.VerifyPrefix, func(text string) (ok bool) {
		r, ok = guest.LastReport(text)
		return ok
	})
	return r, err
}

// Acked is the newest step that the guest acknowledged, 0 before the first one.
func (v *VM) Acked() uint64 { return v.acked.Load() }

// WaitAcked waits until step n is acknowledged.
func (v *VM) WaitAcked(ctx context.Context, n uint64) error {
	return v.poll(ctx, fmt.Sprintf("step %d", n), func() bool { return v.Acked() >= n })
}

// QMP runs a command of the lab's monitor. args and result may be nil.
func (v *VM) QMP(ctx context.Context, name string, args, result any) error {
	return v.monitor.Execute(ctx, name, args, result)
}

// Events are what QEMU told the lab since the start, the first 1000.
func (v *VM) Events() []qmp.Event {
	v.monitor.mu.Lock()
	defer v.monitor.mu.Unlock()
	return append([]qmp.Event(nil), v.monitor.events...)
}

// PowerButton presses the button once. Before READY nobody sees it.
func (v *VM) PowerButton(ctx context.Context) error {
	return v.QMP(ctx, "system_powerdown", nil, nil)
}

// PowerOff presses the button, again after a while if need be, until QEMU is gone.
func (v *VM) PowerOff(ctx context.Context) error {
	for {
		if err := v.PowerButton(ctx); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, pressAgain)
		err := v.WaitExit(wait)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// Exited is closed when QEMU is gone; nil for an attached machine.
func (v *VM) Exited() <-chan struct{} { return v.exited }

// WaitExit waits until QEMU is gone.
func (v *VM) WaitExit(ctx context.Context) error {
	if v.exited == nil {
		return fmt.Errorf("machine %s: not started by this lab", v.cfg.Name)
	}
	select {
	case <-v.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("machine %s: wait for its end: %w", v.cfg.Name, ctx.Err())
	}
}

// Kill ends QEMU as a power failure of its host would, and waits until it is gone.
func (v *VM) Kill() error {
	if v.process == nil {
		return fmt.Errorf("machine %s: not started by this lab", v.cfg.Name)
	}
	if err := v.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", v.cfg.Name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	return v.WaitExit(ctx)
}

// Close kills the machine, if Start started it, and frees what the lab holds. The console's text and the disks stay.
func (v *VM) Close() {
	if v.process != nil {
		_ = v.Kill()
	}
	if v.monitor != nil {
		v.monitor.close()
	}
	if v.ack != nil {
		_ = v.ack.Close()
	}
	v.readers.Wait()
	if v.own {
		_ = os.RemoveAll(v.cfg.Sockets)
	}
}
