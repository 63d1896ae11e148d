// Package bustest gives tests a real bus: an embedded server, or the external
// nats-server program over TCP with mutual TLS, which a test may kill.
package bustest

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/testkit"
)

const cleanupTime = 10 * time.Second

// Serve starts an embedded server that stops with the test. An empty StoreDir is
// a temporary folder.
func Serve(t testing.TB, o bus.ServerOptions) *bus.Server {
	t.Helper()
	if o.StoreDir == "" {
		o.StoreDir = t.TempDir()
	}
	if o.Logger == nil {
		o.Logger = testkit.Logger(t)
	}
	s, err := bus.StartEmbedded(testkit.Context(t), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Stop(Cleanup(t))) })
	return s
}

// Dial connects, and closes the connection with the test.
func Dial(t testing.TB, o bus.Options) *bus.Bus {
	t.Helper()
	if o.Name == "" {
		o.Name = "test"
	}
	if o.Logger == nil {
		o.Logger = testkit.Logger(t)
	}
	b, err := bus.Connect(testkit.Context(t), o)
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close(Cleanup(t)) })
	return b
}

// Open starts an embedded server, connects to it with o (Server is set) and
// declares the streams and buckets.
func Open(t testing.TB, o bus.Options) *bus.Bus {
	t.Helper()
	o.Server = Serve(t, bus.ServerOptions{})
	b := Dial(t, o)
	require.NoError(t, b.Declare(testkit.Context(t), bus.Declaration{}))
	return b
}

// Cleanup returns a context for work at the end of a test, when the test's own
// context is over.
func Cleanup(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTime)
	t.Cleanup(cancel)
	return ctx
}
