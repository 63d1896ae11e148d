package telemetry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/landfall-dr/landfall/libs/telemetry"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func setup(t *testing.T, o telemetry.Options) *telemetry.Telemetry {
	t.Helper()
	o.Service, o.Version, o.Instance = "uploader", "v1", "u-1"
	tel, err := telemetry.Setup(testkit.Context(t), o)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = tel.Shutdown(ctx)
	})
	return tel
}

func TestLogCarriesContext(t *testing.T) {
	var out bytes.Buffer
	tel := setup(t, telemetry.Options{LogFormat: telemetry.FormatJSON, LogOutput: &out})
	ctx := telemetry.With(testkit.Context(t), telemetry.KeyVM, "v1", telemetry.KeyDisk, "d1")
	ctx = telemetry.With(ctx, telemetry.KeyVM, "v2")
	ctx, span := tel.TracerProvider.Tracer("t").Start(ctx, "s")
	tel.Logger.WithGroup("g").With("in", 1).InfoContext(ctx, "hello", "n", 2)
	tel.Logger.DebugContext(ctx, "not shown")
	span.End()
	var got map[string]any
	require.NoError(t, json.Unmarshal(out.Bytes(), &got), out.String())
	require.Equal(t, "uploader", got["service"])
	require.Equal(t, "v2", got["vm"])
	require.Equal(t, "d1", got["disk"])
	require.Equal(t, span.SpanContext().TraceID().String(), got["trace_id"])
	require.Equal(t, span.SpanContext().SpanID().String(), got["span_id"])
	require.Equal(t, map[string]any{"in": 1.0, "n": 2.0}, got["g"])

	out.Reset()
	tel.Level.Set(slog.LevelDebug)
	tel.Logger.DebugContext(ctx, "shown")
	tel.Logger.Info("no context")
	require.Equal(t, 2, strings.Count(out.String(), "\n"))
	require.Equal(t, 1, strings.Count(out.String(), "trace_id"))
}

func TestStdoutSpans(t *testing.T) {
	var out bytes.Buffer
	tel := setup(t, telemetry.Options{Exporter: telemetry.ExportStdout, SpanOutput: &out, LogOutput: io.Discard})
	ctx, root := tel.TracerProvider.Tracer("t").Start(testkit.Context(t), "root")
	_, child := tel.TracerProvider.Tracer("t").Start(ctx, "child", trace.WithAttributes(attribute.Int("n", 3)))
	child.End()
	root.End()
	var line struct {
		Name, Parent_id string //nolint:revive // as printed
		Attributes      map[string]any
	}
	require.NoError(t, json.NewDecoder(&out).Decode(&line))
	require.Equal(t, "child", line.Name)
	require.Equal(t, root.SpanContext().SpanID().String(), line.Parent_id)
	require.EqualValues(t, 3, line.Attributes["n"])
}

func TestCollectorThatIsAway(t *testing.T) {
	tel := setup(t, telemetry.Options{Exporter: telemetry.ExportOTLP, Endpoint: "http://" + testkit.FreeAddr(t), LogOutput: io.Discard})
	_, span := tel.TracerProvider.Tracer("t").Start(testkit.Context(t), "s")
	span.End()
	ctx, cancel := context.WithTimeout(testkit.Context(t), 200*time.Millisecond)
	defer cancel()
	begin := time.Now()
	require.Error(t, tel.Shutdown(ctx), "the loss of spans is reported")
	require.Less(t, time.Since(begin), 5*time.Second, "and bounded")
}

func TestBadOptions(t *testing.T) {
	for _, o := range []telemetry.Options{
		{Exporter: "x"}, {Exporter: telemetry.ExportOTLP}, {LogFormat: "x"}, {SampleRatio: 2},
		{Exporter: telemetry.ExportOTLP, Endpoint: "https://h:1", CAFile: "no-such-file"},
	} {
		_, err := telemetry.Setup(testkit.Context(t), o)
		require.Error(t, err, "%+v", o)
	}
}

func TestMetrics(t *testing.T) {
	tel := setup(t, telemetry.Options{LogOutput: io.Discard})
	c, err := tel.MeterProvider.Meter("t").Int64Counter("landfall_uploader_segments")
	require.NoError(t, err)
	c.Add(testkit.Context(t), 3)
	rec := httptest.NewRecorder()
	tel.Metrics.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Contains(t, rec.Body.String(), "landfall_uploader_segments_total 3")
	require.Contains(t, rec.Body.String(), "go_goroutines")
	require.Contains(t, rec.Body.String(), `service_version="v1"`)
}

func TestAdminServesHTTPAndGRPCOnOnePort(t *testing.T) {
	ctx, cancel := context.WithCancel(testkit.Context(t))
	var ready atomic.Bool
	status := health.NewServer()
	status.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	a, err := telemetry.NewAdmin(ctx, telemetry.AdminOptions{
		Addr: "127.0.0.1:0", Health: status, Profiles: true,
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("m 1\n")) }),
		Ready: func() error {
			if !ready.Load() {
				return errors.New("state not loaded")
			}
			return nil
		},
	})
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		resp, err := client.Get("http://" + a.Addr() + path)
		require.NoError(t, err)
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(body)
	}
	code, body := get("/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, body, "state not loaded")
	ready.Store(true)
	code, _ = get("/readyz")
	require.Equal(t, http.StatusOK, code)
	_, body = get("/metrics")
	require.Equal(t, "m 1\n", body)
	code, _ = get("/livez")
	require.Equal(t, http.StatusOK, code)
	code, _ = get("/debug/pprof/")
	require.Equal(t, http.StatusOK, code)

	conn, err := grpc.NewClient(a.Addr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_SERVING, resp.GetStatus())
	require.NoError(t, conn.Close())
	cancel()
	require.NoError(t, <-done)
}
