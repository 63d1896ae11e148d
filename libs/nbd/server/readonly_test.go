package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	client "github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// frozenDisk can only be read. hold, when set, is called by each read.
type frozenDisk struct {
	d    *sparseDisk
	hold func(context.Context) error
}

func (f *frozenDisk) Size() int64 { return f.d.Size() }

func (f *frozenDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	if f.hold != nil {
		if err := f.hold(ctx); err != nil {
			return err
		}
	}
	return f.d.ReadAt(ctx, p, off)
}

// mappedDisk is one that knows its extents.
type mappedDisk struct{ frozenDisk }

func (m *mappedDisk) Allocated(ctx context.Context, r extent.Range) (*extent.Set, error) {
	return m.d.Allocated(ctx, r)
}

// A disk that cannot be written is exported so, and says so to everybody who asks.
func TestReadOnly(t *testing.T) {
	plain, mapped := newSparseDisk(12*mib), newSparseDisk(12*mib)
	plain.fill(t, 1)
	mapped.fill(t, 2)
	h := serveDisks(t, anyDisks{"plain": &frozenDisk{d: plain}, "mapped": &mappedDisk{frozenDisk{d: mapped}}})
	for name, d := range map[string]*sparseDisk{"plain": plain, "mapped": mapped} {
		for network, uri := range h.uris(name) {
			t.Run(name+"/"+network, func(t *testing.T) {
				want, _ := d.content()
				var info struct {
					Exports []struct {
						ReadOnly  bool `json:"is_read_only"`
						MultiConn bool `json:"can_multi_conn"`
						Trim      bool `json:"can_trim"`
						Zero      bool `json:"can_zero"`
						Contexts  []string
					}
				}
				require.NoError(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri)), &info))
				e := info.Exports[0]
				require.True(t, e.ReadOnly && e.MultiConn && !e.Trim && !e.Zero, "%+v", e)
				require.Equal(t, name == "mapped", len(e.Contexts) == 1, e.Contexts)
				out := filepath.Join(t.TempDir(), "out")
				run(t, "nbdcopy", "--connections=4", uri, out)
				sameBytes(t, want, readFile(t, out))
				out += "2"
				run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
				sameBytes(t, want, readFile(t, out))
				var extents []struct {
					Length int64
					Data   bool
				}
				require.NoError(t, json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &extents))
				var data int64
				for _, e := range extents {
					if e.Data {
						data += e.Length
					}
				}
				held := d.heldBytes()
				if name == "plain" {
					held = d.Size()
				}
				require.Equal(t, held, data)
				raw, err := exec.CommandContext(testkit.Context(t), tool(t, "qemu-io"), "-f", "raw", uri, "-c", "write 0 4k").CombinedOutput()
				require.True(t, err != nil || bytes.Contains(raw, []byte("ead-only")) || bytes.Contains(raw, []byte("not permitted")), "%s", raw)
				after, _ := d.content()
				sameBytes(t, want, after)

				ctx := testkit.Context(t)
				c, err := client.Dial(ctx, uri)
				require.NoError(t, err)
				defer c.Close()
				require.True(t, c.Info().ReadOnly() && c.Info().MultiConn() && !c.Info().CanFUA() && !c.Info().CanTrim() && !c.Info().CanZero())
				_, err = client.Dial(ctx, uri, client.ContextAllocation)
				if name == "plain" {
					require.ErrorIs(t, err, client.ErrNoContext)
				}
			})
		}
	}
}

// Whoever writes all the same is refused, request by request, and can go on reading.
func TestReadOnlyRefusesWrites(t *testing.T) {
	d := newSparseDisk(mib)
	d.fill(t, 1)
	want, _ := d.content()
	p := serveDisks(t, anyDisks{"d": &mappedDisk{frozenDisk{d: d}}}).peer(t)
	p.begin("d", false)
	for _, kind := range []uint16{wire.CmdWrite, wire.CmdTrim, wire.CmdWriteZeroes} {
		p.send(wireRequest(kind, 0, 1, 0, 4096))
		if kind == wire.CmdWrite {
			p.send(make([]byte, 4096))
		}
		_, errno := p.simpleAnswer()
		require.EqualValues(t, wire.EPERM, errno)
	}
	p.send(wireRequest(wire.CmdFlush, 0, 2, 0, 0))
	_, errno := p.simpleAnswer()
	require.Zero(t, errno)
	p.send(wireRequest(wire.CmdRead, 0, 3, 0, 4096))
	_, errno = p.simpleAnswer()
	require.Zero(t, errno)
	sameBytes(t, want[:4096], p.take(4096))
	after, _ := d.content()
	sameBytes(t, want, after)
}

// What is read for a client that is gone ends; a disk that is going away is told as such.
func TestReadsEndWithTheirClient(t *testing.T) {
	var waiting, ended atomic.Int32
	f := &frozenDisk{d: newSparseDisk(mib), hold: func(ctx context.Context) error {
		waiting.Add(1)
		<-ctx.Done()
		ended.Add(1)
		return ctx.Err()
	}}
	g := &frozenDisk{d: newSparseDisk(mib), hold: func(context.Context) error { return fmt.Errorf("closed: %w", ErrStopping) }}
	h := serveDisks(t, anyDisks{"f": f, "g": g})
	p := h.peer(t)
	p.begin("f", false)
	for i := range uint64(8) {
		p.send(wireRequest(wire.CmdRead, 0, i, 0, 4096))
	}
	testkit.Eventually(t, 10*time.Second, func() bool { return waiting.Load() == 8 })
	require.NoError(t, p.Close())
	testkit.Eventually(t, 10*time.Second, func() bool { return ended.Load() == 8 })
	q := h.peer(t)
	q.begin("g", false)
	q.send(wireRequest(wire.CmdRead, 0, 1, 0, 4096))
	_, errno := q.simpleAnswer()
	require.EqualValues(t, wire.ESHUTDOWN, errno)
}

// The memory of all connections together is bounded, and everybody gets their turn.
func TestMemoryOfAllConnections(t *testing.T) {
	var now, peak atomic.Int64
	f := &frozenDisk{d: newSparseDisk(MaxRequest), hold: func(context.Context) error {
		n := now.Add(1)
		for old := peak.Load(); n > old && !peak.CompareAndSwap(old, n); old = peak.Load() {
		}
		defer now.Add(-1)
		return nil
	}}
	h := serveWith(t, anyDisks{"f": f}, Options{Memory: MaxRequest})
	var wg sync.WaitGroup
	var failed atomic.Value
	for range 4 {
		wg.Go(func() {
			c, err := client.Dial(testkit.Context(t), h.uris("f")["tcp"])
			if err == nil {
				buf := make([]byte, 24<<20)
				for range 3 {
					err = errors.Join(err, c.ReadAt(testkit.Context(t), buf, 0))
				}
				err = errors.Join(err, c.Close())
			}
			if err != nil {
				failed.Store(err)
			}
		})
	}
	wg.Wait()
	require.Nil(t, failed.Load())
	require.EqualValues(t, 1, peak.Load())
}

// anyDisks exports disks of any kind.
type anyDisks map[string]Disk

func (s anyDisks) Exports() (names []string) {
	for name := range s {
		names = append(names, name)
	}
	return names
}

func (s anyDisks) Open(name string) (Disk, error) {
	if d, ok := s[name]; ok {
		return d, nil
	}
	return nil, os.ErrNotExist
}
