package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// process is one program of ours: started, killed and started again with the same configuration.
type process struct {
	name, path string
	args, env  []string
	log        string
	armEnv     string // variable that arms failpoints

	mu       sync.Mutex
	cmd      *exec.Cmd
	done     chan struct{} // closed when the present run has ended
	expected bool          // its end was asked for: a kill, or an armed failpoint
	ended    error         // an end nobody asked for
	runs     int
}

// start runs the program with failpoints armed, or none.
func (p *process) start(failpoints string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		return fmt.Errorf("%s runs already", p.name)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p.runs++
	fmt.Fprintf(log, "--- run %d at %s, failpoints %q\n", p.runs, time.Now().Format(time.RFC3339Nano), failpoints)
	cmd := exec.Command(p.path, p.args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(append(os.Environ(), p.env...), p.armEnv+"="+failpoints)
	dieWithUs(cmd)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	done := make(chan struct{})
	p.cmd, p.done, p.expected = cmd, done, failpoints != ""
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.expected && p.ended == nil {
			p.ended = errors.Join(fmt.Errorf("%s ended by itself", p.name), err)
		}
		p.cmd = nil
		close(done)
	}()
	return nil
}

// kill ends the process at once, as kill -9 does, and waits for its end.
func (p *process) kill() {
	p.mu.Lock()
	cmd, done := p.cmd, p.done
	p.expected = true
	if cmd != nil {
		_ = cmd.Process.Kill()
	}
	p.mu.Unlock()
	if cmd != nil {
		<-done
	}
}

// interrupt ends the process politely; an error if it does not end well in time.
func (p *process) interrupt(timeout time.Duration) error {
	p.mu.Lock()
	cmd, done := p.cmd, p.done
	p.expected = true
	if cmd != nil {
		_ = cmd.Process.Signal(os.Interrupt)
	}
	p.mu.Unlock()
	if cmd == nil {
		return nil
	}
	select {
	case <-done:
		if code := cmd.ProcessState.ExitCode(); code != 0 {
			return fmt.Errorf("%s ended with %s", p.name, cmd.ProcessState)
		}
		return nil
	case <-time.After(timeout):
		p.kill()
		return fmt.Errorf("%s did not end within %s", p.name, timeout)
	}
}

// exited is closed when the present run has ended.
func (p *process) exited() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// surprise is an end that nobody asked for.
func (p *process) surprise() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

// tail is the end of the program's log.
func (p *process) tail(n int64) string {
	f, err := os.Open(p.log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err.Error()
	}
	buf := make([]byte, min(n, info.Size()))
	if _, err := f.ReadAt(buf, info.Size()-int64(len(buf))); err != nil {
		return err.Error()
	}
	return string(buf)
}

var errNotYet = errors.New("not yet")

func newProcess(dir, name, path, armEnv string, args ...string) *process {
	return &process{name: name, path: path, args: args, armEnv: armEnv, log: filepath.Join(dir, name+".log")}
}
