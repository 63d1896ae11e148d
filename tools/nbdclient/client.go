// Package nbdclient gives writers in demonstrations and tests a disk of an NBD export: libs/nbd without contexts, every
// request under a time limit.
package nbdclient

import (
	"context"
	"time"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd"
)

// requestTimeout bounds one request.
const requestTimeout = 30 * time.Second

// Client is one connection to one export. Safe for concurrent use.
type Client struct{ nbd *nbd.Client }

// Dial connects to nbd://host:port/export or nbd+unix:///export?socket=path.
func Dial(ctx context.Context, uri string) (*Client, error) {
	c, err := nbd.Dial(ctx, uri)
	if err != nil {
		return nil, err
	}
	return &Client{nbd: c}, nil
}

// Size is the export's size in bytes.
func (c *Client) Size() int64 { return c.nbd.Size() }

func limit(do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	return do(ctx)
}

// ReadAt fills p from off.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	err := limit(func(ctx context.Context) error { return c.nbd.ReadAt(ctx, p, off) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteAt writes p at off and returns when the server has acknowledged it.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	err := limit(func(ctx context.Context) error { return c.nbd.WriteAt(ctx, p, off, false) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteFUA writes p at off, durably.
func (c *Client) WriteFUA(p []byte, off int64) error {
	return limit(func(ctx context.Context) error { return c.nbd.WriteAt(ctx, p, off, true) })
}

// Flush makes every acknowledged write durable.
func (c *Client) Flush() error { return limit(c.nbd.Flush) }

// Trim tells that a range is not needed.
func (c *Client) Trim(off, length int64) error {
	return limit(func(ctx context.Context) error { return c.nbd.Trim(ctx, extent.Range{Off: off, Len: length}) })
}

// WriteZeroes makes a range zero.
func (c *Client) WriteZeroes(off, length int64) error {
	return limit(func(ctx context.Context) error {
		return c.nbd.WriteZeroes(ctx, extent.Range{Off: off, Len: length}, false)
	})
}

// Close says good-bye and closes the connection.
func (c *Client) Close() error { return c.nbd.Close() }
