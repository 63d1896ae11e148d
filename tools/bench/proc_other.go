//go:build !linux

package bench

import (
	"errors"
	"time"
)

// peakOfTree is not measured here.
func peakOfTree(int) int64 { return 0 }

// cpuOf is not measured here.
func cpuOf(int) (all, system time.Duration, err error) {
	return 0, 0, errors.New("processor time of a running process is measured on Linux only")
}

// loadAverage is not known here.
func loadAverage() string { return "" }

// processorName is not known here.
func processorName() string { return "" }
