package vdisk

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/libs/extent"
)

// datasync makes the file's data durable. An image never changes its size while open.
func datasync(f *os.File) error {
	return control(f, func(fd int) error { return unix.Fdatasync(fd) })
}

// punch gives back the space of r; parts of blocks at its ends are zeroed. errors.ErrUnsupported means that the file
// system cannot.
func punch(f *os.File, r extent.Range) error {
	err := control(f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return errors.ErrUnsupported
	}
	return err
}
