// Package telemetry makes what a program is observed by: a logger, a tracer
// provider and a meter provider that agree on who they speak for, and the
// plaintext port that serves health, metrics and profiles ([Admin]).
//
// Everything is handed out, nothing is installed globally, with one exception:
// OpenTelemetry reports its own failures (a collector that is away) only to a
// process-wide handler, which [Setup] points at the logger.
package telemetry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/credentials"
)

// exportTimeout bounds one request to the collector.
const exportTimeout = 10 * time.Second

// Exporter says where spans go.
type Exporter string

// Exporters.
const (
	ExportNone   Exporter = "none"
	ExportStdout Exporter = "stdout" // a JSON line for each span
	ExportOTLP   Exporter = "otlp"   // gRPC, to Options.Endpoint
)

// Format of log lines.
type Format string

// Formats.
const (
	FormatText Format = "text"
	FormatJSON Format = "json"
)

// Options configures [Setup]; the zero value logs text at Info to standard error
// and exports no spans.
type Options struct {
	// Service is the program's name, Version its build, Instance what tells two
	// of them apart (default the host's name).
	Service, Version, Instance string

	Exporter Exporter
	// Endpoint of the collector: http://host:4317 without TLS, https://host:4317
	// with it.
	Endpoint string
	// CAFile, CertFile and KeyFile (PEM) for an https endpoint; optional.
	CAFile, CertFile, KeyFile string
	// SampleRatio of traces that begin here, 0 to 1; 0 means 1. Use ExportNone for none.
	SampleRatio float64

	LogFormat Format
	LogLevel  slog.Level
	// LogOutput and SpanOutput default to standard error and standard output.
	LogOutput, SpanOutput io.Writer
}

// Telemetry is what [Setup] made. Shut it down last.
type Telemetry struct {
	Logger         *slog.Logger
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	// Level of the logger, which may be changed at any time.
	Level *slog.LevelVar
	// Metrics serves the instruments in Prometheus's format.
	Metrics http.Handler

	stops []func(context.Context) error
}

// Setup makes the telemetry of a program. It connects to no collector yet, so it
// succeeds while that is away.
func Setup(ctx context.Context, o Options) (*Telemetry, error) {
	if o.LogOutput == nil {
		o.LogOutput = os.Stderr
	}
	if o.SpanOutput == nil {
		o.SpanOutput = os.Stdout
	}
	if o.Instance == "" {
		o.Instance, _ = os.Hostname()
	}
	t := &Telemetry{Level: &slog.LevelVar{}}
	t.Level.Set(o.LogLevel)
	handler, err := newHandler(o.LogOutput, o.LogFormat, t.Level)
	if err != nil {
		return nil, fmt.Errorf("set up logging: %w", err)
	}
	t.Logger = slog.New(handler).With(KeyService, o.Service)
	if o.LogFormat == FormatJSON {
		t.Logger = t.Logger.With("version", o.Version, "instance", o.Instance)
	}
	res := resource.NewSchemaless(
		attribute.String("service.name", o.Service),
		attribute.String("service.namespace", "landfall"),
		attribute.String("service.version", o.Version),
		attribute.String("service.instance.id", o.Instance),
	)
	if err := t.traces(ctx, o, res); err != nil {
		return nil, fmt.Errorf("set up tracing: %w", err)
	}
	if err := t.metrics(res); err != nil {
		return nil, fmt.Errorf("set up metrics: %w", errors.Join(err, t.Shutdown(ctx)))
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		t.Logger.Warn("telemetry is incomplete", "error", err)
	}))
	return t, nil
}

func (t *Telemetry) traces(ctx context.Context, o Options, res *resource.Resource) error {
	if o.SampleRatio == 0 {
		o.SampleRatio = 1
	}
	if o.SampleRatio < 0 || o.SampleRatio > 1 {
		return fmt.Errorf("sample ratio %v is not between 0 and 1", o.SampleRatio)
	}
	opts := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(res),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(o.SampleRatio))),
	}
	closeExporter := func(context.Context) error { return nil }
	switch o.Exporter {
	case ExportNone, "":
		// Ids still exist, so that logs of one request can be put together.
	case ExportStdout:
		opts = append(opts, sdktrace.WithSyncer(&lineExporter{w: o.SpanOutput}))
	case ExportOTLP:
		exporter, err := newOTLP(ctx, o)
		if err != nil {
			return err
		}
		opts = append(opts, sdktrace.WithBatcher(exporter, sdktrace.WithExportTimeout(exportTimeout)))
		closeExporter = exporter.Shutdown
	default:
		return fmt.Errorf("unknown exporter %q: want none, stdout or otlp", o.Exporter)
	}
	provider := sdktrace.NewTracerProvider(opts...)
	t.TracerProvider = provider
	// The provider leaves an export running when its time is over; closing the
	// exporter ends it.
	t.stops = append(t.stops, provider.Shutdown, closeExporter)
	return nil
}

func newOTLP(ctx context.Context, o Options) (sdktrace.SpanExporter, error) {
	if o.Endpoint == "" {
		return nil, errors.New("exporter otlp needs an endpoint")
	}
	opts := []otlptracegrpc.Option{otlptracegrpc.WithEndpointURL(o.Endpoint), otlptracegrpc.WithTimeout(exportTimeout)}
	if o.CAFile != "" || o.CertFile != "" {
		conf := &tls.Config{MinVersion: tls.VersionTLS12}
		if o.CAFile != "" {
			pem, err := os.ReadFile(o.CAFile)
			if err != nil {
				return nil, err
			}
			conf.RootCAs = x509.NewCertPool()
			if !conf.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("%s has no certificate", o.CAFile)
			}
		}
		if o.CertFile != "" {
			cert, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
			if err != nil {
				return nil, err
			}
			conf.Certificates = []tls.Certificate{cert}
		}
		opts = append(opts, otlptracegrpc.WithTLSCredentials(credentials.NewTLS(conf)))
	}
	return otlptracegrpc.New(ctx, opts...)
}

func (t *Telemetry) metrics(res *resource.Resource) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo())
	if err != nil {
		return err
	}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter), sdkmetric.WithResource(res))
	t.MeterProvider = provider
	t.Metrics = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	t.stops = append(t.stops, provider.Shutdown)
	return nil
}

// Shutdown sends what is still buffered and returns when that is done or ctx
// ends.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	var errs []error
	for _, stop := range t.stops {
		errs = append(errs, stop(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("flush telemetry: %w", err)
	}
	return nil
}
