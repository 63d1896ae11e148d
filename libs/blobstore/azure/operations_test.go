package azure

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// operation is one call that must come out right whatever single request of it breaks.
type operation struct {
	prepare func(c blobstore.Container, name string) error
	run     func(c blobstore.Container, name string) error
	check   func(t *testing.T, c blobstore.Container, name string)
}

func page(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*blobstore.PageSize) }

func number(n int64) *int64 { return &n }

func operations(ctx context.Context) map[string]operation {
	lease := blobstore.LeaseID(uuid.NewString())
	none := blobstore.Conditions{}
	body := strings.Repeat("body", 1000)
	put := func(c blobstore.Container, name, text string, cond blobstore.Conditions) (blobstore.Properties, error) {
		return c.Put(ctx, name, strings.NewReader(text), int64(len(text)), cond)
	}
	read := func(t *testing.T, c blobstore.Container, name string) string {
		r, _, err := c.Get(ctx, name, 0, -1)
		require.NoError(t, err)
		defer r.Close()
		data, err := io.ReadAll(r)
		require.NoError(t, err)
		return string(data)
	}
	pages := func(c blobstore.Container, name string) error {
		_, err := c.CreatePages(ctx, name, 16<<20, map[string]string{"kind": "disk"}, none)
		if err == nil {
			_, err = c.WritePages(ctx, name, 0, page(7, 4), none)
		}
		return err
	}
	leased := func(c blobstore.Container, name string) error {
		return errors.Join(pages(c, name), c.AcquireLease(ctx, name, lease, time.Minute))
	}
	stat := func(t *testing.T, c blobstore.Container, name string) blobstore.Properties {
		p, err := c.Stat(ctx, name, "")
		require.NoError(t, err)
		return p
	}
	same := func(got, want blobstore.Properties, err error) error {
		if err == nil && got.ETag != want.ETag {
			err = fmt.Errorf("returned ETag %s, blob has %s", got.ETag, want.ETag)
		}
		return err
	}
	gone := func(t *testing.T, c blobstore.Container, name string) {
		_, err := c.Stat(ctx, name, "")
		require.ErrorIs(t, err, blobstore.ErrNotFound)
	}
	content := func(t *testing.T, c blobstore.Container, name string, want []byte) {
		got := make([]byte, len(want))
		require.NoError(t, c.ReadPages(ctx, name, "", 0, got))
		require.True(t, bytes.Equal(want, got))
	}
	return map[string]operation{
		"put": {
			run: func(c blobstore.Container, name string) error { _, err := put(c, name, body, none); return err },
			check: func(t *testing.T, c blobstore.Container, name string) {
				require.Equal(t, body, read(t, c, name))
			},
		},
		"put create-only": {
			run: func(c blobstore.Container, name string) error {
				p, err := put(c, name, body, blobstore.Conditions{CreateOnly: true})
				if err != nil {
					return err
				}
				st, err := c.Stat(ctx, name, "")
				return same(p, st, err)
			},
			check: func(t *testing.T, c blobstore.Container, name string) { require.Equal(t, body, read(t, c, name)) },
		},
		"put if-match": {
			prepare: func(c blobstore.Container, name string) error { _, err := put(c, name, "old", none); return err },
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err == nil {
					_, err = put(c, name, body, blobstore.Conditions{IfMatch: p.ETag})
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) { require.Equal(t, body, read(t, c, name)) },
		},
		"create pages": {
			run:   pages,
			check: func(t *testing.T, c blobstore.Container, name string) { content(t, c, name, page(7, 4)) },
		},
		"write pages": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				_, err := c.WritePages(ctx, name, 512, page(9, 2), blobstore.Conditions{Lease: lease, IfSequence: number(0)})
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				content(t, c, name, bytes.Join([][]byte{page(7, 1), page(9, 2), page(7, 1)}, nil))
			},
		},
		"write pages if-match": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err == nil {
					p, err = c.WritePages(ctx, name, 512, page(9, 2), blobstore.Conditions{IfMatch: p.ETag})
				}
				if err != nil {
					return err
				}
				st, err := c.Stat(ctx, name, "")
				return same(p, st, err)
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				content(t, c, name, bytes.Join([][]byte{page(7, 1), page(9, 2), page(7, 1)}, nil))
			},
		},
		"clear pages if-match": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err == nil {
					_, err = c.ClearPages(ctx, name, 512, 512, blobstore.Conditions{IfMatch: p.ETag})
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				content(t, c, name, bytes.Join([][]byte{page(7, 1), page(0, 1), page(7, 2)}, nil))
			},
		},
		"set sequence": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				_, err := c.SetSequence(ctx, name, 5, blobstore.Conditions{Lease: lease})
				if err == nil {
					_, err = c.SetSequence(ctx, name, 3, blobstore.Conditions{Lease: lease})
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				require.EqualValues(t, 3, stat(t, c, name).Sequence)
			},
		},
		"set sequence if-sequence with lease": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				p, err := c.SetSequence(ctx, name, 5, blobstore.Conditions{Lease: lease, IfSequence: number(0)})
				if err == nil && p.Sequence != 5 {
					err = fmt.Errorf("returned %d", p.Sequence)
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				require.EqualValues(t, 5, stat(t, c, name).Sequence)
			},
		},
		"snapshot": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err != nil {
					return err
				}
				id, s, err := c.SnapshotPages(ctx, name, map[string]string{"seq": "1"}, blobstore.Conditions{IfMatch: p.ETag, IfSequence: number(0), Lease: lease})
				if err == nil && (s.Snapshot != id || s.Metadata["seq"] != "1" || len(s.Metadata) != 1) {
					err = fmt.Errorf("returned %+v", s)
				}
				if err == nil {
					err = c.ReadPages(ctx, name, id, 0, make([]byte, 512))
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				n := 0
				for _, err := range c.ListSnapshots(ctx, name) {
					require.NoError(t, err)
					n++
				}
				require.GreaterOrEqual(t, n, 1)
				require.LessOrEqual(t, n, 3, "more than one orphan for each lost answer")
			},
		},
		"delete": {
			prepare: func(c blobstore.Container, name string) error {
				_, _, err := c.SnapshotPages(ctx, name, nil, none)
				if errors.Is(err, blobstore.ErrNotFound) {
					err = errors.Join(pages(c, name))
				}
				return err
			},
			run: func(c blobstore.Container, name string) error {
				return c.Delete(ctx, name, blobstore.Conditions{IfSequence: number(0)})
			},
			check: gone,
		},
		"delete snapshot": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				id, _, err := c.SnapshotPages(ctx, name, nil, none)
				if err != nil {
					return err
				}
				return c.DeleteSnapshot(ctx, name, id)
			},
			check: func(t *testing.T, c blobstore.Container, name string) { content(t, c, name, page(7, 4)) },
		},
		"leases": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				return errors.Join(c.AcquireLease(ctx, name, lease, time.Minute), c.RenewLease(ctx, name, lease), c.ReleaseLease(ctx, name, lease),
					c.AcquireLease(ctx, name, lease, time.Minute), c.BreakLease(ctx, name), c.BreakLease(ctx, name))
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				_, err := c.WritePages(ctx, name, 0, page(1, 1), none)
				require.NoError(t, err)
			},
		},
		"reads": {
			prepare: func(c blobstore.Container, name string) error {
				_, err := c.WritePages(ctx, "shared.vhd", 4<<20, page(3, 16), none)
				if errors.Is(err, blobstore.ErrNotFound) {
					big := bytes.Repeat([]byte("0123456789"), 450_000) // two pieces
					_, perr := c.Put(ctx, "shared", bytes.NewReader(big), int64(len(big)), none)
					err = errors.Join(pages(c, "shared.vhd"), perr)
				}
				return err
			},
			run: func(c blobstore.Container, _ string) error {
				r, _, err := c.Get(ctx, "shared", 5, -1)
				if err != nil {
					return err
				}
				defer r.Close()
				data, err := io.ReadAll(r)
				if err != nil {
					return err
				}
				if !bytes.Equal(data, bytes.Repeat([]byte("0123456789"), 450_000)[5:]) {
					return errors.New("wrong bytes")
				}
				n := 0
				for p, err := range c.List(ctx, "shared", "") {
					if err != nil {
						return err
					}
					if n++; p.Name == "" {
						return errors.New("no name")
					}
				}
				if n != 2 {
					return fmt.Errorf("listed %d", n)
				}
				for r, err := range c.PageRanges(ctx, "shared.vhd", "", 0, 16<<20) {
					if err != nil {
						return err
					}
					n += int(r.Length)
				}
				buf := make([]byte, 5<<20)
				if err := c.ReadPages(ctx, "shared.vhd", "", 0, buf); err != nil {
					return err
				}
				if n < 2+4*512 || buf[0] != 7 || buf[4*512] != 0 {
					return fmt.Errorf("ranges %d, %d %d", n, buf[0], buf[4*512])
				}
				return nil
			},
			check: func(*testing.T, blobstore.Container, string) {},
		},
	}
}
