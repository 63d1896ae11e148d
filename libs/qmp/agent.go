package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// syncTimeout is how long an agent may take to answer a sync. One that is not running, or serves somebody else, is silent.
const syncTimeout = 2 * time.Second

// Agent is one connection to a guest's qemu-ga, synchronised. It is not safe for concurrent use: take one per exchange and
// close it soon, because the socket serves one client. Errors of silence have the reason HYPERVISOR_UNREACHABLE.
type Agent struct {
	conn net.Conn
	r    *bufio.Reader
	// broken: an answer was not waited for; nothing read after it could be matched to its command.
	broken bool
}

// DialAgent connects and synchronises: answers to commands of an earlier client are skipped.
func DialAgent(ctx context.Context, socket string) (*Agent, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, unreachable(err, "connect to guest agent %s", socket)
	}
	a := &Agent{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	if err := a.sync(ctx); err != nil {
		_ = conn.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("no answer: the agent is not running in the guest, or another program uses it: %w", err)
		}
		return nil, unreachable(err, "guest agent %s", socket)
	}
	return a, nil
}

// Close ends the connection.
func (a *Agent) Close() error { return a.conn.Close() }

func (a *Agent) sync(ctx context.Context) error {
	token := rand.Int64N(1 << 52) // qemu-ga's integers survive as JSON numbers
	b, err := json.Marshal(map[string]any{"execute": "guest-sync-delimited", "arguments": map[string]any{"id": token}})
	if err != nil {
		return err
	}
	// 0xFF ends whatever half a message an earlier client left.
	line, stop, err := a.exchange(ctx, append(append([]byte{0xFF}, b...), '\n'))
	defer stop()
	for {
		if err != nil {
			return err
		}
		if i := bytes.LastIndexByte(line, 0xFF); i >= 0 {
			var m message
			var got int64
			if err := json.Unmarshal(line[i+1:], &m); err != nil {
				return fmt.Errorf("sync: %w", err)
			}
			if json.Unmarshal(m.Return, &got) == nil && got == token {
				return nil
			}
		}
		line, err = readLine(a.r)
	}
}

// exchange sends and reads one line under ctx. The caller calls stop once it has read all that it wants.
func (a *Agent) exchange(ctx context.Context, b []byte) (line []byte, stop func(), err error) {
	limit, ok := ctx.Deadline()
	if !ok {
		limit = time.Now().Add(defaultTimeout)
	}
	_ = a.conn.SetDeadline(limit)
	end := context.AfterFunc(ctx, func() { _ = a.conn.SetDeadline(time.Unix(1, 0)) })
	stop = func() { end() }
	if _, err := a.conn.Write(b); err != nil {
		return nil, stop, err
	}
	line, err = readLine(a.r)
	return line, stop, err
}

// Execute runs a command. A *[CommandError] is the agent's refusal.
func (a *Agent) Execute(ctx context.Context, command string, args, result any) error {
	if a.broken {
		return unreachable(ErrClosed, "%s", command)
	}
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fmt.Errorf("encode %s: %w", command, err)
	}
	line, stop, err := a.exchange(ctx, append(b, '\n'))
	defer stop()
	if err != nil {
		a.broken = true
		return unreachable(err, "guest agent: %s", command)
	}
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		a.broken = true
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, err, "guest agent: answer to %s", command)
	}
	r := response{result: m.Return}
	if m.Error != nil {
		r.err = m.Error
	}
	return decode(command, r, result)
}

// Freeze freezes the guest's file systems and returns how many. Zero means that nothing is frozen.
func (a *Agent) Freeze(ctx context.Context) (int, error) {
	var n int
	return n, a.Execute(ctx, "guest-fsfreeze-freeze", nil, &n)
}

// Thaw thaws them and returns how many. Zero means that nothing was frozen any more.
func (a *Agent) Thaw(ctx context.Context) (int, error) {
	var n int
	return n, a.Execute(ctx, "guest-fsfreeze-thaw", nil, &n)
}

// Frozen reports whether file systems are frozen by the agent.
func (a *Agent) Frozen(ctx context.Context) (bool, error) {
	var status string
	err := a.Execute(ctx, "guest-fsfreeze-status", nil, &status)
	return status == "frozen", err
}

// Shutdown asks the guest to power down. The agent does not answer on success, so silence is none of the errors.
func (a *Agent) Shutdown(ctx context.Context) error {
	err := a.Execute(ctx, "guest-shutdown", map[string]any{"mode": "powerdown"}, nil)
	if Refused(err) {
		return err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ErrClosed) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}
