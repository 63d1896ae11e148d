//go:build !(linux || darwin)

package targettest

import "errors"

// limitFiles cannot be done here.
func limitFiles(uint64) error { return errors.New("files cannot be limited on this system") }
