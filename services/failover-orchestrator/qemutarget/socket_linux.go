package qemutarget

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// dial connects to a socket in dir. Its address goes by way of an open folder, because an address has 107 bytes at most
// and the folder may lie deep.
func dial(ctx context.Context, dir, name string) (net.Conn, error) {
	folder, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", filepath.Join(fmt.Sprintf("/proc/self/fd/%d", folder.Fd()), name))
}

// reachable is nil: the depth of a folder does not matter here.
func reachable(string) error { return nil }
