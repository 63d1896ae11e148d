package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// sampleEvery is how often the memory of a running program is looked at.
const sampleEvery = 25 * time.Millisecond

// usage is what a program took.
type usage struct {
	// cpu is processor time in all, system the kernel's part of it.
	wall, cpu, system time.Duration
	// peak is the largest resident memory of one of its processes, in bytes; 0 where it is not known.
	peak int64
}

func (u usage) plus(v usage) usage {
	return usage{wall: u.wall + v.wall, cpu: u.cpu + v.cpu, system: u.system + v.system, peak: max(u.peak, v.peak)}
}

// process is a running program with its children.
type process struct {
	cmd     *exec.Cmd
	stdin   io.Closer
	started time.Time
	tail    *tail
	stop    chan struct{}
	sampled sync.WaitGroup
	done    chan struct{}
	err     error
	ended   time.Time

	mu   sync.Mutex
	peak int64
}

// start begins cmd. Its standard input is an open and empty pipe: some programs spin on an input at its end.
func start(cmd *exec.Cmd) (*process, error) {
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &process{cmd: cmd, stdin: stdin, tail: &tail{}, stop: make(chan struct{}), done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = p.tail
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.tail
	}
	p.started = time.Now()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p.sampled.Go(p.sample)
	go func() { // waited for through done
		p.err = cmd.Wait()
		p.ended = time.Now()
		close(p.stop)
		p.sampled.Wait()
		_ = stdin.Close()
		close(p.done)
	}()
	return p, nil
}

func (p *process) sample() {
	t := time.NewTicker(sampleEvery)
	defer t.Stop()
	for {
		peak := peakOfTree(p.cmd.Process.Pid)
		p.mu.Lock()
		p.peak = max(p.peak, peak)
		p.mu.Unlock()
		select {
		case <-p.stop:
			return
		case <-t.C:
		}
	}
}

// peakSoFar is the largest resident memory seen, in bytes.
func (p *process) peakSoFar() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peak
}

// wait ends with the program and says what it took, children it waited for included.
func (p *process) wait() (usage, error) {
	<-p.done
	s := p.cmd.ProcessState
	u := usage{wall: p.ended.Sub(p.started), cpu: s.UserTime() + s.SystemTime(), system: s.SystemTime(), peak: p.peakSoFar()}
	if p.err != nil {
		return u, fmt.Errorf("%s: %w: %s", strings.Join(p.cmd.Args, " "), p.err, p.tail)
	}
	return u, nil
}

// endTimeout is how long a program may take to stop before it is killed.
const endTimeout = 30 * time.Second

// end interrupts the program and waits for it.
func (p *process) end() (usage, error) {
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
	case <-time.After(endTimeout):
		_ = p.cmd.Process.Kill()
		u, _ := p.wait()
		return u, errors.New("program did not stop and was killed")
	}
	return p.wait()
}

// run runs a program to its end.
func run(ctx context.Context, name string, args ...string) (usage, error) {
	p, err := start(exec.CommandContext(ctx, name, args...))
	if err != nil {
		return usage{}, err
	}
	return p.wait()
}

// syncFile makes a copy durable: part of the wall time of whoever did not do so.
func syncFile(path string) (time.Duration, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("sync copy: %w", err)
	}
	defer f.Close()
	begin := time.Now()
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("sync copy: %w", err)
	}
	return time.Since(begin), nil
}

// tailBytes is how much of a program's output is kept for an error.
const tailBytes = 4 << 10

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	p  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.p = append(t.p, p...)
	if n := len(t.p) - tailBytes; n > 0 {
		t.p = append(t.p[:0], t.p[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.p))
}
