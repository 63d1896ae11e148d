package program

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/lifecycle"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/telemetry"
)

// startTimeout bounds everything before the service runs: the bus may be a minute late in a fleet that starts.
const startTimeout = 2 * time.Minute

// Version of the build, set by the linker.
var Version = "dev"

// Main is the whole main function of a program that runs one service: it loads the configuration T (defaults, file,
// environment, flags), makes an Env from its Settings, builds the service and runs it until a signal. It returns the
// exit code.
func Main[T any](name string, defaults T, settings func(*T) *Settings, build func(ctx context.Context, e *Env, c *T) (Service, error)) int {
	return run(context.Background(), name, os.Args[1:], os.Environ(), os.Stdout, os.Stderr, defaults, settings, build)
}

func run[T any](ctx context.Context, name string, args, environ []string, stdout, stderr io.Writer, defaults T, settings func(*T) *Settings, build func(context.Context, *Env, *T) (Service, error)) int {
	c, err := config.Load(defaults, config.Options{Name: name, Args: args, Environ: environ, Stdout: stdout})
	if errors.Is(err, config.ErrDone) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: configuration:\n%v\n", name, err)
		return 2
	}
	s := settings(&c)
	if err := failpoint.Arm(s.Failpoints); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 2
	}
	var level slog.Level
	_ = level.UnmarshalText([]byte(s.Log.Level)) // validated
	tel, err := telemetry.Setup(ctx, telemetry.Options{
		Service: name, Version: Version, Exporter: telemetry.Exporter(s.Trace.Exporter), Endpoint: s.Trace.Endpoint,
		LogFormat: telemetry.Format(s.Log.Format), LogLevel: level, LogOutput: stderr, SpanOutput: stdout,
	})
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	err = serve(ctx, name, s, tel, func(ctx context.Context, e *Env) (Service, error) { return build(ctx, e, &c) })
	flush, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if ferr := tel.Shutdown(flush); ferr != nil {
		tel.Logger.Warn("flush telemetry", "error", ferr)
	}
	if err != nil {
		tel.Logger.Error("stopped", "error", err)
		return 1
	}
	return 0
}

// serve makes the Env, builds the service and runs it.
func serve(ctx context.Context, name string, s *Settings, tel *telemetry.Telemetry, build func(context.Context, *Env) (Service, error)) error {
	log := tel.Logger
	start, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	identity, err := rpc.LoadIdentity(s.Certificates, time.Now)
	if err != nil {
		return fmt.Errorf("load certificate: %w", err)
	}
	b, err := bus.Connect(start, bus.Options{
		URL: s.Bus.URL, CAFile: s.Bus.CA, CertFile: s.Bus.Cert, KeyFile: s.Bus.Key, Token: s.Bus.Token.Reveal(),
		Name: name, AckWait: s.Bus.AckWait, Logger: log, TracerProvider: tel.TracerProvider, MeterProvider: tel.MeterProvider,
	})
	if err != nil {
		return fmt.Errorf("connect to the event server: %w", err)
	}
	defer closeWithin(ctx, log, "event server", b.Close)
	if s.Bus.Monitor != "" {
		if err := bus.CheckDurability(start, s.Bus.Monitor); err != nil {
			log.Warn("state on the event server may not survive a loss of power", "error", err)
		}
	}
	if err := b.Declare(start, bus.Declaration{}); err != nil {
		return fmt.Errorf("declare streams: %w", err)
	}
	network := &rpc.Network{}
	dialer := rpc.NewDialer(rpc.DialerOptions{Identity: identity, Network: network, TracerProvider: tel.TracerProvider})
	defer dialer.Close()
	resolve, err := HostAddresses(start, b, s.Site)
	if err != nil {
		return err
	}
	e := &Env{
		Name: name, Site: s.Site, Holder: holder(name), Version: Version, Clock: time.Now, Logger: log, Tracer: tel.TracerProvider,
		Meter: tel.MeterProvider, Bus: b, Dialer: dialer, Peers: s.Peers, Hosts: rpc.NewHosts(dialer, resolve, time.Now),
	}
	if s.Store.IsSet() {
		store, err := backend.Open(start, s.Store, backend.Options{Later: true})
		if err != nil {
			return err
		}
		defer store.Close()
		e.Store = store
	}
	service, err := build(start, e)
	if err != nil {
		return fmt.Errorf("build %s: %w", name, err)
	}
	server, err := rpc.NewServer(rpc.ServerOptions{Name: name, Identity: identity, Logger: log, TracerProvider: tel.TracerProvider, MeterProvider: tel.MeterProvider})
	if err != nil {
		return fmt.Errorf("build server: %w", err)
	}
	service.Register(server)
	listener, err := network.Listen(start, s.Listen)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", s.Listen, err)
	}
	components := []lifecycle.Component{
		{Name: "grpc", Run: func(ctx context.Context) error { return server.Run(ctx, listener) }},
		{Name: name, Needs: []string{"grpc"}, Run: service.Run},
	}
	if s.Admin != "" {
		admin, err := telemetry.NewAdmin(start, telemetry.AdminOptions{Addr: s.Admin, Metrics: tel.Metrics, Profiles: true})
		if err != nil {
			return fmt.Errorf("listen for probes: %w", err)
		}
		components = append(components, lifecycle.Component{Name: "admin", Run: admin.Run})
	}
	drain := s.DrainDelay
	if drain == 0 {
		drain = -1 // zero is the default there
	}
	return lifecycle.Run(ctx, lifecycle.Options{
		Logger: log, DrainDelay: drain,
		OnReady: func() { log.Info("ready", "address", listener.Addr().String(), "version", Version) },
		OnDrain: func() { server.SetServing("", false) },
	}, components...)
}

// holder tells processes of one service apart in leases and logs.
func holder(name string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return name + "@" + host + ":" + strconv.Itoa(os.Getpid())
}

// closeWithin closes something at the end, within a bound of its own because ctx may be over.
func closeWithin(ctx context.Context, log *slog.Logger, what string, f func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := f(ctx); err != nil {
		log.Warn("close", "what", what, "error", err)
	}
}
