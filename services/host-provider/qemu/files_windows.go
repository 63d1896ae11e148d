package qemu

import (
	"golang.org/x/sys/windows"
)

// syncDir: a folder cannot be synced there; NTFS journals the rename.
func syncDir(string) error { return nil }

// freeSpace is what an ordinary user may still write below dir, in bytes.
func freeSpace(dir string) (int64, error) {
	p, err := windows.UTF16PtrFromString(dir)
	if err != nil {
		return 0, err
	}
	var free uint64
	if err := windows.GetDiskFreeSpaceEx(p, &free, nil, nil); err != nil {
		return 0, err
	}
	return int64(free), nil
}
