package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// writeLock is the byte of an image that a QEMU holds a lock on while it may write (its RAW_LOCK_PERM_BASE and the bit of
// BLK_PERM_WRITE).
const writeLock = 101

// openForWriting says whether a process on this host holds an image writable, by the locks that every QEMU takes.
func openForWriting(path string) (bool, error) {
	if !filepath.IsAbs(path) {
		return false, fmt.Errorf("%s: its folder is not known", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: writeLock, Len: 1}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l)
	return l.Type != unix.F_UNLCK, errors.Join(err, f.Close())
}
