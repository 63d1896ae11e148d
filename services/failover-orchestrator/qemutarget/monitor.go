package qemutarget

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

const (
	// silence is how long a socket that serves somebody else may say nothing: it accepts, and never greets.
	silence = 3 * time.Second
	// answerTime bounds one command; a screenshot of a loaded machine is the slowest.
	answerTime = 20 * time.Second
	// maxLine bounds one line of an answer. Those of the commands used here have hundreds of bytes.
	maxLine = 1 << 20
)

// errStranger is a monitor that answers with another machine's UUID.
var errStranger = errors.New("the monitor is another machine's")

// monitor is one connection to QEMU's monitor, for one caller, for a moment: QEMU serves one client at a time.
type monitor struct {
	conn net.Conn
	in   *bufio.Scanner
}

// dialMonitor connects to the machine in dir and proves that it is the one with this UUID.
func dialMonitor(ctx context.Context, dir, id string) (*monitor, error) {
	conn, err := dial(ctx, dir, MonitorSocket)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn, in: bufio.NewScanner(conn)}
	m.in.Buffer(nil, maxLine)
	if err := m.greet(ctx, id); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	return m, nil
}

func (m *monitor) greet(ctx context.Context, id string) error {
	if err := m.conn.SetDeadline(earlier(ctx, silence)); err != nil {
		return err
	}
	if !m.in.Scan() {
		return m.broken()
	}
	if err := m.do(ctx, "qmp_capabilities", nil, nil); err != nil {
		return err
	}
	var answer struct {
		UUID string `json:"UUID"`
	}
	if err := m.do(ctx, "query-uuid", nil, &answer); err != nil {
		return err
	}
	if !strings.EqualFold(answer.UUID, id) {
		return errStranger
	}
	return nil
}

// do executes a command. Events that come in between are nobody's concern here.
func (m *monitor) do(ctx context.Context, command string, args, result any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	raw, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("encode %s: %w", command, err)
	}
	if err := m.conn.SetDeadline(earlier(ctx, answerTime)); err != nil {
		return err
	}
	if _, err := m.conn.Write(append(raw, '\n')); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for m.in.Scan() {
		var line struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		switch err := json.Unmarshal(m.in.Bytes(), &line); {
		case err != nil:
			return fmt.Errorf("%s: %w", command, err)
		case line.Error != nil:
			return fmt.Errorf("%s: %s", command, line.Error.Desc)
		case line.Return == nil: // an event
		case result != nil:
			return json.Unmarshal(line.Return, result)
		default:
			return nil
		}
	}
	return fmt.Errorf("%s: %w", command, m.broken())
}

func (m *monitor) broken() error {
	if err := m.in.Err(); err != nil {
		return err
	}
	return errors.New("it closed the connection")
}

func (m *monitor) close() { _ = m.conn.Close() }

// status is the machine's run state, for example "running" or "io-error".
func (m *monitor) status(ctx context.Context) (string, error) {
	var answer struct {
		Status string `json:"status"`
	}
	err := m.do(ctx, "query-status", nil, &answer)
	return answer.Status, err
}

// earlier is the context's deadline, or after d, whichever comes first.
func earlier(ctx context.Context, d time.Duration) time.Time {
	t := time.Now().Add(d)
	if end, ok := ctx.Deadline(); ok && end.Before(t) {
		return end
	}
	return t
}
