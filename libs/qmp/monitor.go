package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// Event is something that QEMU tells unasked.
type Event struct {
	// Name, for example BLOCK_IO_ERROR.
	Name string
	// Data as JSON.
	Data json.RawMessage
	// Time by the host's clock.
	Time time.Time
}

// Version of a QEMU.
type Version struct{ Major, Minor, Micro int }

// String is "7.2.22".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Monitor is one connection to a QEMU's monitor. It is safe for concurrent use; commands are executed in the order in which
// they were sent.
type Monitor struct {
	socket  string
	conn    net.Conn
	version Version

	sending sync.Mutex // one writer at a time

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan response
	subs    map[*Subscription]struct{}
	err     error         // why done was closed
	done    chan struct{} // closed when the connection is gone

	schemaOnce sync.Mutex
	schema     *Schema
}

type response struct {
	result json.RawMessage
	err    error
}

type message struct {
	QMP *struct {
		Version struct {
			QEMU Version `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
	ID        *uint64         `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *CommandError   `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Dial connects, waits for the greeting and leaves the negotiation. All its errors have the reason HYPERVISOR_UNREACHABLE;
// errors.Is(err, [ErrInUse]) when the monitor serves somebody else.
func Dial(ctx context.Context, socket string) (*Monitor, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, unreachable(err, "connect to monitor %s", socket)
	}
	return New(ctx, conn, socket)
}

// New does the same on a connection that the caller made, and then owns it; socket is its name in errors.
func New(ctx context.Context, conn net.Conn, socket string) (*Monitor, error) {
	r := bufio.NewReaderSize(conn, 64<<10)
	m := &Monitor{
		socket: socket, conn: conn, pending: map[uint64]chan response{}, subs: map[*Subscription]struct{}{}, done: make(chan struct{}),
	}
	if err := m.greet(ctx, r); err != nil {
		_ = conn.Close()
		return nil, unreachable(err, "monitor %s", socket)
	}
	go m.read(r)
	ctx, cancel := context.WithTimeout(ctx, greetingTimeout)
	defer cancel()
	if err := m.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = m.Close()
		return nil, unreachable(err, "monitor %s", socket)
	}
	return m, nil
}

func (m *Monitor) greet(ctx context.Context, r *bufio.Reader) error {
	limit := time.Now().Add(greetingTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		limit = d
	}
	_ = m.conn.SetReadDeadline(limit)
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetReadDeadline(time.Unix(1, 0)) })
	line, err := readLine(r)
	if !stop() && ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("no greeting: %w", ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	var greeting message
	if err := json.Unmarshal(line, &greeting); err != nil || greeting.QMP == nil {
		return fmt.Errorf("greeting is not QMP's: %.60q", line)
	}
	m.version = greeting.QMP.Version.QEMU
	return m.conn.SetReadDeadline(time.Time{})
}

// Version is QEMU's.
func (m *Monitor) Version() Version { return m.version }

// Done is closed when the connection is gone.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Close ends the connection. Commands in flight end with [ErrClosed].
func (m *Monitor) Close() error {
	m.fail(ErrClosed)
	return nil
}

func (m *Monitor) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	_ = m.conn.Close()
	close(m.done)
	for id, c := range m.pending {
		c <- response{err: unreachable(err, "monitor %s", m.socket)}
		delete(m.pending, id)
	}
	for s := range m.subs {
		close(s.events)
	}
	m.subs = nil
}

func (m *Monitor) read(r *bufio.Reader) {
	for {
		line, err := readLine(r)
		if err != nil {
			m.fail(err)
			return
		}
		var msg message
		if err := json.Unmarshal(line, &msg); err != nil {
			m.fail(fmt.Errorf("message is not JSON: %w", err))
			return
		}
		m.dispatch(msg)
	}
}

func (m *Monitor) dispatch(msg message) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	if msg.Event != "" {
		e := Event{Name: msg.Event, Data: msg.Data, Time: time.Unix(msg.Timestamp.Seconds, msg.Timestamp.Microseconds*1000)}
		for s := range m.subs {
			s.put(e)
		}
		return
	}
	if msg.ID == nil {
		return // an answer to nothing of ours
	}
	c := m.pending[*msg.ID]
	delete(m.pending, *msg.ID)
	if c == nil {
		return // its caller gave up
	}
	if msg.Error != nil {
		c <- response{err: msg.Error}
		return
	}
	c <- response{result: msg.Return}
}

// Execute runs a command. args may be nil; result may be nil, or a pointer that the answer is decoded into. Without a
// deadline in ctx the command has 30 s. When it ends by ctx the command may still be executed: later commands of the same
// connection are executed after it.
func (m *Monitor) Execute(ctx context.Context, command string, args, result any) error {
	if err := ctx.Err(); err != nil { // nothing is sent: the connection is shared and stays whole
		return unreachable(err, "%s", command)
	}
	ctx, cancel := withDefault(ctx)
	defer cancel()
	c := make(chan response, 1)
	m.mu.Lock()
	if m.err != nil {
		err := m.err
		m.mu.Unlock()
		return unreachable(err, "%s", command)
	}
	m.next++
	id := m.next
	m.pending[id] = c
	m.mu.Unlock()
	request := struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id}
	b, err := json.Marshal(request)
	if err != nil {
		m.forget(id)
		return fmt.Errorf("encode %s: %w", command, err)
	}
	if err := m.send(ctx, append(b, '\n')); err != nil {
		m.fail(err) // half a line may be out: nothing can follow it
		return unreachable(err, "%s", command)
	}
	select {
	case r := <-c:
		return decode(command, r, result)
	case <-ctx.Done():
		m.forget(id)
		return unreachable(ctx.Err(), "no answer to %s in time", command)
	}
}

func decode(command string, r response, result any) error {
	var refused *CommandError
	if errors.As(r.err, &refused) {
		refused.Command = command
	}
	if r.err != nil || result == nil {
		return r.err
	}
	if err := json.Unmarshal(r.result, result); err != nil {
		return fmt.Errorf("answer to %s: %w", command, err)
	}
	return nil
}

func (m *Monitor) send(ctx context.Context, b []byte) error {
	m.sending.Lock()
	defer m.sending.Unlock()
	if d, ok := ctx.Deadline(); ok {
		_ = m.conn.SetWriteDeadline(d)
	}
	_, err := m.conn.Write(b)
	return err
}

func (m *Monitor) forget(id uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pending, id)
}

// HMP runs a command of the human monitor and returns its text. For tests and diagnosis.
func (m *Monitor) HMP(ctx context.Context, line string) (string, error) {
	var out string
	err := m.Execute(ctx, "human-monitor-command", map[string]any{"command-line": line}, &out)
	return out, err
}

// Subscription receives events, in order, from the moment it was made.
type Subscription struct {
	m      *Monitor
	events chan Event
	lost   bool // guarded by m.mu
}

// Subscribe begins to receive events. At most depth of them wait; more are dropped and [Subscription.Lost] says so.
func (m *Monitor) Subscribe(depth int) *Subscription {
	s := &Subscription{m: m, events: make(chan Event, depth)}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		close(s.events)
		return s
	}
	m.subs[s] = struct{}{}
	return s
}

// put needs m.mu.
func (s *Subscription) put(e Event) {
	select {
	case s.events <- e:
	default:
		s.lost = true
	}
}

// Events is closed when the subscription or the connection ends.
func (s *Subscription) Events() <-chan Event { return s.events }

// Lost reports whether events were dropped since it was asked last: the subscriber must look for itself.
func (s *Subscription) Lost() bool {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	lost := s.lost
	s.lost = false
	return lost
}

// Close ends it.
func (s *Subscription) Close() {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if _, ok := s.m.subs[s]; ok {
		delete(s.m.subs, s)
		close(s.events)
	}
}
