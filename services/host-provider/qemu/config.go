package qemu

import (
	"errors"
	"fmt"
	"time"
)

// Config of the driver.
type Config struct {
	// StateDir holds one record per machine. Durable storage.
	StateDir string
	// ScratchDir holds the frozen copies of open points of machines that name no folder of their own. Give it a budget of its
	// own: a full one costs the point, never the guest.
	ScratchDir string
	// SocketDir holds the NBD sockets that points are read from. Its path must be short: a socket's path has 107 bytes at most.
	SocketDir string
	// CopyTimeout is how long a guest write may wait for the frozen copy before the copy is given up; whole seconds, 10 s when 0.
	CopyTimeout time.Duration
	// FreezeLimit is the longest time that a guest is left frozen; 5 s when 0.
	FreezeLimit time.Duration
	// MinScratch is the free space in bytes below which no point is cut unless its whole change is smaller; 64 MiB when 0.
	MinScratch int64

	// UnsafeOneTransactionPerDisk cuts each disk at an instant of its own: the negative control of tests, which must see it
	// fail. No configuration file reaches it.
	UnsafeOneTransactionPerDisk bool
	// ForceBackupJob uses the method for a QEMU without a filter that can give up its copy. For tests.
	ForceBackupJob bool
}

func (c Config) withDefaults() Config {
	if c.CopyTimeout == 0 {
		c.CopyTimeout = 10 * time.Second
	}
	if c.FreezeLimit == 0 {
		c.FreezeLimit = 5 * time.Second
	}
	if c.MinScratch == 0 {
		c.MinScratch = 64 << 20
	}
	return c
}

// maxSocketPath is what sockaddr_un holds, without the final NUL.
const maxSocketPath = 107

// socketName is the length of the name that socketPath adds to SocketDir.
const socketName = len("/lf-0123456789ab.nbd")

// Validate reports all problems at once.
func (c Config) Validate() error {
	var problems []error
	for _, f := range []struct{ key, value string }{
		{"state_dir", c.StateDir}, {"scratch_dir", c.ScratchDir}, {"socket_dir", c.SocketDir},
	} {
		if f.value == "" {
			problems = append(problems, fmt.Errorf("%s: must not be empty", f.key))
		}
	}
	if len(c.SocketDir)+socketName > maxSocketPath {
		problems = append(problems, fmt.Errorf("socket_dir: %s is longer than %d bytes: the path of a unix socket would not fit", c.SocketDir, maxSocketPath-socketName))
	}
	if c.CopyTimeout < 0 || c.CopyTimeout > 5*time.Minute {
		problems = append(problems, fmt.Errorf("copy_timeout: %s must be up to 5m", c.CopyTimeout))
	}
	if c.FreezeLimit < 0 || c.FreezeLimit > 10*time.Second {
		problems = append(problems, fmt.Errorf("freeze_limit: %s must be up to 10s", c.FreezeLimit))
	}
	return errors.Join(problems...)
}
