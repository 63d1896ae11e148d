package inside

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processes starts and reaps children of process 1. It does without os/exec,
// whose Wait would compete with reaping the orphans of others.
type processes struct {
	mu   sync.Mutex
	live map[int]bool
}

func newProcesses() *processes { return &processes{live: map[int]bool{}} }

// start runs a program in a session of its own, its output on the console.
func (p *processes) start(argv []string) (int, error) {
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", argv[0], err)
	}
	defer unix.Close(null)
	console, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", argv[0], err)
	}
	defer unix.Close(console)
	p.mu.Lock()
	defer p.mu.Unlock()
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Env: environment(), Files: []uintptr{uintptr(null), uintptr(console), uintptr(console)},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", argv[0], err)
	}
	p.live[pid] = true
	return pid, nil
}

// reap collects all that have ended, orphans too, and returns those that start began.
func (p *processes) reap() []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ours []int
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return ours
		}
		if p.live[pid] {
			delete(p.live, pid)
			ours = append(ours, pid)
		}
	}
}

// waitGone reaps until a child has ended or the time is over.
func (p *processes) waitGone(limit time.Duration, pid int) {
	p.wait(limit, func() bool { return !p.live[pid] })
}

// waitAll reaps until all children have ended or the time is over.
func (p *processes) waitAll(limit time.Duration) {
	p.wait(limit, func() bool { return len(p.live) == 0 })
}

func (p *processes) wait(limit time.Duration, done func() bool) {
	tick := time.NewTicker(pollEach)
	defer tick.Stop()
	deadline := time.After(limit)
	for {
		p.reap()
		if done() {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			return
		}
	}
}

// An input event: two words of time, type, code, value.
const (
	inputEventSize = 24
	evKey          = 1
	keyPower       = 116
)

// listenPowerButtons opens every power button and returns how many there are.
// When it returns, a button that is pressed is seen.
func listenPowerButtons(pressed chan<- struct{}) (int, error) {
	names, err := filepath.Glob("/sys/class/input/event*/device/name")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(b), "Power Button") {
			continue
		}
		event := filepath.Base(filepath.Dir(filepath.Dir(name)))
		f, err := os.Open("/dev/input/" + event)
		if err != nil {
			return n, fmt.Errorf("listen to the power button: %w", err)
		}
		n++
		go func() { // lives as long as the machine
			buf := make([]byte, inputEventSize)
			for {
				if _, err := f.Read(buf); err != nil {
					say("landfall-guest: power button: " + err.Error())
					return
				}
				if binary.LittleEndian.Uint16(buf[16:]) == evKey && binary.LittleEndian.Uint16(buf[18:]) == keyPower &&
					binary.LittleEndian.Uint32(buf[20:]) == 1 {
					select {
					case pressed <- struct{}{}:
					default:
					}
				}
			}
		}()
	}
	return n, nil
}
