package rpc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	denied          = typesv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED
	unauthenticated = typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED
	unavailable     = typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
	internal        = typesv1.ErrorReason_ERROR_REASON_INTERNAL
	deadline        = typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED
	staleEpoch      = typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH
	unreachable     = typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE
	hostNotFound    = typesv1.ErrorReason_ERROR_REASON_HOST_NOT_FOUND
)

var scheduler = pki.ServiceIdentity("scheduler")

func TestLayerOrder(t *testing.T) {
	require.Equal(t, []string{"metrics", "logging", "deadline", "authorization", "validation", "errors", "recovery"}, LayerNames())
	for _, l := range new(Server).layers() {
		require.NotNil(t, l.unary, l.name)
		require.NotNil(t, l.stream, l.name)
	}
}

func TestAuthorizationMatrix(t *testing.T) {
	callers := []Peer{
		scheduler,
		pki.ServiceIdentity("uploader"),
		pki.ServiceIdentity("change-tracker", "host-provider").On("h1"), // by its alias
		pki.UserIdentity("vera", pki.RoleViewer),
		pki.UserIdentity("otto", pki.RoleOperator),
		pki.UserIdentity("anna", pki.RoleAdmin),
		pki.UserIdentity("scheduler", pki.RoleViewer), // a user of a service's name is no service
	}
	may := map[string][]bool{
		"Read":       {true, false, true, true, true, true, true},
		"Operate":    {false, false, false, false, true, true, false},
		"Internal":   {true, false, false, false, false, false, false},
		"Undeclared": {false, false, false, false, false, false, false},
		"Empty":      {false, false, false, false, false, false, false},
		"Bulk":       {true, false, false, false, false, false, false},
	}
	networks(t, func(t *testing.T, l *lab) {
		address := l.serve(&handlers{unary: echo, bulk: func(grpc.ServerStream) error { return nil }}, nil)
		for i, p := range callers {
			conn := l.conn(p, address)
			for method, want := range may {
				what := fmt.Sprintf("%s calls %s", p, method)
				var got string
				var err error
				if method == "Bulk" {
					err = bulkCall(within(t), conn)
				} else {
					got, err = invoke(within(t), conn, method, "")
				}
				if !want[i] {
					require.True(t, errcat.Is(err, denied), "%s: %v", what, err)
					require.Equal(t, codes.PermissionDenied, status.Code(err))
					require.ErrorContains(t, err, p.String())
					continue
				}
				require.NoError(t, err, what)
				if method != "Bulk" {
					require.Equal(t, p.String(), got)
				}
			}
			_, err := grpc_health_v1.NewHealthClient(conn).Check(within(t), &grpc_health_v1.HealthCheckRequest{Service: testService})
			require.NoError(t, err, "everybody may ask for health")
		}
	})
}

// bulkCall opens Bulk and waits for its end.
func bulkCall(ctx context.Context, conn grpc.ClientConnInterface) error {
	s, err := openBulk(ctx, conn)
	if err != nil {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	for {
		if _, err := RecvBulk(s, &changetrackerv1.ReadChangesResponse{}, dataField); err != nil {
			return noEOF(err)
		}
	}
}

func TestErrorsKeepTheirReason(t *testing.T) {
	sentinel := errcat.New(staleEpoch, "")
	fail := errcat.Wrap(staleEpoch, errors.New("epoch 3 is below 4"), "cut point %d", 7)
	networks(t, func(t *testing.T, l *lab) {
		inner := l.serve(&handlers{
			unary: func(context.Context, string, string) (string, error) { return "", fmt.Errorf("host: %w", fail) },
			bulk:  func(s grpc.ServerStream) error { return fail },
		}, nil)
		conn := l.conn(scheduler, inner)
		outer := l.serve(&handlers{unary: func(ctx context.Context, _, _ string) (string, error) {
			_, err := invoke(ctx, conn, "Read", "")
			return "", err
		}}, nil)
		_, err := invoke(within(t), l.conn(scheduler, outer), "Read", "")
		require.ErrorIs(t, err, sentinel, "over two hops")
		require.EqualError(t, err, "host: cut point 7: epoch 3 is below 4")
		require.ErrorIs(t, bulkCall(within(t), conn), sentinel, "on a stream")
	})
}

func TestPanicBecomesInternalAndIsLogged(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		var log logBuffer
		address := l.serve(&handlers{
			unary: func(context.Context, string, string) (string, error) { panic("lost my marbles") },
			bulk:  func(grpc.ServerStream) error { panic("lost the stream") },
		}, func(o *ServerOptions) { o.Logger = log.logger() })
		conn := l.conn(scheduler, address)
		_, err := invoke(within(t), conn, "Read", "")
		require.True(t, errcat.Is(err, internal), "%v", err)
		require.True(t, errcat.Is(bulkCall(within(t), conn), internal))
		// The log line follows the answer.
		require.Eventually(t, func() bool {
			s := log.String()
			return contains(s, "level=ERROR", "lost my marbles", "lost the stream", "stack=", "server_test.go", "reason=INTERNAL", `peer="service scheduler"`)
		}, 5*time.Second, 5*time.Millisecond, "%s", &log)
		_, err = invoke(within(t), conn, "Internal", "")
		require.True(t, errcat.Is(err, internal), "the server lives on")
	})
}

func TestDeadlineBudget(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		var left atomic.Int64
		address := l.serve(&handlers{
			unary: func(ctx context.Context, _, _ string) (string, error) {
				d, ok := ctx.Deadline()
				if !ok {
					return "", errors.New("no deadline")
				}
				left.Store(int64(time.Until(d)))
				return "", nil
			},
			bulk: func(s grpc.ServerStream) error {
				if _, ok := s.Context().Deadline(); ok {
					return errors.New("a stream has a deadline")
				}
				return nil
			},
		}, func(o *ServerOptions) { o.UnaryTimeout = time.Hour })
		conn := l.conn(scheduler, address)
		_, err := invoke(t.Context(), conn, "Read", "")
		require.NoError(t, err)
		require.InDelta(t, DefaultUnaryTimeout.Seconds(), time.Duration(left.Load()).Seconds(), 10, "the client's default")
		require.NoError(t, bulkCall(t.Context(), conn))

		// A client not built here sets none.
		raw, err := grpc.NewClient("passthrough:///"+address, rawOptions(l, scheduler)...)
		require.NoError(t, err)
		defer func() { _ = raw.Close() }()
		_, err = invoke(t.Context(), raw, "Read", "")
		require.NoError(t, err)
		require.InDelta(t, time.Hour.Seconds(), time.Duration(left.Load()).Seconds(), 60, "the server's default")

		ctx, cancel := context.WithTimeout(t.Context(), -time.Second)
		defer cancel()
		_, err = invoke(ctx, conn, "Read", "")
		require.True(t, errcat.Is(err, deadline))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, codes.DeadlineExceeded, status.Code(budgetLeft(ctx)), "the server refuses it too")
	})
}

func TestCancellationIsNotAFailure(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		entered := make(chan struct{})
		address := l.serve(&handlers{unary: func(ctx context.Context, _, _ string) (string, error) {
			close(entered)
			<-ctx.Done()
			return "", errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE, context.Cause(ctx), "put")
		}}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-entered; cancel() }()
		_, err := invoke(ctx, l.conn(scheduler, address), "Read", "")
		require.ErrorIs(t, err, context.Canceled)
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_CANCELLED))
	})
}

func TestValidation(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		address := l.serve(&handlers{unary: echo}, nil)
		conn := l.conn(scheduler, address)
		out := &wrapperspb.StringValue{}
		err := conn.Invoke(within(t), path("Checked"), &changetrackerv1.ReadChangesRequest{Vm: "v", Lineage: "short", Disk: "d"}, out)
		var e *errcat.Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, e.Reason)
		var fields []string
		for _, f := range e.Fields {
			fields = append(fields, f.Path)
		}
		require.ElementsMatch(t, []string{"lineage", "point"}, fields, "all problems at once")
		require.NoError(t, conn.Invoke(within(t), path("Checked"), &changetrackerv1.ReadChangesRequest{
			Vm: "v", Lineage: "0123456789abcdef0123456789abcdef", Disk: "d", Point: 1,
		}, out))
	})
}

func TestReadsAreRetriedAndNothingElse(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		var calls atomic.Int32
		address := l.serve(&handlers{unary: func(context.Context, string, string) (string, error) {
			if calls.Add(1) < 3 {
				return "", errcat.New(unavailable, "starting")
			}
			return "ok", nil
		}}, nil)
		conn := l.conn(scheduler, address)
		got, err := invoke(within(t), conn, "Read", "")
		require.NoError(t, err)
		require.Equal(t, "ok", got)
		calls.Store(0)
		_, err = invoke(within(t), conn, "Internal", "")
		require.True(t, errcat.Is(err, unavailable))
		require.EqualValues(t, 1, calls.Load())
	})
}

func TestStopDrainsThenCuts(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		entered := make(chan struct{}, 2)
		finish := make(chan struct{})
		h := &handlers{unary: func(ctx context.Context, method, _ string) (string, error) {
			entered <- struct{}{}
			if method == "Internal" { // never finishes by itself
				<-ctx.Done()
				return "", ctx.Err()
			}
			<-finish
			return "done", nil
		}}
		address, stop := l.serveAs(pki.ServiceIdentity("x"), h, func(o *ServerOptions) { o.StopTimeout = 300 * time.Millisecond })
		conn := l.conn(scheduler, address)
		drained, cut := make(chan error, 1), make(chan error, 1)
		go func() { _, err := invoke(within(t), conn, "Read", ""); drained <- err }()
		go func() { _, err := invoke(within(t), conn, "Internal", ""); cut <- err }()
		<-entered
		<-entered
		stopped := make(chan struct{})
		go func() { defer close(stopped); stop() }()
		close(finish)
		require.NoError(t, <-drained, "a running call is waited for")
		require.Error(t, <-cut, "but not for ever")
		<-stopped
		_, err := invoke(within(t), conn, "Internal", "")
		require.True(t, errcat.Is(err, unavailable), "%v", err)
	})
}

func TestHealthFollowsTheServer(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		address := l.serve(&handlers{unary: echo}, nil)
		client := grpc_health_v1.NewHealthClient(l.conn(scheduler, address))
		for _, service := range []string{"", testService} {
			r, err := client.Check(within(t), &grpc_health_v1.HealthCheckRequest{Service: service})
			require.NoError(t, err)
			require.Equal(t, grpc_health_v1.HealthCheckResponse_SERVING, r.GetStatus())
		}
	})
}

func TestCertificates(t *testing.T) {
	l := newLab(t, true)
	address := l.serve(&handlers{unary: echo}, nil)
	call := func(id Identity, opts ...ConnOption) error {
		c, err := l.dialerOf(id).Conn(address, opts...)
		require.NoError(t, err)
		_, err = invoke(within(t), c, "Internal", "")
		return err
	}
	issue := func(ca *pki.Authority, life time.Duration) Identity {
		dir := t.TempDir()
		_, err := ca.Ensure(dir, pki.Request{Identity: scheduler, Lifetime: life})
		require.NoError(t, err)
		id, err := LoadIdentity(dir, time.Now)
		require.NoError(t, err)
		return id
	}
	good := l.identity(scheduler)
	require.NoError(t, call(good))
	require.NoError(t, call(good, ExpectService("change-tracker"), ExpectHost("h1")))

	t.Run("server of another service", func(t *testing.T) {
		err := call(good, ExpectService("uploader"))
		require.True(t, errcat.Is(err, unauthenticated), "%v", err)
		require.ErrorIs(t, err, pki.ErrUntrusted)
		require.ErrorContains(t, err, "not of service uploader")
	})
	t.Run("server of another host", func(t *testing.T) {
		require.ErrorContains(t, call(good, ExpectHost("h2")), "not on host h2")
	})
	t.Run("wrong CA", func(t *testing.T) {
		other, err := pki.Open(t.TempDir(), time.Now)
		require.NoError(t, err)
		id := issue(other, 0)
		err = call(id)
		require.True(t, errcat.Is(err, unauthenticated), "our side refuses the server: %v", err)
		// A client that trusts everybody still cannot come in.
		ours, err := os.ReadFile(filepath.Join(l.dir, "ca", pki.CAFile))
		require.NoError(t, err)
		dir := t.TempDir()
		_, err = other.Ensure(dir, pki.Request{Identity: scheduler})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, pki.CAFile), ours, 0o644))
		id, err = LoadIdentity(dir, time.Now)
		require.NoError(t, err)
		err = call(id)
		require.True(t, errcat.Is(err, unauthenticated), "the server refuses us: %v", err)
	})
	t.Run("expired certificate", func(t *testing.T) {
		past, err := pki.Open(filepath.Join(l.dir, "ca"), func() time.Time { return time.Now().Add(-24 * time.Hour) })
		if err == nil {
			err = call(issue(past, time.Hour))
		}
		require.True(t, errcat.Is(err, unauthenticated), "%v", err)
	})
	t.Run("certificate of a user as a server's", func(t *testing.T) {
		address, _ := l.serveAs(pki.UserIdentity("mallory", pki.RoleAdmin), &handlers{unary: echo}, nil)
		_, err := invoke(within(t), l.conn(scheduler, address), "Internal", "")
		require.True(t, errcat.Is(err, unauthenticated), "%v", err)
	})
	t.Run("no certificate", func(t *testing.T) {
		_, err := l.dialerOf(Identity{Peer: scheduler}).Conn(address)
		require.ErrorIs(t, err, errNoCertificate)
	})
	t.Run("renewed without a restart", func(t *testing.T) {
		dir := t.TempDir()
		_, err := l.ca.Ensure(dir, pki.Request{Identity: pki.ServiceIdentity("uploader")})
		require.NoError(t, err)
		id, err := LoadIdentity(dir, time.Now)
		require.NoError(t, err)
		require.True(t, errcat.Is(call(id), denied))
		issued, err := l.ca.Ensure(dir, pki.Request{Identity: scheduler})
		require.NoError(t, err)
		require.True(t, issued)
		require.NoError(t, call(id), "the same program, with its new certificate")
	})
}

func TestTraceAndMetadataArePassed(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		address := l.serve(&handlers{unary: func(ctx context.Context, _, _ string) (string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return fmt.Sprint(md.Get("x-run")), nil
		}}, nil)
		ctx := metadata.AppendToOutgoingContext(within(t), "x-run", "42")
		got, err := invoke(ctx, l.conn(scheduler, address), "Read", "")
		require.NoError(t, err)
		require.Equal(t, "[42]", got)
	})
}
