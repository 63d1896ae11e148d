package rpc

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// layer is one concern of the server, in the form for unary calls and the form for streams.
type layer struct {
	name   string
	unary  grpc.UnaryServerInterceptor
	stream grpc.StreamServerInterceptor
}

// layers returns what every call passes, outermost first. The order is a contract (tested): metrics and
// logs see the final status; a call is authorized before its message is looked at; recovery is
// innermost, so that everything outside sees the error that a panic becomes.
func (s *Server) layers() []layer {
	return []layer{
		{"metrics", s.measureUnary, s.measureStream},
		{"logging", s.logUnary, s.logStream},
		{"deadline", s.budgetUnary, s.budgetStream},
		{"authorization", s.authorizeUnary, s.authorizeStream},
		{"validation", s.validateUnary, s.validateStream},
		{"errors", mapErrorsUnary, mapErrorsStream},
		{"recovery", recoverUnary, recoverStream},
	}
}

// LayerNames returns the names of the layers that every call passes, outermost first.
func LayerNames() []string {
	var names []string
	for _, l := range new(Server).layers() {
		names = append(names, l.name)
	}
	return names
}

// --- metrics

type instruments struct {
	requests metric.Int64Counter
	duration metric.Float64Histogram
	inFlight metric.Int64UpDownCounter
}

func newInstruments(mp metric.MeterProvider) (instruments, error) {
	m := mp.Meter(scopeName)
	var i instruments
	var errs [3]error
	i.requests, errs[0] = m.Int64Counter("landfall_rpc_server_requests_total",
		metric.WithDescription("Calls that ended, by method, gRPC code and reason."))
	i.duration, errs[1] = m.Float64Histogram("landfall_rpc_server_duration_seconds", metric.WithUnit("s"),
		metric.WithDescription("Time from a call's start to its end, by method; for streams their whole life."),
		metric.WithExplicitBucketBoundaries(.001, .005, .02, .1, .5, 2, 10, 60, 600))
	i.inFlight, errs[2] = m.Int64UpDownCounter("landfall_rpc_server_calls_in_flight",
		metric.WithDescription("Calls that are being served."))
	return i, errors.Join(errs[:]...)
}

// begin counts a call in and returns what counts it out.
func (s *Server) begin(ctx context.Context, method string) func(error) {
	start := time.Now()
	s.metrics.inFlight.Add(ctx, 1)
	return func(err error) {
		ctx := context.WithoutCancel(ctx) // a cancelled call counts too
		s.metrics.inFlight.Add(ctx, -1)
		m := attribute.String("method", method)
		s.metrics.duration.Record(ctx, time.Since(start).Seconds(), metric.WithAttributes(m))
		s.metrics.requests.Add(ctx, 1, metric.WithAttributes(m,
			attribute.String("code", status.Code(err).String()), attribute.String("reason", reasonLabel(err))))
	}
}

func reasonLabel(err error) string {
	if err == nil {
		return ""
	}
	return errcat.Code(errcat.Reason(errcat.FromError(err)))
}

func (s *Server) measureUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	end := s.begin(ctx, info.FullMethod)
	resp, err := next(ctx, req)
	end(err)
	return resp, err
}

func (s *Server) measureStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	end := s.begin(stream.Context(), info.FullMethod)
	err := next(srv, stream)
	end(err)
	return err
}

// --- logging

// call is what inner layers note for the log line of a call.
type call struct{ stack []byte }

type callKey struct{}

func (s *Server) logUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	c, start := &call{}, time.Now()
	resp, err := next(context.WithValue(ctx, callKey{}, c), req)
	s.logCall(ctx, c, info.FullMethod, start, err)
	return resp, err
}

func (s *Server) logStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	c, start := &call{}, time.Now()
	ctx := context.WithValue(stream.Context(), callKey{}, c)
	err := next(srv, &streamWithContext{stream, ctx})
	s.logCall(ctx, c, info.FullMethod, start, err)
	return err
}

func (s *Server) logCall(ctx context.Context, c *call, method string, start time.Time, err error) {
	level := levelOf(status.Code(err))
	if !s.log.Enabled(ctx, level) {
		return
	}
	peer, _ := PeerFrom(ctx)
	attrs := []slog.Attr{
		slog.String("method", method), slog.String("peer", peer.String()),
		slog.Duration("took", time.Since(start)), slog.String("code", status.Code(err).String()),
	}
	if err != nil {
		attrs = append(attrs, slog.String("reason", reasonLabel(err)), slog.String("error", status.Convert(err).Message()))
	}
	if c.stack != nil {
		attrs = append(attrs, slog.String("stack", string(c.stack)))
	}
	s.log.LogAttrs(ctx, level, "call", attrs...)
}

// levelOf: what a caller did wrong is the caller's to report.
func levelOf(code codes.Code) slog.Level {
	switch code {
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return slog.LevelError
	case codes.PermissionDenied, codes.Unauthenticated, codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// streamWithContext is a stream whose handlers see another context.
type streamWithContext struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // grpc.ServerStream is asked for its context
}

func (s *streamWithContext) Context() context.Context { return s.ctx }

// --- deadline budget

func (s *Server) budgetUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := budgetLeft(ctx); err != nil {
		return nil, err
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.opts.UnaryTimeout)
		defer cancel()
	}
	return next(ctx, req)
}

func (s *Server) budgetStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := budgetLeft(stream.Context()); err != nil {
		return err
	}
	return next(srv, stream)
}

// budgetLeft refuses work that nobody waits for any more.
func budgetLeft(ctx context.Context) error {
	err := ctx.Err()
	if deadline, ok := ctx.Deadline(); err == nil && ok && time.Until(deadline) <= 0 {
		err = context.DeadlineExceeded
	}
	return mapError(err)
}

// --- authorization

func (s *Server) authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := s.authorize(ctx, info.FullMethod); err != nil {
		return nil, mapError(err)
	}
	return next(ctx, req)
}

func (s *Server) authorizeStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := s.authorize(stream.Context(), info.FullMethod); err != nil {
		return mapError(err)
	}
	return next(srv, stream)
}

// --- validation

func (s *Server) validate(m any) error {
	if b, ok := m.(*bulk); ok {
		m = b.header // rules on the data field itself are the handler's
	}
	msg, ok := m.(proto.Message)
	if !ok {
		return nil
	}
	return mapError(errcat.Invalid(s.validator.Validate(msg)))
}

func (s *Server) validateUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := s.validate(req); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *Server) validateStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return next(srv, &validatedStream{stream, s})
}

// validatedStream checks every message that a client sends.
type validatedStream struct {
	grpc.ServerStream
	server *Server
}

func (v *validatedStream) RecvMsg(m any) error {
	if err := v.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return v.server.validate(m)
}

// --- errors

// mapError makes the status that travels; nil stays nil.
func mapError(err error) error {
	if err == nil {
		return nil
	}
	return errcat.ToStatus(err).Err()
}

func mapErrorsUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	return resp, mapError(err)
}

func mapErrorsStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return mapError(next(srv, stream))
}

// --- recovery

// recovered makes INTERNAL of a panic and leaves its stack for the log line.
func recovered(ctx context.Context, value any) error {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.stack = debug.Stack()
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_INTERNAL, "the handler panicked: %v", value)
}

func recoverUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if v := recover(); v != nil {
			resp, err = nil, recovered(ctx, v)
		}
	}()
	return next(ctx, req)
}

func recoverStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = recovered(stream.Context(), v)
		}
	}()
	return next(srv, stream)
}
