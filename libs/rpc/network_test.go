package rpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"
)

func TestMemoryNetwork(t *testing.T) {
	var n Network
	ctx := t.Context()
	_, err := n.Dial(ctx, "mem:a", scheduler)
	require.ErrorIs(t, err, ErrConnectionRefused)
	lis, err := n.Listen(ctx, "mem:a")
	require.NoError(t, err)
	_, err = n.Listen(ctx, "mem:a")
	require.ErrorIs(t, err, ErrAddressInUse)

	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	_, err = n.Dial(short, "mem:a", scheduler)
	require.ErrorIs(t, err, context.DeadlineExceeded, "nobody accepts")

	accepted := make(chan net.Conn, 1)
	go func() { c, _ := lis.Accept(); accepted <- c }()
	client, err := n.Dial(ctx, "mem:a", scheduler)
	require.NoError(t, err)
	server := <-accepted
	require.Equal(t, scheduler, server.(*memConn).dialer)
	require.NoError(t, lis.Close())
	require.NoError(t, lis.Close())
	_, err = lis.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = n.Dial(ctx, "mem:a", scheduler)
	require.ErrorIs(t, err, ErrConnectionRefused)

	// What was written before a close arrives, then the end.
	_, err = client.Write([]byte("last words"))
	require.NoError(t, err)
	require.NoError(t, client.Close())
	got, err := io.ReadAll(server)
	require.NoError(t, err)
	require.Equal(t, "last words", string(got))
	_, err = server.Write([]byte("x"))
	require.ErrorIs(t, err, io.ErrClosedPipe)
	_, err = client.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	require.NoError(t, server.Close())

	again, err := n.Listen(ctx, "mem:a")
	require.NoError(t, err, "the name is free again")
	require.NoError(t, again.Close())
}

func TestMemoryConnDeadlines(t *testing.T) {
	a, b := memPipe("mem:x", scheduler)
	defer func() { _ = a.Close() }()
	defer func() { _ = b.Close() }()
	buf := make([]byte, 1)
	for _, d := range []time.Duration{-time.Second, time.Millisecond} {
		require.NoError(t, a.SetReadDeadline(time.Now().Add(d)))
		_, err := a.Read(buf)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		var timeout net.Error
		require.True(t, errors.As(err, &timeout) && timeout.Timeout())
	}
	require.NoError(t, a.SetDeadline(time.Time{}))
	_, err := b.Write([]byte("y"))
	require.NoError(t, err)
	_, err = a.Read(buf)
	require.NoError(t, err)
	require.NoError(t, a.SetWriteDeadline(time.Now().Add(time.Millisecond)))
	n, err := a.Write(make([]byte, 2*pipeMax))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "nobody reads")
	require.Equal(t, pipeMax, n)
}

// TestMemoryConnIsAStream: any sizes of writes and reads give the same bytes.
func TestMemoryConnIsAStream(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sizes := rapid.SliceOfN(rapid.IntRange(0, 3*pipeStart), 0, 40).Draw(t, "writes")
		step := rapid.IntRange(1, 2*pipeMax).Draw(t, "reads")
		total := 0
		for _, n := range sizes {
			total += n
		}
		data := random(total)
		a, b := memPipe("mem:x", scheduler)
		var g errgroup.Group
		g.Go(func() error {
			rest := data
			for _, n := range sizes {
				if k, err := a.Write(rest[:n]); err != nil || k != n {
					return errors.Join(err, errors.New("short write"))
				}
				rest = rest[n:]
			}
			return a.Close()
		})
		var got bytes.Buffer
		_, err := io.CopyBuffer(&got, struct{ io.Reader }{b}, make([]byte, step))
		require.NoError(t, err)
		require.NoError(t, g.Wait())
		require.True(t, bytes.Equal(data, got.Bytes()))
		require.NoError(t, b.Close())
	})
}
