package dir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func (r ref) snapshot(id blobstore.SnapshotID) string {
	return filepath.Join(r.pages(), snapsDir, string(id))
}

// validSnapshot keeps ids that are not ours out of paths: 16 hex digits, the time in ticks.
func validSnapshot(id blobstore.SnapshotID) bool {
	if len(id) != 16 {
		return false
	}
	_, err := strconv.ParseUint(string(id), 16, 64)
	return err == nil
}

func (c *container) openSnapshot(r ref, id blobstore.SnapshotID) (*handle, error) {
	if !validSnapshot(id) {
		return nil, fmt.Errorf("%w: snapshot %q", blobstore.ErrNotFound, id)
	}
	for {
		h, _, err := c.s.handles.get(r.snapshot(id), false)
		if err != nil {
			return nil, notFound(err)
		}
		if !h.deleted() {
			return h, nil
		}
		h.forget()
		h.put()
	}
}

func (m pageMeta) snapshotProps(name string) blobstore.Properties {
	p := blobstore.Properties{
		Name: name, Snapshot: blobstore.SnapshotID(m.Snapshot), Size: m.Size, ETag: m.ETag,
		Sequence: m.Sequence, IsPages: true, Metadata: maps.Clone(m.Metadata),
	}
	if m.Modified != nil {
		p.LastModified = *m.Modified
	}
	return p
}

// SnapshotPages copies the data aside and renames it into place. Page writers wait for the copy, which is
// instant where the file system can share extents; lease calls do not wait.
func (c *container) SnapshotPages(ctx context.Context, name string, metadata map[string]string, cond blobstore.Conditions) (blobstore.SnapshotID, blobstore.Properties, error) {
	p, err := c.snapshotPages(ctx, name, metadata, cond)
	return p.Snapshot, p, c.wrap("snapshot", name, err)
}

func (c *container) snapshotPages(ctx context.Context, name string, metadata map[string]string, cond blobstore.Conditions) (none blobstore.Properties, err error) {
	r, err := c.begin(ctx, name)
	if err == nil {
		err = blobstore.CheckMetadata(metadata)
	}
	if err == nil && cond.CreateOnly {
		err = fmt.Errorf("%w: create-only", blobstore.ErrInvalid)
	}
	if err != nil {
		return none, err
	}
	g, err := c.s.lockExclusive(ctx, c.name, name)
	if err != nil {
		return none, err
	}
	defer g.release()
	h, err := c.openPages(ctx, r)
	if err != nil {
		return none, err
	}
	defer h.put()
	st, err := c.s.settle(h, cond, false)
	if err != nil {
		return none, err
	}
	id := c.s.stamp(time.Unix(0, st.lastSnap))
	st.lastSnap = id.UnixNano()
	if err := c.s.writeState(h.state, &st, true); err != nil {
		return none, err
	}
	p, err := h.properties(name)
	if err != nil {
		return none, err
	}
	if err := g.drop(lockState); err != nil {
		return none, err
	}
	meta := h.meta
	if metadata != nil {
		meta.Metadata = maps.Clone(metadata)
	}
	meta.Snapshot, meta.ETag, meta.Sequence = fmt.Sprintf("%016x", id.UnixNano()), p.ETag, p.Sequence
	meta.Modified = &p.LastModified

	tmp := c.s.tempPath()
	defer os.RemoveAll(tmp)
	if err := c.s.copySnapshot(ctx, h.data, tmp, meta); err != nil {
		return none, err
	}
	snaps := filepath.Join(r.pages(), snapsDir)
	if err := os.Rename(tmp, filepath.Join(snaps, meta.Snapshot)); err != nil {
		return none, err
	}
	return meta.snapshotProps(name), c.s.syncDir(snaps)
}

// copyBlock is how much is copied between two looks at the context.
const copyBlock = 8 << 20

// copySnapshot makes a snapshot's folder durable under a temporary name.
func (s *Store) copySnapshot(ctx context.Context, src *os.File, path string, meta pageMeta) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	dst, err := os.OpenFile(filepath.Join(path, dataFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if !cloneFile(dst, src) {
		if err = makeSparse(dst); err == nil {
			err = dst.Truncate(meta.Size)
		}
		if err == nil {
			err = copySparse(ctx, dst, src, meta.Size)
		}
	}
	if err == nil {
		err = s.syncFile(dst)
	}
	if err = errors.Join(err, dst.Close()); err != nil {
		return err
	}
	raw, err := json.Marshal(meta)
	if err != nil {
		return err
	}
	if err := s.writeFile(filepath.Join(path, metaFile), append(raw, '\n')); err != nil {
		return err
	}
	return s.syncDir(path)
}

// copySparse copies what src holds and leaves its holes.
func copySparse(ctx context.Context, dst, src *os.File, size int64) error {
	var buf []byte
	for at := int64(0); at < size; {
		from, to, ok, err := nextData(src, at, size)
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		for ; from < to; from += copyBlock {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(to-from, copyBlock)
			if buf == nil {
				done, err := copyRange(dst, src, from, n)
				if err != nil {
					return err
				}
				if done {
					continue
				}
				buf = make([]byte, copyBlock)
			}
			if _, err := src.ReadAt(buf[:n], from); err != nil {
				return err
			}
			if _, err := dst.WriteAt(buf[:n], from); err != nil {
				return err
			}
		}
		at = to
	}
	return nil
}

// ListSnapshots yields snapshots by age: their ids sort so.
func (c *container) ListSnapshots(ctx context.Context, name string) iter.Seq2[blobstore.Properties, error] {
	return func(yield func(blobstore.Properties, error) bool) {
		fail := func(err error) { yield(blobstore.Properties{}, c.wrap("list snapshots", name, err)) }
		r, err := c.begin(ctx, name)
		if err != nil {
			fail(err)
			return
		}
		h, err := c.openPages(ctx, r)
		if err != nil {
			fail(err)
			return
		}
		h.put()
		d, err := os.Open(filepath.Join(r.pages(), snapsDir))
		if err != nil {
			fail(notFound(err))
			return
		}
		ids, err := d.Readdirnames(-1)
		if err = errors.Join(err, d.Close()); err != nil {
			fail(err)
			return
		}
		slices.Sort(ids)
		for _, id := range ids {
			if !validSnapshot(blobstore.SnapshotID(id)) {
				continue
			}
			p, err := c.snapshotMeta(ctx, r, blobstore.SnapshotID(id))
			if errors.Is(err, blobstore.ErrNotFound) {
				continue // deleted meanwhile
			}
			if err != nil {
				fail(err)
				return
			}
			if !yield(p, nil) {
				return
			}
		}
	}
}

func (c *container) snapshotMeta(ctx context.Context, r ref, id blobstore.SnapshotID) (blobstore.Properties, error) {
	if err := c.s.ready(ctx); err != nil {
		return blobstore.Properties{}, err
	}
	return c.statPages(ctx, r, id)
}

// DeleteSnapshot removes one snapshot.
func (c *container) DeleteSnapshot(ctx context.Context, name string, snapshot blobstore.SnapshotID) error {
	const op = "delete snapshot"
	r, err := c.begin(ctx, name)
	if err != nil {
		return c.wrap(op, name, err)
	}
	if !validSnapshot(snapshot) {
		return c.wrap(op, name, blobstore.ErrNotFound)
	}
	h, err := c.openPages(ctx, r)
	if err != nil {
		return c.wrap(op, name, err)
	}
	h.put()
	tmp := c.s.tempPath()
	c.s.handles.drop(r.snapshot(snapshot))
	if err := os.Rename(r.snapshot(snapshot), tmp); err != nil {
		return c.wrap(op, name, notFound(err))
	}
	err = c.s.syncDir(filepath.Join(r.pages(), snapsDir))
	discard(tmp)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // the blob went meanwhile, and the snapshot with it
	}
	return c.wrap(op, name, err)
}
