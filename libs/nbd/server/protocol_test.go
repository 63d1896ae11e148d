package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

const mib = 1 << 20

func TestDefaultExport(t *testing.T) {
	one := serveDisks(t, diskSet{"vm/os": newSparseDisk(mib)}).peer(t)
	one.greet()
	one.agree(wire.OptStructuredReply, nil)
	one.agree(wire.OptSetMeta, wireMeta("", wire.ContextAllocation))
	one.agree(wire.OptGo, wireInfo("vm/os")) // the same export by its name: the context stays
	one.send(wireRequest(wire.CmdBlockStatus, 0, 1, 0, mib))
	require.EqualValues(t, wire.ChunkBlockStatus, one.chunks()[0].Kind)

	h := serveDisks(t, diskSet{"vm/os": newSparseDisk(mib), "vm/data": newSparseDisk(mib)})
	two := h.peer(t)
	two.greet()
	r := two.ask(wire.OptGo, wireInfo(""))
	require.Equal(t, uint32(wire.RepErrUnknown), r[0].Kind)
	require.Contains(t, string(r[0].Data), "vm/data, vm/os")
	two.agree(wire.OptInfo, wireInfo("vm/data")) // a refusal leaves the negotiation open
	two.send(wireOption(wire.OptExportName, nil))
	two.gone()

	none := serveDisks(t, diskSet{}).peer(t)
	none.greet()
	require.Equal(t, uint32(wire.RepErrUnknown), none.ask(wire.OptInfo, wireInfo(""))[0].Kind)
}

func TestNegotiation(t *testing.T) {
	d := newSparseDisk(mib)
	slow := newSparseDisk(mib)
	slow.fast = false
	p := serveDisks(t, diskSet{"vm/os": d, "vm/slow": slow}).peer(t)
	p.greet()
	require.Equal(t, uint32(wire.RepErrUnsup), p.ask(5, nil)[0].Kind) // STARTTLS
	require.Equal(t, uint32(wire.RepErrInvalid), p.ask(wire.OptSetMeta, wireMeta("vm/os", wire.ContextAllocation))[0].Kind, "before structured replies")
	require.Equal(t, uint32(wire.RepErrUnknown), p.ask(wire.OptGo, wireInfo("vm/none"))[0].Kind)
	require.Equal(t, uint32(wire.RepErrTooBig), p.ask(wire.OptGo, make([]byte, maxOption+1))[0].Kind)
	require.Equal(t, uint32(wire.RepErrInvalid), p.ask(wire.OptGo, []byte{0, 0, 0, 9, 'x', 0, 0})[0].Kind)
	require.Len(t, p.agree(wire.OptList, nil), 3)

	flags := func(name string) uint16 {
		for _, r := range p.agree(wire.OptInfo, wireInfo(name)) {
			if r.Kind == wire.RepInfo && binary.BigEndian.Uint16(r.Data) == wire.InfoExport {
				return binary.BigEndian.Uint16(r.Data[10:])
			}
		}
		return 0
	}
	require.EqualValues(t, exportFlags|writableFlags|wire.ExportFastZero, flags("vm/os"))
	p.agree(wire.OptStructuredReply, nil)
	require.EqualValues(t, exportFlags|writableFlags|wire.ExportFastZero|wire.ExportDF, flags("vm/os"))
	require.EqualValues(t, exportFlags|writableFlags|wire.ExportDF, flags("vm/slow"))
	for _, r := range p.agree(wire.OptInfo, wireInfo("vm/os")) {
		if r.Kind == wire.RepInfo && binary.BigEndian.Uint16(r.Data) == wire.InfoBlockSize {
			require.Equal(t, []byte{0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0}, r.Data)
		}
	}

	require.Len(t, p.agree(wire.OptListMeta, wireMeta("vm/os")), 2)
	require.Len(t, p.agree(wire.OptListMeta, wireMeta("vm/os", "base:")), 2)
	require.Len(t, p.agree(wire.OptListMeta, wireMeta("vm/os", "qemu:")), 1)
	require.Len(t, p.agree(wire.OptSetMeta, wireMeta("vm/os", wire.ContextAllocation)), 2)
	require.Len(t, p.agree(wire.OptSetMeta, wireMeta("vm/os", "qemu:dirty-bitmap:x")), 1, "replaces what was set, sets nothing")
	p.agree(wire.OptGo, wireInfo("vm/os"))
	p.send(wireRequest(wire.CmdBlockStatus, 0, 1, 0, 512))
	c := p.chunks()
	require.EqualValues(t, wire.ChunkError, c[0].Kind)
	require.EqualValues(t, wire.EINVAL, binary.BigEndian.Uint32(c[0].Payload))

	bye := serveDisks(t, diskSet{"vm/os": d}).peer(t)
	bye.greet()
	bye.agree(wire.OptAbort, nil)
	bye.gone()
}

func TestReadsSendHoles(t *testing.T) {
	d := newSparseDisk(mib)
	data := bytes.Repeat([]byte{9}, 8192)
	require.NoError(t, d.WriteAt(data, 65536, false))
	require.NoError(t, d.WriteAt(data, mib-8192, false))
	p := serveDisks(t, diskSet{"vm/os": d}).peer(t)
	p.begin("vm/os", true)

	hole := func(off uint64, n uint32) chunk {
		return chunk{wire.ChunkHole, off, binary.BigEndian.AppendUint32(nil, n)}
	}
	for name, tc := range map[string]struct {
		off   uint64
		n     uint32
		flags uint16
		want  []chunk
	}{
		"all":           {0, mib, 0, []chunk{hole(0, 65536), {wire.ChunkData, 65536, data}, hole(73728, mib-8192-73728), {wire.ChunkData, mib - 8192, data}}},
		"data":          {66048, 512, 0, []chunk{{wire.ChunkData, 66048, data[:512]}}},
		"hole":          {0, 512, 0, []chunk{hole(0, 512)}},
		"ends in hole":  {73216, 1024, 0, []chunk{{wire.ChunkData, 73216, data[:512]}, hole(73728, 512)}},
		"DF over mixed": {65024, 1024, wire.CmdFlagDF, []chunk{{wire.ChunkData, 65024, append(make([]byte, 512), data[:512]...)}}},
		"DF over hole":  {0, 1024, wire.CmdFlagDF, []chunk{hole(0, 1024)}},
	} {
		t.Run(name, func(t *testing.T) {
			p.send(wireRequest(wire.CmdRead, tc.flags, 3, tc.off, tc.n))
			require.Empty(t, cmp.Diff(tc.want, p.chunks()))
		})
	}
	require.EqualValues(t, 512, d.readAbsent(), "only the read that must be one chunk touches absent space")

	for name, tc := range map[string]struct {
		flags uint16
		want  []uint32
	}{
		"all": {0, []uint32{65536, 3, 8192, 0, mib - 8192 - 73728, 3, 8192, 0}},
		"one": {wire.CmdFlagReqOne, []uint32{65536, 3}},
	} {
		t.Run("status "+name, func(t *testing.T) {
			p.send(wireRequest(wire.CmdBlockStatus, tc.flags, 3, 0, mib))
			var got []uint32
			for b := p.chunks()[0].Payload[4:]; len(b) > 0; b = b[4:] {
				got = append(got, binary.BigEndian.Uint32(b))
			}
			require.Equal(t, tc.want, got)
		})
	}
}

func TestZeroes(t *testing.T) {
	d := newSparseDisk(mib)
	p := serveDisks(t, diskSet{"vm/os": d}).peer(t)
	p.begin("vm/os", false)
	do := func(kind, flags uint16) uint32 {
		p.send(wireRequest(kind, flags, 1, 0, 65536))
		_, errno := p.simpleAnswer()
		return errno
	}
	require.Zero(t, do(wire.CmdWriteZeroes, wire.CmdFlagNoHole))
	require.EqualValues(t, 65536, d.heldBytes())
	require.EqualValues(t, wire.ENOTSUP, do(wire.CmdWriteZeroes, wire.CmdFlagNoHole|wire.CmdFlagFastZero))
	require.Zero(t, do(wire.CmdWriteZeroes, wire.CmdFlagFastZero))
	require.Zero(t, d.heldBytes())
	require.NoError(t, d.WriteAt([]byte{1}, 0, true))
	require.Zero(t, do(wire.CmdTrim, wire.CmdFlagFUA))
	_, safe := d.content()
	require.Zero(t, safe[0])
}

// A flush on one connection covers what was answered on another.
func TestFlushCoversAllConnections(t *testing.T) {
	d := newSparseDisk(mib)
	h := serveDisks(t, diskSet{"vm/os": d})
	a, b := h.peer(t), h.peer(t)
	a.begin("vm/os", false)
	b.begin("vm/os", true)
	data := bytes.Repeat([]byte{5}, page)
	a.send(wireRequest(wire.CmdWrite, 0, 1, 0, page), data)
	a.simpleAnswer()
	b.send(wireRequest(wire.CmdFlush, 0, 1, 0, 0))
	_, errno := b.simpleAnswer()
	require.Zero(t, errno)
	b.send(wireRequest(wire.CmdWrite, wire.CmdFlagFUA, 1, page, page), data)
	b.simpleAnswer()
	_, safe := d.content()
	require.Equal(t, data, safe[:page])
	require.Equal(t, data, safe[page:2*page])
}

func TestFailuresOfTheDisk(t *testing.T) {
	d := newSparseDisk(mib)
	d.gate = func(what string, r extent.Range) error {
		switch {
		case r.Off == 4096 && what != "map":
			return errors.New("medium error")
		case r.Off == 8192:
			panic("planted")
		case r.Off == 12288 && what == "map":
			return errors.New("no map")
		}
		return nil
	}
	require.NoError(t, d.WriteAt([]byte{7}, 12288, false))
	require.NoError(t, d.WriteAt([]byte{7}, 0, false))
	d.held.Add(extent.Range{Len: mib})
	h := serveDisks(t, diskSet{"vm/os": d})
	p := h.peer(t)
	p.begin("vm/os", true)
	for _, off := range []uint64{4096, 8192} {
		p.send(wireRequest(wire.CmdWrite, 0, 11, off, 512), make([]byte, 512))
		cookie, errno := p.simpleAnswer()
		require.EqualValues(t, 11, cookie)
		require.EqualValues(t, wire.EIO, errno)
		p.send(wireRequest(wire.CmdRead, 0, 12, off, 512))
		require.EqualValues(t, wire.EIO, binary.BigEndian.Uint32(p.chunks()[0].Payload))
	}
	require.Len(t, h.logs.Find("NBD request failed"), 2)
	require.Len(t, h.logs.Find("NBD request panicked"), 2)
	p.send(wireRequest(wire.CmdRead, 0, 12, 12288, 512)) // a disk that cannot be mapped can be read still
	require.EqualValues(t, 7, p.chunks()[0].Payload[0])
}

// A request that takes long holds up no other, and only so many are taken at once.
func TestRequestsRunConcurrentlyWithinBounds(t *testing.T) {
	const asked = 100
	d := newSparseDisk(MaxRequest + mib)
	var running, peak atomic.Int64
	open := make(chan struct{})
	d.gate = func(what string, r extent.Range) error {
		if what == "read" && r.Off > 0 {
			now := running.Add(1)
			for {
				p := peak.Load()
				if now <= p || peak.CompareAndSwap(p, now) {
					break
				}
			}
			<-open
			running.Add(-1)
		}
		return nil
	}
	h := serveDisks(t, diskSet{"vm/os": d})
	release := sync.OnceFunc(func() { close(open) })
	t.Cleanup(release)

	p := h.peer(t)
	p.begin("vm/os", false)
	p.send(wireRequest(wire.CmdRead, 0, 1, 512, 512), wireRequest(wire.CmdRead, 0, 2, 0, 512))
	cookie, _ := p.simpleAnswer()
	require.EqualValues(t, 2, cookie, "the later request is answered first")
	p.take(512)
	for i := range uint64(asked) {
		p.send(wireRequest(wire.CmdRead, 0, 10+i, 512, 512))
	}
	testkit.Eventually(t, 10*time.Second, func() bool { return running.Load() == maxInFlight })

	big := h.peer(t)
	big.begin("vm/os", false)
	for i := range uint64(5) {
		big.send(wireRequest(wire.CmdRead, 0, 10+i, 512, MaxRequest))
	}
	testkit.Eventually(t, 10*time.Second, func() bool { return running.Load() == maxInFlight+2 })
	release()
	for range asked + 1 {
		p.simpleAnswer()
		p.take(512)
	}
	for range 5 {
		big.simpleAnswer()
		big.take(MaxRequest)
	}
	require.EqualValues(t, maxInFlight+2, peak.Load())
}

// What one client does wrong is its own loss.
func TestBadClients(t *testing.T) {
	d := newSparseDisk(mib)
	h := serveDisks(t, diskSet{"vm/os": d})
	huge := wireOption(wire.OptGo, nil)
	binary.BigEndian.PutUint32(huge[12:], ^uint32(0))
	for name, tc := range map[string]struct {
		begin bool
		send  []byte
		leave bool // the client hangs up; else the server must
	}{
		"garbage at first":          {false, bytes.Repeat([]byte{0xa5}, 4096), false},
		"http":                      {false, []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), false},
		"option of 4 GiB":           {false, append([]byte{0, 0, 0, 3}, huge...), false},
		"unknown client flags":      {false, []byte{0, 0, 0, 7}, false},
		"endless options":           {false, append([]byte{0, 0, 0, 3}, bytes.Repeat(wireOption(77, nil), maxOptions+1)...), false},
		"garbage for a request":     {true, bytes.Repeat([]byte{0xa5}, 4096), false},
		"write of 4 GiB":            {true, wireRequest(wire.CmdWrite, 0, 1, 0, ^uint32(511)), false},
		"leaves in the greeting":    {false, []byte{0, 0}, true},
		"leaves in an option":       {false, append([]byte{0, 0, 0, 3}, huge[:10]...), true},
		"leaves in a request":       {true, wireRequest(wire.CmdWrite, 0, 1, 0, 4096)[:9], true},
		"leaves in a payload":       {true, append(wireRequest(wire.CmdWrite, 0, 1, 0, 65536), make([]byte, 1000)...), true},
		"leaves in refused payload": {true, append(wireRequest(wire.CmdWrite, 0, 1, mib, 65536), make([]byte, 1000)...), true},
		"leaves with reads open":    {true, bytes.Repeat(wireRequest(wire.CmdRead, 0, 1, 0, mib), 80), true},
	} {
		t.Run(name, func(t *testing.T) {
			p := h.peer(t)
			if tc.begin {
				p.begin("vm/os", false)
			} else {
				p.take(18)
			}
			p.send(tc.send)
			if tc.leave {
				require.NoError(t, p.Close())
			} else {
				p.gone()
			}
			after := h.peer(t)
			after.begin("vm/os", false)
			after.send(wireRequest(wire.CmdRead, 0, 1, 0, 512))
			_, errno := after.simpleAnswer()
			require.Zero(t, errno)
			require.NoError(t, after.Close())
			testkit.Eventually(t, 10*time.Second, func() bool {
				h.server.mu.Lock()
				defer h.server.mu.Unlock()
				return len(h.server.conns) == 0
			})
		})
	}
	content, _ := d.content()
	require.Equal(t, make([]byte, mib), content, "a write that did not arrive whole is not done")
	require.Empty(t, h.logs.Find("panicked"))
}

func TestLimits(t *testing.T) {
	h := serveDisks(t, diskSet{"vm/os": newSparseDisk(mib)}, func(l *limits) { l.connections = 2; l.handshake = 2 * time.Second })
	served := h.peer(t)
	served.begin("vm/os", false)
	silent := h.peer(t)
	silent.take(18)
	h.peer(t).gone() // the third
	silent.gone()    // by the deadline
	require.NotEmpty(t, h.logs.Find("too many NBD connections"))
	served.send(wireRequest(wire.CmdRead, 0, 1, 0, 512)) // the deadline is not for those who chose
	_, errno := served.simpleAnswer()
	require.Zero(t, errno)
}

// The end of the server answers what was asked, and does not wait for a client that takes no replies.
func TestStop(t *testing.T) {
	d := newSparseDisk(MaxRequest)
	d.held.Add(extent.Range{Len: d.Size()})
	entered, open := make(chan struct{}), make(chan struct{})
	d.gate = func(what string, _ extent.Range) error {
		if what == "flush" {
			close(entered)
			<-open
		}
		return nil
	}
	h := serveDisks(t, diskSet{"vm/os": d}, func(l *limits) { l.drain = 200 * time.Millisecond })
	deaf := h.peer(t)
	deaf.begin("vm/os", false)
	for i := range uint64(2) {
		deaf.send(wireRequest(wire.CmdRead, 0, i, 0, MaxRequest))
	}
	p := h.peer(t)
	p.begin("vm/os", false)
	p.send(wireRequest(wire.CmdFlush, 0, 1, 0, 0))
	<-entered
	ended := make(chan struct{})
	go func() { h.stop(); close(ended) }()
	testkit.Eventually(t, 10*time.Second, func() bool { // the deaf one is cut off while the disk still flushes for the other
		h.server.mu.Lock()
		defer h.server.mu.Unlock()
		return len(h.server.conns) == 1
	})
	close(open)
	_, errno := p.simpleAnswer()
	require.Zero(t, errno)
	p.gone()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("a client that takes no replies holds up the end")
	}
}

func TestCloseExports(t *testing.T) {
	h := serveDisks(t, diskSet{"a/os": newSparseDisk(mib), "b/os": newSparseDisk(mib)})
	a, b := h.peer(t), h.peer(t)
	a.begin("a/os", false)
	b.begin("b/os", false)
	h.server.CloseExports(func(name string) bool { return name == "a/os" })
	a.gone()
	b.send(wireRequest(wire.CmdFlush, 0, 1, 0, 0))
	_, errno := b.simpleAnswer()
	require.Zero(t, errno)
}

func TestRefusalNamesAFewExports(t *testing.T) {
	disks := diskSet{}
	for i := range 40 {
		disks[fmt.Sprintf("vm%02d/os", i)] = newSparseDisk(page)
	}
	p := serveDisks(t, disks).peer(t)
	p.greet()
	require.Contains(t, string(p.ask(wire.OptGo, wireInfo(""))[0].Data), "and 24 more")
}

// What the parsers accept, they understood to the last byte.
func FuzzOptions(f *testing.F) {
	f.Add(wireInfo("vm/os"))
	f.Add(wireMeta("vm/os", wire.ContextAllocation, "qemu:"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if name, err := parseInfo(b); err == nil && len(name)+6 > len(b) {
			t.Fatalf("name of %d bytes in %d", len(name), len(b))
		}
		if q, err := parseMeta(b); err == nil && !bytes.Equal(wireMeta(q.export, q.queries...), b) {
			t.Fatalf("%+v is not %x", q, b)
		}
	})
}
