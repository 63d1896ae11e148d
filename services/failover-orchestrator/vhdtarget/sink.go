package vhdtarget

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// DiskFile is the name of a disk's VHD in the folder.
func DiskFile(disk string) string { return disk + ".vhd" }

// Sink receives the disks of a point as fixed VHDs. Close it after Materialise, whatever that returned.
func (f *Folder) Sink() *Sink { return &Sink{folder: f} }

// Sink implements replica.Sink.
type Sink struct {
	folder *Folder
	open   []*disk
}

// Disk starts one disk in a file of another name; what an earlier attempt left is overwritten.
func (s *Sink) Disk(_ context.Context, d replica.DiskState) (replica.DiskSink, error) {
	name := DiskFile(d.ID)
	temp := filepath.Join(s.folder.dir, partial(name))
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove what an earlier attempt left")
	}
	image, err := vdisk.CreateVHD(temp, d.Size)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "make %s", name)
	}
	k := &disk{image: image, temp: temp, final: filepath.Join(s.folder.dir, name)}
	s.open = append(s.open, k)
	return k, nil
}

// Close closes what a failed Materialise left open.
func (s *Sink) Close() error {
	var problems []error
	for _, k := range s.open {
		if k.image != nil {
			problems = append(problems, k.image.Close())
			k.image = nil
		}
	}
	return errors.Join(problems...)
}

type disk struct {
	image       vdisk.Disk
	temp, final string
}

func (k *disk) WriteAt(_ context.Context, p []byte, off int64) error {
	if _, err := k.image.WriteAt(p, off); err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "write %s", filepath.Base(k.final))
	}
	return nil
}

// Finish makes the disk durable and gives it its name.
func (k *disk) Finish(context.Context) error {
	err := errors.Join(k.image.Sync(), k.image.Close())
	k.image = nil
	if err == nil {
		err = os.Rename(k.temp, k.final)
	}
	if err == nil {
		err = syncFolder(filepath.Dir(k.final))
	}
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "finish %s", filepath.Base(k.final))
	}
	return nil
}
