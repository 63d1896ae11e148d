package workload

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// memory is a disk in memory.
type memory struct {
	mu   sync.Mutex
	data []byte
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) WriteZeroes(off, length int64) error {
	_, err := m.WriteAt(make([]byte, length), off)
	return err
}
func (m *memory) Flush() error { return nil }
func (m *memory) Close() error { return nil }

func first(disk int, p []byte, off int64) {
	for i := range p {
		p[i] = byte(disk+1) * byte((off+int64(i))>>16)
	}
}

func guest() Guest {
	return Guest{Seed: 7, Disks: []Disk{{ID: "os", Size: 2 << 20}, {ID: "data", Size: 1 << 20}}}
}

func run(t *testing.T, g Guest, from, to uint64, rec *Record, disks []*memory) {
	t.Helper()
	err := g.Run(context.Background(), rec, func(_ context.Context, d int) (Target, error) { return disks[d], nil }, Options{First: from, Limit: to})
	require.NoError(t, err)
}

func newDisks(g Guest) (disks []*memory) {
	for d, k := range g.Disks {
		m := &memory{data: make([]byte, k.Size)}
		first(d, m.data, 0)
		disks = append(disks, m)
	}
	return disks
}

func readers(disks []*memory) (out []io.ReaderAt) {
	for _, d := range disks {
		out = append(out, bytes.NewReader(d.data))
	}
	return out
}

func TestEveryPrefixIsRecognised(t *testing.T) {
	g, ctx := guest(), context.Background()
	disks, rec := newDisks(g), &Record{}
	n, err := g.Verify(ctx, readers(disks), first, 0, 0)
	require.NoError(t, err, "the initial content is the machine after write 0")
	require.Zero(t, n)
	for to := uint64(1); to <= 60; to++ {
		before := time.Now()
		run(t, g, to, to, rec, disks)
		low, high := rec.Bounds(time.Now(), time.Now())
		require.Equal(t, to, low)
		require.GreaterOrEqual(t, high, to)
		_, err := g.Verify(ctx, readers(disks), first, to, to)
		require.NoError(t, err, "after write %d", to)
		low, high = rec.Bounds(before, time.Now())
		require.LessOrEqual(t, low, to)
		require.GreaterOrEqual(t, high, to)
	}
}

func TestWhatIsWrongIsSeen(t *testing.T) {
	g, ctx := guest(), context.Background()
	whole, rec := newDisks(g), &Record{}
	run(t, g, 1, 200, rec, whole)
	older := newDisks(g)
	run(t, g, 1, 150, rec, older)

	_, err := g.Verify(ctx, readers([]*memory{whole[0], older[1]}), first, 0, 1000)
	require.Error(t, err, "disks of two instants")
	_, err = g.Verify(ctx, readers(whole), first, 0, 150)
	require.Error(t, err, "something after the cut")
	_, err = g.Verify(ctx, readers(older), first, 180, 1000)
	require.Error(t, err, "something acknowledged is missing")

	flipped := &memory{data: bytes.Clone(whole[0].data)}
	flipped.data[len(flipped.data)-1] ^= 1
	_, err = g.Verify(ctx, readers([]*memory{flipped, whole[1]}), first, 0, 1000)
	var m *Mismatch
	require.ErrorAs(t, err, &m, "one bit")
	require.Equal(t, "os", m.Disk)
}
