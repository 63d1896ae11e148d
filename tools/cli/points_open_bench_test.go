package cli_test

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	nbdclient "github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

const benchDisk = 256 << 20

// benchChain is a disk of random bytes, all in the journal, or all in a checkpoint of the replica's disk.
func benchChain(b *testing.B, applied bool) *chain {
	c := newChain(b, map[string][]byte{"os": random(benchDisk, 1)})
	if applied {
		store, err := dir.Open(c.dir, dir.Options{})
		require.NoError(b, err)
		defer store.Close()
		r, err := replica.Open(b.Context(), store, pointLineage)
		require.NoError(b, err)
		a, err := replica.NewApplier(r, replica.ApplierOptions{Footer: func(_ string, size int64) []byte {
			f, err := vdisk.NewFooter(size, uuid.Nil, time.Unix(1e9, 0))
			require.NoError(b, err)
			raw := f.Bytes()
			return raw[:]
		}})
		require.NoError(b, err)
		p, err := a.Advance(b.Context(), 0)
		require.NoError(b, err)
		_, err = r.Checkpoint(b.Context(), p.Applied)
		require.NoError(b, err)
	}
	return c
}

// BenchmarkOpenPoint reads a point by NBD through the command, its cache, the API with mTLS and storage in a folder.
func BenchmarkOpenPoint(b *testing.B) {
	for _, where := range []string{"journal", "checkpoint"} {
		c := benchChain(b, where == "checkpoint")
		s := newSite(b, c)
		b.Setenv("LANDFALL_STATE", s.state)
		for _, how := range []string{"api", "storage"} {
			args := []string{"--point", "2"}
			if how == "storage" {
				args = append(args, "--from-storage", c.dir)
			}
			b.Run(where+"/"+how+"/sequential", func(b *testing.B) {
				b.SetBytes(benchDisk)
				for b.Loop() {
					o := openPoint(b, args...)
					sh(b, "nbdcopy", "--connections=4", o.uris["os"], "null:")
					o.stop()
				}
			})
			b.Run(where+"/"+how+"/one-by-one", func(b *testing.B) {
				const part = 64 << 20
				b.SetBytes(part)
				for b.Loop() {
					o := openPoint(b, args...)
					n, err := nbdclient.Dial(b.Context(), o.uris["os"])
					require.NoError(b, err)
					buf := make([]byte, 64<<10)
					for off := int64(0); off < part; off += int64(len(buf)) {
						require.NoError(b, n.ReadAt(b.Context(), buf, off))
					}
					require.NoError(b, n.Close())
					o.stop()
				}
			})
			b.Run(where+"/"+how+"/random-4k", func(b *testing.B) {
				o := openPoint(b, args...)
				defer o.stop()
				var wg sync.WaitGroup
				work := make(chan int64)
				for range 8 {
					wg.Go(func() {
						n, err := nbdclient.Dial(b.Context(), o.uris["os"])
						if err != nil {
							b.Error(err)
							return
						}
						defer n.Close()
						buf := make([]byte, 4096)
						for off := range work {
							if err := n.ReadAt(b.Context(), buf, off); err != nil {
								b.Error(err)
							}
						}
					})
				}
				rng := rand.New(rand.NewPCG(1, 2))
				b.ResetTimer()
				for range b.N {
					work <- int64(rng.IntN(benchDisk/4096)) * 4096
				}
				close(work)
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
			})
		}
	}
}
