//go:build !linux && !windows

package hrl

import (
	"errors"
	"os"
)

// datasync makes the file durable.
func datasync(f *os.File) error { return f.Sync() }

// allocate is not available; Append then learns of a full volume from the write itself.
func allocate(*os.File, int64, int64) error { return errors.ErrUnsupported }
