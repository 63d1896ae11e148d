package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is the other end of a connection, which can do everything wrong.
type server struct {
	t testing.TB
	net.Conn
	in *bufio.Reader
}

// scripted runs script as a server and returns the address for one client.
func scripted(t testing.TB, script func(*server)) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		script(&server{t: t, Conn: conn, in: bufio.NewReader(conn)})
	})
	t.Cleanup(func() { lis.Close(); wg.Wait() })
	return "nbd://" + lis.Addr().String() + "/os"
}

func (s *server) send(parts ...[]byte) bool {
	_, err := s.Write(bytes.Join(parts, nil))
	return err == nil
}

func (s *server) take(n int) []byte {
	b := make([]byte, n)
	if _, err := io.ReadFull(s.in, b); err != nil {
		return nil
	}
	return b
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func optionReply(opt, kind uint32, data ...[]byte) []byte {
	body := join(data...)
	return join(be64(wire.MagicReply), be32(opt), be32(kind), be32(uint32(len(body))), body)
}

func exportInfo(size uint64, flags uint16) []byte {
	return join(be16(wire.InfoExport), be64(size), be16(flags))
}

func blockInfo(small, preferred, most uint32) []byte {
	return join(be16(wire.InfoBlockSize), be32(small), be32(preferred), be32(most))
}

// meta offers a context under a number.
func meta(id uint32, name string) []byte {
	return optionReply(wire.OptSetMeta, wire.RepMeta, be32(id), []byte(name))
}

// shake does the handshake as a good server, with replies of the test's own for some options.
func (s *server) shake(own map[uint32][]byte) bool {
	s.send(be64(wire.MagicServer), be64(wire.MagicOption), be16(wire.FlagFixedNewstyle|wire.FlagNoZeroes))
	if s.take(4) == nil {
		return false
	}
	for {
		head := s.take(16)
		if head == nil {
			return false
		}
		opt, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		s.take(int(n))
		if reply, ok := own[opt]; ok {
			if !s.send(reply) {
				return false
			}
		} else {
			if opt == wire.OptGo {
				s.send(optionReply(opt, wire.RepInfo, exportInfo(scriptSize, 1)))
			}
			s.send(optionReply(opt, wire.RepAck))
		}
		if opt == wire.OptGo {
			return true
		}
	}
}

const scriptSize = 8 << 20

// request is one command that the server got.
type got struct {
	flags  uint16
	kind   uint16
	cookie uint64
	off    int64
	length int64
}

func (s *server) request() (got, bool) {
	b := s.take(28)
	if b == nil {
		return got{}, false
	}
	r := got{
		flags: binary.BigEndian.Uint16(b[4:]), kind: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
		off: int64(binary.BigEndian.Uint64(b[16:])), length: int64(binary.BigEndian.Uint32(b[24:])),
	}
	if r.kind == wire.CmdWrite {
		s.take(int(r.length))
	}
	return r, r.kind != wire.CmdDisconnect
}

func chunkOf(flags, kind uint16, cookie uint64, body ...[]byte) []byte {
	b := join(body...)
	return join(be32(wire.MagicChunk), be16(flags), be16(kind), be64(cookie), be32(uint32(len(b))), b)
}

func simpleOf(errno uint32, cookie uint64) []byte {
	return join(be32(wire.MagicSimple), be32(errno), be64(cookie))
}

func extentsOf(id uint32, pairs ...uint32) []byte {
	b := be32(id)
	for _, v := range pairs {
		b = append(b, be32(v)...)
	}
	return b
}

const dirtyName = "qemu:dirty-bitmap:b1"

func TestHandshakeRefusals(t *testing.T) {
	ok := optionReply(wire.OptGo, wire.RepAck)
	for name, c := range map[string]struct {
		own  map[uint32][]byte
		want error
	}{
		"context acknowledged in silence": {map[uint32][]byte{wire.OptSetMeta: optionReply(wire.OptSetMeta, wire.RepAck)}, ErrNoContext},
		"contexts not supported":          {map[uint32][]byte{wire.OptSetMeta: optionReply(wire.OptSetMeta, wire.RepErrUnsup)}, ErrNoContext},
		"other context":                   {map[uint32][]byte{wire.OptSetMeta: join(meta(1, "qemu:dirty-bitmap:b2"), optionReply(wire.OptSetMeta, wire.RepAck))}, ErrProtocol},
		"context twice":                   {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), meta(2, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck))}, ErrProtocol},
		"unknown export of contexts":      {map[uint32][]byte{wire.OptSetMeta: optionReply(wire.OptSetMeta, wire.RepErrUnknown, []byte("no such"))}, ErrNoExport},
		"no structured replies":           {map[uint32][]byte{wire.OptStructuredReply: optionReply(wire.OptStructuredReply, wire.RepErrUnsup)}, ErrNoContext},
		"unknown export":                  {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: optionReply(wire.OptGo, wire.RepErrUnknown)}, ErrNoExport},
		"forbidden export":                {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: optionReply(wire.OptGo, wire.RepErrPolicy, []byte("fenced"))}, ErrNoExport},
		"no GO":                           {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: optionReply(wire.OptGo, wire.RepErrUnsup)}, ErrProtocol},
		"no size":                         {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: ok}, ErrProtocol},
		"huge size":                       {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: join(optionReply(wire.OptGo, wire.RepInfo, exportInfo(1<<63, 1)), ok)}, ErrProtocol},
		"short information":               {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: join(optionReply(wire.OptGo, wire.RepInfo, exportInfo(1<<20, 1)[:8]), ok)}, ErrProtocol},
		"block sizes":                     {map[uint32][]byte{wire.OptSetMeta: join(meta(1, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck)), wire.OptGo: join(optionReply(wire.OptGo, wire.RepInfo, blockInfo(3, 4, 5)), ok)}, ErrProtocol},
		"replies without end":             {map[uint32][]byte{wire.OptStructuredReply: bytes.Repeat(optionReply(wire.OptStructuredReply, wire.RepInfo, be16(9)), 100)}, ErrProtocol},
		"reply to another option":         {map[uint32][]byte{wire.OptStructuredReply: optionReply(wire.OptGo, wire.RepAck)}, ErrProtocol},
		"huge reply":                      {map[uint32][]byte{wire.OptStructuredReply: join(be64(wire.MagicReply), be32(wire.OptStructuredReply), be32(wire.RepAck), be32(1<<31))}, ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			uri := scripted(t, func(s *server) { s.shake(c.own); s.request() })
			client, err := Dial(testkit.Context(t), uri, dirtyName)
			require.ErrorIs(t, err, c.want)
			require.Nil(t, client)
		})
	}
}

func TestHandshakeOfOthers(t *testing.T) {
	for name, hello := range map[string][]byte{
		"not NBD":  []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"oldstyle": join(be64(wire.MagicServer), be64(0x00420281861253), make([]byte, 134)),
		"newstyle": join(be64(wire.MagicServer), be64(wire.MagicOption), be16(0)),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Dial(testkit.Context(t), scripted(t, func(s *server) { s.send(hello); s.take(1) }))
			require.ErrorIs(t, err, ErrProtocol)
		})
	}
	t.Run("hangs up", func(t *testing.T) {
		_, err := Dial(testkit.Context(t), scripted(t, func(*server) {}))
		require.ErrorIs(t, err, ErrLost)
	})
	t.Run("says nothing", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(testkit.Context(t), 50*time.Millisecond)
		defer cancel()
		_, err := Dial(ctx, scripted(t, func(s *server) { s.take(1) }))
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
	t.Run("nobody", func(t *testing.T) {
		_, err := Dial(testkit.Context(t), "nbd://"+testkit.FreeAddr(t)+"/x")
		require.ErrorIs(t, err, ErrLost)
	})
}

func TestURI(t *testing.T) {
	for _, bad := range []string{"", "os", "http://h/x", "nbd+unix:///x", "nbd:///x", "nbds://h/x", "nbd+unix://h/x?socket=/s", "nbd://h:1/\x7f"} {
		_, err := Dial(testkit.Context(t), bad)
		require.ErrorIs(t, err, ErrURI, bad)
	}
	network, address, export, err := parseURI("nbd+unix:///vm/os%20disk?socket=/run/a%26b")
	require.NoError(t, err)
	require.Equal(t, []string{"unix", "/run/a&b", "vm/os disk"}, []string{network, address, export})
	_, address, export, err = parseURI("nbd://[::1]/")
	require.NoError(t, err)
	require.Equal(t, []string{"[::1]:10809", ""}, []string{address, export})
}

// serveWith connects a client to a server that shakes hands well and then answers each request by reply. A nil reply
// hangs up.
func serveWith(t *testing.T, own map[uint32][]byte, reply func(r got) []byte, contexts ...string) *Client {
	t.Helper()
	uri := scripted(t, func(s *server) {
		if !s.shake(own) {
			return
		}
		for {
			r, ok := s.request()
			if !ok {
				return
			}
			b := reply(r)
			if b == nil || !s.send(b) {
				return
			}
		}
	})
	c, err := Dial(testkit.Context(t), uri, contexts...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func withDirty(id uint32) map[uint32][]byte {
	return map[uint32][]byte{wire.OptSetMeta: join(meta(id, dirtyName), optionReply(wire.OptSetMeta, wire.RepAck))}
}

const sector = 512

func sectors(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n*sector) }

// Each misbehaviour in the answer to a read of four sectors at sector 8.
func TestReadMisbehaviour(t *testing.T) {
	const at = 8 * sector
	data := func(flags uint16, cookie uint64, off uint64, n int) []byte {
		return chunkOf(flags, wire.ChunkData, cookie, be64(off), sectors(n, 7))
	}
	hole := func(flags uint16, cookie uint64, off uint64, n uint32) []byte {
		return chunkOf(flags, wire.ChunkHole, cookie, be64(off), be32(n))
	}
	for name, c := range map[string]struct {
		reply func(r got) []byte
		want  error
	}{
		"wrong magic":    {func(r got) []byte { return be32(1) }, ErrProtocol},
		"hangs up":       {func(r got) []byte { return nil }, ErrLost},
		"unknown cookie": {func(r got) []byte { return data(wire.ChunkDone, r.cookie+9, at, 4) }, ErrProtocol},
		"simple reply":   {func(r got) []byte { return join(simpleOf(0, r.cookie), sectors(4, 1)) }, ErrProtocol},
		"part missing":   {func(r got) []byte { return data(wire.ChunkDone, r.cookie, at, 3) }, ErrProtocol},
		"nothing":        {func(r got) []byte { return chunkOf(wire.ChunkDone, wire.ChunkNone, r.cookie) }, ErrProtocol},
		"part twice": {func(r got) []byte {
			return join(data(0, r.cookie, at, 2), data(wire.ChunkDone, r.cookie, at+sector, 3))
		}, ErrProtocol},
		"before the read":    {func(r got) []byte { return data(wire.ChunkDone, r.cookie, at-sector, 4) }, ErrProtocol},
		"beyond the read":    {func(r got) []byte { return data(wire.ChunkDone, r.cookie, at+sector, 4) }, ErrProtocol},
		"offset overflow":    {func(r got) []byte { return data(wire.ChunkDone, r.cookie, 1<<63, 4) }, ErrProtocol},
		"hole overflow":      {func(r got) []byte { return hole(wire.ChunkDone, r.cookie, at, 1<<32-1) }, ErrProtocol},
		"empty hole":         {func(r got) []byte { return hole(0, r.cookie, at, 0) }, ErrProtocol},
		"short hole":         {func(r got) []byte { return chunkOf(0, wire.ChunkHole, r.cookie, be64(at)) }, ErrProtocol},
		"empty data":         {func(r got) []byte { return chunkOf(0, wire.ChunkData, r.cookie, be64(at)) }, ErrProtocol},
		"status of a read":   {func(r got) []byte { return chunkOf(0, wire.ChunkBlockStatus, r.cookie, extentsOf(1, sector, 1)) }, ErrProtocol},
		"unknown type":       {func(r got) []byte { return chunkOf(0, 77, r.cookie) }, ErrProtocol},
		"none, not the last": {func(r got) []byte { return chunkOf(0, wire.ChunkNone, r.cookie) }, ErrProtocol},
		"chunks without end": {func(r got) []byte {
			return bytes.Repeat(chunkOf(0, wire.ChunkError, r.cookie, be32(EIO), be16(0)), 2000)
		}, ErrProtocol},
		"error without number": {func(r got) []byte { return chunkOf(wire.ChunkDone, wire.ChunkError, r.cookie, be32(0), be16(0)) }, ErrProtocol},
		"error text too long": {func(r got) []byte {
			return chunkOf(wire.ChunkDone, wire.ChunkError, r.cookie, be32(5), be16(9), []byte("short"))
		}, ErrProtocol},
		"huge error": {func(r got) []byte {
			return join(be32(wire.MagicChunk), be16(wire.ChunkDone), be16(wire.ChunkError), be64(r.cookie), be32(1<<30))
		}, ErrProtocol},
		"huge data": {func(r got) []byte {
			return join(be32(wire.MagicChunk), be16(wire.ChunkDone), be16(wire.ChunkData), be64(r.cookie), be32(1<<31), be64(at))
		}, ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			client := serveWith(t, nil, c.reply)
			err := client.ReadAt(testkit.Context(t), make([]byte, 4*sector), at)
			require.ErrorIs(t, err, c.want)
			require.Error(t, client.ReadAt(testkit.Context(t), make([]byte, sector), 0), "the connection has ended")
		})
	}
	for name, reply := range map[string]func(r got) []byte{
		"in pieces, out of order": func(r got) []byte {
			return join(hole(0, r.cookie, at+2*sector, sector), data(0, r.cookie, at+3*sector, 1), data(0, r.cookie, at, 2), chunkOf(wire.ChunkDone, wire.ChunkNone, r.cookie))
		},
	} {
		t.Run(name, func(t *testing.T) {
			client := serveWith(t, nil, reply)
			p := sectors(4, 9)
			require.NoError(t, client.ReadAt(testkit.Context(t), p, at))
			require.Equal(t, join(sectors(2, 7), sectors(1, 0), sectors(1, 7)), p)
		})
	}
	for name, c := range map[string]struct {
		reply func(r got) []byte
		errno uint32
	}{
		"error chunk": {func(r got) []byte {
			return chunkOf(wire.ChunkDone, wire.ChunkError, r.cookie, be32(EIO), be16(3), []byte("bad"))
		}, EIO},
		"error with offset": {func(r got) []byte {
			return chunkOf(wire.ChunkDone, wire.ChunkErrorOffset, r.cookie, be32(EIO), be16(0), be64(at))
		}, EIO},
		"unknown error type": {func(r got) []byte { return chunkOf(wire.ChunkDone, wire.ChunkIsError+40, r.cookie, be32(99), be64(1)) }, 99},
		"error among data": {func(r got) []byte {
			return join(data(0, r.cookie, at, 1), chunkOf(0, wire.ChunkError, r.cookie, be32(EIO), be16(0)), data(0, r.cookie, at+sector, 1), chunkOf(wire.ChunkDone, wire.ChunkNone, r.cookie))
		}, EIO},
		"simple error": {func(r got) []byte { return simpleOf(ESHUTDOWN, r.cookie) }, ESHUTDOWN},
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			client := serveWith(t, nil, func(r got) []byte {
				if n++; n == 1 {
					return c.reply(r)
				}
				return data(wire.ChunkDone, r.cookie, uint64(r.off), int(r.length/sector))
			})
			var e *Error
			require.ErrorAs(t, client.ReadAt(testkit.Context(t), make([]byte, 4*sector), at), &e)
			require.Equal(t, c.errno, e.Errno)
			require.Equal(t, c.errno != ESHUTDOWN, e.Refused())
			require.NoError(t, client.ReadAt(testkit.Context(t), make([]byte, sector), 0), "the connection goes on")
		})
	}
}

func TestStatusMisbehaviour(t *testing.T) {
	for name, reply := range map[string]func(r got) []byte{
		"no extent": func(r got) []byte { return chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, r.cookie, be32(3)) },
		"no chunk":  func(r got) []byte { return chunkOf(wire.ChunkDone, wire.ChunkNone, r.cookie) },
		"empty extent": func(r got) []byte {
			return chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, r.cookie, extentsOf(3, 0, 1))
		},
		"other context": func(r got) []byte {
			return chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, r.cookie, extentsOf(4, sector, 1))
		},
		"twice": func(r got) []byte {
			b := chunkOf(0, wire.ChunkBlockStatus, r.cookie, extentsOf(3, sector, 1))
			return join(b, b)
		},
		"ragged": func(r got) []byte {
			return chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, r.cookie, extentsOf(3, sector, 1, 4))
		},
		"simple": func(r got) []byte { return simpleOf(0, r.cookie) },
		"data":   func(r got) []byte { return chunkOf(wire.ChunkDone, wire.ChunkData, r.cookie, be64(0), sectors(1, 1)) },
		"huge": func(r got) []byte {
			return join(be32(wire.MagicChunk), be16(1), be16(wire.ChunkBlockStatus), be64(r.cookie), be32(1<<32-4))
		},
		"without end": func(r got) []byte {
			return bytes.Repeat(chunkOf(0, wire.ChunkError, r.cookie, be32(5), be16(0)), 20000)
		},
	} {
		t.Run(name, func(t *testing.T) {
			client := serveWith(t, withDirty(3), reply, dirtyName)
			_, err := client.BlockStatus(testkit.Context(t), dirtyName, all(client))
			require.ErrorIs(t, err, ErrProtocol)
		})
	}
	client := serveWith(t, nil, func(r got) []byte { return nil })
	_, err := client.BlockStatus(testkit.Context(t), dirtyName, all(client))
	require.ErrorIs(t, err, ErrNoContext, "never asked for")
}

// Replies cover less than was asked, and the last extent more.
func TestExtentsLoopAndClip(t *testing.T) {
	var asked []got
	client := serveWith(t, withDirty(3), func(r got) []byte {
		asked = append(asked, r)
		return chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, r.cookie, extentsOf(3, sector, 1, sector, 1, 1<<20, 0, 1<<20, 1))
	}, dirtyName)
	at := client.Size()
	var list []Extent
	for e, err := range client.Extents(testkit.Context(t), dirtyName, all(client)) {
		require.NoError(t, err)
		list = append(list, e)
	}
	end := int64(0)
	for _, e := range list {
		require.Equal(t, end, e.Off)
		end = e.End()
	}
	require.Equal(t, at, end)
	require.Equal(t, uint32(Dirty), list[0].Flags)
	require.Equal(t, int64(2*sector), list[0].Len, "equal neighbours are joined")
	require.Greater(t, len(asked), 2)
}

// A request that is given up leaves its buffer and the others alone, and a server that never answers hangs nobody.
func TestGivingUp(t *testing.T) {
	release := make(chan struct{})
	var first got
	client := serveWith(t, nil, func(r got) []byte {
		if first.cookie == 0 {
			first = r
			return []byte{} // nothing yet
		}
		<-release
		late := chunkOf(wire.ChunkDone, wire.ChunkData, first.cookie, be64(uint64(first.off)), sectors(4, 3))
		return join(late, chunkOf(wire.ChunkDone, wire.ChunkData, r.cookie, be64(uint64(r.off)), sectors(2, 5)))
	})
	ctx, cancel := context.WithTimeout(testkit.Context(t), 30*time.Millisecond)
	defer cancel()
	p := sectors(4, 1)
	require.ErrorIs(t, client.ReadAt(ctx, p, 0), context.DeadlineExceeded)
	other := make([]byte, 2*sector)
	close(release)
	require.NoError(t, client.ReadAt(testkit.Context(t), other, 4096))
	require.Equal(t, sectors(2, 5), other)
	require.Equal(t, sectors(4, 1), p, "the late answer went nowhere")
}

func TestSilentServer(t *testing.T) {
	client := serveWith(t, nil, func(r got) []byte { return []byte{} })
	var wg sync.WaitGroup
	for range 3 * maxInFlight {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(testkit.Context(t), 50*time.Millisecond)
			defer cancel()
			if err := client.ReadAt(ctx, make([]byte, sector), 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	done := make(chan error)
	go func() { done <- client.ReadAt(testkit.Context(t), make([]byte, sector), 0) }()
	require.NoError(t, client.Close())
	require.ErrorIs(t, <-done, ErrClosed)
	require.ErrorIs(t, client.Flush(testkit.Context(t)), ErrClosed)
}

func TestBounds(t *testing.T) {
	client := serveWith(t, nil, func(r got) []byte { return nil })
	require.ErrorIs(t, client.ReadAt(testkit.Context(t), make([]byte, 2), scriptSize-1), errBounds)
	require.ErrorIs(t, client.ReadAt(testkit.Context(t), make([]byte, 2), -1), errBounds)
	require.NoError(t, client.ReadAt(testkit.Context(t), nil, scriptSize))
}

// No read crosses a multiple of the unit.
func TestLimitReads(t *testing.T) {
	client := serveWith(t, nil, func(r got) []byte {
		if r.off/4096 != (r.off+r.length-1)/4096 {
			return nil
		}
		return chunkOf(wire.ChunkDone, wire.ChunkHole, r.cookie, be64(uint64(r.off)), be32(uint32(r.length)))
	})
	client.LimitReads(4096)
	require.NoError(t, client.ReadAt(testkit.Context(t), make([]byte, 9*sector), 7*sector))
	require.NoError(t, client.Stream(testkit.Context(t), oneRun(extent.Range{Off: sector, Len: 64 << 10}), func(extent.Range, []byte) error { return nil }))
}

// A server may refuse to answer a long read in one piece.
func TestOnePieceTooLong(t *testing.T) {
	own := map[uint32][]byte{wire.OptGo: join(optionReply(wire.OptGo, wire.RepInfo, exportInfo(scriptSize, 1|wire.ExportDF)), optionReply(wire.OptGo, wire.RepAck))}
	client := serveWith(t, own, func(r got) []byte {
		if r.flags&wire.CmdFlagDF != 0 {
			return chunkOf(wire.ChunkDone, wire.ChunkError, r.cookie, be32(EOVERFLOW), be16(0))
		}
		return chunkOf(wire.ChunkDone, wire.ChunkData, r.cookie, be64(uint64(r.off)), sectors(int(r.length/sector), 4))
	})
	p := make([]byte, 3*sector)
	require.NoError(t, client.ReadAt(testkit.Context(t), p, 0))
	require.Equal(t, sectors(3, 4), p)
	n := int64(0)
	require.NoError(t, client.Stream(testkit.Context(t), oneRun(all(client)), func(at extent.Range, data []byte) error {
		n += int64(len(data))
		return nil
	}))
	require.Equal(t, int64(scriptSize), n)
}

// A server without structured replies is read all the same.
func TestSimpleReplies(t *testing.T) {
	own := map[uint32][]byte{wire.OptStructuredReply: optionReply(wire.OptStructuredReply, wire.RepErrUnsup)}
	client := serveWith(t, own, func(r got) []byte { return join(simpleOf(0, r.cookie), sectors(int(r.length/sector), 4)) })
	p := make([]byte, 3*sector)
	require.NoError(t, client.ReadAt(testkit.Context(t), p, 0))
	require.Equal(t, sectors(3, 4), p)

	client = serveWith(t, own, func(r got) []byte {
		return chunkOf(wire.ChunkDone, wire.ChunkData, r.cookie, be64(0), sectors(1, 4))
	})
	require.ErrorIs(t, client.ReadAt(testkit.Context(t), p[:sector], 0), ErrProtocol)
}
