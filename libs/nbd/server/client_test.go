package server

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	client "github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// Our client and our server, which were written from the protocol's text by different hands.
func TestOurClient(t *testing.T) {
	var broken atomic.Bool
	test := func(t *testing.T, d *sparseDisk, uri string) {
		ctx := testkit.Context(t)
		_, err := client.Dial(ctx, uri, "qemu:dirty-bitmap:b")
		require.ErrorIs(t, err, client.ErrNoContext)
		c, err := client.Dial(ctx, uri, client.ContextAllocation)
		require.NoError(t, err)
		defer c.Close()
		require.Equal(t, d.Size(), c.Size())
		require.Equal(t, client.BlockSizes{Min: SectorSize, Preferred: 4096, Max: MaxRequest}, c.Info().Block)
		require.True(t, c.Info().CanFlush() && c.Info().CanFUA() && c.Info().CanTrim() && c.Info().CanZero() && c.Info().MultiConn() && !c.Info().ReadOnly())

		all := extent.Range{Len: c.Size()}
		var wg sync.WaitGroup
		for i := range int64(24) {
			wg.Go(func() {
				p := bytes.Repeat([]byte{byte(i + 1)}, 64<<10)
				if err := errors.Join(c.WriteAt(ctx, p, i*128<<10, i%2 == 0), c.ReadAt(ctx, p, i*128<<10)); err != nil || p[77] != byte(i+1) {
					t.Errorf("%d: %v", i, err)
				}
			})
		}
		wg.Wait()
		require.NoError(t, c.WriteZeroes(ctx, extent.Range{Off: 128 << 10, Len: 64 << 10}, true))
		require.NoError(t, c.Trim(ctx, extent.Range{Off: 256 << 10, Len: 64 << 10}))
		require.NoError(t, c.Flush(ctx))
		want, safe := d.content()
		sameBytes(t, want, safe)

		got := make([]byte, c.Size())
		require.NoError(t, c.ReadAt(ctx, got, 0))
		sameBytes(t, want, got)
		clear(got)
		held := int64(0)
		err = c.Stream(ctx, func(ctx context.Context) iter.Seq2[client.Run, error] {
			return func(yield func(client.Run, error) bool) {
				for e, err := range c.Extents(ctx, client.ContextAllocation, all) {
					if !yield(client.Run{Range: e.Range, Zero: e.Flags&client.Zero != 0}, err) {
						return
					}
				}
			}
		}, func(at extent.Range, data []byte) error {
			held += int64(len(data))
			copy(got[at.Off:], data)
			return nil
		})
		require.NoError(t, err)
		sameBytes(t, want, got)
		require.Equal(t, d.heldBytes(), held)

		broken.Store(true)
		var e *client.Error
		require.ErrorAs(t, c.WriteAt(ctx, got[:4096], 0, false), &e)
		require.Equal(t, uint32(client.ENOSPC), e.Errno)
		require.ErrorAs(t, c.ReadAt(ctx, got[:4096], 0), &e)
		require.Equal(t, uint32(client.EIO), e.Errno)
	}
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			broken.Store(false)
			d := newSparseDisk(12 * mib)
			d.fill(t, 1)
			d.gate = func(what string, r extent.Range) error {
				switch {
				case !broken.Load():
					return nil
				case what == "write":
					return syscall.ENOSPC
				}
				return syscall.EIO
			}
			test(t, d, serveDisks(t, diskSet{"vm/os": d}).uris("vm/os")[network])
		})
	}
}
