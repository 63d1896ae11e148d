package hostprovider

import (
	"errors"
	"fmt"
	"regexp"
	"time"
)

// Config of the host-provider.
type Config struct {
	// Site that the host belongs to.
	Site string `koanf:"site"`
	// Host is this host's name within the site.
	Host string `koanf:"host"`
	// Images is the folder of machine folders, for driver imagedir.
	Images string `koanf:"images"`
	// ScanInterval is how often machines that came or went are looked for.
	ScanInterval time.Duration `koanf:"scan_interval"`
	// Heartbeat is how often the host record is renewed.
	Heartbeat time.Duration `koanf:"heartbeat"`
	// Address at which others reach HostService; written to the host record.
	Address string `koanf:"address"`
	// ChangeTrackerAddress at which others reach this host's change-tracker; written to the host record.
	ChangeTrackerAddress string `koanf:"change_tracker_address"`
}

// token is a name in subjects and resource names (docs/events.md).
var token = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)

// Default is a sensible configuration; Images, Address and ChangeTrackerAddress have none.
func Default() Config {
	return Config{Site: "local", Host: "host-1", ScanInterval: 10 * time.Second, Heartbeat: 10 * time.Second}
}

// Validate reports all problems at once, each with its key.
func (c Config) Validate() error {
	var problems []error
	for _, f := range []struct{ key, value string }{{"site", c.Site}, {"host", c.Host}} {
		if !token.MatchString(f.value) {
			problems = append(problems, fmt.Errorf("%s: %q must be 1 to 64 of a-z, 0-9 and inner hyphens", f.key, f.value))
		}
	}
	for _, f := range []struct{ key, value string }{{"images", c.Images}, {"address", c.Address}, {"change_tracker_address", c.ChangeTrackerAddress}} {
		if f.value == "" {
			problems = append(problems, fmt.Errorf("%s: must not be empty", f.key))
		}
	}
	for _, f := range []struct {
		key   string
		value time.Duration
	}{{"scan_interval", c.ScanInterval}, {"heartbeat", c.Heartbeat}} {
		if f.value < 100*time.Millisecond || f.value > 10*time.Minute {
			problems = append(problems, fmt.Errorf("%s: %s must be 100ms to 10m", f.key, f.value))
		}
	}
	return errors.Join(problems...)
}
