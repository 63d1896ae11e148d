package server

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

	"golang.org/x/sync/semaphore"

	"github.com/landfall-dr/landfall/libs/extent"
)

// Disk is what is exported, for reading only unless it is a Writer. Its methods are safe for concurrent use. Offsets and
// lengths are in bytes, whole sectors, within the disk.
type Disk interface {
	// Size in bytes.
	Size() int64
	// ReadAt fills p. The context ends when the client is gone, not when the server stops.
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// Allocator is a Disk that knows where it holds data. Other disks do not offer base:allocation, and are read everywhere.
type Allocator interface {
	// Allocated returns the parts of r that may hold something other than zero.
	Allocated(ctx context.Context, r extent.Range) (*extent.Set, error)
}

// Writer is a Disk that can be written. A request to write any other is answered with EPERM.
type Writer interface {
	// WriteAt returns once the write is done; with fua once it is durable.
	WriteAt(p []byte, off int64, fua bool) error
	// Zero makes r read as zeros; it keeps the space allocated if keep is set.
	Zero(r extent.Range, keep, fua bool) error
	// Flush makes durable what was answered before.
	Flush() error
}

// FastZeroer is a Disk that may say that Zero without keep costs less than writing. Clients are told of fast zeroes
// only then: a disk that may have to write the zeros would make them pay twice.
type FastZeroer interface {
	FastZero() bool
}

// ErrForbidden, in an error of Exports.Open, says that the export is there and not to be had.
var ErrForbidden = errors.New("export is closed")

// ErrStopping, in an error of a Disk, says that it is going away, which its clients are told.
var ErrStopping = errors.New("disk is going away")

// Exports finds disks by name.
type Exports interface {
	// Exports are the names. If there is one it is the default export as well.
	Exports() []string
	// Open returns an export. It lives until CloseExports of its name returned.
	Open(name string) (Disk, error)
}

// Bounds of one connection.
const (
	maxInFlight      = 64
	maxInFlightBytes = 64 << 20
)

// Options of a server; the zero value is one for guests.
type Options struct {
	// Connections at most; default 256.
	Connections int
	// Memory bounds the payloads in flight on all connections together, in bytes, at least MaxRequest. By default only
	// those of each connection are bounded, at 64 MiB.
	Memory int64
	// Drain is how long a client that takes no replies holds up the end; default 10 s.
	Drain time.Duration
}

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
	memory  *semaphore.Weighted // nil: bounded by connection only

	mu    sync.Mutex
	conns map[*conn]struct{}
}

// New returns a server.
func New(exports Exports, logger *slog.Logger, o Options) *Server {
	s := &Server{exports: exports, logger: logger, limits: defaultLimits(), conns: map[*conn]struct{}{}}
	if o.Connections > 0 {
		s.limits.connections = o.Connections
	}
	if o.Drain > 0 {
		s.limits.drain = o.Drain
	}
	if o.Memory > 0 {
		s.memory = semaphore.NewWeighted(max(o.Memory, MaxRequest))
	}
	return s
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
