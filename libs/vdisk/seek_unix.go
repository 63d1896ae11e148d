//go:build linux || darwin || freebsd

package vdisk

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/libs/extent"
)

// nextData returns the first range in [at, limit) that may hold data, or an empty range if the rest is absent. It
// moves the descriptor's own offset, which nothing here uses.
func nextData(f *os.File, at, limit int64) (have extent.Range, err error) {
	err = control(f, func(fd int) error {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil // no data from at on
		case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP):
			have = extent.Span(at, limit) // this file system does not tell
			return nil
		case err != nil:
			return err
		case start >= limit:
			return nil
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil // cut or punched in between
		case err != nil:
			return err
		}
		have = extent.Span(start, min(end, limit))
		return nil
	})
	return have, err
}
