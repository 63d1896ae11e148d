package hrl

import (
	"errors"

	"golang.org/x/sys/windows"
)

// isFull reports whether err says that the volume has no space left.
func isFull(err error) bool {
	return errors.Is(err, windows.ERROR_DISK_FULL) || errors.Is(err, windows.ERROR_HANDLE_DISK_FULL)
}

// syncDir does nothing: NTFS journals folder entries and offers no handle to flush one.
func syncDir(string) error { return nil }
