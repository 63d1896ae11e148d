package dir

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// BenchmarkWritePages against "pwrite", the same writes into a plain file.
func BenchmarkWritePages(b *testing.B) {
	const size = 64 << 20 // written once before, so that both sides overwrite
	fill := bytes.Repeat([]byte{1}, 4<<20)
	for _, n := range []int{512, 4 << 10, 64 << 10, 4 << 20} {
		data := bytes.Repeat([]byte{7}, n)
		b.Run(fmt.Sprintf("dir/%d", n), func(b *testing.B) {
			s, err := Open(b.TempDir(), Options{})
			require.NoError(b, err)
			defer s.Close()
			ctx := context.Background()
			require.NoError(b, s.CreateContainer(ctx, "bench"))
			c := s.Container("bench")
			_, err = c.CreatePages(ctx, "p", size, nil, blobstore.Conditions{})
			require.NoError(b, err)
			for at := int64(0); at < size; at += int64(len(fill)) {
				_, err := c.WritePages(ctx, "p", at, fill, blobstore.Conditions{})
				require.NoError(b, err)
			}
			seq := int64(0)
			cond := blobstore.Conditions{IfSequence: &seq}
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.WritePages(ctx, "p", rand.Int64N(size/int64(n))*int64(n), data, cond); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("pwrite/%d", n), func(b *testing.B) {
			f, err := os.Create(filepath.Join(b.TempDir(), "p"))
			require.NoError(b, err)
			defer f.Close()
			for at := int64(0); at < size; at += int64(len(fill)) {
				_, err := f.WriteAt(fill, at)
				require.NoError(b, err)
			}
			b.SetBytes(int64(n))
			for b.Loop() {
				if _, err := f.WriteAt(data, rand.Int64N(size/int64(n))*int64(n)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkPut(b *testing.B) {
	for _, n := range []int{512, 1 << 20, 32 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s, err := Open(b.TempDir(), Options{})
			require.NoError(b, err)
			defer s.Close()
			ctx := context.Background()
			require.NoError(b, s.CreateContainer(ctx, "bench"))
			data := bytes.Repeat([]byte{7}, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				name := fmt.Sprintf("seg/%d", i%16)
				if _, err := s.Container("bench").Put(ctx, name, bytes.NewReader(data), int64(n), blobstore.Conditions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSetSequence(b *testing.B) {
	s, err := Open(b.TempDir(), Options{})
	require.NoError(b, err)
	defer s.Close()
	ctx := context.Background()
	require.NoError(b, s.CreateContainer(ctx, "bench"))
	c := s.Container("bench")
	_, err = c.CreatePages(ctx, "p", 1<<30, nil, blobstore.Conditions{})
	require.NoError(b, err)
	for i := int64(0); b.Loop(); i++ {
		if _, err := c.SetSequence(ctx, "p", i, blobstore.Conditions{}); err != nil {
			b.Fatal(err)
		}
	}
}
