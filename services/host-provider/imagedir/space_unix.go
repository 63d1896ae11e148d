//go:build unix

package imagedir

import "golang.org/x/sys/unix"

// freeSpace is the number of bytes that an unprivileged process may still write to the folder's volume.
func freeSpace(folder string) (int64, bool) {
	var s unix.Statfs_t
	if err := unix.Statfs(folder, &s); err != nil {
		return 0, false
	}
	return int64(s.Bavail) * int64(s.Bsize), true //nolint:unconvert // the types differ between systems
}
