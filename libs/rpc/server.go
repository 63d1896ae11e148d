package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"buf.build/go/protovalidate"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc/filters"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/reflect/protoreflect"
)

const scopeName = "github.com/landfall-dr/landfall/libs/rpc"

const (
	// DefaultUnaryTimeout is the deadline of unary calls that come or go without one.
	DefaultUnaryTimeout = 30 * time.Second
	// DefaultStopTimeout is how long a stopping server waits for the calls that it serves.
	DefaultStopTimeout = 10 * time.Second
	// MaxMessageBytes is the largest message either way. Bulk chunks are at most 1 MiB of payload; lists
	// are paged.
	MaxMessageBytes = 8 << 20

	// stopGrace is how long handlers may take to notice that their calls were cut off.
	stopGrace = 2 * time.Second

	// bufferBytes is what one read or write of a connection moves at most. 128 KiB instead of gRPC's
	// 32 KiB moves a fifth more per CPU-second over TLS (BenchmarkBulkGRPC) for 0.25 MiB per connection.
	bufferBytes = 128 << 10

	maxStreams       = 1024 // concurrent calls of one connection
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
	handshakeTimeout = 10 * time.Second
)

// ServerOptions is what a server is built from.
type ServerOptions struct {
	// Name is the program's name in logs.
	Name string
	// Identity is the server's own; its Files are needed for TCP listeners.
	Identity Identity
	// Logger gets a line for every call that failed (and, at debug level, for all); nil discards.
	Logger *slog.Logger
	// TracerProvider and MeterProvider; nil means none.
	TracerProvider trace.TracerProvider
	// MeterProvider gets the instruments landfall_rpc_server_*.
	MeterProvider metric.MeterProvider
	// Validator checks requests; nil builds one for the request types of all registered methods when
	// the server starts, so that no request pays for compiling rules.
	Validator protovalidate.Validator
	// UnaryTimeout is the deadline of unary calls that come without one; zero means
	// DefaultUnaryTimeout.
	UnaryTimeout time.Duration
	// StopTimeout is how long Run waits for calls when it ends; zero means DefaultStopTimeout.
	StopTimeout time.Duration
}

// Server is a gRPC server with every layer of the product. Register services on it as on a
// *grpc.Server, then Run it.
type Server struct {
	opts      ServerOptions
	log       *slog.Logger
	grpc      *grpc.Server
	health    *health.Server
	metrics   instruments
	validator protovalidate.Validator

	prepare sync.Once
	failed  error
	rules   map[string]rule // written by prepare, read-only after
}

var _ grpc.ServiceRegistrar = (*Server)(nil)

// NewServer builds a server. It fails only on instruments that cannot be made.
func NewServer(opts ServerOptions) (*Server, error) {
	if opts.UnaryTimeout == 0 {
		opts.UnaryTimeout = DefaultUnaryTimeout
	}
	if opts.StopTimeout == 0 {
		opts.StopTimeout = DefaultStopTimeout
	}
	if opts.TracerProvider == nil {
		opts.TracerProvider = tracenoop.NewTracerProvider()
	}
	if opts.MeterProvider == nil {
		opts.MeterProvider = metricnoop.NewMeterProvider()
	}
	s := &Server{opts: opts, log: opts.Logger, health: health.NewServer(), validator: opts.Validator}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.metrics, err = newInstruments(opts.MeterProvider); err != nil {
		return nil, fmt.Errorf("build the server %s: %w", opts.Name, err)
	}
	var unary []grpc.UnaryServerInterceptor
	var stream []grpc.StreamServerInterceptor
	for _, l := range s.layers() {
		unary, stream = append(unary, l.unary), append(stream, l.stream)
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(serverCredentials(opts.Identity)),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.StatsHandler(otelgrpc.NewServerHandler(tracing(opts.TracerProvider)...)),
		grpc.ChainUnaryInterceptor(unary...),
		grpc.ChainStreamInterceptor(stream...),
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxSendMsgSize(MaxMessageBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.WaitForHandlers(true),
		experimental.BufferPool(&pool{}),
		grpc.WriteBufferSize(bufferBytes),
		grpc.ReadBufferSize(bufferBytes),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 3, PermitWithoutStream: true}),
	)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	return s, nil
}

// tracing are the options of the stats handlers on both sides. Their metrics are off: the layers have
// their own, with the method's reason.
func tracing(tp trace.TracerProvider) []otelgrpc.Option {
	return []otelgrpc.Option{
		otelgrpc.WithTracerProvider(tp),
		otelgrpc.WithMeterProvider(metricnoop.NewMeterProvider()),
		otelgrpc.WithPropagators(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})),
		otelgrpc.WithFilter(filters.Not(filters.HealthCheck())),
	}
}

// RegisterService implements grpc.ServiceRegistrar. Call it before Run or Serve.
func (s *Server) RegisterService(desc *grpc.ServiceDesc, impl any) {
	s.grpc.RegisterService(desc, impl)
	s.health.SetServingStatus(desc.ServiceName, grpc_health_v1.HealthCheckResponse_SERVING)
}

// SetServing sets the health of one service, or of the whole server for "".
func (s *Server) SetServing(service string, serving bool) {
	state := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		state = grpc_health_v1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus(service, state)
}

// Probe serves nothing but health on a listener without TLS and without identities, until ctx ends: for
// the kubelet, whose probes have no client certificate. It says what the server itself says.
func (s *Server) Probe(ctx context.Context, lis net.Listener) error {
	probe := grpc.NewServer(grpc.MaxRecvMsgSize(4<<10), grpc.MaxConcurrentStreams(16), grpc.WaitForHandlers(true))
	grpc_health_v1.RegisterHealthServer(probe, s.health)
	stop := context.AfterFunc(ctx, probe.Stop)
	defer stop()
	if err := probe.Serve(lis); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve health of %s on %s: %w", s.opts.Name, lis.Addr(), err)
	}
	probe.Stop() // waits, where AfterFunc has only begun
	return nil
}

// Run serves the listeners until ctx ends or one of them fails, then stops: health says not serving,
// no new calls are taken, running ones get StopTimeout, then are cut off. It returns nil after an
// orderly stop.
func (s *Server) Run(ctx context.Context, listeners ...net.Listener) error {
	if len(listeners) == 0 {
		return fmt.Errorf("run the server %s: no listener", s.opts.Name)
	}
	errs := make(chan error, len(listeners))
	for _, lis := range listeners {
		go func() { errs <- s.Serve(lis) }()
	}
	var err error
	left := len(listeners)
	select {
	case <-ctx.Done():
	case err = <-errs:
		left--
	}
	stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.opts.StopTimeout)
	defer cancel()
	err = errors.Join(err, s.Stop(stopCtx))
	for range left {
		err = errors.Join(err, <-errs)
	}
	return err
}

// Serve serves one listener until Stop; nil after Stop. The listener is closed.
func (s *Server) Serve(lis net.Listener) error {
	if s.prepare.Do(s.getReady); s.failed != nil {
		return errors.Join(s.failed, lis.Close())
	}
	if err := s.grpc.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s on %s: %w", s.opts.Name, lis.Addr(), err)
	}
	return nil
}

// Stop stops gracefully until ctx ends, then cuts calls off. The error names handlers that did not end
// even then; they go on without a connection.
func (s *Server) Stop(ctx context.Context) error {
	s.health.Shutdown()
	graceful := make(chan struct{})
	go func() {
		defer close(graceful)
		s.grpc.GracefulStop()
	}()
	select {
	case <-graceful:
		return nil
	case <-ctx.Done():
	}
	hard := make(chan struct{})
	go func() {
		defer close(hard)
		s.grpc.Stop()
	}()
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-hard:
		<-graceful
		return nil
	case <-grace.C:
		return fmt.Errorf("stop the server %s: handlers still run %s after their calls were cut off", s.opts.Name, stopGrace)
	}
}

// getReady reads the rules of all registered methods and compiles the validation of their requests.
func (s *Server) getReady() {
	undeclared := s.loadRules()
	slices.Sort(undeclared)
	for _, m := range undeclared {
		s.log.Warn("method declares no callers, all calls are refused", slog.String("method", m))
	}
	if s.validator != nil {
		return
	}
	var inputs []protoreflect.MessageDescriptor
	for full := range s.rules {
		if m, ok := findMethod(full); ok {
			inputs = append(inputs, m.Input())
		}
	}
	s.validator, s.failed = protovalidate.New(protovalidate.WithMessageDescriptors(inputs...))
	if s.failed != nil {
		s.failed = fmt.Errorf("start the server %s: compile validation rules: %w", s.opts.Name, s.failed)
	}
}
