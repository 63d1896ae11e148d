package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func all(c *Client) extent.Range { return extent.Range{Len: c.Size()} }

// tool returns the path of a program. Where it is absent the test is skipped, except in CI.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI must have it", name)
		}
		t.Skipf("%s is not installed", name)
	}
	return path
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(testkit.Context(t), tool(t, name), args...).CombinedOutput()
	require.NoError(t, err, "%s %q\n%s", name, args, out)
	return string(out)
}

// serve runs a server program that listens on the socket that it is given, until the test ends.
func serve(t testing.TB, name string, args func(socket string) []string) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for a socket
	require.NoError(t, err)
	socket = filepath.Join(dir, "s")
	said, err := os.Create(filepath.Join(dir, "said"))
	require.NoError(t, err)
	cmd := exec.Command(tool(t, name), args(socket)...)
	cmd.Stdout, cmd.Stderr = said, said
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		_ = said.Close()
		_ = os.RemoveAll(dir)
	})
	testkit.Eventually(t, 10*time.Second, func() error {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			text, _ := os.ReadFile(said.Name())
			return fmt.Errorf("%w\n%s", err, text)
		}
		return conn.Close()
	})
	return socket
}

func unixURI(socket, export string) string {
	return (&url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + url.QueryEscape(socket)}).String()
}

func dial(t testing.TB, uri string, contexts ...string) *Client {
	t.Helper()
	c, err := Dial(testkit.Context(t), uri, contexts...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

const mib = 1 << 20

// qcow2 makes an image with a persistent bitmap "b1", and data in it: 3 MiB at 4 MiB before the bitmap, 192 KiB at 9 MiB
// and 1 MiB at 20 MiB after it.
func qcow2(t testing.TB) string {
	path := filepath.Join(t.TempDir(), "d.qcow2")
	run(t, "qemu-img", "create", "-f", "qcow2", path, "64M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x11 4M 3M", path)
	run(t, "qemu-img", "bitmap", "--add", path, "b1")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x22 9M 192k", "-c", "write -P 0x33 20M 1M", path)
	return path
}

func wantContent() []byte {
	b := make([]byte, 64*mib)
	fill := func(v byte, off, n int) { copy(b[off:], bytes.Repeat([]byte{v}, n)) }
	fill(0x11, 4*mib, 3*mib)
	fill(0x22, 9*mib, 192<<10)
	fill(0x33, 20*mib, mib)
	return b
}

func TestQemu(t *testing.T) {
	path := qcow2(t)
	socket := serve(t, "qemu-nbd", func(s string) []string {
		return []string{"-k", s, "-f", "qcow2", "-r", "-t", "-e", "8", "-B", "b1", "-x", "os", path}
	})
	uri := unixURI(socket, "os")
	const b1 = "qemu:dirty-bitmap:b1"

	_, err := Dial(testkit.Context(t), uri, b1, "qemu:dirty-bitmap:b2")
	require.ErrorIs(t, err, ErrNoContext)
	require.ErrorContains(t, err, "b2")
	_, err = Dial(testkit.Context(t), unixURI(socket, "data"))
	require.ErrorIs(t, err, ErrNoExport)

	c := dial(t, uri, b1, ContextAllocation)
	require.Equal(t, int64(64*mib), c.Size())
	require.True(t, c.Info().ReadOnly())
	require.True(t, c.Info().MultiConn())
	require.LessOrEqual(t, c.Info().Block.Max, int64(MaxPayload))

	dirty := extent.Set{}
	for e, err := range c.Extents(testkit.Context(t), b1, all(c)) {
		require.NoError(t, err)
		if e.Flags&Dirty != 0 {
			dirty.Add(e.Range)
		}
	}
	require.Equal(t, int64(192<<10+mib), dirty.Bytes())
	require.True(t, dirty.Covers(extent.Range{Off: 9 * mib, Len: 192 << 10}))

	// Another client sees the same, and the same holes.
	var theirs []struct {
		Offset, Length int64
		Type           uint32
	}
	require.NoError(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--json", "--map=base:allocation", uri)), &theirs))
	var ours []Extent
	for e, err := range c.Extents(testkit.Context(t), ContextAllocation, all(c)) {
		require.NoError(t, err)
		ours = append(ours, e)
	}
	require.Len(t, ours, len(theirs))
	for i, e := range theirs {
		require.Equal(t, Extent{extent.Range{Off: e.Offset, Len: e.Length}, e.Type}, ours[i])
	}

	got := make([]byte, c.Size())
	require.NoError(t, c.ReadAt(testkit.Context(t), got, 0))
	require.True(t, bytes.Equal(wantContent(), got))

	clear(got)
	end := int64(0)
	err = c.Stream(testkit.Context(t), planOf(c, ContextAllocation, Zero), func(at extent.Range, data []byte) error {
		require.Equal(t, end, at.Off)
		end = at.End()
		copy(got[at.Off:], data)
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, c.Size(), end)
	require.True(t, bytes.Equal(wantContent(), got))

	// Many at once, some given up.
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			ctx := testkit.Context(t)
			if i%4 == 0 {
				short, cancel := context.WithTimeout(ctx, time.Duration(i)*10*time.Microsecond)
				defer cancel()
				ctx = short
			}
			p := make([]byte, 3*mib)
			off := int64(i) * mib
			if err := c.ReadAt(ctx, p, off); err != nil {
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("read %d: %v", i, err)
				}
			} else if !bytes.Equal(p, wantContent()[off:off+int64(len(p))]) {
				t.Errorf("read %d: other content", i)
			}
		})
	}
	wg.Wait()
	require.NoError(t, c.ReadAt(testkit.Context(t), make([]byte, mib), 0), "the connection outlives those who left")
	ro := dial(t, uri)
	var e *Error
	require.ErrorAs(t, ro.WriteAt(testkit.Context(t), make([]byte, 512), 0, false), &e)
	require.True(t, e.Refused())
}

func planOf(c *Client, name string, zero uint32) Plan {
	return func(ctx context.Context) iter.Seq2[Run, error] {
		return func(yield func(Run, error) bool) {
			for e, err := range c.Extents(ctx, name, all(c)) {
				if !yield(Run{Range: e.Range, Zero: e.Flags&zero != 0}, err) {
					return
				}
			}
		}
	}
}

func TestWriting(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.raw")
	require.NoError(t, os.WriteFile(path, make([]byte, 40*mib), 0o600))
	socket := serve(t, "qemu-nbd", func(s string) []string { return []string{"-k", s, "-f", "raw", "-t", "--discard=unmap", path} })
	ctx := testkit.Context(t)
	c := dial(t, unixURI(socket, ""))
	p := bytes.Repeat([]byte{5}, 36*mib)
	require.NoError(t, c.WriteAt(ctx, p, mib, false), "longer than a request may be")
	require.NoError(t, c.WriteAt(ctx, p[:512], 0, true))
	require.NoError(t, c.WriteZeroes(ctx, extent.Range{Off: 2 * mib, Len: mib}, true))
	require.NoError(t, c.Trim(ctx, extent.Range{Off: 38 * mib, Len: mib}))
	require.NoError(t, c.Flush(ctx))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, byte(5), got[511])
	require.Equal(t, byte(0), got[512])
	require.Equal(t, byte(0), got[2*mib])
	require.Equal(t, byte(5), got[3*mib])
	require.Equal(t, byte(5), got[37*mib-1])
}

// QEMU hangs up when an answer in several pieces fails; asked for one piece it says what failed.
func TestQemuReadError(t *testing.T) {
	path := qcow2(t)
	run(t, "qemu-img", "bitmap", "--disable", path, "b1")
	socket := serve(t, "qemu-storage-daemon", func(s string) []string {
		return []string{
			"--blockdev", "driver=file,node-name=f,filename=" + path,
			"--blockdev", "driver=blkdebug,node-name=g,image=f,inject-error.0.event=read_aio,inject-error.0.errno=5",
			"--blockdev", "driver=qcow2,node-name=os,file=g", "--nbd-server", "addr.type=unix,addr.path=" + s,
			"--export", "type=nbd,id=os,node-name=os,name=os,bitmaps.0=b1",
		}
	})
	c := dial(t, unixURI(socket, "os"))
	var e *Error
	require.ErrorAs(t, c.ReadAt(testkit.Context(t), make([]byte, mib), 4*mib), &e)
	require.Equal(t, uint32(EIO), e.Errno)
	require.ErrorAs(t, c.Stream(testkit.Context(t), oneRun(all(c)), func(extent.Range, []byte) error { return nil }), &e)
	require.NoError(t, c.ReadAt(testkit.Context(t), make([]byte, mib), 50*mib), "nothing to read there; the connection goes on")
}

// nbdkit is another implementation: no qemu contexts, small blocks, errors, slow answers.
func TestNbdkit(t *testing.T) {
	serveKit := func(t *testing.T, args ...string) string {
		return unixURI(serve(t, "nbdkit", func(s string) []string {
			return append([]string{"-f", "-U", s}, args...)
		}), "")
	}
	t.Run("sparse", func(t *testing.T) {
		c := dial(t, serveKit(t, "data", "@1048576 \"hello\"*200", "size=8M"), ContextAllocation)
		data := int64(0)
		for e, err := range c.Extents(testkit.Context(t), ContextAllocation, all(c)) {
			require.NoError(t, err)
			if e.Flags&Zero == 0 {
				data += e.Len
			}
		}
		require.Less(t, data, int64(mib))
		p := make([]byte, 10)
		require.NoError(t, c.ReadAt(testkit.Context(t), p, mib))
		require.Equal(t, "hellohello", string(p))
		_, err := Dial(testkit.Context(t), serveKit(t, "memory", "1M"), dirtyName)
		require.ErrorIs(t, err, ErrNoContext)
	})
	t.Run("small blocks", func(t *testing.T) {
		c := dial(t, serveKit(t, "--filter=blocksize-policy", "pattern", "8M", "blocksize-minimum=512", "blocksize-maximum=64K", "blocksize-error-policy=error"))
		require.Equal(t, BlockSizes{512, 4096, 64 << 10}, c.Info().Block)
		p := make([]byte, mib)
		require.NoError(t, c.ReadAt(testkit.Context(t), p, 0))
		n := int64(0)
		require.NoError(t, c.Stream(testkit.Context(t), oneRun(all(c)), func(at extent.Range, data []byte) error {
			if at.End() <= mib && !bytes.Equal(p[at.Off:at.End()], data) {
				return errors.New("other content")
			}
			n += at.Len
			return nil
		}))
		require.Equal(t, c.Size(), n)
	})
	t.Run("errors", func(t *testing.T) {
		c := dial(t, serveKit(t, "--filter=error", "memory", "8M", "error-pread=EIO", "error-pread-rate=100%"))
		var e *Error
		require.ErrorAs(t, c.ReadAt(testkit.Context(t), make([]byte, mib), 0), &e)
		require.Equal(t, uint32(EIO), e.Errno)
		require.ErrorAs(t, c.Stream(testkit.Context(t), oneRun(all(c)), func(extent.Range, []byte) error { return nil }), &e)
	})
	t.Run("slow", func(t *testing.T) {
		c := dial(t, serveKit(t, "--filter=delay", "memory", "8M", "rdelay=30"))
		ctx, cancel := context.WithTimeout(testkit.Context(t), 50*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, c.Stream(ctx, oneRun(all(c)), func(extent.Range, []byte) error { return nil }), context.DeadlineExceeded)
	})
}

func oneRun(at extent.Range) Plan {
	return func(context.Context) iter.Seq2[Run, error] {
		return func(yield func(Run, error) bool) { yield(Run{Range: at}, nil) }
	}
}

// A plan that fails, a consumer that fails and a consumer that is slow.
func TestStreamEnds(t *testing.T) {
	var inFlight, most atomic.Int64
	client := serveWith(t, nil, func(r got) []byte {
		most.Store(max(most.Load(), inFlight.Add(1)))
		return chunkOf(wire.ChunkDone, wire.ChunkHole, r.cookie, be64(uint64(r.off)), be32(uint32(r.length)))
	})
	ctx := testkit.Context(t)
	boom := errors.New("boom")
	err := client.Stream(ctx, func(context.Context) iter.Seq2[Run, error] {
		return func(yield func(Run, error) bool) {
			_ = yield(Run{Range: extent.Range{Len: mib}}, nil) && yield(Run{}, boom)
		}
	}, func(extent.Range, []byte) error { return nil })
	require.ErrorIs(t, err, boom)
	err = client.Stream(ctx, oneRun(all(client)), func(extent.Range, []byte) error { return boom })
	require.ErrorIs(t, err, boom)
	err = client.Stream(ctx, oneRun(extent.Range{Len: 2 * scriptSize}), func(extent.Range, []byte) error { return nil })
	require.ErrorIs(t, err, errBounds)
	n := int64(0)
	testkit.Eventually(t, 10*time.Second, func() bool { return client.pending() == 0 }, "what was given up is answered")
	inFlight.Store(0)
	most.Store(0)
	require.NoError(t, client.Stream(ctx, oneRun(all(client)), func(at extent.Range, data []byte) error {
		inFlight.Add(-1)
		n += int64(len(data))
		return nil
	}))
	require.Equal(t, int64(scriptSize), n)
	require.LessOrEqual(t, most.Load(), int64(StreamMemory/StreamPiece))
	require.Zero(t, client.pending())
}

func (c *Client) pending() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.calls)
}

// Whatever a server sends: no panic, no memory that it chose, and a read that succeeds has all its bytes.
func FuzzReplies(f *testing.F) {
	f.Add(chunkOf(wire.ChunkDone, wire.ChunkData, 1, be64(4096), sectors(4, 1)))
	f.Add(join(chunkOf(0, wire.ChunkHole, 1, be64(4096), be32(1024)), chunkOf(wire.ChunkDone, wire.ChunkData, 1, be64(5120), sectors(2, 1))))
	f.Add(chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, 2, extentsOf(7, 512, 1, 1<<20, 0)))
	f.Add(chunkOf(wire.ChunkDone, wire.ChunkError, 1, be32(5), be16(2), []byte("no")))
	f.Add(join(simpleOf(0, 3), simpleOf(28, 1)))
	f.Fuzz(func(t *testing.T, stream []byte) {
		here, there := net.Pipe()
		defer there.Close()
		defer here.Close()
		c := newClient(here)
		c.in = bufio.NewReaderSize(bytes.NewReader(stream), 4096)
		c.structured = true
		c.contexts[dirtyName] = 7
		c.contexts[ContextAllocation] = 8
		c.info.Size = scriptSize
		at := extent.Range{Off: 4096, Len: 2048}
		read := &call{cmd: wire.CmdRead, at: at, buf: bytes.Repeat([]byte{0xee}, 2048)}
		status := &call{cmd: wire.CmdBlockStatus, at: at, context: 7}
		write := &call{cmd: wire.CmdWrite, at: at}
		c.calls = map[uint64]*call{1: read, 2: status, 3: write}
		for _, k := range []*call{read, status, write} {
			k.done = make(chan struct{})
			c.slots <- struct{}{}
		}
		c.run()
		if read.err == nil && read.got.Bytes() != at.Len {
			t.Fatalf("a read with %d of %d bytes", read.got.Bytes(), at.Len)
		}
		if status.err == nil {
			if len(status.extents) == 0 {
				t.Fatal("a block status without extents")
			}
			end := at.Off
			for _, e := range status.extents {
				if e.Off != end || e.Len <= 0 || e.End() > at.End() {
					t.Fatalf("extents %v", status.extents)
				}
				end = e.End()
			}
		}
	})
}

// What a server may send in a handshake ends it, one way or the other.
func FuzzHandshake(f *testing.F) {
	hello := join(be64(wire.MagicServer), be64(wire.MagicOption), be16(3))
	f.Add(join(hello, optionReply(wire.OptStructuredReply, wire.RepAck), meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck),
		optionReply(wire.OptGo, wire.RepInfo, exportInfo(1<<20, 1)), optionReply(wire.OptGo, wire.RepInfo, blockInfo(1, 4096, 1<<25)), optionReply(wire.OptGo, wire.RepAck)))
	f.Add(join(hello, optionReply(wire.OptStructuredReply, wire.RepErrUnsup), optionReply(wire.OptGo, wire.RepErrUnknown, []byte("x"))))
	f.Fuzz(func(t *testing.T, stream []byte) {
		here, there := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, there) }()
		defer there.Close()
		defer here.Close()
		c := newClient(here)
		c.in = bufio.NewReader(bytes.NewReader(stream))
		if err := c.handshake("os", []string{dirtyName}); err == nil {
			if _, ok := c.contexts[dirtyName]; !ok || c.info.Size < 0 || c.info.Block.Max < c.info.Block.Min {
				t.Fatalf("%+v %v", c.info, c.contexts)
			}
		}
	})
}
