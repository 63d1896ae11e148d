package rpc

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
)

// registry is where hosts register their addresses.
type registry struct {
	mu      sync.Mutex
	address map[string]string
	asked   int
}

func (r *registry) set(host, address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.address[host] = address
}

func (r *registry) resolve(_ context.Context, host, service string) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	a, ok := r.address[host]
	if !ok {
		return "", fmt.Errorf("%s of %s: %w", service, host, ErrUnknownHost)
	}
	return a, nil
}

func TestHosts(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		r := &registry{address: map[string]string{}}
		now := time.Now()
		hosts := NewHosts(l.dialer(scheduler), r.resolve, func() time.Time { return now })
		h := &handlers{unary: echo, bulk: func(s grpc.ServerStream) error { <-s.Context().Done(); return nil }}

		_, err := hosts.Conn(within(t), "h1", "change-tracker")
		require.True(t, errcat.Is(err, hostNotFound), "%v", err)
		require.ErrorIs(t, err, ErrUnknownHost)

		id := pki.ServiceIdentity("host-provider", "change-tracker").On("h1")
		address, stop := l.serveAs(id, h, nil)
		r.set("h1", address)
		conn, err := hosts.Conn(within(t), "h1", "change-tracker")
		require.NoError(t, err)
		got, err := invoke(within(t), conn, "Internal", "")
		require.NoError(t, err)
		require.Equal(t, "service scheduler", got)
		asked := r.asked
		again, err := hosts.Conn(within(t), "h1", "change-tracker")
		require.NoError(t, err)
		require.Same(t, conn, again)
		require.Equal(t, asked, r.asked, "a fresh address is not asked for again")

		// The host dies: the running call, later calls and new connections say so.
		stop()
		_, err = invoke(within(t), conn, "Internal", "")
		require.True(t, errcat.Is(err, unreachable), "%v", err)
		require.Eventually(t, func() bool { return conn.(*Conn).GetState() == connectivity.TransientFailure }, 5*time.Second, time.Millisecond)
		var wait sync.WaitGroup
		for range 4 {
			wait.Go(func() {
				_, err := hosts.Conn(within(t), "h1", "change-tracker")
				var e *errcat.Error
				require.ErrorAs(t, err, &e)
				require.True(t, errcat.Is(err, unreachable), "%v", err)
				require.Equal(t, "h1", e.Meta["host"])
			})
		}
		wait.Wait()

		// It comes back elsewhere.
		address, _ = l.serveAs(id, h, nil)
		r.set("h1", address)
		conn, err = hosts.Conn(within(t), "h1", "change-tracker")
		require.NoError(t, err)
		_, err = invoke(within(t), conn, "Internal", "")
		require.NoError(t, err)

		// After a while the resolver is asked again; the same address keeps the connection.
		asked, now = r.asked, now.Add(hostTTL)
		again, err = hosts.Conn(within(t), "h1", "change-tracker")
		require.NoError(t, err)
		require.Same(t, conn, again)
		require.Equal(t, asked+1, r.asked)
	})
}

func TestHostsCheckWhoAnswers(t *testing.T) {
	l := newLab(t, true)
	address, _ := l.serveAs(pki.ServiceIdentity("change-tracker").On("h2"), &handlers{unary: echo}, nil)
	r := &registry{address: map[string]string{"h1": address}}
	hosts := NewHosts(l.dialer(scheduler), r.resolve, time.Now)
	_, err := hosts.Conn(within(t), "h1", "change-tracker")
	require.True(t, errcat.Is(err, unauthenticated), "%v", err)
	require.ErrorContains(t, err, "not on host h1")
}
