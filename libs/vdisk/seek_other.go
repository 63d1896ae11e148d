//go:build !(linux || darwin || freebsd)

package vdisk

import (
	"os"

	"github.com/landfall-dr/landfall/libs/extent"
)

// nextData does not know holes here: all of [at, limit) may hold data.
func nextData(_ *os.File, at, limit int64) (extent.Range, error) { return extent.Span(at, limit), nil }
