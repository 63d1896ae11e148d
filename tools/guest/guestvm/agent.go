package guestvm

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/tools/guest"
)

// execPoll is the pause between questions whether a command in the guest has ended.
const execPoll = 20 * time.Millisecond

// agent is a client of the lab's guest agent. Its protocol has no ids: each
// call first synchronises by a number, so that a late answer to an earlier
// call cannot be taken for this one's.
type agent struct {
	mu   sync.Mutex
	conn net.Conn
	r    *bufio.Reader
	sync int
}

func (a *agent) command(ctx context.Context, name string, args, result any) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.commandLocked(ctx, name, args, result); err != nil {
		return fmt.Errorf("guest agent: %w", err)
	}
	return nil
}

func (a *agent) commandLocked(ctx context.Context, name string, args, result any) error {
	// The connection obeys the context by a deadline in the past.
	stop := context.AfterFunc(ctx, func() { _ = a.conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		stop()
		_ = a.conn.SetDeadline(time.Time{})
	}()
	a.sync++
	if _, err := a.conn.Write([]byte{0xff}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := a.send("guest-sync-delimited", map[string]int{"id": a.sync}); err != nil {
		return err
	}
	for {
		if _, err := a.r.ReadBytes(0xff); err != nil {
			return fmt.Errorf("%s: synchronise: %w", name, err)
		}
		var got int
		if err := a.receive("guest-sync-delimited", &got); err == nil && got == a.sync {
			break
		} else if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", name, ctx.Err())
		}
	}
	if err := a.send(name, args); err != nil {
		return err
	}
	return a.receive(name, result)
}

func (a *agent) send(name string, args any) error {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{name, args})
	if err == nil {
		_, err = a.conn.Write(append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (a *agent) receive(name string, result any) error {
	line, err := a.r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var r reply
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if r.Error != nil {
		r.Error.Command = name
		return r.Error
	}
	if result != nil {
		if err := json.Unmarshal(r.Return, result); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// Agent runs a command of the guest agent, through the lab's own agent.
func (v *VM) Agent(ctx context.Context, name string, args, result any) error {
	if v.agent == nil {
		return fmt.Errorf("machine %s has no agent for the lab", v.cfg.Name)
	}
	return v.agent.command(ctx, name, args, result)
}

// ExecResult is how a command in the guest ended.
type ExecResult struct {
	ExitCode int
	Stdout   string
	Stderr   string
}

// Exec runs a program in the guest to its end.
func (v *VM) Exec(ctx context.Context, argv ...string) (ExecResult, error) {
	var started struct {
		PID int `json:"pid"`
	}
	args := map[string]any{"path": argv[0], "arg": argv[1:], "capture-output": true}
	if err := v.Agent(ctx, "guest-exec", args, &started); err != nil {
		return ExecResult{}, err
	}
	tick := time.NewTicker(execPoll)
	defer tick.Stop()
	for {
		var s struct {
			Exited   bool   `json:"exited"`
			ExitCode int    `json:"exitcode"`
			Signal   int    `json:"signal"`
			Out      []byte `json:"out-data"` // base64
			Err      []byte `json:"err-data"`
		}
		if err := v.Agent(ctx, "guest-exec-status", map[string]int{"pid": started.PID}, &s); err != nil {
			return ExecResult{}, err
		}
		if s.Exited {
			r := ExecResult{s.ExitCode, string(s.Out), string(s.Err)}
			if s.Signal != 0 {
				return r, fmt.Errorf("%s in the guest: ended by signal %d", argv[0], s.Signal)
			}
			return r, nil
		}
		select {
		case <-ctx.Done():
			return ExecResult{}, fmt.Errorf("%s in the guest: %w", argv[0], ctx.Err())
		case <-tick.C:
		}
	}
}

// program runs landfall-guest in the guest and reads the JSON that it prints.
func (v *VM) program(ctx context.Context, result any, args ...string) error {
	r, err := v.Exec(ctx, append([]string{guest.Program}, args...)...)
	if err != nil {
		return err
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("landfall-guest %s: exit code %d: %s", strings.Join(args, " "), r.ExitCode, strings.TrimSpace(r.Stderr))
	}
	return json.Unmarshal([]byte(r.Stdout), result)
}

// Verify verifies now, between two steps of the writer.
func (v *VM) Verify(ctx context.Context) (guest.Report, error) {
	var r guest.Report
	return r, v.program(ctx, &r, "verify")
}

// WriteLoad writes one checksummed file ("50MB") to a disk ("os" or "data"), durably.
func (v *VM) WriteLoad(ctx context.Context, size, disk string) (guest.Load, error) {
	var l guest.Load
	return l, v.program(ctx, &l, "write", size, disk)
}

// MeasureLatency measures durable 4 KiB writes on a disk for a time.
func (v *VM) MeasureLatency(ctx context.Context, during time.Duration, disk string) (guest.Latency, error) {
	var l guest.Latency
	return l, v.program(ctx, &l, "latency", during.String(), disk)
}

// SetRate changes how many steps a second the writer does: 0 as many as it can, negative pauses it. It lasts until the next boot.
func (v *VM) SetRate(ctx context.Context, rate int) error {
	var s guest.Settings
	return v.program(ctx, &s, "rate", strconv.Itoa(rate))
}
