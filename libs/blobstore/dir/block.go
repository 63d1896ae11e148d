package dir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// container is a handle on a folder of blobs.
type container struct {
	s    *Store
	name string
	path string
}

func (c *container) Name() string { return c.name }

// ref is a checked blob name and the files it stands for.
type ref struct {
	name string
	base string // path without suffix
}

func (r ref) block() string  { return r.base + suffixBlock }
func (r ref) pages() string  { return r.base + suffixPages }
func (r ref) lease() string  { return r.base + suffixLease }
func (r ref) parent() string { return filepath.Dir(r.base) }

// begin checks what every call checks.
func (c *container) begin(ctx context.Context, name string) (ref, error) {
	if err := c.s.ready(ctx); err != nil {
		return ref{}, err
	}
	if err := blobstore.CheckContainerName(c.name); err != nil {
		return ref{}, err
	}
	if err := blobstore.CheckBlobName(name); err != nil {
		return ref{}, err
	}
	rel, err := encodeName(name)
	if err != nil {
		return ref{}, err
	}
	return ref{name, filepath.Join(c.path, rel)}, nil
}

func (c *container) wrap(op, name string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
		if _, gone := os.Stat(c.path); errors.Is(gone, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", blobstore.ErrNoContainer, err)
		}
	}
	return fmt.Errorf("%s %s/%s: %w", op, c.name, name, storageErr(err))
}

// notFound makes the operating system's "no such file" the store's.
func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", blobstore.ErrNotFound, err)
	}
	return err
}

// blockProps are a block blob's properties: they are its file's.
func blockProps(name string, st fs.FileInfo) blobstore.Properties {
	return blobstore.Properties{
		Name: name, Size: st.Size(), LastModified: st.ModTime().UTC(),
		ETag: blobstore.ETag(strconv.FormatInt(st.ModTime().UnixNano(), 16)),
	}
}

// writeBlock is how much of a body is written between two looks at the context.
const writeBlock = 1 << 20

var spoolBuffers = sync.Pool{New: func() any { return new([writeBlock]byte) }}

// spool writes body to a temporary file, stamped and durable, but not yet visible.
func (s *Store) spool(ctx context.Context, body io.Reader, size int64) (string, error) {
	path := s.tempPath()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	buf := spoolBuffers.Get().(*[writeBlock]byte)
	defer spoolBuffers.Put(buf)
	for done := int64(0); done < size && err == nil; {
		var n int
		n, err = io.ReadFull(body, buf[:min(size-done, writeBlock)])
		done += int64(n)
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			err = fmt.Errorf("%w: body ended after %d of %d bytes", blobstore.ErrInvalid, done, size)
		case err == nil:
			if _, err = f.Write(buf[:n]); err == nil {
				err = ctx.Err()
			}
		}
	}
	if err == nil {
		err = s.setStamp(path, f, s.stamp(time.Time{}))
	}
	if err = errors.Join(err, f.Close()); err == nil && runtime.GOOS == "windows" {
		err = restamp(path) // closing there may set the time again
	}
	if err != nil {
		_ = os.Remove(path)
		return "", err
	}
	return path, nil
}

// setStamp gives an open temporary file its modification time and makes both durable.
func (s *Store) setStamp(path string, f *os.File, t time.Time) error {
	if err := os.Chtimes(path, t, t); err != nil {
		return err
	}
	return s.syncFile(f)
}

func restamp(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Chtimes(path, st.ModTime(), st.ModTime())
}

// Put writes a block blob: spooled without a lock, then checked and made visible under it.
func (c *container) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "put"
	none := blobstore.Properties{}
	r, err := c.begin(ctx, name)
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	if size < 0 || cond.IfSequence != nil {
		return none, c.wrap(op, name, blobstore.ErrInvalid)
	}
	if cond.CreateOnly { // spare the body where the answer is known
		if _, err := os.Lstat(r.block()); err == nil {
			return none, c.wrap(op, name, blobstore.ErrExists)
		}
	}
	tmp, err := c.s.spool(ctx, body, size)
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	defer os.Remove(tmp)
	g, err := c.s.lockExclusive(ctx, c.name, name)
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	defer g.release()
	if err := c.checkPut(ctx, r, tmp, cond); err != nil {
		return none, c.wrap(op, name, err)
	}
	st, err := os.Stat(tmp)
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	if err := c.place(r.parent(), func() error { return publish(tmp, r.block(), cond.CreateOnly) }); err != nil {
		return none, c.wrap(op, name, err)
	}
	return blockProps(name, st), nil
}

// publish makes a spooled file visible. The lock already excludes rivals; link refuses also one that
// does not know the lock.
func publish(tmp, path string, createOnly bool) error {
	if !createOnly {
		return os.Rename(tmp, path)
	}
	err := os.Link(tmp, path)
	switch {
	case err == nil || errors.Is(err, fs.ErrNotExist):
		return err
	case errors.Is(err, fs.ErrExist):
		return blobstore.ErrExists
	default: // no hard links here
		return os.Rename(tmp, path)
	}
}

// checkPut checks cond against what is there; the caller holds the blob exclusively. A version to be
// replaced with the same or a later stamp makes the new one later still.
func (c *container) checkPut(ctx context.Context, r ref, tmp string, cond blobstore.Conditions) error {
	exists, err := c.pagesExist(ctx, r)
	if err != nil {
		return err
	}
	if exists {
		if cond.CreateOnly {
			return blobstore.ErrExists
		}
		return fmt.Errorf("%w: is a page blob", blobstore.ErrInvalid)
	}
	old, err := os.Lstat(r.block())
	if errors.Is(err, fs.ErrNotExist) {
		switch {
		case cond.Lease != "":
			return blobstore.ErrLeaseConflict
		case cond.IfMatch != "":
			return blobstore.ErrConditionFailed
		}
		if err := os.Remove(r.lease()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err != nil {
		return err
	}
	if cond.CreateOnly {
		return blobstore.ErrExists
	}
	if err := c.checkBlock(r, old, cond); err != nil {
		return err
	}
	mine, err := os.Stat(tmp)
	if err != nil || mine.ModTime().After(old.ModTime()) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(c.s.setStamp(tmp, f, c.s.stamp(old.ModTime())), f.Close())
}

// checkBlock checks cond against an existing block blob.
func (c *container) checkBlock(r ref, st fs.FileInfo, cond blobstore.Conditions) error {
	l, err := readLease(r.lease())
	if err != nil {
		return err
	}
	if err := c.s.checkLease(l.Lease, l.Expires, cond.Lease, true); err != nil {
		return err
	}
	if cond.IfMatch != "" && blockProps(r.name, st).ETag != cond.IfMatch {
		return blobstore.ErrConditionFailed
	}
	return nil
}

// blockReader reads part of a block blob.
type blockReader struct {
	ctx context.Context //nolint:containedctx // the call's deadline covers the reading of its answer
	f   *os.File
	r   *io.SectionReader
}

func (b *blockReader) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	return b.r.Read(p)
}

func (b *blockReader) Close() error { return b.f.Close() }

// Get opens a block blob. An open file keeps to its version: blobs are replaced by rename.
func (c *container) Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, blobstore.Properties, error) {
	const op = "get"
	none := blobstore.Properties{}
	r, err := c.begin(ctx, name)
	if err != nil {
		return nil, none, c.wrap(op, name, err)
	}
	f, err := os.Open(r.block())
	if err != nil {
		if h, herr := c.openPages(ctx, r); herr == nil {
			h.put()
			return nil, none, c.wrap(op, name, fmt.Errorf("%w: is a page blob", blobstore.ErrInvalid))
		}
		return nil, none, c.wrap(op, name, notFound(err))
	}
	st, err := f.Stat()
	if err == nil && (offset < 0 || offset > st.Size()) {
		err = fmt.Errorf("%w: offset %d of %d bytes", blobstore.ErrInvalid, offset, st.Size())
	}
	if err != nil {
		_ = f.Close()
		return nil, none, c.wrap(op, name, err)
	}
	if left := st.Size() - offset; length < 0 || length > left {
		length = left
	}
	return &blockReader{ctx, f, io.NewSectionReader(f, offset, length)}, blockProps(name, st), nil
}

// Stat returns properties without waiting for any lock.
func (c *container) Stat(ctx context.Context, name string, snapshot blobstore.SnapshotID) (blobstore.Properties, error) {
	const op = "stat"
	r, err := c.begin(ctx, name)
	if err != nil {
		return blobstore.Properties{}, c.wrap(op, name, err)
	}
	if snapshot == "" {
		st, err := os.Lstat(r.block())
		if err == nil {
			return blockProps(name, st), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return blobstore.Properties{}, c.wrap(op, name, err)
		}
	}
	p, err := c.statPages(ctx, r, snapshot)
	return p, c.wrap(op, name, err)
}

// Delete removes a blob with its lease and snapshots.
func (c *container) Delete(ctx context.Context, name string, cond blobstore.Conditions) error {
	const op = "delete"
	r, err := c.begin(ctx, name)
	if err != nil {
		return c.wrap(op, name, err)
	}
	if cond.CreateOnly {
		return c.wrap(op, name, fmt.Errorf("%w: create-only", blobstore.ErrInvalid))
	}
	g, err := c.s.lockExclusive(ctx, c.name, name)
	if err != nil {
		return c.wrap(op, name, err)
	}
	defer g.release()
	st, err := os.Lstat(r.block())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return c.wrap(op, name, c.deletePages(ctx, r, cond))
	case err != nil:
		return c.wrap(op, name, err)
	case cond.IfSequence != nil:
		return c.wrap(op, name, blobstore.ErrConditionFailed)
	}
	if err := c.checkBlock(r, st, cond); err != nil {
		return c.wrap(op, name, err)
	}
	if err := os.Remove(r.lease()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c.wrap(op, name, err)
	}
	if err := os.Remove(r.block()); err != nil {
		return c.wrap(op, name, notFound(err))
	}
	return c.wrap(op, name, c.removed(r))
}

// removed makes the absence of a blob durable and drops folders that became empty.
func (c *container) removed(r ref) error {
	if err := c.s.syncDir(r.parent()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.prune(r.parent())
	return nil
}
