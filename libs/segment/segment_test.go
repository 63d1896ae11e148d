package segment_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/segment"
)

func header(size int64) segment.Header {
	return segment.Header{Lineage: [16]byte{1, 2, 3, 15: 9}, DiskID: "disk-0", Gen: 1, DiskSize: size, Kind: segment.KindPoint, Ordinal: 7}
}

// image reads a whole disk through the reader; have says which bytes the segment speaks of.
func image(t require.TestingT, body []byte, size int64) (disk []byte, have []bool) {
	r, err := segment.Open(bytes.NewReader(body), int64(len(body)))
	require.NoError(t, err)
	disk, have = make([]byte, size), make([]bool, size/segment.Sector)
	last := int64(0)
	err = r.Range(0, size, func(off, n int64, data []byte) error {
		require.GreaterOrEqual(t, off, last, "ascending")
		require.True(t, data == nil || int64(len(data)) == n)
		copy(disk[off:off+n], data)
		for s := off / segment.Sector; s < (off+n)/segment.Sector; s++ {
			have[s] = true
		}
		last = off + n
		return nil
	})
	require.NoError(t, err)
	return disk, have
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 2 << 20
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		comp := segment.Compression(rapid.IntRange(0, 2).Draw(t, "compression"))
		buf := make([]byte, 0, rapid.IntRange(0, 1<<20).Draw(t, "cap"))
		w, err := segment.NewWriter(header(size), buf, segment.Options{Compression: comp})
		require.NoError(t, err)
		want, wantHave := make([]byte, size), make([]bool, size/segment.Sector)
		var at, zero, data int64
		for range rapid.IntRange(1, 40).Draw(t, "extents") {
			off := at + int64(rng.IntN(40))*segment.Sector*int64(rng.IntN(2))
			n := int64(1+rng.IntN(200)) * segment.Sector
			if off+n > size {
				break
			}
			for s := off / segment.Sector; s < (off+n)/segment.Sector; s++ {
				wantHave[s] = true
			}
			if rng.IntN(4) == 0 {
				require.NoError(t, w.Zero(off, n))
			} else {
				p := want[off : off+n]
				switch rng.IntN(3) {
				case 0: // random with zero blocks
					for i := range p {
						if (i/4096)%3 != 0 {
							p[i] = byte(rng.Uint32())
						}
					}
				case 1: // text
					for i := range p {
						p[i] = "abcd efgh"[rng.IntN(9)]
					}
				}
				require.NoError(t, w.Data(off, p))
			}
			at = off + n
		}
		if w.Empty() {
			t.Skip("nothing")
		}
		body, sha, st, err := w.Finish()
		require.NoError(t, err)
		require.Equal(t, sha256.Sum256(body), sha)
		got, have := image(t, body, size)
		require.True(t, bytes.Equal(want, got))
		require.Equal(t, wantHave, have)

		r, err := segment.Open(bytes.NewReader(body), int64(len(body)))
		require.NoError(t, err)
		require.Equal(t, header(size), r.Header)
		for _, e := range r.Extents {
			if e.Zero {
				zero += e.Len
			} else {
				data += e.Len
			}
		}
		require.Equal(t, [3]int64{data, zero, int64(len(body))}, [3]int64{st.Data, st.Zero, st.Stored})
		require.Len(t, r.Extents, st.Extents)
		// A sub-range reads the same.
		lo := int64(rng.IntN(size/segment.Sector)) * segment.Sector
		n := int64(rng.IntN(int((size-lo)/segment.Sector)+1)) * segment.Sector
		require.NoError(t, r.Range(lo, n, func(off, n int64, data []byte) error {
			require.GreaterOrEqual(t, off, lo)
			if data == nil {
				data = make([]byte, n)
			}
			require.True(t, bytes.Equal(want[off:off+n], data))
			return nil
		}))
	})
}

func TestZeroRuns(t *testing.T) {
	const size = 1 << 20
	p := bytes.Repeat([]byte{1}, 256<<10)
	clear(p[16<<10 : 24<<10])   // a short gap stays data
	clear(p[64<<10 : 128<<10])  // a long one becomes zeros
	clear(p[252<<10 : 256<<10]) // an end has no data after it
	w, err := segment.NewWriter(header(size), nil, segment.Options{})
	require.NoError(t, err)
	require.NoError(t, w.Data(4<<10, p[:100<<10]))
	require.NoError(t, w.Data(104<<10, p[100<<10:])) // a split in a run of zeros does not matter
	require.NoError(t, w.Zero(260<<10, 8<<10))
	require.NoError(t, w.Zero(512<<10, 512<<10))
	body, _, st, err := w.Finish()
	require.NoError(t, err)
	r, err := segment.Open(bytes.NewReader(body), int64(len(body)))
	require.NoError(t, err)
	type ext struct {
		off, n int64
		zero   bool
	}
	var got []ext
	for _, e := range r.Extents {
		got = append(got, ext{e.Off >> 10, e.Len >> 10, e.Zero})
	}
	require.Equal(t, []ext{{4, 64, false}, {68, 64, true}, {132, 124, false}, {256, 12, true}, {512, 512, true}}, got)
	require.Equal(t, int64(512+64+12)<<10, st.Zero)
	require.Less(t, st.Stored, int64(16<<10), "repeated bytes compress")
}

func TestFull(t *testing.T) {
	const size = 1 << 40
	rng := rand.NewChaCha8([32]byte{})
	t.Run("bytes", func(t *testing.T) {
		w, err := segment.NewWriter(header(size), nil, segment.Options{Target: 8 << 20})
		require.NoError(t, err)
		p := make([]byte, segment.MaxData)
		_, _ = rng.Read(p)
		n := 0
		for ; !w.Full(); n++ {
			require.NoError(t, w.Data(int64(n)*segment.MaxData, p))
		}
		require.Equal(t, 2, n)
		body, _, st, err := w.Finish()
		require.NoError(t, err)
		require.Equal(t, st.Stored, int64(len(body)))
		require.Less(t, float64(st.Stored)/float64(st.Data), 1.001, "random data grows by the index only")
	})
	t.Run("extents", func(t *testing.T) {
		w, err := segment.NewWriter(header(size), nil, segment.Options{})
		require.NoError(t, err)
		// The worst case: every other block is zero, beyond what merging joins.
		p := make([]byte, segment.MaxData)
		for i := 0; i < len(p); i += 64 << 10 {
			_, _ = rng.Read(p[i : i+4096])
		}
		for off := int64(0); !w.Full(); off += 2 * segment.MaxData {
			require.NoError(t, w.Data(off, p))
		}
		body, _, st, err := w.Finish()
		require.NoError(t, err)
		require.LessOrEqual(t, st.Extents, segment.MaxExtents)
		_, err = segment.Open(bytes.NewReader(body), int64(len(body)))
		require.NoError(t, err)
	})
	t.Run("sectors", func(t *testing.T) {
		w, err := segment.NewWriter(header(size), nil, segment.Options{})
		require.NoError(t, err)
		p := make([]byte, 512)
		_, _ = rng.Read(p)
		for off := int64(0); !w.Full(); off += 1024 {
			require.NoError(t, w.Data(off, p))
		}
		body, _, _, err := w.Finish()
		require.NoError(t, err)
		ix, err := segment.ReadIndex(bytes.NewReader(body), int64(len(body)))
		require.NoError(t, err)
		require.Less(t, ix.MemoryBytes(), int64(5<<20))
	})
}

func TestRefusals(t *testing.T) {
	w, err := segment.NewWriter(header(1<<20), nil, segment.Options{})
	require.NoError(t, err)
	require.NoError(t, w.Data(4096, make([]byte, 4096)))
	for _, err := range []error{
		w.Data(4096, make([]byte, 512)), w.Data(8191, make([]byte, 512)), w.Data(8192, make([]byte, 100)),
		w.Zero(0, 512), w.Zero(1<<20, 512), w.Zero(8192, -512), w.Data(8192, make([]byte, segment.MaxData+512)),
	} {
		require.ErrorIs(t, err, segment.ErrInvalid)
	}
	_, _, _, err = w.Finish()
	require.NoError(t, err)
	require.ErrorIs(t, w.Zero(8192, 512), segment.ErrInvalid)
	_, err = segment.NewWriter(segment.Header{}, nil, segment.Options{})
	require.ErrorIs(t, err, segment.ErrInvalid)
	w, err = segment.NewWriter(header(1<<20), nil, segment.Options{})
	require.NoError(t, err)
	_, _, _, err = w.Finish()
	require.ErrorIs(t, err, segment.ErrInvalid, "an empty segment is not one")
}

func sample(t testing.TB, comp segment.Compression) []byte {
	w, err := segment.NewWriter(header(1<<20), nil, segment.Options{Compression: comp})
	require.NoError(t, err)
	p := bytes.Repeat([]byte("landfall"), 512)
	require.NoError(t, w.Data(8192, p))
	require.NoError(t, w.Zero(65536, 131072))
	require.NoError(t, w.Data(512<<10, p[:512]))
	body, _, _, err := w.Finish()
	require.NoError(t, err)
	return body
}

// TestGolden pins the stored bytes: a change of the format needs a new version.
func TestGolden(t *testing.T) {
	body := sample(t, segment.None)
	file := filepath.Join("testdata", "small.seg.hex")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(file, []byte(hex.Dump(body)), 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), hex.Dump(body))
}

// TestDamage flips every byte of a small segment: it is noticed, or it is in no byte that matters (there is none).
func TestDamage(t *testing.T) {
	for _, comp := range []segment.Compression{segment.Fast, segment.Small, segment.None} {
		good := sample(t, comp)
		want, _ := image(t, good, 1<<20)
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 0x40
			got, err := readAll(bad, 1<<20)
			if i < 192 {
				// The copy of the header at the front is for people and recovery tools; readers use the index.
				require.NoError(t, err)
				continue
			}
			if err != nil {
				require.ErrorIs(t, err, segment.ErrCorrupt, "byte %d", i)
				continue
			}
			require.True(t, bytes.Equal(want, got), "byte %d changed data unnoticed", i)
		}
		for n := range len(good) {
			_, err := readAll(good[:n], 1<<20)
			require.ErrorIs(t, err, segment.ErrCorrupt)
		}
	}
}

func readAll(body []byte, size int64) ([]byte, error) {
	r, err := segment.Open(bytes.NewReader(body), int64(len(body)))
	if err != nil {
		return nil, err
	}
	disk := make([]byte, size)
	return disk, r.Range(0, size, func(off, n int64, data []byte) error {
		if data == nil {
			return nil
		}
		copy(disk[off:off+n], data)
		return nil
	})
}

func FuzzOpen(f *testing.F) {
	for _, comp := range []segment.Compression{segment.Fast, segment.Small, segment.None} {
		f.Add(sample(f, comp))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := segment.Open(bytes.NewReader(body), int64(len(body)))
		if err != nil {
			require.ErrorIs(t, err, segment.ErrCorrupt)
			return
		}
		end := int64(0)
		for _, e := range r.Extents {
			require.True(t, e.Off >= end && e.Len > 0 && e.End() <= r.Header.DiskSize, "extents ascend inside the disk")
			end = e.End()
		}
		err = r.Range(0, r.Header.DiskSize, func(off, n int64, data []byte) error { return nil })
		if err != nil {
			require.ErrorIs(t, err, segment.ErrCorrupt)
		}
	})
}

type failing struct{}

var errBroken = errors.New("broken")

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

func TestReadErrorIsNotCorruption(t *testing.T) {
	_, err := segment.Open(failing{}, 4096)
	require.ErrorIs(t, err, errBroken)
	require.NotErrorIs(t, err, segment.ErrCorrupt)
	_, err = segment.Open(io.NewSectionReader(bytes.NewReader(nil), 0, 0), 4096)
	require.ErrorIs(t, err, segment.ErrCorrupt)
}

func BenchmarkWriter(b *testing.B) {
	rng := rand.NewChaCha8([32]byte{})
	random := make([]byte, 1<<20)
	_, _ = rng.Read(random)
	text := make([]byte, 1<<20)
	for i := range text {
		text[i] = "the quick brown fox "[(i*7+i/97)%20]
	}
	for name, p := range map[string][]byte{"random": random, "text": text, "zero": make([]byte, 1<<20)} {
		for _, comp := range []segment.Compression{segment.Fast, segment.Small} {
			b.Run(fmt.Sprintf("%s-%d", name, comp), func(b *testing.B) {
				buf := make([]byte, 0, 40<<20)
				b.SetBytes(16 << 20)
				b.ReportAllocs()
				for range b.N {
					w, err := segment.NewWriter(header(1<<30), buf, segment.Options{Compression: comp})
					require.NoError(b, err)
					for i := range int64(16) {
						require.NoError(b, w.Data(i<<20, p))
					}
					_, _, _, err = w.Finish()
					require.NoError(b, err)
				}
			})
		}
	}
}

// benchData is n bytes of one kind.
func benchData(kind string, n int) []byte {
	p := make([]byte, n)
	rng := rand.New(rand.NewPCG(3, 4))
	text := func(p []byte) {
		words := make([][]byte, 4000)
		for i := range words {
			words[i] = make([]byte, 2+rng.IntN(9))
			for j := range words[i] {
				words[i][j] = byte('a' + rng.IntN(26))
			}
		}
		for at := 0; at < len(p); {
			at += copy(p[at:], words[int(float64(len(words))*rng.Float64()*rng.Float64())])
			if at < len(p) {
				p[at] = ' '
				at++
			}
		}
	}
	random := func(p []byte) {
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	}
	switch kind {
	case "random":
		random(p)
	case "text":
		text(p)
	case "base64":
		const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
		for i := range p {
			p[i] = digits[rng.IntN(64)]
		}
	default: // mixed: a half of each, by 64 KiB
		text(p)
		for off := 0; off+(128<<10) <= n; off += 128 << 10 {
			random(p[off : off+(64<<10)])
		}
	}
	return p
}
