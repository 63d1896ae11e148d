package hrl

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// datasync makes the file durable.
func datasync(f *os.File) error { return f.Sync() }

// allocate reserves space up to off+n without changing the file's size; the system gives back what lies behind the
// end when the file is closed. errors.ErrUnsupported means that it would not.
func allocate(f *os.File, off, n int64) error {
	size := off + n // FILE_ALLOCATION_INFO
	err := windows.SetFileInformationByHandle(windows.Handle(f.Fd()), windows.FileAllocationInfo,
		(*byte)(unsafe.Pointer(&size)), uint32(unsafe.Sizeof(size)))
	if err != nil && !isFull(err) {
		return errors.ErrUnsupported
	}
	return err
}
