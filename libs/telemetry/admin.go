package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// AdminOptions configures [NewAdmin].
type AdminOptions struct {
	// Addr to listen on, for example ":9090" or "127.0.0.1:0". It is plaintext:
	// keep it inside the cluster or on loopback.
	Addr string
	// Metrics is served at /metrics; optional.
	Metrics http.Handler
	// Health is served as grpc.health.v1.Health on the same port, because the
	// kubelet's probe cannot present a client certificate; optional.
	Health healthpb.HealthServer
	// Live and Ready answer /livez and /readyz; nil is always well. They must
	// answer from memory: what takes time is checked in the background.
	Live, Ready func() error
	// Profiles serves /debug/pprof/.
	Profiles bool
}

// Admin is the plaintext port of a program: health, metrics, profiles, over HTTP
// and gRPC on one listener.
type Admin struct {
	l      net.Listener
	server *http.Server
	rpc    *grpc.Server
}

// NewAdmin listens. Run it, or close it.
func NewAdmin(ctx context.Context, o AdminOptions) (*Admin, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen for health and metrics: %w", err)
	}
	a := &Admin{l: l, rpc: grpc.NewServer()}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", answer(o.Live))
	mux.HandleFunc("GET /readyz", answer(o.Ready))
	if o.Metrics != nil {
		mux.Handle("GET /metrics", o.Metrics)
	}
	if o.Profiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	if o.Health != nil {
		healthpb.RegisterHealthServer(a.rpc, o.Health)
	}
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	a.server = &http.Server{
		Protocols: protocols, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
				a.rpc.ServeHTTP(w, r)
				return
			}
			mux.ServeHTTP(w, r)
		}),
	}
	return a, nil
}

// Addr returns where it listens.
func (a *Admin) Addr() string { return a.l.Addr().String() }

// Run serves until ctx ends, and then closes.
func (a *Admin) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = a.Close() })
	defer stop()
	if err := a.server.Serve(a.l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health and metrics: %w", err)
	}
	return nil
}

// Close ends everything at once; probes and scrapes are asked again anyway.
func (a *Admin) Close() error {
	a.rpc.Stop()
	return errors.Join(a.server.Close(), ignoreClosed(a.l.Close()))
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func answer(check func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if check != nil {
			if err := check(); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = fmt.Fprintln(w, err)
				return
			}
		}
		_, _ = fmt.Fprintln(w, "ok")
	}
}
