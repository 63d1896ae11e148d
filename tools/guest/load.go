package guest

import (
	"fmt"
	"strconv"
	"strings"
)

// Load is what `landfall-guest write SIZE [os|data]` prints, in JSON.
type Load struct {
	Disk   string `json:"disk"`
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
	TookMS int64  `json:"took_ms"` // until the file was durable, making of its content included
}

// Latency is what `landfall-guest latency DURATION [os|data]` prints, in JSON: durable writes of 4 KiB, in microseconds.
type Latency struct {
	Disk   string `json:"disk"`
	Writes int    `json:"writes"`
	P50US  int64  `json:"p50_us"`
	P99US  int64  `json:"p99_us"`
	MaxUS  int64  `json:"max_us"`
}

// ParseSize reads a number of bytes: "50MB" (10^6), "50MiB" (2^20), "4KiB", or plain bytes.
func ParseSize(s string) (int64, error) {
	unit, number := int64(1), s
	for _, u := range []struct {
		suffix string
		bytes  int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}} {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			unit, number = u.bytes, rest
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("size %q: a positive number with kB, MB, GB, KiB, MiB, GiB or nothing behind it", s)
	}
	return n * unit, nil
}
