package guestvm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"
)

// dialEach is the pause between attempts to reach a socket that is not there yet.
const dialEach = 10 * time.Millisecond

// maxEvents bounds what Events keeps.
const maxEvents = 1000

// Event is something that QEMU told.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// CommandError is QEMU's or the agent's refusal.
type CommandError struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

// Error is the refusal in words.
func (e *CommandError) Error() string { return e.Command + ": " + e.Class + ": " + e.Desc }

// monitor is a QMP client: commands by id, events kept.
type monitor struct {
	conn net.Conn

	mu      sync.Mutex
	last    int
	waiting map[string]chan reply
	events  []Event
	err     error // why the connection ended
	ended   chan struct{}
}

type reply struct {
	Return json.RawMessage `json:"return"`
	Error  *CommandError   `json:"error"`
	ID     string          `json:"id"`
}

// dial connects to a socket as soon as it is there.
func dial(ctx context.Context, path string) (net.Conn, error) {
	tick := time.NewTicker(dialEach)
	defer tick.Stop()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to %s: %w", path, errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}

func dialMonitor(ctx context.Context, path string) (*monitor, error) {
	conn, err := dial(ctx, path)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn, waiting: map[string]chan reply{}, ended: make(chan struct{})}
	r := bufio.NewReader(conn)
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetReadDeadline(deadline)
	}
	// A monitor that has a client already sends no greeting.
	if _, err := r.ReadBytes('\n'); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("greeting of %s: %w", path, err)
	}
	_ = conn.SetReadDeadline(time.Time{})
	go m.read(r)
	if err := m.command(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) read(r *bufio.Reader) {
	var err error
	for {
		var line []byte
		if line, err = r.ReadBytes('\n'); err != nil {
			break
		}
		var msg struct {
			reply
			Event
		}
		if err = json.Unmarshal(line, &msg); err != nil {
			break
		}
		m.mu.Lock()
		if msg.Name != "" {
			if len(m.events) < maxEvents {
				m.events = append(m.events, msg.Event)
			}
		} else if c := m.waiting[msg.ID]; c != nil {
			delete(m.waiting, msg.ID)
			c <- msg.reply // has room for it
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	m.err = err
	m.mu.Unlock()
	close(m.ended)
}

func (m *monitor) command(ctx context.Context, name string, args, result any) error {
	answer := make(chan reply, 1)
	m.mu.Lock()
	m.last++
	id := strconv.Itoa(m.last)
	m.waiting[id] = answer
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{name, args, id})
	if err == nil {
		_, err = m.conn.Write(append(b, '\n'))
	}
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	select {
	case r := <-answer:
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
	case <-m.ended:
		return fmt.Errorf("%s: the monitor closed: %w", name, m.err)
	case <-ctx.Done():
		m.mu.Lock()
		delete(m.waiting, id)
		m.mu.Unlock()
		return fmt.Errorf("%s: %w", name, ctx.Err())
	}
}

func (m *monitor) close() {
	_ = m.conn.Close()
	<-m.ended
}
