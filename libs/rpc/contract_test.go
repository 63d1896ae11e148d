package rpc

import (
	"context"
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"github.com/stretchr/testify/require"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/landfall-dr/landfall/libs/errcat"
	_ "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	_ "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	_ "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	_ "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	_ "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	_ "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// TestContracts: every method of the product says who may call it, names callers that exist, and has
// validation rules that compile.
func TestContracts(t *testing.T) {
	services := map[string]bool{
		"host-provider": true, "change-tracker": true, "uploader": true, "resync-engine": true,
		"scheduler": true, "failover-orchestrator": true,
	}
	var inputs []protoreflect.MessageDescriptor
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package().Parent().Parent() != "landfall" || f.Package() == "landfall.rpctest.v1" {
			return true
		}
		for i := range f.Services().Len() {
			methods := f.Services().Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				r, ok := ruleOf(m)
				require.True(t, ok, "%s declares no callers", m.FullName())
				require.True(t, len(r.services) > 0 || r.role > 0, "%s can be called by nobody", m.FullName())
				for _, s := range r.services {
					require.True(t, services[s], "%s names the unknown caller %q", m.FullName(), s)
				}
				inputs = append(inputs, m.Input())
			}
		}
		return true
	})
	require.Greater(t, len(inputs), 30)
	v, err := protovalidate.New(protovalidate.WithMessageDescriptors(inputs...), protovalidate.WithDisableLazy())
	require.NoError(t, err)
	for _, in := range inputs {
		m, err := protoregistry.GlobalTypes.FindMessageByName(in.FullName())
		require.NoError(t, err)
		err = errcat.Invalid(v.Validate(m.New().Interface()))
		require.False(t, errcat.Is(err, internal), "%s: %v", in.FullName(), err)
	}
}

func TestIdempotentReadsComeFromTheContract(t *testing.T) {
	var names []protoreflect.FullName
	for _, m := range idempotentReads() {
		names = append(names, m.FullName())
	}
	require.Contains(t, names, protoreflect.FullName(testService+".Read"))
	require.Contains(t, names, protoreflect.FullName("landfall.changetracker.v1.ChangeTrackerService.GetTracking"))
	require.NotContains(t, names, protoreflect.FullName("landfall.changetracker.v1.ChangeTrackerService.ReadChanges"), "a stream resumes by itself")
	require.NotContains(t, names, protoreflect.FullName(testService+".Internal"))
}

func TestTelemetry(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		spans := tracetest.NewSpanRecorder()
		tp := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
		reader := sdkmetric.NewManualReader()
		mp := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
		address := l.serve(&handlers{unary: func(context.Context, string, string) (string, error) {
			return "", errcat.New(staleEpoch, "old")
		}}, func(o *ServerOptions) { o.TracerProvider, o.MeterProvider = tp, mp })
		d := NewDialer(DialerOptions{Identity: l.identity(scheduler), Network: l.network, TracerProvider: tp})
		defer func() { _ = d.Close() }()
		conn, err := d.Conn(address)
		require.NoError(t, err)
		_, err = invoke(within(t), conn, "Read", "")
		require.Error(t, err)
		_, err = grpc_health_v1.NewHealthClient(conn).Check(within(t), &grpc_health_v1.HealthCheckRequest{})
		require.NoError(t, err)

		require.Eventually(t, func() bool { return len(spans.Ended()) >= 2 }, 5*time.Second, time.Millisecond)
		ended := spans.Ended()
		require.Len(t, ended, 2, "health checks leave no spans")
		require.Equal(t, ended[0].SpanContext().TraceID(), ended[1].SpanContext().TraceID(), "one trace on both sides")

		var got metricdata.ResourceMetrics
		require.NoError(t, reader.Collect(t.Context(), &got))
		found := false
		for _, m := range got.ScopeMetrics[0].Metrics {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if !ok || m.Name != "landfall_rpc_server_requests_total" {
				continue
			}
			for _, p := range sum.DataPoints {
				reason, _ := p.Attributes.Value("reason")
				code, _ := p.Attributes.Value("code")
				if reason.AsString() == "STALE_EPOCH" {
					found = true
					require.Equal(t, "FailedPrecondition", code.AsString())
					require.EqualValues(t, 1, p.Value)
				}
			}
		}
		require.True(t, found)
	})
}

func TestProbe(t *testing.T) {
	srv, err := NewServer(ServerOptions{Name: "x"})
	require.NoError(t, err)
	lis, err := new(Network).Listen(t.Context(), "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Probe(ctx, lis) }()
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	for _, serving := range []bool{true, false} {
		srv.SetServing("", serving)
		r, err := grpc_health_v1.NewHealthClient(conn).Check(within(t), &grpc_health_v1.HealthCheckRequest{})
		require.NoError(t, err)
		require.Equal(t, serving, r.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING)
	}
	cancel()
	require.NoError(t, <-done)
}

func TestDialerClosed(t *testing.T) {
	l := newLab(t, false)
	d := l.dialer(scheduler)
	a, err := d.Conn("mem:x")
	require.NoError(t, err)
	b, err := d.Conn("mem:x")
	require.NoError(t, err)
	require.Same(t, a, b)
	c, err := d.Conn("mem:x", ExpectService("y"))
	require.NoError(t, err)
	require.NotSame(t, a, c)
	_, err = invoke(within(t), a, "Read", "")
	require.True(t, errcat.Is(err, unavailable), "%v", err)
	require.NoError(t, d.Close())
	_, err = d.Conn("mem:x")
	require.ErrorIs(t, err, ErrDialerClosed)
	_, err = invoke(within(t), a, "Read", "")
	require.True(t, errcat.Is(err, errcat.Reason(context.Canceled)), "%v", err)
}
