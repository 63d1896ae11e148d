//go:build !linux

package dir

import "testing"

func smallDisk(t *testing.T) string {
	t.Skip("needs a small file system")
	return ""
}

func child() bool { return false }
