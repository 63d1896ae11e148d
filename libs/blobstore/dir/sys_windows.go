package dir

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// sharedCounters: without a shared mapping every page write excludes the others.
const sharedCounters = false

// tryLock locks n bytes for this handle, all or none, without waiting. Each byte is a region of its own, because
// a region can only be unlocked as a whole.
func tryLock(f *os.File, offset, n int64, exclusive bool) (bool, error) {
	flags := uint32(windows.LOCKFILE_FAIL_IMMEDIATELY)
	if exclusive {
		flags |= windows.LOCKFILE_EXCLUSIVE_LOCK
	}
	for i := range n {
		err := windows.LockFileEx(windows.Handle(f.Fd()), flags, 0, 1, 0, overlapped(offset+i))
		if err == nil {
			continue
		}
		uerr := unlock(f, offset, i)
		if errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING) {
			return false, uerr
		}
		return false, errors.Join(os.NewSyscallError("LockFileEx", err), uerr)
	}
	return true, nil
}

func unlock(f *os.File, offset, n int64) error {
	var errs error
	for i := range n {
		err := windows.UnlockFileEx(windows.Handle(f.Fd()), 0, 1, 0, overlapped(offset+i))
		errs = errors.Join(errs, os.NewSyscallError("UnlockFileEx", err))
	}
	return errs
}

// unlockHeld drops all of a guard's locks.
func unlockHeld(f *os.File, base int64, held *[lockBytes]bool) error {
	var errs error
	for i, is := range held {
		if is {
			errs = errors.Join(errs, unlock(f, base+int64(i), 1))
		}
	}
	*held = [lockBytes]bool{}
	return errs
}

func overlapped(offset int64) *windows.Overlapped {
	return &windows.Overlapped{Offset: uint32(offset), OffsetHigh: uint32(offset >> 32)}
}

func isFull(err error) bool {
	return errors.Is(err, windows.ERROR_DISK_FULL) || errors.Is(err, windows.ERROR_HANDLE_DISK_FULL)
}

func fdatasync(f *os.File) error { return f.Sync() }

// syncDir does nothing: NTFS journals names itself and folders cannot be flushed.
func syncDir(string) error { return nil }

func bootID() [16]byte { return randomBoot() }

func cloneFile(_, _ *os.File) bool { return false }

// nextData takes the whole rest for data.
func nextData(_ *os.File, offset, end int64) (from, to int64, ok bool, err error) {
	return offset, end, offset < end, nil
}

const (
	fsctlSetSparse   = 0x000900c4
	fsctlSetZeroData = 0x000980c8
)

// makeSparse lets the file have holes.
func makeSparse(f *os.File) error {
	var n uint32
	return os.NewSyscallError("FSCTL_SET_SPARSE",
		windows.DeviceIoControl(windows.Handle(f.Fd()), fsctlSetSparse, nil, 0, nil, 0, &n, nil))
}

// punchHole zeroes a range of a sparse file and frees it.
func punchHole(f *os.File, offset, length int64) (bool, error) {
	in := [2]int64{offset, offset + length}
	var n uint32
	err := windows.DeviceIoControl(windows.Handle(f.Fd()), fsctlSetZeroData,
		(*byte)(unsafe.Pointer(&in)), uint32(unsafe.Sizeof(in)), nil, 0, &n, nil)
	return err == nil, os.NewSyscallError("FSCTL_SET_ZERO_DATA", err)
}

func copyRange(_, _ *os.File, _, _ int64) (bool, error) { return false, nil }

// gone is never true: an open file cannot be removed.
func gone(*os.File) bool { return false }
