package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	// Client-side health checking and the round_robin policy named in the service config.
	_ "google.golang.org/grpc/balancer/roundrobin"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// maxReconnectDelay is the longest pause between attempts to connect: a service that comes back should
// be found within seconds, and there are never so many clients that this hurts it.
const maxReconnectDelay = 5 * time.Second

// DialerOptions is what connections are built from.
type DialerOptions struct {
	// Identity is the caller's own; its Files are needed for TCP.
	Identity Identity
	// Network resolves in-memory addresses; nil means that there are none.
	Network *Network
	// TracerProvider; nil means none.
	TracerProvider trace.TracerProvider
	// UnaryTimeout is the deadline of unary calls that are made without one; zero means
	// DefaultUnaryTimeout.
	UnaryTimeout time.Duration
}

// ErrDialerClosed is returned (wrapped) by Conn after Close.
var ErrDialerClosed = errors.New("the dialer is closed")

// Dialer makes and keeps client connections. Safe for concurrent use.
type Dialer struct {
	opts    DialerOptions
	service string // service config
	frames  *pool

	mu     sync.Mutex
	conns  map[connKey]*Conn
	closed bool
}

type connKey struct{ address, service, host string }

// NewDialer returns a dialer without connections. Close it in the end.
func NewDialer(opts DialerOptions) *Dialer {
	if opts.UnaryTimeout == 0 {
		opts.UnaryTimeout = DefaultUnaryTimeout
	}
	if opts.TracerProvider == nil {
		opts.TracerProvider = tracenoop.NewTracerProvider()
	}
	if opts.Network == nil {
		opts.Network = &Network{}
	}
	return &Dialer{opts: opts, service: serviceConfig(), frames: &pool{}, conns: make(map[connKey]*Conn)}
}

// ConnOption narrows whom a connection may reach.
type ConnOption func(*connKey)

// ExpectService demands that the server's certificate is of the named service. In-memory addresses are
// not checked: the name of the listener is all there is.
func ExpectService(name string) ConnOption { return func(k *connKey) { k.service = name } }

// ExpectHost demands that the server's certificate is bound to the named host.
func ExpectHost(name string) ConnOption { return func(k *connKey) { k.host = name } }

// Conn is a client connection: give it to the generated NewXServiceClient.
type Conn struct {
	*grpc.ClientConn
	key   connKey
	trust *trust
}

// Conn returns the connection to an address: "mem:<name>", "host:port", or a gRPC target such as
// "dns:///name:port", over whose addresses calls are spread. Connections are kept and shared; the
// caller does not close them. It does not wait for the server: calls fail with UNAVAILABLE while there
// is none, or wait if made with grpc.WaitForReady(true). The error is a malformed address or a closed
// dialer.
func (d *Dialer) Conn(address string, opts ...ConnOption) (*Conn, error) {
	key := connKey{address: address}
	for _, o := range opts {
		o(&key)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_CANCELLED, ErrDialerClosed, "connect to %s", address)
	}
	if c, ok := d.conns[key]; ok && c.GetState() != connectivity.Shutdown {
		return c, nil
	}
	c, err := d.dial(key)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "connect to %s", address)
	}
	d.conns[key] = c
	return c, nil
}

// Close closes all connections; calls on them end with CANCELLED.
func (d *Dialer) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	var errs []error
	for _, c := range d.conns {
		errs = append(errs, c.ClientConn.Close())
	}
	clear(d.conns)
	return errors.Join(errs...)
}

// drop closes a connection that is of no more use.
func (d *Dialer) drop(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conns[c.key] == c {
		delete(d.conns, c.key)
	}
	_ = c.ClientConn.Close() // fails only if closed already
}

func (d *Dialer) dial(key connKey) (*Conn, error) {
	creds := clientCredentials(d.opts.Identity, func(p Peer) error {
		if key.service != "" && !p.IsService(key.service) {
			return fmt.Errorf("the server's certificate is of %s, not of service %s", p, key.service)
		}
		if key.host != "" && p.Host != key.host {
			return fmt.Errorf("the server's certificate is of %s, not on host %s", p, key.host)
		}
		return nil
	})
	c := &Conn{key: key, trust: creds.trust}
	target := key.address
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodecV2(newCodec()),
			grpc.MaxCallRecvMsgSize(MaxMessageBytes),
			grpc.MaxCallSendMsgSize(MaxMessageBytes),
		),
		grpc.WithStatsHandler(otelgrpc.NewClientHandler(tracing(d.opts.TracerProvider)...)),
		grpc.WithChainUnaryInterceptor(c.unary(d.opts.UnaryTimeout)),
		grpc.WithChainStreamInterceptor(c.stream),
		grpc.WithDefaultServiceConfig(d.service),
		grpc.WithDisableServiceConfig(), // the resolver's; ours stands
		experimental.WithBufferPool(d.frames),
		grpc.WithWriteBufferSize(bufferBytes),
		grpc.WithReadBufferSize(bufferBytes),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxReconnectDelay},
			MinConnectTimeout: hostProbeTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
	}
	if IsMemory(key.address) {
		target = "passthrough:///" + key.address
		opts = append(opts,
			grpc.WithAuthority("localhost"),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				return d.opts.Network.Dial(ctx, address, d.opts.Identity.Peer)
			}))
	} else if d.opts.Identity.Files == nil {
		return nil, errNoCertificate
	}
	var err error
	if c.ClientConn, err = grpc.NewClient(target, opts...); err != nil {
		return nil, err
	}
	return c, nil
}

// unary gives calls a deadline and their errors a reason.
func (c *Conn) unary(timeout time.Duration) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if _, ok := ctx.Deadline(); !ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		return c.explain(invoke(ctx, method, req, reply, cc, opts...))
	}
}

func (c *Conn) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, c.explain(err)
	}
	return &clientStream{s, c}, nil
}

// explain makes an *errcat.Error of what a call returned. An Unavailable that no server of ours sent
// is about the connection, and is told apart by what the handshake saw.
func (c *Conn) explain(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return errcat.FromError(err)
	}
	if st.Code() == codes.Unavailable && len(st.Details()) == 0 {
		if cause := c.trust.get(); cause != nil {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED, cause,
				"connect to %s: the certificates do not fit", c.key.address)
		}
		reason, what := typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "no connection to "+c.key.address
		if c.key.host != "" {
			reason, what = typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, "host "+c.key.host+" at "+c.key.address+" does not answer"
		}
		return errcat.Wrap(reason, errors.New(strings.TrimSuffix(st.Message(), "\n")), "%s", what)
	}
	return errcat.FromStatus(st)
}

// clientStream gives the errors of a stream their reasons.
type clientStream struct {
	grpc.ClientStream
	conn *Conn
}

func (s *clientStream) SendMsg(m any) error { return s.conn.explain(s.ClientStream.SendMsg(m)) }
func (s *clientStream) RecvMsg(m any) error { return s.conn.explain(s.ClientStream.RecvMsg(m)) }
func (s *clientStream) CloseSend() error    { return s.conn.explain(s.ClientStream.CloseSend()) }

// serviceConfig is the gRPC service config of every connection: calls are spread over the addresses of
// a target, and the unary methods that the contract marks NO_SIDE_EFFECTS are retried while the server
// is unavailable. Everything else has its one owner of retries elsewhere.
func serviceConfig() string {
	type name struct {
		Service string `json:"service"`
		Method  string `json:"method"`
	}
	type retry struct {
		MaxAttempts          int      `json:"maxAttempts"`
		InitialBackoff       string   `json:"initialBackoff"`
		MaxBackoff           string   `json:"maxBackoff"`
		BackoffMultiplier    float64  `json:"backoffMultiplier"`
		RetryableStatusCodes []string `json:"retryableStatusCodes"`
	}
	type method struct {
		Name        []name `json:"name"`
		RetryPolicy retry  `json:"retryPolicy"`
	}
	config := struct {
		LoadBalancing []map[string]any `json:"loadBalancingConfig"`
		Methods       []method         `json:"methodConfig,omitempty"`
	}{LoadBalancing: []map[string]any{{"round_robin": map[string]any{}}}}
	var reads []name
	for _, m := range idempotentReads() {
		reads = append(reads, name{string(m.Parent().FullName()), string(m.Name())})
	}
	if len(reads) > 0 {
		config.Methods = []method{{reads, retry{4, "0.1s", "1s", 2, []string{"UNAVAILABLE"}}}}
	}
	b, err := json.Marshal(config)
	if err != nil {
		panic(err) // plain structs always marshal
	}
	return string(b)
}

// idempotentReads are the unary methods of the linked contracts that are marked NO_SIDE_EFFECTS.
func idempotentReads() []protoreflect.MethodDescriptor {
	var found []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if !strings.HasPrefix(string(f.Package()), "landfall.") {
			return true
		}
		for i := range f.Services().Len() {
			methods := f.Services().Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				opts, ok := m.Options().(*descriptorpb.MethodOptions)
				if ok && opts.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS &&
					!m.IsStreamingClient() && !m.IsStreamingServer() {
					found = append(found, m)
				}
			}
		}
		return true
	})
	return found
}
