package replica

import (
	"context"
	"iter"

	"github.com/landfall-dr/landfall/libs/extent"
)

// Sink receives the disks of a point.
type Sink interface {
	// Disk starts one disk, all zero. It is called once per disk, before any of its bytes, in order of the manifest.
	Disk(ctx context.Context, d DiskState) (DiskSink, error)
}

// DiskSink receives one disk. WriteAt is called from several goroutines, in no order, never twice for a byte, and not
// at all for absent space.
type DiskSink interface {
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Finish is called once, after the last write succeeded; not after an error.
	Finish(ctx context.Context) error
}

// MaterialiseOptions tune Materialise.
type MaterialiseOptions struct {
	// Parallel is how many ranges are read at once; default 4.
	Parallel int
	// Progress, when set, hears the bytes written so far and the bytes known to be needed, from any goroutine.
	Progress func(done, total int64)
}

// Materialised describes what Materialise wrote.
type Materialised struct {
	Manifest *Manifest
	// Checkpoint the copy began from; 0 when it replayed the chain from its beginning.
	Checkpoint Seq
	// Disks written, in the manifest's order.
	Disks []DiskState
	// Bytes written to the sink.
	Bytes int64
}

// Materialise writes the disks as they were at a point: the nearest checkpoint at or below it, and the journals
// above that. Nothing in the replica changes. ErrNotFound: no such point. ErrNotReachable: retention took what it
// needs.
func (r *Replica) Materialise(ctx context.Context, point Ordinal, sink Sink, o MaterialiseOptions) (Materialised, error) {
	panic("todo")
}

// Source is one disk at one manifest, read-only and safe for concurrent use.
type Source struct{}

// SourceAt opens a disk as it is at manifest seq: any kind, not only points, so that a comparing pass can read the
// state it compares with (rules 13, 14).
func (r *Replica) SourceAt(ctx context.Context, seq Seq, diskID string) (*Source, error) {
	panic("todo")
}

// Disk describes the disk.
func (s *Source) Disk() DiskState { panic("todo") }

// ReadAt fills p from off; absent space reads as zeros. off and len(p) need no alignment, but must lie in the disk.
func (s *Source) ReadAt(ctx context.Context, p []byte, off int64) error { panic("todo") }

// Extents yields the ranges in [off, off+length) that may hold anything but zeros, ascending.
func (s *Source) Extents(ctx context.Context, off, length int64) iter.Seq2[extent.Range, error] {
	panic("todo")
}
