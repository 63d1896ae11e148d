package failoverorchestrator

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Bounds of reading points. A disk that is open for reading keeps the map of its changes, and up to 5 MiB of segments
// for each read that it serves at once (replica.Source).
const (
	// maxSources is how many disks are open at once, of all points; the one that was not read for longest is given up.
	maxSources = 16
	// sourceReads is how many reads of one disk run at once, allReads of all disks.
	sourceReads = 4
	allReads    = 16
	// openTimeout bounds the opening of a disk, which goes on when who asked for it is gone: the next one finds it done.
	openTimeout = 10 * time.Minute
	// maxOpening is how many disks are opened at once.
	maxOpening = 4

	// MaxPointRead is the longest read of a point, in bytes.
	MaxPointRead = 1 << 20
	// maxPointExtents bounds the answer of a map, mapStep how much of a disk one call looks through, in bytes.
	maxPointExtents = 4096
	mapStep         = 4 << 30
	// mapGrain is the least that a map tells apart: shorter gaps are told as data, in bytes.
	mapGrain = 32 << 10
)

// PointReader reads the disks of recovery points as they were, from storage. It keeps a bounded number of them open and is
// safe for concurrent use. Pin a point before it is read, where that is possible.
type PointReader struct {
	reads   *semaphore.Weighted
	opening *semaphore.Weighted

	mu    sync.Mutex
	open  map[sourceKey]*openSource
	clock uint64 // of uses
}

type sourceKey struct {
	lineage replica.Lineage
	seq     replica.Seq
	disk    string
}

// openSource is a disk that is open or being opened. Everything but used is set before ready is closed.
type openSource struct {
	ready chan struct{}
	err   error
	src   *replica.Source
	reads *semaphore.Weighted
	used  uint64 // guarded by PointReader.mu
}

// NewPointReader returns a reader that has nothing open.
func NewPointReader() *PointReader {
	return &PointReader{reads: semaphore.NewWeighted(allReads), opening: semaphore.NewWeighted(maxOpening), open: map[sourceKey]*openSource{}}
}

// Read fills p from off of a disk at a manifest. Segments are verified by their checksums.
func (r *PointReader) Read(ctx context.Context, rep *replica.Replica, seq replica.Seq, disk string, p []byte, off int64) error {
	return r.with(ctx, rep, seq, disk, func(s *replica.Source) error {
		if err := within(s.Disk(), off, int64(len(p))); err != nil {
			return err
		}
		return replicaError(s.ReadAt(ctx, p, off), "read disk %s at %d", disk, off)
	})
}

// Map says where a range of a disk may hold data, at most 4096 parts and 4 GiB of the disk at a time: the answer covers
// the range up to next.
func (r *PointReader) Map(ctx context.Context, rep *replica.Replica, seq replica.Seq, disk string, at extent.Range) (parts []extent.Range, next int64, err error) {
	err = r.with(ctx, rep, seq, disk, func(s *replica.Source) error {
		if err := within(s.Disk(), at.Off, at.Len); err != nil {
			return err
		}
		parts, next, err = coarse(ctx, s, at)
		return replicaError(err, "map disk %s", disk)
	})
	return parts, next, err
}

// coarse joins extents that lie closer than mapGrain.
func coarse(ctx context.Context, s *replica.Source, at extent.Range) (parts []extent.Range, next int64, err error) {
	next = min(at.End(), at.Off+mapStep)
	for e, err := range s.Extents(ctx, at.Off, next-at.Off) {
		if err != nil {
			return nil, 0, err
		}
		if n := len(parts); n > 0 && e.Off-parts[n-1].End() < mapGrain {
			parts[n-1].Len = e.End() - parts[n-1].Off
			continue
		}
		if len(parts) == maxPointExtents {
			return parts, parts[len(parts)-1].End(), nil
		}
		parts = append(parts, e)
	}
	return parts, next, nil
}

func within(d replica.DiskState, off, length int64) error {
	if off < 0 || length <= 0 || off > d.Size || length > d.Size-off {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "[%d, +%d) is not within disk %s of %d bytes", off, length, d.ID, d.Size)
	}
	return nil
}

// with runs do with an open disk, while fewer than the bound do. A disk may have been opened for an earlier pin, from a
// checkpoint that nothing keeps any more: then it is opened anew, once.
func (r *PointReader) with(ctx context.Context, rep *replica.Replica, seq replica.Seq, disk string, do func(*replica.Source) error) error {
	key := sourceKey{rep.Lineage(), seq, disk}
	o, err := r.get(ctx, rep, key)
	if err != nil {
		return err
	}
	if err = r.use(ctx, o, do); !errors.Is(err, replica.ErrNotReachable) {
		return err
	}
	r.mu.Lock()
	if r.open[key] == o {
		delete(r.open, key)
	}
	r.mu.Unlock()
	if _, err := rep.Refresh(ctx); err != nil { // with what retention has given up since
		return chainError(err, "read the chain")
	}
	if o, err = r.get(ctx, rep, key); err != nil {
		return err
	}
	return r.use(ctx, o, do)
}

func (r *PointReader) use(ctx context.Context, o *openSource, do func(*replica.Source) error) error {
	for _, s := range []*semaphore.Weighted{o.reads, r.reads} {
		if err := s.Acquire(ctx, 1); err != nil {
			return err
		}
		defer s.Release(1)
	}
	return do(o.src)
}

// get finds a disk that is open, or opens it.
func (r *PointReader) get(ctx context.Context, rep *replica.Replica, key sourceKey) (*openSource, error) {
	r.mu.Lock()
	o := r.open[key]
	if o == nil {
		if !r.room() {
			r.mu.Unlock()
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "%d disks of points are being opened already", maxSources)
		}
		o = &openSource{ready: make(chan struct{}), reads: semaphore.NewWeighted(sourceReads)}
		r.open[key] = o
		go r.fill(context.WithoutCancel(ctx), rep, key, o)
	}
	r.clock++
	o.used = r.clock
	r.mu.Unlock()
	select {
	case <-o.ready:
		return o, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// room makes place for one more: false when all are being opened. The caller holds mu.
func (r *PointReader) room() bool {
	for len(r.open) >= maxSources {
		var oldest sourceKey
		for key, o := range r.open {
			select {
			case <-o.ready:
			default:
				continue
			}
			if old := r.open[oldest]; old == nil || o.used < old.used {
				oldest = key
			}
		}
		if r.open[oldest] == nil {
			return false
		}
		delete(r.open, oldest)
	}
	return true
}

func (r *PointReader) fill(ctx context.Context, rep *replica.Replica, key sourceKey, o *openSource) {
	defer close(o.ready)
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if o.err = r.opening.Acquire(ctx, 1); o.err == nil {
		defer r.opening.Release(1)
		o.src, o.err = rep.SourceAt(ctx, key.seq, key.disk)
	}
	if o.err != nil {
		o.err = replicaError(o.err, "open disk %s", key.disk)
		r.mu.Lock()
		delete(r.open, key) // the next one tries again
		r.mu.Unlock()
	}
}

// forget gives up what is open of a manifest, unless it is in use elsewhere, where it lives on until then.
func (r *PointReader) forget(lineage replica.Lineage, seq replica.Seq) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, o := range r.open {
		select {
		case <-o.ready:
			if key.lineage == lineage && key.seq == seq {
				delete(r.open, key)
			}
		default:
		}
	}
}

// pointDisk finds a disk in a point's manifest.
func pointDisk(m *replica.Manifest, id string) (replica.Disk, error) {
	i := slices.IndexFunc(m.Disks, func(d replica.Disk) bool { return d.ID == id })
	if i < 0 {
		return replica.Disk{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND, "point %d has no disk %s", m.Ordinal(), id).With("disk", id)
	}
	return m.Disks[i], nil
}
