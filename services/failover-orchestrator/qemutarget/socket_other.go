//go:build !linux

package qemutarget

import (
	"context"
	"net"
	"path/filepath"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// maxAddress is what a socket's address may have; 104 with the terminating zero on BSD and macOS.
const maxAddress = 103

// dial connects to a socket in dir.
func dial(ctx context.Context, dir, name string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", filepath.Join(dir, name))
}

// reachable says whether dir is short enough for the sockets in it.
func reachable(dir string) error {
	if len(filepath.Join(dir, MonitorSocket)) > maxAddress {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "target folder %s is too deep for QEMU's sockets: at most %d bytes", dir, maxAddress-len(MonitorSocket)-1)
	}
	return nil
}
