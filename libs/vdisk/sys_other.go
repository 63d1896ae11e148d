//go:build unix && !linux

package vdisk

import (
	"errors"
	"os"

	"github.com/landfall-dr/landfall/libs/extent"
)

// datasync makes the file durable.
func datasync(f *os.File) error { return f.Sync() }

// punch is not available; zeros are written instead.
func punch(*os.File, extent.Range) error { return errors.ErrUnsupported }
