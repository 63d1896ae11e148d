package rpc

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/landfall-dr/landfall/libs/rpc/pki"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const testService = "landfall.rpctest.v1.TestService"

// The methods of the test service and who may call them.
var testMethods = []struct {
	name         string
	in, out      string
	callers      *typesv1.Callers
	read         bool
	server, bidi bool
}{
	{name: "Read", callers: &typesv1.Callers{Services: []string{"scheduler", "host-provider"}, MinimumRole: typesv1.Role_ROLE_VIEWER}, read: true},
	{name: "Operate", callers: &typesv1.Callers{MinimumRole: typesv1.Role_ROLE_OPERATOR}},
	{name: "Internal", callers: &typesv1.Callers{Services: []string{"scheduler"}}},
	{name: "Undeclared"},
	{name: "Empty", callers: &typesv1.Callers{}},
	{
		name: "Bulk", in: ".landfall.changetracker.v1.ReadChangesResponse", out: ".landfall.changetracker.v1.ReadChangesResponse",
		callers: &typesv1.Callers{Services: []string{"scheduler"}}, server: true, bidi: true,
	},
	{
		name: "Checked", in: ".landfall.changetracker.v1.ReadChangesRequest",
		callers: &typesv1.Callers{Services: []string{"scheduler"}},
	},
}

func TestMain(m *testing.M) {
	if err := registerTestService(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// registerTestService puts a contract into the registry as generated code would.
func registerTestService() error {
	service := &descriptorpb.ServiceDescriptorProto{Name: proto.String("TestService")}
	for _, m := range testMethods {
		opts := &descriptorpb.MethodOptions{}
		if m.callers != nil {
			proto.SetExtension(opts, typesv1.E_Callers, m.callers)
		}
		if m.read {
			opts.IdempotencyLevel = descriptorpb.MethodOptions_NO_SIDE_EFFECTS.Enum()
		}
		d := &descriptorpb.MethodDescriptorProto{
			Name: proto.String(m.name), Options: opts,
			InputType: proto.String(".google.protobuf.StringValue"), OutputType: proto.String(".google.protobuf.StringValue"),
			ServerStreaming: proto.Bool(m.server), ClientStreaming: proto.Bool(m.bidi),
		}
		if m.in != "" {
			d.InputType = proto.String(m.in)
		}
		if m.out != "" {
			d.OutputType = proto.String(m.out)
		}
		service.Method = append(service.Method, d)
	}
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("landfall/rpctest/v1/test.proto"), Package: proto.String("landfall.rpctest.v1"), Syntax: proto.String("proto3"),
		Dependency: []string{wrapperspb.File_google_protobuf_wrappers_proto.Path(), changetrackerv1.File_landfall_changetracker_v1_change_tracker_proto.Path()},
		Service:    []*descriptorpb.ServiceDescriptorProto{service},
	}, protoregistry.GlobalFiles)
	if err != nil {
		return err
	}
	return protoregistry.GlobalFiles.RegisterFile(file)
}

// handlers is the test service: unary answers every unary method with a StringValue, bulk serves Bulk.
type handlers struct {
	unary func(ctx context.Context, method, in string) (string, error)
	bulk  func(grpc.ServerStream) error
}

func (h *handlers) desc() *grpc.ServiceDesc {
	desc := &grpc.ServiceDesc{ServiceName: testService, HandlerType: (*any)(nil)}
	for _, m := range testMethods {
		if m.server {
			desc.Streams = append(desc.Streams, grpc.StreamDesc{
				StreamName: m.name, ServerStreams: true, ClientStreams: m.bidi,
				Handler: func(_ any, s grpc.ServerStream) error { return h.bulk(s) },
			})
			continue
		}
		desc.Methods = append(desc.Methods, grpc.MethodDesc{
			MethodName: m.name,
			Handler: func(_ any, ctx context.Context, dec func(any) error, layers grpc.UnaryServerInterceptor) (any, error) {
				var in proto.Message = &wrapperspb.StringValue{}
				if m.in != "" {
					in = &changetrackerv1.ReadChangesRequest{}
				}
				if err := dec(in); err != nil {
					return nil, err
				}
				return layers(ctx, in, &grpc.UnaryServerInfo{FullMethod: path(m.name)}, func(ctx context.Context, req any) (any, error) {
					text := ""
					if s, ok := req.(*wrapperspb.StringValue); ok {
						text = s.GetValue()
					}
					out, err := h.unary(ctx, m.name, text)
					return wrapperspb.String(out), err
				})
			},
		})
	}
	return desc
}

func path(method string) string { return "/" + testService + "/" + method }

// echo answers with the caller's name.
func echo(ctx context.Context, _, _ string) (string, error) {
	p, ok := PeerFrom(ctx)
	if !ok {
		return "", fmt.Errorf("no peer")
	}
	return p.String(), nil
}

// invoke calls a unary method of the test service.
func invoke(ctx context.Context, conn grpc.ClientConnInterface, method, in string) (string, error) {
	out := &wrapperspb.StringValue{}
	err := conn.Invoke(ctx, path(method), wrapperspb.String(in), out)
	return out.GetValue(), err
}

// lab is an installation: a CA, a network, servers and clients of either kind of connection.
type lab struct {
	tb      testing.TB
	tcp     bool
	dir     string
	ca      *pki.Authority
	network *Network
	n       int
}

// networks runs a test once over memory and once over TCP with mutual TLS.
func networks(t *testing.T, test func(t *testing.T, l *lab)) {
	t.Helper()
	for _, tcp := range []bool{false, true} {
		name := "mem"
		if tcp {
			name = "tcp"
		}
		t.Run(name, func(t *testing.T) { test(t, newLab(t, tcp)) })
	}
}

func newLab(tb testing.TB, tcp bool) *lab {
	tb.Helper()
	l := &lab{tb: tb, tcp: tcp, dir: tb.TempDir(), network: &Network{}}
	if tcp {
		var err error
		l.ca, err = pki.Open(filepath.Join(l.dir, "ca"), time.Now)
		require.NoError(tb, err)
	}
	return l
}

// identity issues a certificate where one is needed.
func (l *lab) identity(id Peer) Identity {
	l.tb.Helper()
	if !l.tcp {
		return Identity{Peer: id}
	}
	l.n++
	dir := filepath.Join(l.dir, fmt.Sprint(l.n))
	_, err := l.ca.Ensure(dir, pki.Request{Identity: id})
	require.NoError(l.tb, err)
	got, err := LoadIdentity(dir, time.Now)
	require.NoError(l.tb, err)
	return got
}

// serve runs a server with the test service until the test ends and returns its address.
func (l *lab) serve(h *handlers, change func(*ServerOptions)) string {
	l.tb.Helper()
	address, _ := l.serveAs(pki.ServiceIdentity("change-tracker").On("h1"), h, change)
	return address
}

func (l *lab) serveAs(id Peer, h *handlers, change func(*ServerOptions)) (address string, stop func()) {
	l.tb.Helper()
	opts := ServerOptions{Name: "test", Identity: l.identity(id), StopTimeout: time.Second}
	if change != nil {
		change(&opts)
	}
	srv, err := NewServer(opts)
	require.NoError(l.tb, err)
	srv.RegisterService(h.desc(), nil)
	l.n++
	address = fmt.Sprintf("mem:%d", l.n)
	if l.tcp {
		address = "127.0.0.1:0"
	}
	lis, err := l.network.Listen(l.tb.Context(), address)
	require.NoError(l.tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, lis) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			require.NoError(l.tb, <-done)
		})
	}
	l.tb.Cleanup(stop)
	if l.tcp {
		address = lis.Addr().(*net.TCPAddr).String()
	}
	return address, stop
}

func (l *lab) dialer(id Peer) *Dialer {
	l.tb.Helper()
	return l.dialerOf(l.identity(id))
}

func (l *lab) dialerOf(id Identity) *Dialer {
	d := NewDialer(DialerOptions{Identity: id, Network: l.network})
	l.tb.Cleanup(func() { _ = d.Close() })
	return d
}

func (l *lab) conn(id Peer, address string, opts ...ConnOption) *Conn {
	l.tb.Helper()
	c, err := l.dialer(id).Conn(address, opts...)
	require.NoError(l.tb, err)
	return c
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// logBuffer collects log lines.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
