package bus

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// defaultMaxStore bounds what streams may reserve together; the disk itself is
// the real bound.
const defaultMaxStore = 1 << 40

// ServerOptions configures the embedded server.
type ServerOptions struct {
	// StoreDir is the folder of streams and state. One server at a time may use
	// it; the caller holds the lock on its state directory.
	StoreDir string
	// Name is shown to operators; default "landfall".
	Name string
	// Unsynced acknowledges writes before they are on disk. Only for benchmarks
	// and tests of other things: state is lost when the power goes.
	Unsynced bool
	// MaxStore bounds the bytes that streams reserve together; default 1 TiB.
	MaxStore int64
	// Listen, when set, also opens a TCP port, for example "127.0.0.1:0". Clients
	// then need the token, in process as well.
	Listen string
	// Token of clients; made up when empty and Listen is set.
	Token string
	// TLS of the TCP port; plain when nil. Connections in process need none.
	TLS *tls.Config
	// Logger receives the server's log; default discards it.
	Logger *slog.Logger
}

// Server is an embedded NATS server with JetStream. Stop it.
type Server struct {
	ns    *server.Server
	token string
	tls   bool
}

// StartEmbedded starts a server and returns when it accepts connections and
// JetStream is up, or when ctx ends.
func StartEmbedded(ctx context.Context, o ServerOptions) (*Server, error) {
	if o.StoreDir == "" {
		return nil, errors.New("start embedded NATS: no store directory")
	}
	opts := &server.Options{
		ServerName: o.Name, DontListen: true, NoSigs: true,
		JetStream: true, StoreDir: o.StoreDir, SyncAlways: !o.Unsynced,
		JetStreamMaxStore: o.MaxStore, JetStreamMaxMemory: 64 << 20,
	}
	if opts.ServerName == "" {
		opts.ServerName = "landfall"
	}
	if opts.JetStreamMaxStore <= 0 {
		opts.JetStreamMaxStore = defaultMaxStore
	}
	s := &Server{token: o.Token, tls: o.TLS != nil}
	if o.Listen != "" {
		host, portText, err := net.SplitHostPort(o.Listen)
		if err != nil {
			return nil, fmt.Errorf("start embedded NATS: listen address: %w", err)
		}
		port, err := strconv.ParseUint(portText, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("start embedded NATS: listen port %q: %w", portText, err)
		}
		opts.DontListen, opts.Host, opts.Port = false, host, int(port)
		if port == 0 {
			opts.Port = server.RANDOM_PORT
		}
		if s.token == "" {
			s.token = rand.Text()
		}
		if o.TLS != nil {
			opts.TLS, opts.TLSConfig, opts.TLSTimeout = true, o.TLS, 5
		}
	}
	opts.Authorization = s.token

	ns, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("start embedded NATS: %w", err)
	}
	s.ns = ns
	logger := &serverLogger{to: o.Logger}
	if logger.to == nil {
		logger.to = slog.New(slog.DiscardHandler)
	}
	ns.SetLoggerV2(logger, false, false, false)
	ns.Start()
	for !ns.ReadyForConnections(50 * time.Millisecond) {
		if fatal := logger.fatal.Load(); fatal != nil {
			err = errors.New(*fatal)
		} else if err = ctx.Err(); err == nil {
			continue
		}
		ns.Shutdown()
		ns.WaitForShutdown()
		return nil, fmt.Errorf("start embedded NATS in %s: %w", o.StoreDir, err)
	}
	return s, nil
}

// URL returns where the TCP port listens, and "" if there is none.
func (s *Server) URL() string {
	addr := s.ns.Addr()
	if addr == nil {
		return ""
	}
	scheme := "nats"
	if s.tls {
		scheme = "tls"
	}
	return scheme + "://" + addr.String()
}

// Token returns what clients must present, and "" if nothing.
func (s *Server) Token() string { return s.token }

// Stop closes all connections, writes what is open to disk, and returns when
// that is done or ctx ends. Stopping twice is harmless.
func (s *Server) Stop(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.ns.Shutdown()
		s.ns.WaitForShutdown()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop embedded NATS: %w", context.Cause(ctx))
	}
}

// serverLogger passes the server's log on. The server calls Fatalf when
// JetStream does not start and expects the process to end there; we keep the
// message for StartEmbedded instead.
type serverLogger struct {
	to    *slog.Logger
	fatal atomic.Pointer[string]
}

func (l *serverLogger) log(level slog.Level, format string, v []any) {
	if l.to.Enabled(context.Background(), level) {
		l.to.Log(context.Background(), level, "nats: "+strings.TrimSpace(fmt.Sprintf(format, v...)))
	}
}

// Noticef is Debug for us: the server tells its life story at this level.
func (l *serverLogger) Noticef(format string, v ...any) { l.log(slog.LevelDebug, format, v) }
func (l *serverLogger) Warnf(format string, v ...any)   { l.log(slog.LevelWarn, format, v) }
func (l *serverLogger) Errorf(format string, v ...any)  { l.log(slog.LevelError, format, v) }
func (l *serverLogger) Debugf(string, ...any)           {}
func (l *serverLogger) Tracef(string, ...any)           {}

func (l *serverLogger) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.fatal.CompareAndSwap(nil, &text)
	l.log(slog.LevelError, format, v)
}
