package azure

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/minio/crc64nvme"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

const (
	// pieceSize is how much is read in one request: the most that the service sends a checksum for.
	pieceSize = 4 << 20
	// readers is how many pieces one ReadPages fetches at once.
	readers = 4
)

// wantSum in a context asks for the CRC64 of a range. The SDK has no option for it, and adds the headers of
// policy.WithHTTPHeader after it has signed the request.
type wantSum struct{}

// Do is a policy of the SDK's pipeline that comes before the signature.
func (wantSum) Do(req *policy.Request) (*http.Response, error) {
	if raw := req.Raw(); raw.Context().Value(wantSum{}) != nil {
		raw.Header.Set("x-ms-range-get-content-crc64", "true")
	}
	return req.Next()
}

// piece is what one range read brought.
type piece struct {
	n     int   // bytes in the buffer
	total int64 // size of the blob
	props blobstore.Properties
}

// fetch reads len(buf) bytes from off, or up to the blob's end. match binds it to one version.
func (c *ctr) fetch(ctx context.Context, op, name string, b *blob.Client, pages bool, off int64, buf []byte, match blobstore.ETag) (piece, error) {
	var p piece
	_, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: pages, read: true, bytes: int64(len(buf))}, func(ctx context.Context) error {
		if summing(c.s.checksum.Load()) == sumCRC64 {
			ctx = context.WithValue(ctx, wantSum{}, true)
		}
		r, err := b.DownloadStream(ctx, &blob.DownloadStreamOptions{
			Range: blob.HTTPRange{Offset: off, Count: int64(len(buf))}, AccessConditions: access(blobstore.Conditions{IfMatch: match}),
		})
		if err != nil {
			return err
		}
		defer func() { _ = r.Body.Close() }()
		length := value(r.ContentLength)
		if length < 0 || length > int64(len(buf)) {
			return fmt.Errorf("%w: the answer has %d bytes where %d were asked for", blobstore.ErrInvalid, length, len(buf))
		}
		p = piece{n: int(length), total: length}
		if cr := value(r.ContentRange); cr != "" {
			_, total, _ := strings.Cut(cr, "/")
			if p.total, err = strconv.ParseInt(total, 10, 64); err != nil {
				return fmt.Errorf("the answer's range %q: %w", cr, err)
			}
		}
		if _, err := io.ReadFull(r.Body, buf[:p.n]); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
				return errShortAnswer
			}
			return err
		}
		if sum := r.ContentCRC64; len(sum) == 8 && binary.LittleEndian.Uint64(sum) != crc64nvme.Checksum(buf[:p.n]) {
			return errDamaged
		}
		md, _ := metadata(r.Metadata)
		p.props = blobstore.Properties{
			Name: name, Size: p.total, ETag: tag(r.ETag), LastModified: stamp(r.LastModified), Metadata: md,
			Sequence: value(r.BlobSequenceNumber), IsPages: value(r.BlobType) == blob.BlobTypePageBlob,
		}
		return nil
	})
	return p, err
}

// outside tells whether the range begins at or after the end of the blob.
func outside(err error) bool {
	_, status := codeOf(err)
	return status == http.StatusRequestedRangeNotSatisfiable
}

// Get reads the first piece; the reader fetches the others, one ahead, of the same version only. The context covers the
// reading too.
func (c *ctr) Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, blobstore.Properties, error) {
	const op = "get"
	none := blobstore.Properties{}
	if err := c.begin(ctx, op, name); err != nil {
		return nil, none, err
	}
	if offset < 0 {
		return nil, none, c.invalid(op, name, "offset %d", offset)
	}
	b := c.client.NewBlobClient(name)
	r := &reader{c: c, ctx: ctx, name: name, b: b}
	if length != 0 {
		n := int64(pieceSize)
		if length > 0 {
			n = min(n, length)
		}
		buf := c.s.buffer(n)
		p, err := c.fetch(ctx, op, name, b, false, offset, buf, "")
		switch {
		case err == nil && p.props.IsPages:
			c.s.recycle(buf)
			return nil, none, c.wrap(op, name, errNoBlocks)
		case err == nil:
			r.etag, r.buf, r.rest = p.props.ETag, buf, buf[:p.n]
			r.next, r.end = offset+int64(p.n), p.total
			if length > 0 {
				r.end = min(r.end, offset+length)
			}
			return r, p.props, nil
		}
		c.s.recycle(buf)
		if !outside(err) {
			return nil, none, err
		}
	}
	st, err := c.head(ctx, op, name, "", "") // nothing to read: at the end, or past it
	switch {
	case err != nil:
		return nil, none, err
	case st.IsPages:
		return nil, none, c.wrap(op, name, errNoBlocks)
	case offset > st.Size || offset < st.Size && length != 0:
		return nil, none, c.invalid(op, name, "offset %d in a blob of %d bytes", offset, st.Size)
	}
	return r, st.Properties, nil
}

// buffer returns a slice of n bytes, at most pieceSize; small ones are made to measure.
func (s *Store) buffer(n int64) []byte {
	if n <= pieceSize/4 {
		return make([]byte, n)
	}
	return (*s.buffers.Get().(*[]byte))[:n]
}

func (s *Store) recycle(b []byte) {
	if cap(b) == pieceSize {
		b = b[:pieceSize]
		s.buffers.Put(&b)
	}
}

// reader reads a block blob in pieces.
type reader struct {
	c    *ctr
	ctx  context.Context //nolint:containedctx // the call's deadline covers the reading of its answer
	name string
	b    *blob.Client
	etag blobstore.ETag
	end  int64

	mu    sync.Mutex
	buf   []byte // rest is of it
	rest  []byte
	next  int64        // offset of the first byte that nobody has asked for
	ahead chan fetched // the piece that is on its way; nil is none
	stop  context.CancelFunc
	err   error // sticks
}

type fetched struct {
	buf []byte
	n   int
	err error
}

// prefetch asks for the next piece; the caller holds mu.
func (r *reader) prefetch() {
	if r.ahead != nil || r.next >= r.end {
		return
	}
	ctx, stop := context.WithCancel(r.ctx)
	ch, off, n := make(chan fetched, 1), r.next, min(pieceSize, r.end-r.next)
	r.ahead, r.stop = ch, stop
	r.next += n
	go func() {
		buf := r.c.s.buffer(n)
		p, err := r.c.fetch(ctx, "get", r.name, r.b, false, off, buf, r.etag)
		if err == nil && int64(p.n) != n {
			err = r.c.wrap("get", r.name, errShortAnswer)
		}
		ch <- fetched{buf: buf, n: p.n, err: err}
	}()
}

// Read is that of io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	r.prefetch()
	if len(r.rest) == 0 {
		r.c.s.recycle(r.buf)
		r.buf = nil
		if r.ahead == nil {
			r.err = io.EOF
			return 0, r.err
		}
		f := <-r.ahead // ends with the context
		r.stop()
		r.ahead = nil
		if f.err != nil {
			r.c.s.recycle(f.buf)
			r.err = f.err
			return 0, r.err
		}
		r.buf, r.rest = f.buf, f.buf[:f.n]
		r.prefetch()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close ends what is on its way.
func (r *reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ahead != nil {
		r.stop()
		r.c.s.recycle((<-r.ahead).buf)
		r.ahead = nil
	}
	r.c.s.recycle(r.buf)
	r.buf, r.rest, r.err = nil, nil, errReaderClosed
	return nil
}

var errReaderClosed = errors.New("reader is closed")

// ReadPages reads in pieces, some at once.
func (c *ctr) ReadPages(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset int64, buf []byte) error {
	const op = "read pages"
	if err := c.begin(ctx, op, name); err != nil {
		return err
	}
	b, err := c.version(op, name, snapshot)
	if err != nil {
		return err
	}
	if len(buf) == 0 {
		st, err := c.head(ctx, op, name, snapshot, "")
		if err == nil && !st.IsPages {
			err = c.wrap(op, name, errNoPages)
		}
		if err == nil {
			if err = blobstore.CheckRange(offset, 0, st.Size); err != nil {
				err = c.wrap(op, name, err)
			}
		}
		return err
	}
	if offset < 0 {
		return c.invalid(op, name, "offset %d", offset)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(readers)
	for at := 0; at < len(buf); at += pieceSize {
		part, off := buf[at:min(at+pieceSize, len(buf))], offset+int64(at)
		g.Go(func() error {
			p, err := c.fetch(gctx, op, name, b, true, off, part, "")
			switch {
			case err != nil:
				return err
			case !p.props.IsPages:
				return c.wrap(op, name, errNoPages)
			case p.n < len(part):
				return c.invalid(op, name, "range at %d, %d bytes, leaves a blob of %d bytes", offset, len(buf), p.total)
			}
			return nil
		})
	}
	return g.Wait()
}
