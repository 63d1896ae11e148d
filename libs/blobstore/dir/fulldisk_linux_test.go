package dir

import (
	"syscall"
	"testing"
)

// smallDisk mounts a file system of 4 MiB, or skips where that is not allowed.
func smallDisk(t *testing.T) string {
	root := t.TempDir()
	if err := syscall.Mount("none", root, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(root, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return root
}
