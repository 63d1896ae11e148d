package rpc

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// pipeStart is the first size of a pipe's buffer, in bytes: most connections carry control calls.
	pipeStart = 8 << 10
	// pipeMax is how far it grows when its writer is ahead of its reader. Larger gains nothing
	// (BenchmarkBulkGRPC/mem): the buffer falls out of the processor's cache.
	pipeMax = 128 << 10
)

// memConn is one end of an in-memory connection.
type memConn struct {
	in, out *pipe
	addr    memAddr
	dialer  Peer
}

// memPipe makes both ends of a connection.
func memPipe(addr memAddr, dialer Peer) (client, server *memConn) {
	up, down := newPipe(), newPipe()
	client = &memConn{in: down, out: up, addr: addr, dialer: dialer}
	server = &memConn{in: up, out: down, addr: addr, dialer: dialer}
	return client, server
}

func (c *memConn) speaksFor() Peer { return c.dialer }

func (c *memConn) Read(b []byte) (int, error)  { return c.in.read(b) }
func (c *memConn) Write(b []byte) (int, error) { return c.out.write(b) }

// Close ends both directions; what was written before can still be read by the other end.
func (c *memConn) Close() error {
	c.out.closeWrite()
	c.in.closeRead()
	return nil
}

func (c *memConn) LocalAddr() net.Addr  { return c.addr }
func (c *memConn) RemoteAddr() net.Addr { return c.addr }

func (c *memConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readLimit, t)
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.writeLimit, t)
	return nil
}

// pipe is one direction: a ring that one side fills and the other drains.
type pipe struct {
	mu          sync.Mutex
	readable    sync.Cond
	writable    sync.Cond
	ring        []byte
	start, used int
	writeClosed bool // no more will be written
	readClosed  bool // nobody reads any more
	readLimit   limit
	writeLimit  limit
}

// limit is a deadline of one side.
type limit struct {
	timer  *time.Timer
	passed bool
}

func newPipe() *pipe {
	p := &pipe{}
	p.readable.L, p.writable.L = &p.mu, &p.mu
	return p
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.readClosed:
			return 0, net.ErrClosed
		case p.readLimit.passed:
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		case p.used > 0:
			return p.drain(b), nil
		case p.writeClosed:
			return 0, io.EOF
		}
		p.readable.Wait()
	}
}

// drain moves bytes out of the ring, across its end if need be.
func (p *pipe) drain(b []byte) int {
	n := 0
	for n < len(b) && p.used > 0 {
		k := copy(b[n:], p.ring[p.start:min(p.start+p.used, len(p.ring))])
		p.start, p.used, n = (p.start+k)%len(p.ring), p.used-k, n+k
	}
	if p.used == 0 {
		p.start = 0 // keep to the front of the ring, which is in the cache
	}
	p.writable.Signal()
	return n
}

func (p *pipe) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for {
		switch {
		case p.writeClosed:
			return n, net.ErrClosed
		case p.readClosed:
			return n, io.ErrClosedPipe
		case p.writeLimit.passed:
			return n, os.ErrDeadlineExceeded
		}
		n += p.fill(b[n:])
		if n == len(b) {
			return n, nil
		}
		p.writable.Wait()
	}
}

// fill moves bytes into the ring, which it grows up to pipeMax.
func (p *pipe) fill(b []byte) int {
	if free := len(p.ring) - p.used; free < len(b) && len(p.ring) < pipeMax {
		size := max(len(p.ring), pipeStart)
		for size < pipeMax && size-p.used < len(b) {
			size *= 2
		}
		grown := make([]byte, size)
		k := copy(grown, p.ring[p.start:min(p.start+p.used, len(p.ring))])
		copy(grown[k:], p.ring[:p.used-k])
		p.ring, p.start = grown, 0
	}
	n := 0
	for n < len(b) && p.used < len(p.ring) {
		at := (p.start + p.used) % len(p.ring)
		end := len(p.ring)
		if at < p.start {
			end = p.start
		}
		k := copy(p.ring[at:end], b[n:])
		p.used, n = p.used+k, n+k
	}
	if n > 0 {
		p.readable.Signal()
	}
	return n
}

func (p *pipe) closeWrite() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writeClosed = true
	p.wake()
}

func (p *pipe) closeRead() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.readClosed = true
	p.ring, p.start, p.used = nil, 0, 0
	p.wake()
}

// wake lets every waiting side look again, and stops the timers of a pipe that is closed.
func (p *pipe) wake() {
	if p.readClosed || p.writeClosed {
		for _, l := range []*limit{&p.readLimit, &p.writeLimit} {
			if l.timer != nil {
				l.timer.Stop()
			}
		}
	}
	p.readable.Broadcast()
	p.writable.Broadcast()
}

func (p *pipe) setDeadline(l *limit, t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	l.passed = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		l.passed = true
		p.wake()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.timer == timer { // else it was replaced while this ran
			l.passed = true
			p.wake()
		}
	})
	l.timer = timer
}
