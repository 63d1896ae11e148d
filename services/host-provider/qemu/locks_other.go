//go:build !linux

package qemu

import "errors"

// openForWriting cannot be told here.
func openForWriting(string) (bool, error) {
	return false, errors.New("image locks cannot be read on this system")
}
