package cli

import "net"

// listenPrivately listens. Who may connect to a socket is what its folder allows.
func listenPrivately(network, address string) (net.Listener, error) {
	return net.Listen(network, address)
}
