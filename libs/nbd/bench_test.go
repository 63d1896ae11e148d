package nbd

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// BenchmarkStream reads 512 MiB of data from QEMU, beside nbdcopy with one connection and with four.
func BenchmarkStream(b *testing.B) {
	const size = 512 * mib
	path := filepath.Join(b.TempDir(), "d.raw")
	f, err := os.Create(path)
	require.NoError(b, err)
	p := make([]byte, mib)
	for off := int64(0); off < size; off += mib {
		testkit.Fill(p, uint64(off))
		_, err := f.WriteAt(p, off)
		require.NoError(b, err)
	}
	require.NoError(b, f.Close())
	socket := serve(b, "qemu-nbd", func(s string) []string {
		return []string{"-k", s, "-f", "raw", "-r", "-t", "-e", "8", path}
	})
	uri := unixURI(socket, "")
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		c := dial(b, uri)
		for b.Loop() {
			n := int64(0)
			require.NoError(b, c.Stream(testkit.Context(b), oneRun(all(c)), func(at extent.Range, data []byte) error {
				n += int64(len(data))
				return nil
			}))
			require.Equal(b, int64(size), n)
		}
	})
	for name, args := range map[string][]string{"nbdcopy-1": {"--connections=1"}, "nbdcopy-4": {"--connections=4"}} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				run(b, "nbdcopy", append(args, uri, "null:")...)
			}
		})
	}
}

// BenchmarkExtents walks a bitmap of many extents, as QEMU's replies have them.
func BenchmarkExtents(b *testing.B) {
	const n = 64 << 10
	var pairs []uint32
	for i := range n {
		pairs = append(pairs, 64, uint32(i%2))
	}
	body := extentsOf(3, pairs...)
	b.SetBytes(n)
	uri := scripted(b, func(s *server) {
		s.shake(withDirty(3))
		for {
			r, ok := s.request()
			if !ok || !s.send(chunkOf(wire.ChunkDone, wire.ChunkBlockStatus, r.cookie, body)) {
				return
			}
		}
	})
	c := dial(b, uri, dirtyName)
	for b.Loop() {
		list, err := c.BlockStatus(testkit.Context(b), dirtyName, all(c))
		require.NoError(b, err)
		require.Len(b, list, n)
	}
}
