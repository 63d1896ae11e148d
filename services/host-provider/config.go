package hostprovider

import (
	"errors"
	"path/filepath"
	"regexp"
	"time"

	"github.com/landfall-dr/landfall/libs/config"
)

// Config of the host-provider.
type Config struct {
	// Site that the host belongs to.
	Site string `koanf:"site"`
	// Host is this host's name within the site.
	Host string `koanf:"host"`
	// Driver is the kind of hypervisor: imagedir (also when empty) or qemu.
	Driver string `koanf:"driver" help:"kind of hypervisor: imagedir or qemu"`
	// Images is the folder of machine folders, for driver imagedir.
	Images string `koanf:"images"`
	// QEMU is for driver qemu.
	QEMU QEMUConfig `koanf:"qemu"`
	// ScanInterval is how often machines that came or went are looked for.
	ScanInterval time.Duration `koanf:"scan_interval"`
	// Heartbeat is how often the host record is renewed.
	Heartbeat time.Duration `koanf:"heartbeat"`
	// Address at which others reach HostService; written to the host record.
	Address string `koanf:"address"`
	// ChangeTrackerAddress at which others reach this host's change-tracker; written to the host record.
	ChangeTrackerAddress string `koanf:"change_tracker_address"`
}

// Drivers.
const (
	// DriverImagedir has folders of disk images.
	DriverImagedir = "imagedir"
	// DriverQEMU has QEMU's monitors.
	DriverQEMU = "qemu"
)

// QEMUConfig is what driver qemu is told. Its problems are found by [Config.Validate], when it is the driver.
type QEMUConfig struct {
	// Machines is the folder of definitions and monitor sockets (docs/formats/qemu-machine.md).
	Machines string `koanf:"machines" help:"folder of NAME.yaml definitions and NAME.qmp sockets"`
	// StateDir keeps what the driver must remember of points, passes and fences.
	StateDir string `koanf:"state_dir" help:"folder of what is remembered of points and fences"`
	// ScratchDir holds the frozen copies of points while they are shipped; empty means a folder in StateDir.
	ScratchDir string `koanf:"scratch_dir" help:"folder of the frozen copies of points; default: in state_dir"`
	// SocketDir holds the sockets that points are read from; empty means a folder in StateDir. A socket's path has 107 bytes
	// at most, so it must be short.
	SocketDir string `koanf:"socket_dir" help:"folder of the sockets that points are read from, a short path; default: in state_dir"`
}

// Sockets is where the sockets are.
func (c QEMUConfig) Sockets() string {
	if c.SocketDir != "" {
		return c.SocketDir
	}
	return filepath.Join(c.StateDir, "s")
}

// Scratch is where frozen copies are.
func (c QEMUConfig) Scratch() string {
	if c.ScratchDir != "" {
		return c.ScratchDir
	}
	return filepath.Join(c.StateDir, "scratch")
}

// token is a name in subjects and resource names (docs/events.md).
var token = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)

// Default is a sensible configuration; the driver's folders, Address and ChangeTrackerAddress have none.
func Default() Config {
	return Config{Site: "local", Host: "host-1", Driver: DriverImagedir, ScanInterval: 10 * time.Second, Heartbeat: 10 * time.Second}
}

// Validate reports all problems at once, each with its key.
func (c Config) Validate() error {
	var problems []error
	for _, f := range []struct{ key, value string }{{"site", c.Site}, {"host", c.Host}} {
		if !token.MatchString(f.value) {
			problems = append(problems, config.Bad(f.key, "%q must be 1 to 64 of a-z, 0-9 and inner hyphens", f.value))
		}
	}
	type setting struct{ key, value string }
	must := []setting{{"address", c.Address}, {"change_tracker_address", c.ChangeTrackerAddress}}
	switch c.Driver {
	case DriverImagedir, "":
		must = append(must, setting{"images", c.Images})
	case DriverQEMU:
		must = append(must, setting{"qemu.machines", c.QEMU.Machines}, setting{"qemu.state_dir", c.QEMU.StateDir})
	default:
		problems = append(problems, config.Bad("driver", "%q is not imagedir or qemu", c.Driver))
	}
	for _, f := range must {
		if f.value == "" {
			problems = append(problems, config.Bad(f.key, "must not be empty"))
		}
	}
	for _, f := range []struct {
		key   string
		value time.Duration
	}{{"scan_interval", c.ScanInterval}, {"heartbeat", c.Heartbeat}} {
		if f.value < 100*time.Millisecond || f.value > 10*time.Minute {
			problems = append(problems, config.Bad(f.key, "%s must be 100ms to 10m", f.value))
		}
	}
	return errors.Join(problems...)
}
