package bus_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/bus/bustest"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestExternalServerDiesAndComesBack(t *testing.T) {
	t.Parallel()
	server := bustest.StartExternal(t)
	ctx := testkit.Context(t)
	require.NoError(t, bus.CheckDurability(ctx, server.Monitor))

	stranger := server.Options()
	stranger.CertFile, stranger.KeyFile = filepath.Join(server.Dir, "stranger.pem"), filepath.Join(server.Dir, "stranger.key")
	_, err := bus.Connect(ctx, stranger)
	require.ErrorIs(t, err, bus.ErrRefused, "a certificate of another CA")
	naked := server.Options()
	naked.CertFile, naked.KeyFile = "", ""
	_, err = bus.Connect(ctx, naked)
	require.ErrorIs(t, err, bus.ErrRefused, "no certificate")
	doubting := server.Options()
	doubting.CAFile = filepath.Join(server.Dir, "stranger.pem")
	_, err = bus.Connect(ctx, doubting)
	require.ErrorIs(t, err, bus.ErrRefused, "a server of another CA")

	var states atomic.Value
	states.Store("")
	o := server.Options()
	o.OnState = func(s bus.State, _ error) { states.Store(states.Load().(string) + string(s) + " ") }
	b := bustest.Dial(t, o)
	require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	kv := bucket(t, b)

	wctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex
	seen := map[string]string{}
	watched := make(chan error, 1)
	go func() {
		for u, err := range kv.Watch(wctx, "") {
			if err != nil {
				watched <- err
				return
			}
			mu.Lock()
			seen[u.Key] = u.Value.GetValue()
			mu.Unlock()
		}
	}()
	defer func() { cancel(); require.ErrorIs(t, <-watched, context.Canceled) }()

	var handled atomic.Int64
	run(t, consumer(t, b, bus.ConsumerOptions{AckWait: time.Second, Concurrency: 2}), func(context.Context, *bus.Task) error {
		handled.Add(1)
		return nil
	})
	revs := map[string]uint64{}
	for round := range 2 {
		for i := range 20 {
			key := fmt.Sprintf("k%d", i)
			_, rev, err := kv.MutateOrCreate(ctx, key, func(v *text) error { v.Value = fmt.Sprint(round, "-", i); return nil })
			require.NoError(t, err)
			revs[key] = rev
		}
		require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", fmt.Sprint("before", round), ship(1)))
		server.Kill()
		testkit.Eventually(t, 5*time.Second, func() bool { return b.State() == bus.Disconnected })
		short, cancelShort := context.WithTimeout(ctx, 100*time.Millisecond)
		_, err = kv.Update(short, "k0", wrapperspb.String("lost?"), revs["k0"])
		cancelShort()
		require.ErrorIs(t, err, bus.ErrUnknown)
		require.NotErrorIs(t, err, bus.ErrRevision)
		server.Start()
		testkit.Eventually(t, 10*time.Second, func() bool { return b.State() == bus.Connected })
		for i := 1; i < 20; i++ {
			v, rev, err := kv.Get(ctx, fmt.Sprintf("k%d", i))
			require.NoError(t, err)
			require.Equal(t, fmt.Sprint(round, "-", i), v.GetValue(), "state is intact after kill -9")
			require.Equal(t, revs[fmt.Sprintf("k%d", i)], rev)
		}
		require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", fmt.Sprint("after", round), ship(2)))
		_, _, err = kv.MutateOrCreate(ctx, "after", func(v *text) error { v.Value = fmt.Sprint(round); return nil })
		require.NoError(t, err)
		testkit.Eventually(t, 20*time.Second, func() error {
			mu.Lock()
			defer mu.Unlock()
			if seen["after"] != fmt.Sprint(round) || seen["k19"] != fmt.Sprint(round, "-", 19) {
				return errors.New("watch is behind")
			}
			return nil
		}, "the watch goes on")
		testkit.Eventually(t, 20*time.Second, func() bool { return handled.Load() >= int64(2*(round+1)) }, "the consumer goes on")
	}
	empty(t, b)
	require.Regexp(t, "^connected disconnected connected disconnected connected ", states.Load())
}

func TestConnectGivesUpWithItsContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(testkit.Context(t), 300*time.Millisecond)
	defer cancel()
	_, err := bus.Connect(ctx, bus.Options{URL: "nats://" + testkit.FreeAddr(t)})
	require.ErrorIs(t, err, bus.ErrNotConnected)
	_, err = bus.Connect(ctx, bus.Options{})
	require.Error(t, err)
}

func TestEmbeddedListensWithToken(t *testing.T) {
	server := bustest.Serve(t, bus.ServerOptions{Listen: "127.0.0.1:0"})
	ctx := testkit.Context(t)
	_, err := bus.Connect(ctx, bus.Options{URL: server.URL(), Token: "guess"})
	require.ErrorIs(t, err, bus.ErrRefused)
	for _, o := range []bus.Options{{URL: server.URL(), Token: server.Token()}, {Server: server}} {
		b := bustest.Dial(t, o)
		require.NoError(t, b.Ready(ctx))
		require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	}
}

func TestEmbeddedKeepsStateAndSaysWhyItDoesNotStart(t *testing.T) {
	dir := t.TempDir()
	ctx := testkit.Context(t)
	for round := range 2 {
		s, err := bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: dir})
		require.NoError(t, err)
		b := bustest.Dial(t, bus.Options{Server: s})
		require.NoError(t, b.Declare(ctx, bus.Declaration{}))
		kv := bucket(t, b)
		v, _, err := kv.MutateOrCreate(ctx, "k", func(v *text) error { v.Value += "x"; return nil })
		require.NoError(t, err)
		require.Len(t, v.GetValue(), round+1)
		require.NoError(t, b.Close(ctx))
		require.NoError(t, s.Stop(ctx))
		require.NoError(t, s.Stop(ctx))
	}
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err := bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: file})
	require.ErrorContains(t, err, file)
}

// A proxy that swallows answers: the write happens, its writer is not told.
func TestKVWriteWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	server := bustest.Serve(t, bus.ServerOptions{Listen: "127.0.0.1:0"})
	p := newProxy(t, server.URL()[len("nats://"):])
	ctx := testkit.Context(t)
	b := bustest.Dial(t, bus.Options{URL: "nats://" + p.addr(), Token: server.Token()})
	require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	kv := bucket(t, b)
	direct := bucket(t, bustest.Dial(t, bus.Options{Server: server}))
	r1, err := kv.Create(ctx, "k", wrapperspb.String("a"))
	require.NoError(t, err)

	// The answer is lost with its connection; the repeated write finds itself.
	result := make(chan error, 1)
	var r2 uint64
	p.swallow(true)
	go func() {
		var err error
		r2, err = kv.Update(ctx, "k", wrapperspb.String("b"), r1)
		result <- err
	}()
	testkit.Eventually(t, 5*time.Second, func() bool {
		v, _, err := direct.Get(ctx, "k")
		return err == nil && v.GetValue() == "b"
	}, "the write arrived")
	p.cut()
	p.swallow(false)
	require.NoError(t, <-result)
	_, rev, err := direct.Get(ctx, "k")
	require.NoError(t, err)
	require.Equal(t, rev, r2, "known as its own, and written once")

	// Another writer's equal content is not taken for it.
	p.swallow(true)
	r3, err := direct.Update(ctx, "k", wrapperspb.String("c"), r2)
	require.NoError(t, err)
	go func() {
		_, err := kv.Update(ctx, "k", wrapperspb.String("c"), r2)
		result <- err
	}()
	testkit.Eventually(t, 5*time.Second, func() bool { return p.swallowed.Load() > 0 })
	p.cut()
	p.swallow(false)
	require.ErrorIs(t, <-result, bus.ErrRevision)
	_, rev, err = direct.Get(ctx, "k")
	require.NoError(t, err)
	require.Equal(t, r3, rev)
}

// proxy forwards TCP to one address, and on demand drops what the server says.
type proxy struct {
	l         net.Listener
	to        string
	drop      atomic.Bool
	swallowed atomic.Int64
	mu        sync.Mutex
	conns     []net.Conn
	wg        sync.WaitGroup
}

func newProxy(t *testing.T, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{l: l, to: to}
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, c, s)
			p.mu.Unlock()
			p.wg.Go(func() { _, _ = io.Copy(s, c); _ = s.Close() })
			p.wg.Go(func() { p.answers(c, s); _ = c.Close() })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) answers(c, s net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := s.Read(buf)
		if err != nil {
			return
		}
		if p.drop.Load() {
			p.swallowed.Add(int64(n))
			continue
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) swallow(on bool) { p.swallowed.Store(0); p.drop.Store(on) }

// cut ends every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}
