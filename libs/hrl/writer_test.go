package hrl

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

var (
	testID  = uuid.MustParse("0f0e0d0c-0b0a-4908-8706-050403020100")
	testNow = time.Date(2026, 10, 2, 12, 0, 0, 0, time.UTC)
)

// memFile is a file in memory on a volume of limited size. It counts what was asked of it and fails on request.
type memFile struct {
	data     []byte
	limit    int64 // of the volume, in bytes; 0: none
	reserves bool  // the file system can allocate
	reserved int64
	writes   int
	synced   int // length at the last sync
	syncErr  error
	closed   bool
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if f.closed {
		return 0, os.ErrClosed
	}
	f.writes++
	end := off + int64(len(p))
	n := len(p)
	if f.limit > 0 && end > max(f.limit, f.reserved) {
		n = int(max(0, f.limit-off)) // as a real volume does, write what fits
	}
	if need := off + int64(n); need > int64(len(f.data)) {
		f.data = append(f.data, make([]byte, need-int64(len(f.data)))...)
	}
	copy(f.data[off:], p[:n])
	if n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func (f *memFile) Truncate(n int64) error { f.data = f.data[:n]; return nil }
func (f *memFile) Sync() error            { return f.datasync() }
func (f *memFile) datasync() error        { f.synced = len(f.data); return f.syncErr }
func (f *memFile) syncDir() error         { return nil }
func (f *memFile) Close() error           { f.closed = true; return nil }

func (f *memFile) allocate(off, n int64) error {
	switch {
	case !f.reserves:
		return errors.ErrUnsupported
	case f.limit > 0 && off+n > f.limit:
		return syscall.ENOSPC
	}
	f.reserved = off + n
	return nil
}

type logged struct {
	off  uint64
	data []byte
	pos  int64
}

// readAll returns everything the log yields, with data, and fails on any error.
func readAll(t require.TestingT, raw []byte) (*Reader, []logged) {
	r, err := Open(bytes.NewReader(raw), int64(len(raw)))
	require.NoError(t, err)
	out := []logged{}
	for e, err := range r.Entries(context.Background()) {
		require.NoError(t, err)
		p := make([]byte, e.DataLength)
		require.NoError(t, r.ReadData(e, p))
		out = append(out, logged{e.ByteOffset, p, e.FilePosition})
	}
	return r, out
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := &memFile{reserves: rapid.Bool().Draw(t, "reserves")}
		w, err := newWriter(f, Options{UniqueID: testID, MetadataSize: 512 * rapid.IntRange(1, 3).Draw(t, "meta"),
			Now: func() time.Time { return testNow }})
		require.NoError(t, err)
		want := []logged{}
		flushed := 0
		for range rapid.IntRange(0, 60).Draw(t, "appends") {
			off := rapid.Uint64Range(0, 1<<40).Draw(t, "off")
			p := rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "data")
			pos, err := w.Append(off, p)
			require.NoError(t, err)
			want = append(want, logged{off, p, pos})
			if rapid.IntRange(0, 9).Draw(t, "flush") == 0 {
				require.NoError(t, w.Flush())
				flushed = len(want)
				require.Equal(t, len(f.data), f.synced)
			}
		}
		require.EqualValues(t, len(want), w.Entries())

		// Killed here: everything flushed is there, and what is there is a prefix.
		r, got := readAll(t, f.data)
		require.False(t, r.Closed())
		require.GreaterOrEqual(t, len(got), flushed)
		require.Equal(t, want[:len(got)], got)
		require.EqualValues(t, len(f.data), r.Tail().Position+r.Tail().Unproven)

		// Killed, and the file cut anywhere.
		cut := rapid.IntRange(HeaderSize, len(f.data)).Draw(t, "cut")
		_, got = readAll(t, f.data[:cut])
		require.Equal(t, want[:len(got)], got)

		require.NoError(t, w.Close())
		r, got = readAll(t, f.data)
		require.True(t, r.Closed())
		require.Len(t, got, len(want))
		require.Equal(t, want[:len(got)], got)
		require.Len(t, f.data, int(r.Header().CurrentSize))
		require.ErrorIs(t, w.Close(), ErrClosed)
	})
}

// TestTornData models a power failure: a block reached the disk and the data before it did not.
func TestTornData(t *testing.T) {
	f := &memFile{}
	w, err := newWriter(f, Options{UniqueID: testID})
	require.NoError(t, err)
	var pos []int64
	for i := range 5 {
		p, err := w.Append(uint64(i)*512, bytes.Repeat([]byte{byte(i + 1)}, 512))
		require.NoError(t, err)
		pos = append(pos, p)
	}
	require.NoError(t, w.Flush())
	clear(f.data[pos[3] : pos[3]+512])
	r, got := readAll(t, f.data)
	require.Len(t, got, 3)
	require.Equal(t, pos[3], r.Tail().Position)
	require.Contains(t, r.Tail().Reason, "checksum")
}

func TestFullVolume(t *testing.T) {
	for _, reserves := range []bool{true, false} {
		f := &memFile{reserves: reserves, limit: 64 << 10}
		w, err := newWriter(f, Options{UniqueID: testID})
		require.NoError(t, err)
		data := bytes.Repeat([]byte{7}, 3000)
		n := 0
		for {
			_, err = w.Append(uint64(n)*4096, data)
			if err != nil {
				break
			}
			n++
		}
		require.ErrorIs(t, err, ErrFull)
		require.ErrorIs(t, err, syscall.ENOSPC)
		require.Positive(t, n)
		if !reserves {
			f.limit += DefaultMetadataSize // without reserving, space must come back before the block fits
		}
		require.NoError(t, w.Flush(), "reserves=%t", reserves)
		_, got := readAll(t, f.data)
		require.Len(t, got, n)

		_, err = w.Append(0, data)
		require.ErrorIs(t, err, ErrFull)
		f.limit += 1 << 20 // somebody made room
		_, err = w.Append(0, data)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		r, got := readAll(t, f.data)
		require.Len(t, got, n+1)
		require.True(t, r.Closed())
	}
}

func TestFullVolumeAtCreate(t *testing.T) {
	_, err := newWriter(&memFile{limit: 5000}, Options{UniqueID: testID})
	require.ErrorIs(t, err, ErrFull)
}

// TestBlockRetried fills the volume exactly when the block of a full set of entries is due.
func TestBlockRetried(t *testing.T) {
	f := &memFile{limit: HeaderSize + 512 + 15*10}
	w, err := newWriter(f, Options{UniqueID: testID, MetadataSize: 512})
	require.NoError(t, err)
	for i := range 15 {
		_, err := w.Append(uint64(i), bytes.Repeat([]byte{1}, 10))
		require.NoError(t, err)
	}
	_, err = w.Append(99, []byte{1})
	require.ErrorIs(t, err, ErrFull)
	f.limit = 0
	_, err = w.Append(99, []byte{1})
	require.NoError(t, err)
	require.NoError(t, w.Close())
	_, got := readAll(t, f.data)
	require.Len(t, got, 16)
}

func TestFailedSyncIsFinal(t *testing.T) {
	f := &memFile{syncErr: syscall.EIO}
	w, err := newWriter(f, Options{UniqueID: testID})
	require.NoError(t, err)
	_, err = w.Append(0, []byte{1})
	require.NoError(t, err)
	require.ErrorIs(t, w.Flush(), syscall.EIO)
	f.syncErr = nil
	_, err = w.Append(0, []byte{1})
	require.ErrorIs(t, err, syscall.EIO)
	require.ErrorIs(t, w.Close(), syscall.EIO)
	require.True(t, f.closed)
	r, _ := readAll(t, f.data)
	require.False(t, r.Closed(), "never sealed")
}

func TestCreateOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.hrl")
	_, err := Create(path, Options{})
	require.Error(t, err)
	require.NoFileExists(t, path)
	_, err = Create(path, Options{UniqueID: testID, MetadataSize: 100})
	require.Error(t, err)
	require.NoFileExists(t, path)

	w, err := Create(path, Options{UniqueID: testID})
	require.NoError(t, err)
	require.Equal(t, testID, w.UniqueID())
	_, err = Create(path, Options{UniqueID: testID})
	require.ErrorIs(t, err, os.ErrExist)
	for _, p := range [][]byte{nil, make([]byte, MaxEntry+1)} {
		_, err = w.Append(0, p)
		require.ErrorIs(t, err, ErrTooLarge)
	}
	_, err = w.Append(5, make([]byte, MaxEntry))
	require.NoError(t, err)
	require.NoError(t, w.Flush())
	require.EqualValues(t, MaxEntry, w.DataBytes())
	require.NoError(t, w.Abort())
	require.NoError(t, w.Abort())
	_, err = w.Append(0, []byte{1})
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, w.Flush(), ErrClosed)
	require.ErrorIs(t, w.Close(), ErrClosed)

	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Len(t, raw, 3*4096+MaxEntry)
	r, got := readAll(t, raw)
	require.False(t, r.Closed())
	require.Len(t, got, 1)
}

func TestConcurrentAppends(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.hrl")
	w, err := Create(path, Options{UniqueID: testID})
	require.NoError(t, err)
	const writers, each = 8, 200
	var mu sync.Mutex
	at := map[int64]uint64{}
	var wg sync.WaitGroup
	for g := range writers {
		wg.Go(func() {
			for i := range each {
				off := uint64(g*each + i)
				pos, err := w.Append(off, bytes.Repeat([]byte{byte(off)}, 100+g))
				if err == nil && i%50 == 0 {
					err = w.Flush()
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				at[pos] = off
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	require.NoError(t, w.Close())
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	_, got := readAll(t, raw)
	require.Len(t, got, writers*each)
	for _, e := range got {
		require.Equal(t, at[e.pos], e.off)
		require.Equal(t, byte(e.off), e.data[0])
	}
}

func TestAppendDoesNotAllocate(t *testing.T) {
	w, err := Create(filepath.Join(t.TempDir(), "a.hrl"), Options{UniqueID: testID})
	require.NoError(t, err)
	p := make([]byte, 4096)
	require.Zero(t, testing.AllocsPerRun(500, func() { _, _ = w.Append(0, p) }))
	require.NoError(t, w.Abort())
}

func TestAppendIsOneWrite(t *testing.T) {
	f := &memFile{reserves: true}
	w, err := newWriter(f, Options{UniqueID: testID})
	require.NoError(t, err)
	for range 127 * 4 {
		_, err := w.Append(0, []byte{1})
		require.NoError(t, err)
	}
	require.Equal(t, 1+127*4+4, f.writes) // header, data, blocks
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10} {
		b.Run(map[int]string{4 << 10: "4KiB", 64 << 10: "64KiB"}[size], func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "a.hrl")
			w, err := Create(path, Options{UniqueID: testID})
			require.NoError(b, err)
			p := bytes.Repeat([]byte{0x5a}, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if w.Position() > 256<<20 { // keep the benchmark off the disk
					b.StopTimer()
					require.NoError(b, w.Abort())
					require.NoError(b, os.Remove(path))
					w, err = Create(path, Options{UniqueID: testID})
					require.NoError(b, err)
					b.StartTimer()
				}
				if _, err := w.Append(0, p); err != nil {
					b.Fatal(err)
				}
			}
			require.NoError(b, w.Abort())
		})
	}
}

func BenchmarkChecksum(b *testing.B) {
	p := bytes.Repeat([]byte{0x5a}, 64<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		_ = Checksum(p)
	}
}
