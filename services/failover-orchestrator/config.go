package failoverorchestrator

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/landfall-dr/landfall/services/failover-orchestrator/qemutarget"
)

// Config of the failover-orchestrator.
type Config struct {
	// Site whose failovers this instance runs.
	Site string `koanf:"site"`
	// Workers is how many failovers run at once.
	Workers int `koanf:"workers"`
	// Parallel is how many ranges one failover reads at once.
	Parallel int `koanf:"parallel"`
	// LeaseTTL is how long a dead orchestrator keeps its standby waiting.
	LeaseTTL time.Duration `koanf:"lease_ttl"`
	// RetryDelay is the pause after a failed attempt to reach storage or the bus.
	RetryDelay time.Duration `koanf:"retry_delay"`
	// Attempts is how often a step is tried before the failover fails.
	Attempts int `koanf:"attempts"`
	// SourceTimeout is how long a planned failover waits for its source to stop.
	SourceTimeout time.Duration `koanf:"source_timeout"`
	// Machine is the name of this machine in the records of failovers; empty takes the host name. Set it where the host
	// name does not last, as in containers: a copy is only removed from the machine that made it.
	Machine string `koanf:"machine"`
	// Qemu is how target qemu runs machines here.
	Qemu qemutarget.Config `koanf:"qemu"`
}

// site is a token of event subjects (docs/events.md).
var site = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)

// Default is a sensible configuration.
func Default() Config {
	return Config{Site: "local", Workers: 4, Parallel: 8, LeaseTTL: 15 * time.Second, RetryDelay: 2 * time.Second, Attempts: 5, SourceTimeout: time.Hour, Qemu: qemutarget.Default()}
}

// Validate reports all problems at once, each with its key.
func (c Config) Validate() error {
	var problems []error
	between := func(key string, v, low, high int) {
		if v < low || v > high {
			problems = append(problems, fmt.Errorf("%s: %d must be %d to %d", key, v, low, high))
		}
	}
	if !site.MatchString(c.Site) {
		problems = append(problems, fmt.Errorf("site: %q must be 1 to 64 of a-z, 0-9 and inner hyphens", c.Site))
	}
	between("workers", c.Workers, 1, 64)
	between("parallel", c.Parallel, 1, 64)
	between("attempts", c.Attempts, 1, 100)
	if c.LeaseTTL < time.Second || c.LeaseTTL > 10*time.Minute {
		problems = append(problems, fmt.Errorf("lease_ttl: %s must be 1s to 10m", c.LeaseTTL))
	}
	if c.RetryDelay <= 0 || c.RetryDelay > time.Minute {
		problems = append(problems, fmt.Errorf("retry_delay: %s must be above 0 and at most 1m", c.RetryDelay))
	}
	if c.SourceTimeout < time.Second || c.SourceTimeout > 7*24*time.Hour {
		problems = append(problems, fmt.Errorf("source_timeout: %s must be 1s to 168h", c.SourceTimeout))
	}
	if len(c.Machine) > 253 {
		problems = append(problems, fmt.Errorf("machine: %d characters, at most 253 are allowed", len(c.Machine)))
	}
	for _, err := range c.Qemu.Problems() {
		problems = append(problems, fmt.Errorf("qemu.%w", err))
	}
	return errors.Join(problems...)
}
