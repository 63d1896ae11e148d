package rpc

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// hostTTL is how long a resolved address is used before the resolver is asked again.
	hostTTL = 5 * time.Second
	// hostProbeTimeout bounds the first contact with a host, in addition to the caller's deadline.
	hostProbeTimeout = 5 * time.Second
)

// ErrUnknownHost is what a HostResolver returns (wrapped) for a host that never registered.
var ErrUnknownHost = errors.New("unknown host")

// HostResolver returns the address at which a host serves a service, as the host registered it.
type HostResolver func(ctx context.Context, host, service string) (address string, err error)

// Hosts is the way to the services that run on hosts. Safe for concurrent use.
type Hosts struct {
	dialer  *Dialer
	resolve HostResolver
	now     func() time.Time

	mu    sync.Mutex
	known map[hostKey]hostConn
}

type hostKey struct{ host, service string }

type hostConn struct {
	conn     *Conn
	resolved time.Time
}

// NewHosts returns the hosts that resolve finds, reached through dialer; now is the clock by which
// addresses age. Close the dialer to close the connections.
func NewHosts(dialer *Dialer, resolve HostResolver, now func() time.Time) *Hosts {
	return &Hosts{dialer: dialer, resolve: resolve, now: now, known: make(map[hostKey]hostConn)}
}

// Conn returns a connection to a service of a host. Over TCP the certificate at the other end must be
// of that service and, if it is bound to a host, of that host.
// A new connection is tried before it is returned; one that has broken is replaced, so a host that
// moved is found again. Reasons: HOST_NOT_FOUND (the resolver returned ErrUnknownHost),
// HOST_UNREACHABLE (no connection; also from calls on the connection later), UNAUTHENTICATED (a
// certificate was refused), UNAVAILABLE (the resolver failed).
func (h *Hosts) Conn(ctx context.Context, host, service string) (grpc.ClientConnInterface, error) {
	key := hostKey{host, service}
	h.mu.Lock()
	have, ok := h.known[key]
	h.mu.Unlock()
	if ok {
		switch have.conn.GetState() {
		case connectivity.Shutdown, connectivity.TransientFailure:
			h.forget(key, have)
		default:
			if h.now().Sub(have.resolved) < hostTTL {
				return have.conn, nil
			}
		}
	}
	address, err := h.resolve(ctx, host, service)
	if err != nil {
		reason := typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
		if errors.Is(err, ErrUnknownHost) {
			reason = typesv1.ErrorReason_ERROR_REASON_HOST_NOT_FOUND
		} else if r := errcat.Reason(err); r != typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
			reason = r
		}
		return nil, withHost(errcat.Wrap(reason, err, "find %s on host %s", service, host), host)
	}
	conn, err := h.dialer.Conn(address, ExpectService(service), ExpectHost(host))
	if err != nil {
		return nil, withHost(err, host)
	}
	if err := h.probe(ctx, conn); err != nil {
		return nil, withHost(err, host)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.known[key] = hostConn{conn, h.now()}
	return conn, nil
}

// probe makes sure that somebody answers; what the health answer says is not asked.
func (h *Hosts) probe(ctx context.Context, conn *Conn) error {
	if conn.GetState() == connectivity.Ready {
		return nil
	}
	probeCtx, cancel := context.WithTimeout(ctx, hostProbeTimeout)
	defer cancel()
	_, err := grpc_health_v1.NewHealthClient(conn).Check(probeCtx, &grpc_health_v1.HealthCheckRequest{})
	if err == nil {
		return nil
	}
	h.dialer.drop(conn)
	// Cancelled although the caller still waits: another caller's probe found the same and dropped it.
	if ctx.Err() == nil && (probeCtx.Err() != nil || errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_CANCELLED)) {
		err = errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE, errors.New(err.Error()), "reach %s", conn.key.address)
	}
	return err
}

func (h *Hosts) forget(key hostKey, old hostConn) {
	h.mu.Lock()
	if h.known[key].conn == old.conn {
		delete(h.known, key)
	}
	h.mu.Unlock()
	h.dialer.drop(old.conn)
}

func withHost(err error, host string) error {
	var e *errcat.Error
	if errors.As(err, &e) {
		return e.With("host", host)
	}
	return err
}
