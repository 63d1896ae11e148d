//go:build linux || darwin

package targettest

import (
	"os/signal"
	"syscall"
)

// limitFiles makes writes beyond so many bytes of a file fail, in this process and those that it starts, as on a full
// volume. 0 only says whether that can be done here.
func limitFiles(most uint64) error {
	if most == 0 {
		return nil
	}
	signal.Ignore(syscall.SIGXFSZ)
	return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: most, Max: most})
}
