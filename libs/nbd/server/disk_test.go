package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// page is the unit in which a sparseDisk holds space, in bytes.
const page = 4096

// sparseDisk is a disk that behaves: space is held in pages, and what was not flushed is lost by crash.
type sparseDisk struct {
	fast bool

	// gate is called by every method before it works, if set. Its error is the method's.
	gate func(what string, r extent.Range) error

	mu      sync.Mutex
	data    []byte
	durable []byte
	held    extent.Set
	absent  int64 // bytes read where no space is held
}

var _ FastZeroer = (*sparseDisk)(nil)

func newSparseDisk(size int64) *sparseDisk {
	return &sparseDisk{data: make([]byte, size), durable: make([]byte, size), fast: true}
}

func (d *sparseDisk) enter(what string, r extent.Range) error {
	if r.Off < 0 || r.End() > d.Size() {
		panic(fmt.Sprintf("%s of %v on a disk of %d bytes", what, r, d.Size()))
	}
	if d.gate != nil {
		return d.gate(what, r)
	}
	return nil
}

func (d *sparseDisk) FastZero() bool { return d.fast }
func (d *sparseDisk) Size() int64    { return int64(len(d.data)) }

func (d *sparseDisk) ReadAt(_ context.Context, p []byte, off int64) error {
	r := extent.Range{Off: off, Len: int64(len(p))}
	if err := d.enter("read", r); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for gap := range d.held.Gaps(r) {
		d.absent += gap.Len
	}
	copy(p, d.data[off:])
	return nil
}

func (d *sparseDisk) WriteAt(p []byte, off int64, fua bool) error {
	r := extent.Range{Off: off, Len: int64(len(p))}
	if err := d.enter("write", r); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.data[off:], p)
	d.held.Add(r.Align(page))
	d.sync(r, fua)
	return nil
}

func (d *sparseDisk) Zero(r extent.Range, keep, fua bool) error {
	if err := d.enter("zero", r); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[r.Off:r.End()])
	if keep {
		d.held.Add(r.Align(page))
	} else if first, last := (r.Off+page-1)/page, r.End()/page; first < last {
		d.held.Remove(extent.Span(first*page, last*page))
	}
	d.sync(r, fua)
	return nil
}

func (d *sparseDisk) sync(r extent.Range, fua bool) {
	if fua {
		copy(d.durable[r.Off:r.End()], d.data[r.Off:r.End()])
	}
}

func (d *sparseDisk) Flush() error {
	if err := d.enter("flush", extent.Range{}); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.durable, d.data)
	return nil
}

func (d *sparseDisk) Allocated(_ context.Context, r extent.Range) (*extent.Set, error) {
	if err := d.enter("map", r); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	set := &extent.Set{}
	for run := range d.held.In(r) {
		set.Add(run)
	}
	return set, nil
}

// content is what the disk reads as; safe is what of it would outlive a crash.
func (d *sparseDisk) content() (content, safe []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.data), bytes.Clone(d.durable)
}

func (d *sparseDisk) readAbsent() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.absent
}

func (d *sparseDisk) heldBytes() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.held.Bytes()
}

// fill writes seeded data to every third 256 KiB.
func (d *sparseDisk) fill(t testing.TB, seed uint64) {
	rng := testkit.RandOf(seed)
	buf := make([]byte, 256<<10)
	for off := int64(0); off+int64(len(buf)) <= d.Size(); off += 3 * int64(len(buf)) {
		for i := 0; i < len(buf); i += 8 {
			binary.LittleEndian.PutUint64(buf[i:], rng.Uint64())
		}
		require.NoError(t, d.WriteAt(buf, off, true))
	}
}

// diskSet exports disks by name.
type diskSet map[string]*sparseDisk

func (s diskSet) Exports() []string {
	var names []string
	for name := range s {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (s diskSet) Open(name string) (Disk, error) {
	d, ok := s[name]
	if !ok {
		return nil, fmt.Errorf("no disk %q is exported", name)
	}
	return d, nil
}

// harness is a running server on a TCP port and a Unix socket.
type harness struct {
	server *Server
	logs   *testkit.Logs
	tcp    string
	unix   string
	stop   func() // ends Serve and waits for it
}

func serveDisks(t *testing.T, disks Exports, change ...func(*limits)) *harness {
	t.Helper()
	return serveWith(t, disks, Options{}, change...)
}

func serveWith(t *testing.T, disks Exports, o Options, change ...func(*limits)) *harness {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for a socket
	require.NoError(t, err)
	h := &harness{logs: testkit.NewLogs(t), unix: filepath.Join(dir, "s")}
	h.server = New(disks, h.logs.Logger(), o)
	for _, f := range change {
		f(&h.server.limits)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, network := range []string{"tcp", "unix"} {
		address := h.unix
		if network == "tcp" {
			address = "127.0.0.1:0"
		}
		lis, err := net.Listen(network, address)
		require.NoError(t, err)
		if network == "tcp" {
			h.tcp = lis.Addr().String()
		}
		wg.Go(func() {
			if err := h.server.Serve(ctx, lis); err != nil {
				t.Errorf("serve %s: %v", network, err)
			}
		})
	}
	h.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(func() {
		h.stop()
		_ = os.RemoveAll(dir)
		goleak.VerifyNone(t, leaks)
	})
	return h
}

// peer is a client that can do everything wrong.
type peer struct {
	t *testing.T
	net.Conn
}

func (h *harness) peer(t *testing.T) *peer {
	t.Helper()
	c, err := net.Dial("tcp", h.tcp)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	return &peer{t, c}
}

func (p *peer) send(b ...[]byte) {
	p.t.Helper()
	_, err := p.Write(bytes.Join(b, nil))
	require.NoError(p.t, err)
}

func (p *peer) take(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(p, b)
	require.NoError(p.t, err)
	return b
}

// gone requires that the server hung up.
func (p *peer) gone() {
	p.t.Helper()
	_, err := io.Copy(io.Discard, p)
	require.NotErrorIs(p.t, err, os.ErrDeadlineExceeded, "the server kept the connection")
}

func (p *peer) greet() {
	p.t.Helper()
	require.Equal(p.t, "NBDMAGICIHAVEOPT", string(p.take(18)[:16]))
	p.send([]byte{0, 0, 0, wire.FlagFixedNewstyle | wire.FlagNoZeroes})
}

func wireOption(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func wireInfo(name string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	return append(append(b, name...), 0, 0)
}

func wireMeta(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(q))), q...)
	}
	return b
}

func wireRequest(kind, flags uint16, cookie, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, wire.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

type optionReply struct {
	Kind uint32
	Data []byte
}

// ask sends an option and returns its replies up to the last.
func (p *peer) ask(opt uint32, data []byte) (replies []optionReply) {
	p.t.Helper()
	p.send(wireOption(opt, data))
	for {
		h := p.take(20)
		require.Equal(p.t, uint64(wire.MagicReply), binary.BigEndian.Uint64(h))
		require.Equal(p.t, opt, binary.BigEndian.Uint32(h[8:]))
		r := optionReply{binary.BigEndian.Uint32(h[12:]), p.take(int(binary.BigEndian.Uint32(h[16:])))}
		replies = append(replies, r)
		if r.Kind == wire.RepAck || r.Kind&wire.RepErr != 0 {
			return replies
		}
	}
}

func (p *peer) agree(opt uint32, data []byte) []optionReply {
	p.t.Helper()
	r := p.ask(opt, data)
	require.EqualValues(p.t, wire.RepAck, r[len(r)-1].Kind, "%s", r[len(r)-1].Data)
	return r
}

// begin enters transmission of name with structured replies and base:allocation if structured.
func (p *peer) begin(name string, structured bool) {
	p.t.Helper()
	p.greet()
	if structured {
		p.agree(wire.OptStructuredReply, nil)
		require.Len(p.t, p.agree(wire.OptSetMeta, wireMeta(name, wire.ContextAllocation)), 2)
	}
	p.agree(wire.OptGo, wireInfo(name))
}

// simpleAnswer takes a simple reply.
func (p *peer) simpleAnswer() (cookie uint64, errno uint32) {
	p.t.Helper()
	h := p.take(16)
	require.EqualValues(p.t, wire.MagicSimple, binary.BigEndian.Uint32(h))
	return binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[4:])
}

type chunk struct {
	Kind    uint16
	Off     uint64
	Payload []byte // without the offset
}

// chunks takes the structured reply to one request.
func (p *peer) chunks() (out []chunk) {
	p.t.Helper()
	for {
		h := p.take(20)
		require.EqualValues(p.t, wire.MagicChunk, binary.BigEndian.Uint32(h))
		c := chunk{Kind: binary.BigEndian.Uint16(h[6:]), Payload: p.take(int(binary.BigEndian.Uint32(h[16:])))}
		if c.Kind == wire.ChunkData || c.Kind == wire.ChunkHole {
			c.Off, c.Payload = binary.BigEndian.Uint64(c.Payload), c.Payload[8:]
		}
		out = append(out, c)
		if binary.BigEndian.Uint16(h[4:])&wire.ChunkDone != 0 {
			return out
		}
	}
}
