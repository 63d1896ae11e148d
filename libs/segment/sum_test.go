package segment_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/segment"
)

// sourceRun is what a host sent: bytes, and the checksum it made of them.
type sourceRun struct {
	off  int64
	data []byte
	sum  uint32
}

func drawRuns(t *rapid.T, size int64) (runs []sourceRun) {
	rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 2))
	for off := int64(0); ; {
		off += segment.Sector * int64(rng.IntN(3)*rng.IntN(60))
		n := segment.Sector * int64(1+rng.IntN(300))
		if off+n > size || len(runs) == 12 {
			return runs
		}
		p := make([]byte, n)
		for range rng.IntN(5) { // some zeros stay, short and long
			at := segment.Sector * rng.Int64N(n/segment.Sector)
			for i := at; i < min(n, at+segment.Sector*int64(1+rng.IntN(150))); i++ {
				p[i] = byte(rng.Uint32())
			}
		}
		runs = append(runs, sourceRun{off, p, segment.Sum(p)})
		off += n
	}
}

func write(runs []sourceRun, o segment.Options, size int64) (body []byte, stats segment.Stats, err error) {
	w, err := segment.NewWriter(header(size), nil, o)
	if err != nil {
		return nil, stats, err
	}
	for i, r := range runs {
		if i%7 == 3 { // some come without one
			err = w.Data(r.off, r.data)
		} else {
			err = w.Checked(r.off, r.data, r.sum)
		}
		if err != nil {
			return nil, stats, err
		}
	}
	body, _, stats, err = w.Finish()
	return body, stats, err
}

// However runs are cut into frames and zeros are taken out, the source's checksums hold for what was packed, and what is
// packed is the same as without them. Any flipped bit between the source's checksum and the frame is found.
func TestSourceChecksumsHold(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 2 << 20
		runs := drawRuns(t, size)
		if len(runs) == 0 {
			return
		}
		o := segment.Options{Compression: segment.Compression(rapid.IntRange(0, 2).Draw(t, "compression")), SkipZeros: rapid.Bool().Draw(t, "skip")}
		body, stats, err := write(runs, o, size)
		if o.SkipZeros && stats.Data == 0 {
			return // nothing but zeros
		}
		require.NoError(t, err)
		disk, _ := image(t, body, size)
		whole := int64(0)
		for _, r := range runs {
			require.True(t, bytes.Equal(r.data, disk[r.off:r.off+int64(len(r.data))]))
			whole += int64(len(r.data))
		}
		if o.SkipZeros {
			require.Zero(t, stats.Zero)
		} else {
			require.Equal(t, whole, stats.Data+stats.Zero)
		}
		require.LessOrEqual(t, stats.Incompressible, stats.Data)

		victim := rapid.IntRange(0, len(runs)-1).Draw(t, "victim")
		if victim%7 == 3 {
			return
		}
		at := rapid.IntRange(0, len(runs[victim].data)-1).Draw(t, "byte")
		runs[victim].data[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		_, _, err = write(runs, o, size)
		require.ErrorIs(t, err, segment.ErrDamaged)
	})
}

func TestZerosLeftOut(t *testing.T) {
	const size = 1 << 20
	w, err := segment.NewWriter(header(size), nil, segment.Options{SkipZeros: true})
	require.NoError(t, err)
	require.NoError(t, w.Zero(0, 4096))
	require.NoError(t, w.Checked(4096, make([]byte, 8192), segment.Sum(make([]byte, 8192))))
	require.True(t, w.Empty())
	text := bytes.Repeat([]byte("landfall"), 512)
	require.NoError(t, w.Data(64<<10, text))
	require.NoError(t, w.Zero(68<<10, 8192)) // short, between data: stays
	require.NoError(t, w.Data(76<<10, text))
	require.NoError(t, w.Zero(80<<10, 128<<10)) // long: left out
	require.NoError(t, w.Data(512<<10, text))
	_, _, stats, err := w.Finish()
	require.NoError(t, err)
	require.Equal(t, []int64{2, 3*4096 + 8192, 0, 8192, 0}, []int64{int64(stats.Extents), stats.Data, stats.Zero, stats.Gaps, stats.Incompressible})
}

// What is said about churn does not depend on the codec.
func TestIncompressible(t *testing.T) {
	for kind, share := range map[string]float64{"random": 1, "text": 0, "mixed": 0.5, "base64": 0} {
		p := benchData(kind, 512<<10)
		for _, comp := range []segment.Compression{segment.Fast, segment.Small, segment.None} {
			w, err := segment.NewWriter(header(int64(len(p))), nil, segment.Options{Compression: comp})
			require.NoError(t, err)
			require.NoError(t, w.Data(0, p))
			body, _, stats, err := w.Finish()
			require.NoError(t, err)
			require.InDelta(t, share*float64(len(p)), stats.Incompressible, 0, "%s %s", kind, comp)
			if kind == "base64" && comp == segment.Small {
				require.Less(t, len(body), len(p)*4/5, "zstd makes use of the frequency of bytes")
			}
		}
	}
}

// BenchmarkProbe shows what the probe saves: the same frames with and without it.
func BenchmarkProbe(b *testing.B) {
	for _, kind := range []string{"random", "mixed", "text"} {
		p := benchData(kind, 8<<20)
		for _, comp := range []segment.Compression{segment.Fast, segment.Small} {
			for _, always := range []bool{false, true} {
				b.Run(fmt.Sprintf("%s/%s/always=%t", kind, comp, always), func(b *testing.B) {
					buf := make([]byte, 0, 20<<20)
					b.SetBytes(int64(len(p)))
					stored := 0
					for b.Loop() {
						w, err := segment.NewWriter(header(int64(len(p))), buf, segment.Options{Compression: comp})
						require.NoError(b, err)
						if always {
							segment.ProbeNothing(w)
						}
						for off := 0; off < len(p); off += 1 << 20 {
							require.NoError(b, w.Data(int64(off), p[off:off+1<<20]))
						}
						body, _, _, err := w.Finish()
						require.NoError(b, err)
						stored = len(body)
					}
					b.ReportMetric(float64(stored)/float64(len(p)), "out/in")
				})
			}
		}
	}
}
