package bus

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

const (
	// requestTimeout bounds a request whose context has no deadline, and each
	// attempt of one whose context has a later one.
	requestTimeout = 5 * time.Second

	reconnectFirst = 100 * time.Millisecond
	reconnectLast  = 2 * time.Second
)

// State is the state of the connection.
type State string

// States of a connection.
const (
	Connected    State = "connected"
	Disconnected State = "disconnected" // being reconnected, for ever
	Closed       State = "closed"       // by Close
)

// Options configures a connection.
type Options struct {
	// Server connects in process; URL and TLS are not used then, its token is
	// known.
	Server *Server
	// URL of one or more servers, comma separated: nats://host:4222, tls://host:4222.
	URL string
	// TLS of the connection. The three files build one when TLS is nil.
	TLS *tls.Config
	// CAFile, CertFile and KeyFile are PEM files; the pair is read again for
	// every connection, so that certificates can be renewed.
	CAFile, CertFile, KeyFile string
	// CredentialsFile is a NATS .creds file (JWT and key).
	CredentialsFile string
	// Token authenticates when the server asks for one.
	Token string
	// Name is the service; it names the connection and is the source of events.
	Name string
	// AckWait is the default of [ConsumerOptions.AckWait] on this connection; zero is 30 s.
	AckWait time.Duration
	// Logger, TracerProvider and MeterProvider default to none.
	Logger         *slog.Logger
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	// OnState, if set, is called at each change of state, one call at a time,
	// with the error that caused it or nil. It must not block.
	OnState func(State, error)
}

// Bus is one connection. It is safe for concurrent use. Close it.
type Bus struct {
	*shared
	name string
}

type shared struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	logger  *slog.Logger
	tracer  trace.Tracer
	counter metric.Int64Counter
	onState func(State, error)
	ackWait time.Duration // default of consumers; zero is theirs

	mu          sync.Mutex
	state       State
	reconnected chan struct{} // closed and replaced at each reconnect
	closed      chan struct{}
}

// Connect connects, trying again until ctx ends if no server can be reached;
// then the error wraps [ErrNotConnected]. A server that refuses the credentials
// or the certificate ends it at once with [ErrRefused]. Once connected, the
// connection reconnects for ever; requests meanwhile wait for their deadline.
func Connect(ctx context.Context, o Options) (*Bus, error) {
	s := &shared{
		logger: o.Logger, onState: o.OnState, ackWait: o.AckWait, state: Disconnected,
		reconnected: make(chan struct{}), closed: make(chan struct{}),
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if o.TracerProvider == nil {
		o.TracerProvider = tracenoop.NewTracerProvider()
	}
	s.tracer = o.TracerProvider.Tracer("github.com/landfall-dr/landfall/libs/bus")
	if o.MeterProvider == nil {
		o.MeterProvider = metricnoop.NewMeterProvider()
	}
	var err error
	s.counter, err = o.MeterProvider.Meter("github.com/landfall-dr/landfall/libs/bus").Int64Counter(
		"landfall_bus_deliveries",
		metric.WithDescription("Messages handled, by queue (work kind or event durable) and outcome."))
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	url, opts, err := s.connectOptions(o)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	wait := reconnectFirst
	for {
		s.nc, err = nats.Connect(url, opts...)
		if err == nil {
			break
		}
		if refused(err) {
			return nil, fmt.Errorf("connect to %s: %w: %w", url, ErrRefused, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to %s: %w: %w", url, ErrNotConnected, err)
		case <-time.After(wait):
		}
		wait = min(2*wait, reconnectLast)
	}
	s.js, err = jetstream.New(s.nc, jetstream.WithDefaultTimeout(requestTimeout))
	if err != nil {
		s.nc.Close()
		return nil, fmt.Errorf("connect to %s: %w", url, err)
	}
	s.setState(Connected, nil)
	return &Bus{shared: s, name: o.Name}, nil
}

func (s *shared) connectOptions(o Options) (string, []nats.Option, error) {
	opts := []nats.Option{
		nats.Name(o.Name),
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(), // renewed credentials must be able to heal a running service
		nats.CustomReconnectDelay(func(attempts int) time.Duration {
			return min(reconnectFirst<<min(attempts, 10), reconnectLast)
		}),
		nats.Timeout(requestTimeout),
		nats.PingInterval(10 * time.Second), nats.MaxPingsOutstanding(2),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { s.setState(Disconnected, err) }),
		nats.ReconnectHandler(func(*nats.Conn) { s.setState(Connected, nil) }),
		nats.ClosedHandler(func(*nats.Conn) { s.setState(Closed, nil); close(s.closed) }),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			s.logger.Warn("NATS reports an error", "subject", subject, "error", err)
		}),
	}
	if o.Server != nil {
		opts = append(opts, nats.InProcessServer(o.Server.ns))
		if token := o.Server.token; token != "" {
			opts = append(opts, nats.Token(token))
		}
		return "nats://in-process", opts, nil
	}
	if o.URL == "" {
		return "", nil, errors.New("neither a server nor a URL given")
	}
	if o.Token != "" {
		opts = append(opts, nats.Token(o.Token))
	}
	if o.CredentialsFile != "" {
		opts = append(opts, nats.UserCredentials(o.CredentialsFile))
	}
	switch {
	case o.TLS != nil:
		opts = append(opts, nats.Secure(o.TLS))
	case o.CAFile != "" || o.CertFile != "":
		if o.CAFile != "" {
			opts = append(opts, nats.RootCAs(o.CAFile))
		}
		if o.CertFile != "" {
			opts = append(opts, nats.ClientCert(o.CertFile, o.KeyFile))
		}
	}
	return o.URL, opts, nil
}

// refused tells errors that another try cannot change.
func refused(err error) bool {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var host x509.HostnameError
	var alert tls.AlertError
	var opErr *net.OpError
	switch {
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked),
		errors.Is(err, nats.ErrSecureConnRequired), errors.Is(err, nats.ErrSecureConnWanted),
		errors.As(err, &unknown), errors.As(err, &invalid), errors.As(err, &host), errors.As(err, &alert):
		return true
	case errors.As(err, &opErr) && opErr.Op == "remote error": // a TLS alert of the server
		return true
	}
	return false
}

func (s *shared) setState(state State, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == state {
		return
	}
	was := s.state
	s.state = state
	if state == Connected {
		close(s.reconnected)
		s.reconnected = make(chan struct{})
	}
	if was != Disconnected || state == Closed || s.nc != nil {
		s.logger.Info("NATS connection changed", "state", string(state), "error", err)
	}
	if s.onState != nil {
		s.onState(state, err)
	}
}

// nextReconnect returns a channel that closes at the next reconnect.
func (s *shared) nextReconnect() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reconnected
}

// As returns the same connection for another service: events carry its name.
// Closing either closes both.
func (b *Bus) As(name string) *Bus { return &Bus{shared: b.shared, name: name} }

// State returns the state of the connection.
func (b *Bus) State() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state
}

// Ready asks the server and JetStream for a sign of life; for readiness checks.
func (b *Bus) Ready(ctx context.Context) error {
	if _, err := b.js.AccountInfo(ctx); err != nil {
		return fmt.Errorf("ask JetStream: %w", err)
	}
	return nil
}

// Close sends what is buffered and closes the connection. Stop consumers first:
// end the contexts of their Run and wait for it.
func (b *Bus) Close(ctx context.Context) error {
	var err error
	if b.nc.IsConnected() {
		flush, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		err = b.nc.FlushWithContext(flush)
	}
	b.nc.Close()
	select {
	case <-b.closed:
	case <-ctx.Done():
		return fmt.Errorf("close NATS connection: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("flush NATS connection: %w", err)
	}
	return nil
}

// ErrNotDurable is wrapped by [CheckDurability] when a server acknowledges
// writes before they are on disk.
var ErrNotDurable = errors.New("server does not synchronise every write")

// CheckDurability asks the monitoring endpoint of an external server, for
// example "http://nats:8222", whether writes reach the disk before they are
// acknowledged. It returns nil if they do, an error wrapping [ErrNotDurable]
// that says what to configure if not, and another error if it could not ask.
func CheckDurability(ctx context.Context, monitor string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(monitor, "/")+"/jsz", nil)
	if err != nil {
		return fmt.Errorf("ask NATS monitoring: %w", err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask NATS monitoring: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	var status struct {
		Disabled bool `json:"disabled"`
		Config   struct {
			SyncAlways bool `json:"sync_always"`
		} `json:"config"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&status); err != nil {
		return fmt.Errorf("read NATS monitoring, HTTP status %d: %w", resp.StatusCode, err)
	}
	switch {
	case status.Disabled:
		return fmt.Errorf("NATS server at %s: JetStream is disabled", monitor)
	case !status.Config.SyncAlways:
		return fmt.Errorf("NATS server at %s: %w: set jetstream { sync_interval: always }", monitor, ErrNotDurable)
	}
	return nil
}
