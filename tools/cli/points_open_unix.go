//go:build unix

package cli

import (
	"net"
	"syscall"
)

// listenPrivately listens on a Unix socket that nobody else may connect to from its first moment. The mask is the
// process's: whatever else it makes meanwhile is more private than needed.
func listenPrivately(network, address string) (net.Listener, error) {
	if network == "unix" {
		defer syscall.Umask(syscall.Umask(0o177))
	}
	return net.Listen(network, address)
}
