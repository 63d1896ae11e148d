//go:build unix

package bench

import (
	"os"
	"syscall"
)

// allocated is the space that a file takes on its volume, in bytes.
func allocated(info os.FileInfo) int64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return s.Blocks * 512
	}
	return info.Size()
}
