package changetracker

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
)

// Config of the change-tracker.
type Config struct {
	// StateDir keeps which machines are attached. It survives restarts.
	StateDir string `koanf:"state_dir"`
	// NBDAddress is where disks are exported: "host:port", or "unix:PATH". NBD has no authentication here: loopback
	// or a Unix socket only.
	NBDAddress string `koanf:"nbd_address"`
	// MaxLogEntries bounds the entries of a disk's unshipped logs, and so the memory of reading them; beyond it
	// changes are kept as dirty extents.
	MaxLogEntries int64 `koanf:"max_log_entries"`
}

// Default is a sensible configuration; StateDir has none.
func Default() Config {
	return Config{NBDAddress: "127.0.0.1:10809", MaxLogEntries: 1 << 20}
}

// Validate reports all problems at once, each with its key.
func (c Config) Validate() error {
	var problems []error
	if c.StateDir == "" {
		problems = append(problems, errors.New("state_dir: must not be empty"))
	} else if !filepath.IsAbs(c.StateDir) {
		problems = append(problems, fmt.Errorf("state_dir: %q must be an absolute path", c.StateDir))
	}
	network, address := c.nbd()
	if network == "tcp" {
		if host, _, err := net.SplitHostPort(address); err != nil {
			problems = append(problems, fmt.Errorf("nbd_address: %w", err))
		} else if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			problems = append(problems, fmt.Errorf("nbd_address: %q is not a loopback address, and NBD has no authentication", host))
		}
	}
	if c.MaxLogEntries < 1000 || c.MaxLogEntries > 64<<20 {
		problems = append(problems, fmt.Errorf("max_log_entries: %d must be 1,000 to 67,108,864", c.MaxLogEntries))
	}
	return errors.Join(problems...)
}

const unixPrefix = "unix:"

func (c Config) nbd() (network, address string) {
	if n := len(unixPrefix); len(c.NBDAddress) > n && c.NBDAddress[:n] == unixPrefix {
		return "unix", c.NBDAddress[n:]
	}
	return "tcp", c.NBDAddress
}
