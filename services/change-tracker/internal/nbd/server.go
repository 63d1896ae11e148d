// Package nbd serves disks by the NBD protocol: fixed newstyle negotiation, structured replies with the
// base:allocation context, and every command that a guest needs. Several connections may use one export at once;
// a flush on any of them covers the writes that were answered on all.
//
// Everything is bounded: options and their length, payloads, requests and bytes in flight per connection,
// connections. TLS is not offered; listen on loopback or a Unix socket.
package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/extent"
)

// Disk is what is exported. Its methods are safe for concurrent use. Offsets and lengths are in bytes, whole sectors.
type Disk interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt returns once the write is done; with fua once it is durable.
	WriteAt(p []byte, off int64, fua bool) error
	// Zero makes r read as zeros; it keeps the space allocated if keep is set.
	Zero(r extent.Range, keep, fua bool) error
	// Flush makes durable what was answered before.
	Flush() error
	// Allocated returns the parts of r that may hold something other than zero.
	Allocated(r extent.Range) (*extent.Set, error)
}

// Exports finds disks by name.
type Exports interface {
	Exports() []string
	Open(name string) (Disk, error)
}

const (
	handshakeTimeout = 20 * time.Second
	maxConnections   = 256
	maxInFlight      = 64
	maxInFlightBytes = 64 << 20
)

// Server serves Exports on listeners.
type Server struct {
	exports Exports
	logger  *slog.Logger

	mu    sync.Mutex
	conns map[*conn]struct{}
}

// New returns a server.
func New(exports Exports, logger *slog.Logger) *Server {
	return &Server{exports: exports, logger: logger, conns: map[*conn]struct{}{}}
}

// Serve accepts connections until ctx ends, then lets the requests in flight finish, answers them and returns nil. It
// closes the listener.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = lis.Close() })
	defer stop()
	var failure error
	for {
		nc, err := lis.Accept()
		if err != nil {
			if ctx.Err() == nil {
				failure = err
			}
			break
		}
		c := &conn{server: s, nc: nc, done: make(chan struct{})}
		if !s.add(c) {
			s.logger.Warn("too many NBD connections; one more is refused", "limit", maxConnections)
			_ = nc.Close()
			continue
		}
		wg.Go(func() {
			defer s.remove(c)
			err := c.run()
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !c.stopped() {
				s.logger.Info("NBD connection ended", "export", c.name, "err", err)
			}
		})
	}
	s.CloseExports(func(string) bool { return true })
	wg.Wait()
	_ = lis.Close()
	return failure
}

// CloseExports ends the connections to the exports that match, after their requests in flight were answered, and
// waits for them. Connections that have no export yet are ended too.
func (s *Server) CloseExports(match func(name string) bool) {
	s.mu.Lock()
	var ending []*conn
	for c := range s.conns {
		if c.export() == "" || match(c.export()) {
			ending = append(ending, c)
		}
	}
	s.mu.Unlock()
	for _, c := range ending {
		c.stop()
	}
	for _, c := range ending {
		<-c.done
	}
}

func (s *Server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= maxConnections {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	close(c.done)
}
