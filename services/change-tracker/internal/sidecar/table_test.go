package sidecar

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
)

// memFile counts its syncs and can fail.
type memFile struct {
	mu    sync.Mutex
	b     []byte
	syncs int
	fail  error
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := copy(p, f.b[min(off, int64(len(f.b))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return 0, f.fail
	}
	if grow := off + int64(len(p)) - int64(len(f.b)); grow > 0 {
		f.b = append(f.b, make([]byte, grow)...)
	}
	return copy(f.b[off:], p), nil
}

func (f *memFile) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.syncs++
	return f.fail
}

func (f *memFile) Close() error { return nil }

const size = 2000*ExtentSize + 512 // five sectors

var lineage = [16]byte{1, 2, 3}

func fresh(t testing.TB) (*Table, *memFile) {
	t.Helper()
	f := &memFile{}
	table, err := Create(f, size, lineage)
	require.NoError(t, err)
	require.Len(t, f.b, int(FileSize(size)))
	return table, f
}

func at(ext int) extent.Range { return extent.Range{Off: int64(ext) * ExtentSize, Len: 4096} }

func TestMarksSurviveReopening(t *testing.T) {
	table, f := fresh(t)
	require.NoError(t, table.Heat(at(3)))
	table.Mark(extent.Range{Off: 1990 * ExtentSize, Len: 10*ExtentSize + 512}, Dirty)
	table.Mark(at(600), Pass)
	require.NoError(t, table.Commit())
	again, damaged, err := Open(f, size, lineage)
	require.NoError(t, err)
	require.Zero(t, damaged)
	require.Equal(t, []extent.Range{{Off: 1990 * ExtentSize, Len: 10*ExtentSize + 512}}, again.Ranges(Dirty, extent.Range{Len: size}))
	require.True(t, again.Bits(Hot).Has(3))
	require.Equal(t, []extent.Range{{Off: 600*ExtentSize + 7, Len: 100}}, again.Ranges(Pass, extent.Range{Off: 600*ExtentSize + 7, Len: 100}))
	again.Move(Dirty|Pass, 0)
	require.False(t, again.Any(Dirty))
	require.EqualValues(t, ExtentSize, again.Bytes(Hot))
}

// A damaged sector is dirty throughout, and only it; a damaged header is an error.
func TestDamageIsDirty(t *testing.T) {
	_, f := fresh(t)
	f.b[headerSize+sectorSize+9] ^= 1
	table, damaged, err := Open(f, size, lineage)
	require.NoError(t, err)
	require.Equal(t, 1, damaged)
	require.Equal(t, []extent.Range{{Off: perSector * ExtentSize, Len: perSector * ExtentSize}}, table.Ranges(Dirty, extent.Range{Len: size}))
	require.NoError(t, table.Commit())
	_, damaged, err = Open(f, size, lineage)
	require.NoError(t, err)
	require.Zero(t, damaged, "the damage was repaired")

	for name, spoil := range map[string]func() (*Table, int, error){
		"other lineage": func() (*Table, int, error) { return Open(f, size, [16]byte{}) },
		"other size":    func() (*Table, int, error) { return Open(f, size+512, lineage) },
		"cut short":     func() (*Table, int, error) { return Open(&memFile{b: f.b[:5000]}, size, lineage) },
		"not one":       func() (*Table, int, error) { return Open(&memFile{b: make([]byte, len(f.b))}, size, lineage) },
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := spoil()
			require.ErrorIs(t, err, ErrCorrupt)
		})
	}
}

// Rule 1: what cools an extent is a flush that began after its last write, and nothing less.
func TestCoolingNeedsALaterFlush(t *testing.T) {
	table, _ := fresh(t)
	require.NoError(t, table.Heat(at(3)))
	token := table.FlushBegins()
	table.Done(at(3), 1)
	table.FlushEnds(token)
	require.Zero(t, table.Cool(9), "the flush began before the write was done")
	require.NoError(t, table.Heat(at(3)))
	token = table.FlushBegins()
	table.FlushEnds(token)
	require.Zero(t, table.Cool(9), "a writer holds it")
	table.Done(at(3), 2)
	token = table.FlushBegins()
	require.Zero(t, table.Cool(9), "the flush has not ended")
	table.FlushEnds(token)
	require.Zero(t, table.Cool(1), "log 2 holds it")
	require.Equal(t, 1, table.Cool(2))
	require.False(t, table.Any(Hot))
}

func TestSequentialWritersMarkAhead(t *testing.T) {
	table, f := fresh(t)
	before := f.syncs
	for i := range 170 {
		require.NoError(t, table.Heat(at(i)))
		table.Done(at(i), 1)
	}
	require.LessOrEqual(t, f.syncs-before, 12)
}

// Marks made together share their sync; every mark is in the file when its Heat returns.
func TestGroupCommit(t *testing.T) {
	table, f := fresh(t)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for range 300 {
				r := at(rng.IntN(2000))
				if err := table.Heat(r); err != nil {
					t.Error(err)
				}
				var b [1]byte
				i, _ := Span(r)
				if _, err := f.ReadAt(b[:], headerSize+int64(i/perSector)*sectorSize+int64(i%perSector)); err != nil || Flag(b[0])&Hot == 0 {
					t.Errorf("extent %d is not hot in the file: %v", i, err)
				}
				table.Done(r, 0)
				if rng.IntN(10) == 0 {
					table.FlushEnds(table.FlushBegins())
					table.Cool(0)
				}
			}
		})
	}
	wg.Wait()
}

// After a failed commit the table says so for ever, and goes on counting writers.
func TestFailureSticks(t *testing.T) {
	table, f := fresh(t)
	f.fail = errors.New("broken disk")
	require.ErrorIs(t, table.Heat(at(1)), f.fail)
	table.Done(at(1), 0)
	f.fail = nil
	require.Error(t, table.Heat(at(1)))
	table.Done(at(1), 0)
	require.Error(t, table.Commit())
	require.Error(t, table.Err())
}

func FuzzOpen(f *testing.F) {
	file := &memFile{}
	table, err := Create(file, 3*ExtentSize, lineage)
	if err != nil {
		f.Fatal(err)
	}
	_ = table.Close() // in memory
	f.Add(file.b)
	f.Fuzz(func(t *testing.T, b []byte) {
		table, _, err := Open(&memFile{b: b}, 3*ExtentSize, lineage)
		if err == nil {
			table.Move(Hot|Pass, Dirty)
			if err := table.Commit(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
