package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"syscall"
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

// FastZeroer is a Disk that may say that Zero without keep costs less than writing. Clients are told of fast zeroes
// only then: a disk that may have to write the zeros would make them pay twice.
type FastZeroer interface {
	FastZero() bool
}

// ErrForbidden, in an error of Exports.Open, says that the export is there and not to be had.
var ErrForbidden = errors.New("export is closed")

// Exports finds disks by name.
type Exports interface {
	// Exports are the names, "<machine>/<disk>". If there is one it is the default export as well.
	Exports() []string
	// Open returns an export. It lives until CloseExports of its name returned.
	Open(name string) (Disk, error)
}

const (
	maxInFlight      = 64
	maxInFlightBytes = 64 << 20
)

// limits are what a client may cost.
type limits struct {
	connections int
	handshake   time.Duration // from the first byte to the choice of an export
	reply       time.Duration // for the client to take one
	drain       time.Duration // for the same once the connection is to end
	acceptRetry time.Duration
}

func defaultLimits() limits {
	return limits{
		connections: 256, handshake: 20 * time.Second, reply: 2 * time.Minute, drain: 10 * time.Second,
		acceptRetry: 100 * time.Millisecond,
	}
}

// Server serves Exports on listeners.
type Server struct {
	exports Exports
	logger  *slog.Logger
	limits  limits

	mu    sync.Mutex
	conns map[*conn]struct{}
}

// New returns a server.
func New(exports Exports, logger *slog.Logger) *Server {
	return &Server{exports: exports, logger: logger, limits: defaultLimits(), conns: map[*conn]struct{}{}}
}

// Serve accepts connections until ctx ends, then lets the requests in flight finish, answers the clients that take
// their replies and returns nil when every connection is closed and every request is done. It closes the listener.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = lis.Close() })
	defer stop()
	var failure error
	for {
		nc, err := lis.Accept()
		if err != nil {
			if ctx.Err() == nil && transient(err) {
				s.logger.Warn("NBD connection not accepted; the next try follows", "err", err)
				pause(ctx, s.limits.acceptRetry)
				continue
			}
			if ctx.Err() == nil {
				failure = err
			}
			break
		}
		c := &conn{server: s, nc: nc, done: make(chan struct{})}
		if !s.add(c) {
			s.logger.Warn("too many NBD connections; one more is refused", "limit", s.limits.connections)
			_ = nc.Close()
			continue
		}
		wg.Go(func() {
			defer s.remove(c)
			defer func() {
				if p := recover(); p != nil {
					s.logger.Error("NBD connection panicked", "export", c.export(), "panic", p, "stack", string(debug.Stack()))
				}
			}()
			err := c.run()
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !c.stopped() {
				s.logger.Info("NBD connection ended", "export", c.export(), "err", err)
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
	if len(s.conns) >= s.limits.connections {
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

// transient reports whether accepting may work again later.
func transient(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) ||
		errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ENOBUFS)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
