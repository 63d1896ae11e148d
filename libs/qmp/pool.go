package qmp

import (
	"context"
	"sync"
	"time"
)

// retryAfter is how long a failed connect is remembered, so that frequent callers do not wait for a silent monitor each time.
const retryAfter = time.Second

// Pool keeps one connection per monitor socket, shared by everybody who needs it: a monitor serves one client only.
type Pool struct {
	mu     sync.Mutex
	slots  map[string]*slot
	closed bool
}

type slot struct {
	lock    chan struct{} // one connect at a time, given up with the caller's context
	monitor *Monitor      // guarded by Pool.mu
	failed  error
	at      time.Time
}

// NewPool returns an empty pool. Close it.
func NewPool() *Pool { return &Pool{slots: map[string]*slot{}} }

// Get returns the live connection of a socket, connecting when there is none. Errors are those of [Dial]; one is repeated
// for a second without trying.
func (p *Pool) Get(ctx context.Context, socket string) (*Monitor, error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, unreachable(ErrClosed, "pool of monitors")
	}
	s := p.slots[socket]
	if s == nil {
		s = &slot{lock: make(chan struct{}, 1)}
		p.slots[socket] = s
	}
	p.mu.Unlock()
	if m, err, known := p.known(s); known {
		return m, err
	}
	select {
	case s.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, unreachable(ctx.Err(), "connect to monitor %s", socket)
	}
	defer func() { <-s.lock }()
	if m, err, known := p.known(s); known { // somebody else connected meanwhile
		return m, err
	}
	m, err := Dial(ctx, socket)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil && p.closed {
		_ = m.Close()
		return nil, unreachable(ErrClosed, "pool of monitors")
	}
	s.monitor, s.failed, s.at = m, err, time.Now()
	if ctx.Err() != nil {
		s.failed = nil // the caller's haste says nothing of the socket
	}
	return m, err
}

// known returns the live connection, or the failure of a moment ago.
func (p *Pool) known(s *slot) (*Monitor, error, bool) { //nolint:revive // the flag says whether the first two mean something
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.monitor != nil {
		select {
		case <-s.monitor.Done():
			s.monitor = nil
		default:
			return s.monitor, nil, true
		}
	}
	if s.failed != nil && time.Since(s.at) < retryAfter {
		return nil, s.failed, true
	}
	return nil, nil, false
}

// Forget closes the connection of a socket.
func (p *Pool) Forget(socket string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.slots[socket]; s != nil {
		if s.monitor != nil {
			_ = s.monitor.Close()
		}
		s.monitor, s.failed = nil, nil
	}
}

// Close ends all connections.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, s := range p.slots {
		if s.monitor != nil {
			_ = s.monitor.Close()
		}
	}
}
