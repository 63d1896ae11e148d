package vdisk

import (
	"errors"
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"

	"github.com/landfall-dr/landfall/libs/extent"
)

// fsctlSetZeroData is FSCTL_SET_ZERO_DATA (winioctl.h): in a sparse file it also gives the space back.
const fsctlSetZeroData = 0x000980C8

// lock takes the image for this owner, without waiting, by locking one byte far behind any disk: locks here are
// mandatory, and readers may read.
func lock(f *os.File) error {
	at := windows.Overlapped{Offset: math.MaxUint32, OffsetHigh: math.MaxInt32}
	err := windows.LockFileEx(windows.Handle(f.Fd()),
		windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &at)
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return ErrLocked
	} else if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// makeSparse lets a new file have absent space. A volume that cannot keeps a file that is not.
func makeSparse(f *os.File) error {
	var n uint32
	_ = windows.DeviceIoControl(windows.Handle(f.Fd()), windows.FSCTL_SET_SPARSE, nil, 0, nil, 0, &n, nil)
	return nil
}

func datasync(f *os.File) error { return f.Sync() }

// punch zeroes r, giving its space back if the file is sparse.
func punch(f *os.File, r extent.Range) error {
	in := struct{ from, beyond int64 }{r.Off, r.End()} // FILE_ZERO_DATA_INFORMATION
	var n uint32
	err := windows.DeviceIoControl(windows.Handle(f.Fd()), fsctlSetZeroData,
		(*byte)(unsafe.Pointer(&in)), uint32(unsafe.Sizeof(in)), nil, 0, &n, nil)
	if errors.Is(err, windows.ERROR_INVALID_FUNCTION) || errors.Is(err, windows.ERROR_NOT_SUPPORTED) {
		return errors.ErrUnsupported
	}
	return err
}
