package vhdtarget

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"

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

// Disk starts one disk under a name that no other attempt uses, so that an orchestrator which lost its lease without
// noticing cannot give an unfinished file its final name. What earlier attempts left is removed.
func (s *Sink) Disk(ctx context.Context, d replica.DiskState) (replica.DiskSink, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	name := DiskFile(d.ID)
	if err := s.folder.removePartials(name); err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove what an earlier attempt left")
	}
	temp := filepath.Join(s.folder.dir, Partial(name)+"-"+rand.Text())
	image, err := vdisk.CreateVHD(temp, d.Size)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "make %s", name)
	}
	k := &disk{image: image, temp: temp, final: filepath.Join(s.folder.dir, name)}
	s.open = append(s.open, k)
	return k, nil
}

func (f *Folder) removePartials(name string) error {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), Partial(name)) {
			continue
		}
		if err := os.Remove(filepath.Join(f.dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
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
func (k *disk) Finish(ctx context.Context) error {
	err := errors.Join(k.image.Sync(), k.image.Close())
	k.image = nil
	if ctx.Err() != nil {
		return ctx.Err()
	}
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
