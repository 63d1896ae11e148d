package blobstoretest

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func (h memHandle) CreatePages(ctx context.Context, name string, size int64, metadata map[string]string, cond blobstore.Conditions) (blobstore.Properties, error) {
	fail := func(err error) (blobstore.Properties, error) {
		return blobstore.Properties{}, fmt.Errorf("create pages %s/%s: %w", h.name, name, err)
	}
	if err := blobstore.CheckPageBlobSize(size); err != nil {
		return fail(err)
	}
	if err := blobstore.CheckMetadata(metadata); err != nil {
		return fail(err)
	}
	c, err := h.enter(ctx, "create pages", name)
	if err != nil {
		return blobstore.Properties{}, err
	}
	defer h.m.mu.Unlock()
	if _, ok := c.blobs.Get(name); ok {
		return fail(blobstore.ErrExists)
	}
	if cond.Lease != "" {
		return fail(blobstore.ErrLeaseConflict)
	}
	if cond.IfMatch != "" || cond.IfSequence != nil {
		return fail(blobstore.ErrConditionFailed)
	}
	b := &memBlob{
		props:  blobstore.Properties{Name: name, Size: size, IsPages: true, Metadata: maps.Clone(metadata)},
		chunks: map[int64][]byte{}, created: h.m.time(),
	}
	h.m.touch(&b.props)
	c.blobs.Set(name, b)
	return b.properties(), nil
}

// change runs fn on a page blob under cond and stamps it.
func (h memHandle) change(ctx context.Context, op, name string, cond blobstore.Conditions, fn func(*memBlob) error) (blobstore.Properties, error) {
	c, b, err := h.find(ctx, op, name)
	if err != nil {
		return blobstore.Properties{}, err
	}
	defer h.m.mu.Unlock()
	switch {
	case !b.props.IsPages:
		err = fmt.Errorf("%w: is a block blob", blobstore.ErrInvalid)
	case cond.CreateOnly:
		err = fmt.Errorf("%w: create-only", blobstore.ErrInvalid)
	default:
		err = h.m.allow(b, cond, true)
	}
	if err == nil {
		err = c.overwritable()
	}
	if err == nil {
		err = fn(b)
	}
	if err != nil {
		return blobstore.Properties{}, fmt.Errorf("%s %s/%s: %w", op, h.name, name, err)
	}
	h.m.touch(&b.props)
	return b.properties(), nil
}

// own makes the chunk map private before a change.
func (b *memBlob) own() {
	if b.shared {
		b.chunks, b.shared = maps.Clone(b.chunks), false
	}
}

func (h memHandle) WritePages(ctx context.Context, name string, offset int64, data []byte, cond blobstore.Conditions) (blobstore.Properties, error) {
	return h.change(ctx, "write pages", name, cond, func(b *memBlob) error {
		if len(data) > blobstore.MaxPageWrite {
			return fmt.Errorf("%w: %d bytes in one write", blobstore.ErrInvalid, len(data))
		}
		if err := blobstore.CheckPages(offset, int64(len(data)), b.props.Size); err != nil {
			return err
		}
		b.own()
		for len(data) > 0 {
			no, at := offset/memChunk, offset%memChunk
			chunk := make([]byte, memChunk)
			copy(chunk, b.chunks[no])
			n := copy(chunk[at:], data)
			b.chunks[no] = chunk
			data, offset = data[n:], offset+int64(n)
		}
		return nil
	})
}

func (h memHandle) ClearPages(ctx context.Context, name string, offset, length int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	return h.change(ctx, "clear pages", name, cond, func(b *memBlob) error {
		if err := blobstore.CheckPages(offset, length, b.props.Size); err != nil {
			return err
		}
		b.own()
		for no, old := range b.chunks {
			from, to := max(offset, no*memChunk), min(offset+length, (no+1)*memChunk)
			switch {
			case from >= to:
			case to-from == memChunk:
				delete(b.chunks, no)
			default:
				chunk := slices.Clone(old)
				clear(chunk[from-no*memChunk : to-no*memChunk])
				b.chunks[no] = chunk
			}
		}
		return nil
	})
}

// pages finds a page blob or snapshot; the caller unlocks when err is nil.
func (h memHandle) pages(ctx context.Context, op, name string, snapshot blobstore.SnapshotID) (*memBlob, error) {
	_, b, err := h.find(ctx, op, name)
	if err != nil {
		return nil, err
	}
	if !b.props.IsPages {
		err = fmt.Errorf("%w: is a block blob", blobstore.ErrInvalid)
	} else {
		b, err = b.version(snapshot)
	}
	if err != nil {
		h.m.mu.Unlock()
		return nil, fmt.Errorf("%s %s/%s@%s: %w", op, h.name, name, snapshot, err)
	}
	return b, nil
}

func (h memHandle) ReadPages(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset int64, buf []byte) error {
	b, err := h.pages(ctx, "read pages", name, snapshot)
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	if err := blobstore.CheckRange(offset, int64(len(buf)), b.props.Size); err != nil {
		return fmt.Errorf("read pages %s/%s: %w", h.name, name, err)
	}
	for len(buf) > 0 {
		no, at := offset/memChunk, offset%memChunk
		n := min(int64(len(buf)), memChunk-at)
		if chunk, ok := b.chunks[no]; ok {
			copy(buf[:n], chunk[at:])
		} else {
			clear(buf[:n])
		}
		buf, offset = buf[n:], offset+n
	}
	return nil
}

func (h memHandle) PageRanges(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset, length int64) iter.Seq2[blobstore.PageRange, error] {
	return func(yield func(blobstore.PageRange, error) bool) {
		b, err := h.pages(ctx, "page ranges", name, snapshot)
		if err != nil {
			yield(blobstore.PageRange{}, err)
			return
		}
		var ranges []blobstore.PageRange
		if err = blobstore.CheckRange(offset, length, b.props.Size); err == nil {
			for _, no := range slices.Sorted(maps.Keys(b.chunks)) {
				from, to := max(offset, no*memChunk), min(offset+length, (no+1)*memChunk)
				if from >= to {
					continue
				}
				if n := len(ranges); n > 0 && ranges[n-1].Offset+ranges[n-1].Length == from {
					ranges[n-1].Length += to - from
				} else {
					ranges = append(ranges, blobstore.PageRange{Offset: from, Length: to - from})
				}
			}
		}
		h.m.mu.Unlock()
		if err != nil {
			yield(blobstore.PageRange{}, fmt.Errorf("page ranges %s/%s: %w", h.name, name, err))
			return
		}
		for _, r := range ranges {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func (h memHandle) SetSequence(ctx context.Context, name string, n int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	return h.change(ctx, "set sequence", name, cond, func(b *memBlob) error {
		if n < 0 {
			return fmt.Errorf("%w: sequence number %d", blobstore.ErrInvalid, n)
		}
		b.props.Sequence = n
		return nil
	})
}

func (h memHandle) SnapshotPages(ctx context.Context, name string, metadata map[string]string, cond blobstore.Conditions) (blobstore.SnapshotID, blobstore.Properties, error) {
	fail := func(err error) (blobstore.SnapshotID, blobstore.Properties, error) {
		return "", blobstore.Properties{}, fmt.Errorf("snapshot %s/%s: %w", h.name, name, err)
	}
	if err := blobstore.CheckMetadata(metadata); err != nil {
		return fail(err)
	}
	b, err := h.pages(ctx, "snapshot", name, "")
	if err != nil {
		return "", blobstore.Properties{}, err
	}
	defer h.m.mu.Unlock()
	if cond.CreateOnly {
		return fail(fmt.Errorf("%w: create-only", blobstore.ErrInvalid))
	}
	if err := h.m.allow(b, cond, false); err != nil {
		return fail(err)
	}
	h.m.stamp++
	h.m.now = h.m.now.Add(time.Microsecond)
	s := &memBlob{props: b.properties(), chunks: b.chunks}
	s.props.Snapshot = blobstore.SnapshotID(fmt.Sprintf("%016x", h.m.stamp))
	if metadata != nil {
		s.props.Metadata = maps.Clone(metadata)
	}
	b.shared = true
	b.snaps = append(b.snaps, s)
	return s.props.Snapshot, s.properties(), nil
}

func (h memHandle) ListSnapshots(ctx context.Context, name string) iter.Seq2[blobstore.Properties, error] {
	return func(yield func(blobstore.Properties, error) bool) {
		b, err := h.pages(ctx, "list snapshots", name, "")
		if err != nil {
			yield(blobstore.Properties{}, err)
			return
		}
		snaps := slices.Clone(b.snaps)
		h.m.mu.Unlock()
		for _, s := range snaps {
			if !yield(s.properties(), nil) { // a snapshot's properties never change
				return
			}
		}
	}
}

func (h memHandle) DeleteSnapshot(ctx context.Context, name string, snapshot blobstore.SnapshotID) error {
	b, err := h.pages(ctx, "delete snapshot", name, "")
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	i := slices.IndexFunc(b.snaps, func(s *memBlob) bool { return s.props.Snapshot == snapshot })
	if i < 0 {
		return fmt.Errorf("delete snapshot %s/%s@%s: %w", h.name, name, snapshot, blobstore.ErrNotFound)
	}
	b.snaps = slices.Delete(slices.Clone(b.snaps), i, i+1)
	return nil
}

func (h memHandle) AcquireLease(ctx context.Context, name string, id blobstore.LeaseID, duration time.Duration) error {
	if err := blobstore.CheckLeaseID(id); err != nil {
		return fmt.Errorf("acquire lease %s/%s: %w", h.name, name, err)
	}
	if err := blobstore.CheckLeaseDuration(duration); err != nil {
		return fmt.Errorf("acquire lease %s/%s: %w", h.name, name, err)
	}
	_, b, err := h.find(ctx, "acquire lease", name)
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	now := h.m.time()
	if b.lease != "" && b.lease != id && now.Before(b.leaseEnd) {
		return fmt.Errorf("acquire lease %s/%s: %w", h.name, name, blobstore.ErrLeaseConflict)
	}
	b.lease, b.leaseDur, b.leaseEnd = id, duration, now.Add(duration)
	return nil
}

func (h memHandle) RenewLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	_, b, err := h.find(ctx, "renew lease", name)
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	now := h.m.time()
	if id == "" || b.lease != id || !now.Before(b.leaseEnd) {
		return fmt.Errorf("renew lease %s/%s: %w", h.name, name, blobstore.ErrLeaseConflict)
	}
	b.leaseEnd = now.Add(b.leaseDur)
	return nil
}

func (h memHandle) ReleaseLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	_, b, err := h.find(ctx, "release lease", name)
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	if id == "" || b.lease != id {
		return fmt.Errorf("release lease %s/%s: %w", h.name, name, blobstore.ErrLeaseConflict)
	}
	b.lease = ""
	return nil
}

func (h memHandle) BreakLease(ctx context.Context, name string) error {
	_, b, err := h.find(ctx, "break lease", name)
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	b.lease = ""
	return nil
}
