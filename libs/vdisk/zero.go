package vdisk

import (
	"bytes"
	"encoding/binary"
)

// zeros is what data is compared with and what zeroing writes: small enough to stay in the first-level cache.
var zeros [4096]byte

// IsZero reports whether every byte of p is zero. An empty p is.
func IsZero(p []byte) bool {
	if len(p) >= 8 && binary.LittleEndian.Uint64(p) != 0 { // most data is decided here
		return false
	}
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
