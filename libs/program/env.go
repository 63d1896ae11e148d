package program

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/rpc"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
)

// Service is what a program runs: handlers on a server, and work until its context ends.
type Service interface {
	Register(r grpc.ServiceRegistrar)
	Run(ctx context.Context) error
}

// Env is what a composition root gives to a service's constructor.
type Env struct {
	// Name of the service, also of its identity and of its events.
	Name string
	// Site it serves.
	Site string
	// Holder names this process among others of the same service.
	Holder  string
	Version string
	Clock   func() time.Time
	Logger  *slog.Logger
	Tracer  trace.TracerProvider
	Meter   metric.MeterProvider
	// Bus is the connection under the service's name.
	Bus *bus.Bus
	// Store is nil in programs that have none.
	Store blobstore.Store
	// Dialer speaks for the service.
	Dialer *rpc.Dialer
	// Peers are addresses of services that do not run on hosts, by name.
	Peers map[string]string
	// Hosts finds the services of hosts.
	Hosts *rpc.Hosts
}

// Peer connects to a service that does not run on a host.
func (e *Env) Peer(service string) (*rpc.Conn, error) {
	address := e.Peers[service]
	if address == "" {
		return nil, fmt.Errorf("no address of %s is configured", service)
	}
	return e.Dialer.Conn(address, rpc.ExpectService(service))
}

// Services that run on hosts.
const (
	HostProvider  = "host-provider"
	ChangeTracker = "change-tracker"
)

// HostAddresses resolves hosts by the records that their host-providers write to the bus. A host is named by its id or
// as sites/{site}/hosts/{host}.
func HostAddresses(ctx context.Context, b *bus.Bus, site string) (rpc.HostResolver, error) {
	records, err := bus.OpenKV[*hostproviderv1.Host](ctx, b, bus.BucketHosts)
	if err != nil {
		return nil, fmt.Errorf("open host records: %w", err)
	}
	return func(ctx context.Context, host, service string) (string, error) {
		at, id := site, host
		if parts := strings.Split(host, "/"); len(parts) == 4 && parts[0] == "sites" && parts[2] == "hosts" {
			at, id = parts[1], parts[3]
		}
		record, _, err := records.Get(ctx, bus.Key(at, id))
		switch {
		case errors.Is(err, bus.ErrNotFound):
			return "", fmt.Errorf("%w: %s in site %s", rpc.ErrUnknownHost, id, at)
		case err != nil:
			return "", fmt.Errorf("read host record: %w", err)
		case service == HostProvider:
			return record.HostProviderAddress, nil
		case service == ChangeTracker:
			return record.ChangeTrackerAddress, nil
		default:
			return "", fmt.Errorf("hosts run no %s", service)
		}
	}, nil
}
