package dir

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// openPages returns the live page blob. One that is being deleted does not exist any more.
func (c *container) openPages(ctx context.Context, r ref) (*handle, error) {
	for {
		h, fresh, err := c.s.handles.get(r.pages(), true)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				if _, berr := os.Lstat(r.block()); berr == nil {
					return nil, fmt.Errorf("%w: is a block blob", blobstore.ErrInvalid)
				}
			}
			return nil, notFound(err)
		}
		if !h.deleted() {
			return h, nil
		}
		h.forget()
		h.put()
		if fresh { // just opened and still marked: a delete is under way, or its process died
			return nil, blobstore.ErrNotFound
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// pagesExist reports whether a page blob holds the name; the caller holds the blob exclusively. It
// finishes the delete of a process that died in it.
func (c *container) pagesExist(ctx context.Context, r ref) (bool, error) {
	if _, err := os.Lstat(r.pages()); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	h, err := c.openPages(ctx, r)
	if errors.Is(err, blobstore.ErrNotFound) {
		return false, c.unlinkPages(r)
	}
	if err != nil {
		return false, err
	}
	h.put()
	return true, nil
}

// unlinkPages moves a page blob that is marked as deleted out of sight, durably, and removes it.
func (c *container) unlinkPages(r ref) error {
	tmp := c.s.tempPath()
	c.s.handles.drop(r.pages())
	if err := os.Rename(r.pages(), tmp); err != nil {
		return notFound(err)
	}
	err := c.removed(r)
	discard(tmp)
	return err
}

func (c *container) deletePages(ctx context.Context, r ref, cond blobstore.Conditions) error {
	if exists, err := c.pagesExist(ctx, r); err != nil || !exists {
		return errors.Join(err, errIf(!exists && err == nil, blobstore.ErrNotFound))
	}
	h, err := c.openPages(ctx, r)
	if err != nil {
		return err
	}
	defer h.put()
	if _, err := c.s.settle(h, cond, true); err != nil {
		return err
	}
	if err := h.count.set(wordDeleted, 1); err != nil {
		return err
	}
	return c.unlinkPages(r)
}

// discard removes the folder of a blob or snapshot that was moved out of sight, and frees its data even while
// other processes keep it open. What it cannot remove goes with the session.
func discard(path string) {
	f, err := os.OpenFile(filepath.Join(path, dataFile), os.O_RDWR, 0)
	_ = os.RemoveAll(path) // first, so that a reader that finds the data gone finds the file gone as well
	if err == nil {
		_ = f.Truncate(0)
		_ = f.Close()
	}
}

func errIf(cond bool, err error) error {
	if cond {
		return err
	}
	return nil
}

// CreatePages builds the blob's folder aside and renames it into place.
func (c *container) CreatePages(ctx context.Context, name string, size int64, metadata map[string]string, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "create pages"
	none := blobstore.Properties{}
	r, err := c.begin(ctx, name)
	if err == nil {
		err = errors.Join(blobstore.CheckPageBlobSize(size), blobstore.CheckMetadata(metadata))
	}
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	var inc [8]byte
	_, _ = rand.Read(inc[:])
	now := c.s.stamp(time.Time{})
	meta := pageMeta{V: metaV, Incarnation: hex.EncodeToString(inc[:]), Size: size, Metadata: maps.Clone(metadata)}
	tmp := c.s.tempPath()
	defer os.RemoveAll(tmp)
	if err := c.s.buildPages(tmp, meta, now); err != nil {
		return none, c.wrap(op, name, err)
	}
	g, err := c.s.lockExclusive(ctx, c.name, name)
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	defer g.release()
	exists, err := c.pagesExist(ctx, r)
	if err == nil && !exists {
		_, serr := os.Lstat(r.block())
		exists = serr == nil
	}
	switch {
	case err != nil:
	case exists:
		err = blobstore.ErrExists
	case cond.Lease != "":
		err = blobstore.ErrLeaseConflict
	case cond.IfMatch != "" || cond.IfSequence != nil:
		err = blobstore.ErrConditionFailed
	default:
		err = c.place(r.parent(), func() error { return os.Rename(tmp, r.pages()) })
	}
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	return meta.properties(name, pageState{gen: 1, modified: now.UnixNano()}, 0, 0, 0), nil
}

// buildPages makes a page blob's folder durable under a temporary name.
func (s *Store) buildPages(path string, meta pageMeta, now time.Time) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(path, snapsDir), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(path, dataFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = makeSparse(f); err == nil {
		err = f.Truncate(meta.Size)
	}
	if err == nil {
		err = s.syncFile(f)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	raw, err := json.Marshal(meta)
	if err != nil {
		return err
	}
	if err := s.writeFile(filepath.Join(path, metaFile), append(raw, '\n')); err != nil {
		return err
	}
	if err := s.newState(filepath.Join(path, stateFil), now); err != nil {
		return err
	}
	return s.syncDir(path)
}

// properties puts together what a live page blob is.
func (m pageMeta) properties(name string, st pageState, started, finished, modified uint64) blobstore.Properties {
	return blobstore.Properties{
		Name: name, Size: m.Size, IsPages: true, Metadata: maps.Clone(m.Metadata),
		ETag:         etag(m.Incarnation, st.gen, started, finished),
		Sequence:     st.sequence,
		LastModified: time.Unix(0, max(st.modified, int64(modified))).UTC(),
	}
}

// properties reads a live page blob without a lock. Finished is read first: equal counters then mean that
// no write was under way.
func (h *handle) properties(name string) (blobstore.Properties, error) {
	finished, err1 := h.count.get(wordFinished)
	started, err2 := h.count.get(wordStarted)
	modified, err3 := h.count.get(wordModified)
	st, err4 := h.count.readState()
	return h.meta.properties(name, st, started, finished, modified), errors.Join(err1, err2, err3, err4)
}

func (c *container) statPages(ctx context.Context, r ref, snapshot blobstore.SnapshotID) (blobstore.Properties, error) {
	h, err := c.openVersion(ctx, r, snapshot)
	if err != nil {
		return blobstore.Properties{}, err
	}
	defer h.put()
	if snapshot != "" {
		return h.meta.snapshotProps(r.name), nil
	}
	return h.properties(r.name)
}

// settle is what every exclusive holder does first: check cond and make the ETag tell the truth. Writers that
// died, and counters that a power loss may have taken back, become a new generation, so that an ETag
// that was read while a write was under way never matches afterwards.
func (s *Store) settle(h *handle, cond blobstore.Conditions, needLease bool) (pageState, error) {
	st, err := h.count.readState()
	if err != nil {
		return st, err
	}
	started, err1 := h.count.get(wordStarted)
	finished, err2 := h.count.get(wordFinished)
	if err := errors.Join(err1, err2); err != nil {
		return st, err
	}
	if started != finished || st.dirty && st.boot != s.boot {
		st.gen++
		st.dirty, st.boot = true, s.boot
		if err := s.writeState(h.state, &st, true); err != nil {
			return st, err
		}
		// Only now: a death before leaves them unequal for the next holder.
		if err := h.count.set(wordFinished, started); err != nil {
			return st, err
		}
	}
	if err := s.checkLease(st.lease, st.leaseEnd, cond.Lease, needLease); err != nil {
		return st, err
	}
	if cond.IfSequence != nil && *cond.IfSequence != st.sequence ||
		cond.IfMatch != "" && cond.IfMatch != etag(h.meta.Incarnation, st.gen, started, started) {
		return st, blobstore.ErrConditionFailed
	}
	return st, nil
}

// writing runs one page write under the conditions. The first since SetSequence, and one with an ETag to
// match, excludes all others; the rest share the blob.
func (c *container) writing(ctx context.Context, op, name string, cond blobstore.Conditions, offset, length int64, write func(h *handle) error) (blobstore.Properties, error) {
	none := blobstore.Properties{}
	r, err := c.begin(ctx, name)
	if err == nil && cond.CreateOnly {
		err = fmt.Errorf("%w: create-only", blobstore.ErrInvalid)
	}
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	for exclusive := cond.IfMatch != "" || !sharedCounters; ; exclusive = true {
		p, again, err := c.writeOnce(ctx, r, cond, exclusive, offset, length, write)
		if !again || err != nil {
			return p, c.wrap(op, name, err)
		}
	}
}

// writeOnce is one attempt; again means that it needs the blob exclusively.
func (c *container) writeOnce(ctx context.Context, r ref, cond blobstore.Conditions, exclusive bool, offset, length int64, write func(h *handle) error) (p blobstore.Properties, again bool, err error) {
	lock := c.s.lockShared
	if exclusive {
		lock = c.s.lockExclusive
	}
	g, err := lock(ctx, c.name, r.name)
	if err != nil {
		return p, false, err
	}
	defer g.release()
	h, err := c.openPages(ctx, r)
	if err != nil {
		return p, false, err
	}
	defer h.put()
	if err := blobstore.CheckPages(offset, length, h.meta.Size); err != nil {
		return p, false, err
	}
	var st pageState
	if exclusive {
		if st, err = c.s.settle(h, cond, true); err != nil {
			return p, false, err
		}
		if !st.dirty { // durable before the first page: after a power loss settle knows that pages may differ
			st.dirty, st.boot, st.modified = true, c.s.boot, c.s.stamp(time.Time{}).UnixNano()
			if err := c.s.writeState(h.state, &st, true); err != nil {
				return p, false, err
			}
		}
	} else {
		if st, err = h.count.readState(); err != nil {
			return p, false, err
		}
		if err := c.s.checkLease(st.lease, st.leaseEnd, cond.Lease, true); err != nil {
			return p, false, err
		}
		if cond.IfSequence != nil && *cond.IfSequence != st.sequence {
			return p, false, blobstore.ErrConditionFailed
		}
		if !st.dirty || st.boot != c.s.boot {
			return p, true, nil
		}
	}
	if err := h.count.add(wordStarted); err != nil {
		return p, false, err
	}
	werr := write(h)
	now := c.s.opts.Clock().UnixNano()
	if err := errors.Join(werr, h.count.set(wordModified, uint64(now)), h.count.add(wordFinished)); err != nil {
		return p, false, err
	}
	finished, err1 := h.count.get(wordFinished)
	started, err2 := h.count.get(wordStarted)
	return h.meta.properties(r.name, st, started, finished, uint64(now)), false, errors.Join(err1, err2)
}

// WritePages writes into the page cache; SetSequence makes it durable.
func (c *container) WritePages(ctx context.Context, name string, offset int64, data []byte, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "write pages"
	if len(data) > blobstore.MaxPageWrite {
		return blobstore.Properties{}, c.wrap(op, name, fmt.Errorf("%w: %d bytes in one write", blobstore.ErrInvalid, len(data)))
	}
	return c.writing(ctx, op, name, cond, offset, int64(len(data)), func(h *handle) error {
		_, err := h.data.WriteAt(data, offset)
		return err
	})
}

// ClearPages punches a hole where the file system can.
func (c *container) ClearPages(ctx context.Context, name string, offset, length int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	return c.writing(ctx, "clear pages", name, cond, offset, length, func(h *handle) error {
		if ok, err := punchHole(h.data, offset, length); ok || err != nil {
			return err
		}
		zeros := make([]byte, min(length, writeBlock))
		for at := offset; at < offset+length; at += int64(len(zeros)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, err := h.data.WriteAt(zeros[:min(int64(len(zeros)), offset+length-at)], at); err != nil {
				return err
			}
		}
		return nil
	})
}

// openVersion opens the live blob or a snapshot.
func (c *container) openVersion(ctx context.Context, r ref, snapshot blobstore.SnapshotID) (*handle, error) {
	if snapshot == "" {
		return c.openPages(ctx, r)
	}
	return c.openSnapshot(r, snapshot)
}

// ReadPages reads without a lock.
func (c *container) ReadPages(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset int64, buf []byte) error {
	const op = "read pages"
	r, err := c.begin(ctx, name)
	if err != nil {
		return c.wrap(op, name, err)
	}
	h, err := c.openVersion(ctx, r, snapshot)
	if err != nil {
		return c.wrap(op, name, err)
	}
	defer h.put()
	if err := blobstore.CheckRange(offset, int64(len(buf)), h.meta.Size); err != nil {
		return c.wrap(op, name, err)
	}
	if n, err := h.data.ReadAt(buf, offset); err != nil && (n < len(buf) || !errors.Is(err, io.EOF)) {
		if h.deleted() { // discard took the data away
			err = blobstore.ErrNotFound
		}
		return c.wrap(op, name, err)
	}
	return nil
}

// PageRanges asks the file system for allocated ranges.
func (c *container) PageRanges(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset, length int64) iter.Seq2[blobstore.PageRange, error] {
	return func(yield func(blobstore.PageRange, error) bool) {
		fail := func(err error) { yield(blobstore.PageRange{}, c.wrap("page ranges", name, err)) }
		r, err := c.begin(ctx, name)
		if err != nil {
			fail(err)
			return
		}
		h, err := c.openVersion(ctx, r, snapshot)
		if err != nil {
			fail(err)
			return
		}
		defer h.put()
		if err := blobstore.CheckRange(offset, length, h.meta.Size); err != nil {
			fail(err)
			return
		}
		for at, end := offset, offset+length; at < end; {
			if err := c.s.ready(ctx); err != nil {
				fail(err)
				return
			}
			from, to, ok, err := nextData(h.data, at, end)
			if err == nil && h.deleted() { // looked after the ranges: no hole made by discard is believed
				err = blobstore.ErrNotFound
			}
			if err != nil {
				fail(err)
				return
			}
			if !ok || !yield(blobstore.PageRange{Offset: from, Length: to - from}, nil) {
				return
			}
			at = to
		}
	}
}

// SetSequence makes the data durable, then the number. Most of the data goes to disk before the blob is locked.
func (c *container) SetSequence(ctx context.Context, name string, n int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "set sequence"
	p, err := c.setSequence(ctx, name, n, cond)
	return p, c.wrap(op, name, err)
}

func (c *container) setSequence(ctx context.Context, name string, n int64, cond blobstore.Conditions) (p blobstore.Properties, err error) {
	r, err := c.begin(ctx, name)
	if err != nil {
		return p, err
	}
	if n < 0 || cond.CreateOnly {
		return p, fmt.Errorf("%w: sequence number %d, create-only %t", blobstore.ErrInvalid, n, cond.CreateOnly)
	}
	if err := c.preflush(ctx, r); err != nil {
		return p, err
	}
	g, err := c.s.lockExclusive(ctx, c.name, name)
	if err != nil {
		return p, err
	}
	defer g.release()
	h, err := c.openPages(ctx, r)
	if err != nil {
		return p, err
	}
	defer h.put()
	st, err := c.s.settle(h, cond, true)
	if err != nil {
		return p, err
	}
	if st.dirty {
		if err := c.s.syncData(h.data); err != nil {
			return p, err
		}
	}
	st.gen++
	st.sequence, st.dirty, st.modified = n, false, c.s.stamp(time.Time{}).UnixNano()
	if err := c.s.writeState(h.state, &st, true); err != nil {
		return p, err
	}
	return h.properties(name)
}

// preflush writes dirty pages out while others may still write.
func (c *container) preflush(ctx context.Context, r ref) error {
	h, err := c.openPages(ctx, r)
	if err != nil {
		return err
	}
	defer h.put()
	st, err := h.count.readState()
	if err != nil || !st.dirty {
		return err
	}
	return c.s.syncData(h.data)
}
