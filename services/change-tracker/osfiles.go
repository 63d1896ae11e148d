package changetracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/hrl"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

// OpenImage opens an image through libs/vdisk, which locks it.
func (osFiles) OpenImage(path string, format Format) (image, error) {
	img, err := vdisk.Open(path, vdisk.Format(format), false)
	switch {
	case err == nil:
		return diskImage{img}, nil
	case errors.Is(err, vdisk.ErrNotFound):
		return nil, fmt.Errorf("%w: %w", ErrDiskMissing, err)
	case errors.Is(err, vdisk.ErrTruncated), errors.Is(err, vdisk.ErrSectorSize), errors.Is(err, vdisk.ErrBadFooter):
		return nil, fmt.Errorf("%w: %w", ErrDiskTruncated, err)
	case errors.Is(err, vdisk.ErrUnsupported), errors.Is(err, vdisk.ErrTooLarge):
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	case errors.Is(err, vdisk.ErrLocked):
		return nil, fmt.Errorf("%w: %w", ErrDiskInUse, err)
	}
	return nil, err
}

type diskImage struct{ *vdisk.Image }

// Allocated returns the parts of r that may hold something other than zero.
func (d diskImage) Allocated(r extent.Range) (*extent.Set, error) {
	set := &extent.Set{}
	for e, err := range d.Extents(context.Background(), r) { // bounded by the range; the caller's context is checked between
		if err != nil {
			return nil, err
		}
		set.Add(e)
	}
	return set, nil
}

func (f osFiles) CreateLog(path string, size int64, id, previous uuid.UUID) (logWriter, error) {
	w, err := hrl.Create(path, hrl.Options{
		UniqueID: id, PreviousUniqueID: previous, OriginalSize: uint64(size), CurrentSize: uint64(size), Now: f.now,
	})
	if err != nil {
		return nil, err
	}
	return w, nil
}

func (osFiles) OpenLog(path string) (logReader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r, err := hrl.Open(f, st.Size())
	if err == nil && !r.Closed() {
		err = errors.New("log was not closed")
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return sealedLog{f, r}, nil
}

type sealedLog struct {
	file *os.File
	log  *hrl.Reader
}

var _ io.ReaderAt = sealedLog{}

func (l sealedLog) ReadAt(p []byte, off int64) (int, error) { return l.file.ReadAt(p, off) }
func (l sealedLog) UniqueID() uuid.UUID                     { return l.log.Header().UniqueID }
func (l sealedLog) Close() error                            { return l.file.Close() }

func (l sealedLog) Entries(visit func(r extent.Range, pos int64) error) error {
	for e, err := range l.log.Entries(context.Background()) { // bounded by the log, which holds at most 1 Mi entries
		if err != nil {
			return err
		}
		r := extent.Range{Off: int64(e.ByteOffset), Len: int64(e.DataLength)}
		if err := visit(r, e.FilePosition); err != nil {
			return err
		}
	}
	return nil
}
