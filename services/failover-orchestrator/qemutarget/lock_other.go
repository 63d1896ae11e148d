//go:build !(linux || darwin || freebsd)

package qemutarget

import (
	"errors"
	"os"
	"os/exec"
	"runtime"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var errHeld = errors.New("the folder's lock is held")

// supported is why target qemu does not work here: QEMU cannot be detached (-daemonize) on this system.
func supported() error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, "target qemu runs on Linux, macOS and FreeBSD, not on %s", runtime.GOOS)
}

func tryLock(string) (*os.File, error) { return nil, supported() }

// held: nothing runs where nothing can be started.
func held(string) (bool, error) { return false, nil }

func detach(*exec.Cmd, *os.File) {}
