package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memDisk is a disk in memory.
type memDisk struct {
	mu      sync.Mutex
	b       []byte
	set     extent.Set // allocated
	flushes int
}

func newMemDisk(size int64) *memDisk { return &memDisk{b: make([]byte, size)} }

func (d *memDisk) Size() int64 { return int64(len(d.b)) }

func (d *memDisk) ReadAt(_ context.Context, p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.b[off:])
	return nil
}

func (d *memDisk) WriteAt(p []byte, off int64, fua bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.b[off:], p)
	d.set.Add(extent.Range{Off: off, Len: int64(len(p))})
	if fua {
		d.flushes++
	}
	return nil
}

func (d *memDisk) Zero(r extent.Range, keep, _ bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.b[r.Off:r.End()])
	if keep {
		d.set.Add(r)
	} else {
		d.set.Remove(r)
	}
	return nil
}

func (d *memDisk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return nil
}

func (d *memDisk) Allocated(_ context.Context, r extent.Range) (*extent.Set, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return extent.NewSet(collect(d.set.In(r))...), nil
}

func collect(seq func(func(extent.Range) bool)) (out []extent.Range) {
	seq(func(r extent.Range) bool { out = append(out, r); return true })
	return out
}

type oneExport struct{ d *memDisk }

func (oneExport) Exports() []string { return []string{"vm/os"} }

func (e oneExport) Open(name string) (Disk, error) {
	if name != "vm/os" {
		return nil, errors.New("no such export")
	}
	return e.d, nil
}

// dial starts a server and returns a raw connection past the greeting.
func dial(t *testing.T, d *memDisk) net.Conn {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(testkit.Context(t))
	done := make(chan error, 1)
	go func() { done <- New(oneExport{d}, slog.New(slog.DiscardHandler), Options{}).Serve(ctx, lis) }()
	c, err := net.Dial("tcp", lis.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
		_ = c.Close()
	})
	hello := read(t, c, 18)
	require.Equal(t, "NBDMAGICIHAVEOPT", string(hello[:16]))
	write(t, c, []byte{0, 0, 0, wire.FlagFixedNewstyle | wire.FlagNoZeroes})
	return c
}

func write(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	_, err := c.Write(b)
	require.NoError(t, err)
}

func read(t *testing.T, c net.Conn, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	return b
}

func option(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// answer reads one option reply.
func answer(t *testing.T, c net.Conn) (kind uint32, data []byte) {
	t.Helper()
	h := read(t, c, 20)
	require.Equal(t, uint64(wire.MagicReply), binary.BigEndian.Uint64(h))
	return binary.BigEndian.Uint32(h[12:]), read(t, c, int(binary.BigEndian.Uint32(h[16:])))
}

func command(kind, flags uint16, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, wire.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, 42)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

func simple(t *testing.T, c net.Conn) uint32 {
	t.Helper()
	h := read(t, c, 16)
	require.EqualValues(t, wire.MagicSimple, binary.BigEndian.Uint32(h))
	require.EqualValues(t, 42, binary.BigEndian.Uint64(h[8:]))
	return binary.BigEndian.Uint32(h[4:])
}

func TestExportNameServesSimpleReplies(t *testing.T) {
	d := newMemDisk(1 << 20)
	c := dial(t, d)
	write(t, c, option(99, nil))
	kind, _ := answer(t, c)
	require.EqualValues(t, wire.RepErrUnsup, kind)
	write(t, c, option(wire.OptExportName, []byte("vm/os")))
	require.EqualValues(t, 1<<20, binary.BigEndian.Uint64(read(t, c, 10)))

	payload := bytes.Repeat([]byte{7}, 1024)
	write(t, c, append(command(wire.CmdWrite, wire.CmdFlagFUA, 512, 1024), payload...))
	require.Zero(t, simple(t, c))
	d.mu.Lock()
	require.Equal(t, 1, d.flushes)
	d.mu.Unlock()
	write(t, c, command(wire.CmdRead, 0, 512, 1024))
	require.Zero(t, simple(t, c))
	require.Equal(t, payload, read(t, c, 1024))
	write(t, c, command(wire.CmdTrim, 0, 512, 512))
	require.Zero(t, simple(t, c))
	write(t, c, command(wire.CmdFlush, 0, 0, 0))
	require.Zero(t, simple(t, c))
	write(t, c, command(wire.CmdDisconnect, 0, 0, 0))
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	d.mu.Lock()
	defer d.mu.Unlock()
	require.Equal(t, payload[:512], d.b[1024:1536])
	require.Zero(t, d.b[512])
}

// A refused request is answered and leaves the connection in step.
func TestBadRequestsAreRefused(t *testing.T) {
	c := dial(t, newMemDisk(1<<20))
	write(t, c, option(wire.OptExportName, []byte("vm/os")))
	read(t, c, 10)
	for name, tc := range map[string]struct {
		request []byte
		errno   uint32
	}{
		"unaligned":          {command(wire.CmdRead, 0, 100, 512), wire.EINVAL},
		"beyond the end":     {command(wire.CmdRead, 0, 1<<20, 512), wire.EINVAL},
		"offset overflows":   {command(wire.CmdTrim, 0, ^uint64(511), 1024), wire.EINVAL},
		"write beyond":       {append(command(wire.CmdWrite, 0, 1<<20, 512), make([]byte, 512)...), wire.ENOSPC},
		"too large":          {command(wire.CmdRead, 0, 0, MaxRequest+512), wire.EOVERFLOW},
		"too large write":    {append(command(wire.CmdWrite, 0, 0, MaxRequest+512), make([]byte, MaxRequest+512)...), wire.EOVERFLOW},
		"unknown command":    {command(77, 0, 0, 512), wire.EINVAL},
		"unknown flag":       {command(wire.CmdRead, 1<<9, 0, 512), wire.EINVAL},
		"status not agreed":  {command(wire.CmdBlockStatus, 0, 0, 512), wire.EINVAL},
		"fast zero, no hole": {command(wire.CmdWriteZeroes, wire.CmdFlagFastZero|wire.CmdFlagNoHole, 0, 512), wire.ENOTSUP},
	} {
		t.Run(name, func(t *testing.T) {
			write(t, c, tc.request)
			require.Equal(t, tc.errno, simple(t, c))
		})
	}
}

func TestBlockStatusTellsHoles(t *testing.T) {
	d := newMemDisk(1 << 20)
	require.NoError(t, d.WriteAt(make([]byte, 4096), 65536, false))
	c := dial(t, d)
	write(t, c, option(wire.OptStructuredReply, nil))
	kind, _ := answer(t, c)
	require.EqualValues(t, wire.RepAck, kind)
	q := binary.BigEndian.AppendUint32(nil, 5)
	q = append(q, "vm/os"...)
	q = binary.BigEndian.AppendUint32(q, 1)
	q = binary.BigEndian.AppendUint32(q, uint32(len(wire.ContextAllocation)))
	write(t, c, option(wire.OptSetMeta, append(q, wire.ContextAllocation...)))
	kind, _ = answer(t, c)
	require.EqualValues(t, wire.RepMeta, kind)
	kind, _ = answer(t, c)
	require.EqualValues(t, wire.RepAck, kind)
	info := append(binary.BigEndian.AppendUint32(nil, 5), "vm/os\x00\x00"...)
	write(t, c, option(wire.OptGo, info))
	for kind = wire.RepInfo; kind == wire.RepInfo; {
		kind, _ = answer(t, c)
	}
	require.EqualValues(t, wire.RepAck, kind)

	write(t, c, command(wire.CmdBlockStatus, 0, 0, 1<<20))
	h := read(t, c, 20)
	require.EqualValues(t, wire.ChunkBlockStatus, binary.BigEndian.Uint16(h[6:]))
	b := read(t, c, int(binary.BigEndian.Uint32(h[16:])))
	var got []uint32
	for i := 4; i < len(b); i += 4 {
		got = append(got, binary.BigEndian.Uint32(b[i:]))
	}
	require.Equal(t, []uint32{65536, 3, 4096, 0, 1<<20 - 65536 - 4096, 3}, got)

	write(t, c, command(wire.CmdRead, 0, 65536, 512))
	h = read(t, c, 20)
	require.EqualValues(t, wire.ChunkData, binary.BigEndian.Uint16(h[6:]))
	read(t, c, int(binary.BigEndian.Uint32(h[16:])))
}

// Whatever bytes come, requests parse without panic and what check accepts lies on the disk.
func FuzzRequest(f *testing.F) {
	f.Add(command(wire.CmdRead, 0, 0, 512), true)
	f.Add(command(wire.CmdWriteZeroes, wire.CmdFlagFastZero, ^uint64(0)-511, ^uint32(0)-511), false)
	f.Fuzz(func(t *testing.T, b []byte, structured bool) {
		const size = 1 << 30
		var head [wire.RequestSize]byte
		copy(head[:], b)
		r, err := parseRequest(&head)
		if err != nil || r.check(size, true, structured) != 0 || r.kind == wire.CmdFlush {
			return
		}
		if r.off+uint64(r.length) > size || r.length == 0 {
			t.Fatalf("accepted %+v", r)
		}
	})
}

// Whatever a client sends, the server neither panics nor hangs.
func FuzzConversation(f *testing.F) {
	f.Add(append([]byte{0, 0, 0, 3}, option(wire.OptList, nil)...))
	f.Add(append(append([]byte{0, 0, 0, 3}, option(wire.OptExportName, []byte("vm/os"))...), command(wire.CmdRead, 0, 0, 512)...))
	f.Add(append(append([]byte{0, 0, 0, 3}, option(wire.OptStructuredReply, nil)...), option(wire.OptSetMeta, []byte("\x00\x00\x00\x05vm/os\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation"))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		client, server := net.Pipe()
		s := New(oneExport{newMemDisk(1 << 16)}, slog.New(slog.DiscardHandler), Options{})
		c := &conn{server: s, nc: server, done: make(chan struct{})}
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = io.Copy(io.Discard, client) })
		wg.Go(func() { _ = c.run() })
		_, _ = client.Write(b)
		_ = client.Close()
		wg.Wait()
	})
}
