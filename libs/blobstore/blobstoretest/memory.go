package blobstoretest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"sync"
	"time"

	"github.com/tidwall/btree"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Memory is a blobstore.Store in memory. It keeps every rule of the interface, "durable" meaning as long
// as the value lives: a test models a crash by dropping the client, not the store. Its clock is virtual:
// it starts at a fixed instant, moves by one microsecond with each change and by Advance, so that leases
// never expire by themselves and runs with the same calls give the same times and ids.
type Memory struct {
	mu         sync.Mutex
	clock      func() time.Time // nil: virtual
	now        time.Time
	stamp      uint64 // ETags and snapshot ids
	containers btree.Map[string, *memContainer]
}

type memContainer struct {
	blobs      btree.Map[string, *memBlob]
	protection blobstore.Protection
}

// memChunk is the unit of copy-on-write of page blobs. A chunk is never changed once it is in a map.
const memChunk = 4096

type memBlob struct {
	props    blobstore.Properties
	data     []byte           // block blob; never changed in place
	chunks   map[int64][]byte // page blob: chunk number to memChunk bytes
	shared   bool             // chunks is also referenced by a snapshot
	lease    blobstore.LeaseID
	leaseDur time.Duration
	leaseEnd time.Time
	snaps    []*memBlob // oldest first
	created  time.Time  // what a write-once policy counts from
}

// NewMemory returns an empty store with a virtual clock.
func NewMemory() *Memory {
	return &Memory{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
}

// NewMemoryClock returns an empty store whose storage time is clock.
func NewMemoryClock(clock func() time.Time) *Memory { return &Memory{clock: clock} }

// Advance moves the virtual clock; d must not be negative. It has no effect on a store made by NewMemoryClock.
func (m *Memory) Advance(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = m.now.Add(d)
}

func (m *Memory) time() time.Time {
	if m.clock != nil {
		return m.clock().UTC()
	}
	return m.now
}

// touch stamps a changed blob. Caller holds mu.
func (m *Memory) touch(p *blobstore.Properties) {
	m.now = m.now.Add(time.Microsecond)
	m.stamp++
	p.ETag = blobstore.ETag(fmt.Sprintf("%x", m.stamp))
	p.LastModified = m.time()
}

// Now returns the virtual time.
func (m *Memory) Now(ctx context.Context) (time.Time, error) {
	if err := ctx.Err(); err != nil {
		return time.Time{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.time(), nil
}

// Close does nothing: the content stays readable.
func (m *Memory) Close() error { return nil }

// CreateContainer makes a container.
func (m *Memory) CreateContainer(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := blobstore.CheckContainerName(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.containers.Get(name); !ok {
		m.containers.Set(name, &memContainer{})
	}
	return nil
}

// ListContainers yields container names.
func (m *Memory) ListContainers(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := ctx.Err(); err != nil {
			yield("", err)
			return
		}
		var names []string
		m.mu.Lock()
		m.containers.Ascend(prefix, func(name string, _ *memContainer) bool {
			if !hasPrefix(name, prefix) {
				return false
			}
			names = append(names, name)
			return true
		})
		m.mu.Unlock()
		for _, n := range names {
			if !yield(n, nil) {
				return
			}
		}
	}
}

// Container returns a handle.
func (m *Memory) Container(name string) blobstore.Container { return memHandle{m, name} }

type memHandle struct {
	m    *Memory
	name string
}

func (h memHandle) Name() string { return h.name }

// enter checks context and name and locks the store; every caller unlocks it when err is nil.
func (h memHandle) enter(ctx context.Context, op, name string) (*memContainer, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s %s/%s: %w", op, h.name, name, err)
	}
	if err := blobstore.CheckContainerName(h.name); err != nil {
		return nil, err
	}
	if err := blobstore.CheckBlobName(name); err != nil {
		return nil, err
	}
	h.m.mu.Lock()
	c, ok := h.m.containers.Get(h.name)
	if !ok {
		h.m.mu.Unlock()
		return nil, fmt.Errorf("%s %s/%s: %w", op, h.name, name, blobstore.ErrNoContainer)
	}
	return c, nil
}

// find is enter plus the blob itself.
func (h memHandle) find(ctx context.Context, op, name string) (*memContainer, *memBlob, error) {
	c, err := h.enter(ctx, op, name)
	if err != nil {
		return nil, nil, err
	}
	b, ok := c.blobs.Get(name)
	if !ok {
		h.m.mu.Unlock()
		return nil, nil, fmt.Errorf("%s %s/%s: %w", op, h.name, name, blobstore.ErrNotFound)
	}
	return c, b, nil
}

// allow checks cond against a live blob. needLease is false for calls that a leased blob accepts without an id.
func (m *Memory) allow(b *memBlob, cond blobstore.Conditions, needLease bool) error {
	active := b.lease != "" && m.time().Before(b.leaseEnd)
	switch {
	case cond.Lease != "" && (!active || b.lease != cond.Lease):
		return blobstore.ErrLeaseConflict
	case cond.Lease == "" && active && needLease:
		return blobstore.ErrLeaseConflict
	case cond.IfSequence != nil && (!b.props.IsPages || b.props.Sequence != *cond.IfSequence):
		return blobstore.ErrConditionFailed
	case cond.IfMatch != "" && cond.IfMatch != b.props.ETag:
		return blobstore.ErrConditionFailed
	}
	return nil
}

func (b *memBlob) properties() blobstore.Properties {
	p := b.props
	p.Metadata = maps.Clone(p.Metadata)
	return p
}

func (h memHandle) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	none := blobstore.Properties{}
	fail := func(err error) (blobstore.Properties, error) {
		return none, fmt.Errorf("put %s/%s: %w", h.name, name, err)
	}
	if size < 0 || cond.IfSequence != nil {
		return fail(blobstore.ErrInvalid)
	}
	var data []byte
	if err := ctx.Err(); err == nil { // a cancelled put must not consume the body
		data = make([]byte, size)
		if n, err := io.ReadFull(body, data); err != nil {
			return fail(fmt.Errorf("%w: body ended after %d of %d bytes: %w", blobstore.ErrInvalid, n, size, err))
		}
	}
	c, err := h.enter(ctx, "put", name)
	if err != nil {
		return none, err
	}
	defer h.m.mu.Unlock()
	b, ok := c.blobs.Get(name)
	switch {
	case ok && cond.CreateOnly:
		return fail(blobstore.ErrExists)
	case ok && b.props.IsPages:
		return fail(fmt.Errorf("%w: is a page blob", blobstore.ErrInvalid))
	case ok:
		if err := h.m.allow(b, cond, true); err != nil {
			return fail(err)
		}
		if err := c.overwritable(); err != nil {
			return fail(err)
		}
	case cond.Lease != "":
		return fail(blobstore.ErrLeaseConflict)
	case cond.IfMatch != "":
		return fail(blobstore.ErrConditionFailed)
	default:
		b = &memBlob{props: blobstore.Properties{Name: name}, created: h.m.time()}
		c.blobs.Set(name, b)
	}
	b.data, b.props.Size = data, size
	h.m.touch(&b.props)
	return b.properties(), nil
}

func (h memHandle) Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, blobstore.Properties, error) {
	_, b, err := h.find(ctx, "get", name)
	if err != nil {
		return nil, blobstore.Properties{}, err
	}
	defer h.m.mu.Unlock()
	if b.props.IsPages || offset < 0 || offset > b.props.Size {
		return nil, blobstore.Properties{}, fmt.Errorf("get %s/%s at %d: %w", h.name, name, offset, blobstore.ErrInvalid)
	}
	end := b.props.Size
	if length >= 0 && length < end-offset {
		end = offset + length
	}
	return io.NopCloser(bytes.NewReader(b.data[offset:end])), b.properties(), nil
}

func (h memHandle) Stat(ctx context.Context, name string, snapshot blobstore.SnapshotID) (blobstore.Properties, error) {
	_, b, err := h.find(ctx, "stat", name)
	if err != nil {
		return blobstore.Properties{}, err
	}
	defer h.m.mu.Unlock()
	if b, err = b.version(snapshot); err != nil {
		return blobstore.Properties{}, fmt.Errorf("stat %s/%s@%s: %w", h.name, name, snapshot, err)
	}
	return b.properties(), nil
}

// version returns the blob itself or one of its snapshots.
func (b *memBlob) version(id blobstore.SnapshotID) (*memBlob, error) {
	if id == "" {
		return b, nil
	}
	for _, s := range b.snaps {
		if s.props.Snapshot == id {
			return s, nil
		}
	}
	return nil, blobstore.ErrNotFound
}

// memListBatch bounds how long List holds the store's lock.
const memListBatch = 256

func (h memHandle) List(ctx context.Context, prefix, after string) iter.Seq2[blobstore.Properties, error] {
	return func(yield func(blobstore.Properties, error) bool) {
		if err := blobstore.CheckContainerName(h.name); err != nil {
			yield(blobstore.Properties{}, err)
			return
		}
		pivot := max(prefix, after)
		for {
			if err := ctx.Err(); err != nil {
				yield(blobstore.Properties{}, fmt.Errorf("list %s: %w", h.name, err))
				return
			}
			h.m.mu.Lock()
			c, ok := h.m.containers.Get(h.name)
			if !ok {
				h.m.mu.Unlock()
				yield(blobstore.Properties{}, fmt.Errorf("list %s: %w", h.name, blobstore.ErrNoContainer))
				return
			}
			var batch []blobstore.Properties
			c.blobs.Ascend(pivot, func(name string, b *memBlob) bool {
				if !hasPrefix(name, prefix) {
					return name < prefix
				}
				if name > after || after == "" {
					batch = append(batch, b.properties())
				}
				return len(batch) < memListBatch
			})
			h.m.mu.Unlock()
			for _, p := range batch {
				if !yield(p, nil) {
					return
				}
			}
			if len(batch) < memListBatch {
				return
			}
			after = batch[len(batch)-1].Name
			pivot = after
		}
	}
}

func (h memHandle) Delete(ctx context.Context, name string, cond blobstore.Conditions) error {
	c, b, err := h.find(ctx, "delete", name)
	if err != nil {
		return err
	}
	defer h.m.mu.Unlock()
	if err := h.m.allow(b, cond, true); err != nil {
		return fmt.Errorf("delete %s/%s: %w", h.name, name, err)
	}
	if err := c.deletable(b, h.m.time()); err != nil {
		return fmt.Errorf("delete %s/%s: %w", h.name, name, err)
	}
	c.blobs.Delete(name)
	return nil
}

func hasPrefix(s, prefix string) bool { return len(s) >= len(prefix) && s[:len(prefix)] == prefix }
