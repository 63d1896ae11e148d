package guestvm

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/tools/guest"
)

// execPoll is the pause between questions whether a command in the guest has ended.
const execPoll = 20 * time.Millisecond

// Agent runs a command of the guest agent, through the lab's own agent.
func (v *VM) Agent(ctx context.Context, name string, args, result any) error {
	if v.cfg.NoLab {
		return fmt.Errorf("machine %s has no agent for the lab", v.cfg.Name)
	}
	v.agent.Lock() // its socket serves one client
	defer v.agent.Unlock()
	a, err := qmp.DialAgent(ctx, v.cfg.labAgentPath())
	if err != nil {
		return err
	}
	defer a.Close()
	return a.Execute(ctx, name, args, result)
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
