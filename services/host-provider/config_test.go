package hostprovider_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

func TestDriverConfig(t *testing.T) {
	sound := func(c *hostprovider.Config) {
		c.Images, c.Address, c.ChangeTrackerAddress = "/images", "a:1", "a:2"
	}
	for _, c := range []struct {
		name   string
		change func(*hostprovider.Config)
		want   []string // keys with a problem
	}{
		{name: "imagedir"},
		{name: "imagedir without images", change: func(c *hostprovider.Config) { c.Images = "" }, want: []string{"images"}},
		{name: "imagedir does not look at qemu", change: func(c *hostprovider.Config) { c.QEMU.Machines = "/machines" }},
		{name: "qemu", change: func(c *hostprovider.Config) {
			c.Driver, c.Images, c.QEMU.Machines, c.QEMU.StateDir = hostprovider.DriverQEMU, "", "/machines", "/state"
		}},
		{name: "qemu without folders", change: func(c *hostprovider.Config) { c.Driver, c.Images = hostprovider.DriverQEMU, "" }, want: []string{"qemu.machines", "qemu.state_dir"}},
		{name: "everything", change: func(c *hostprovider.Config) {
			*c = hostprovider.Config{Driver: "hyperv", Site: "A", Host: "-"}
		}, want: []string{"site", "host", "driver", "address", "change_tracker_address", "scan_interval", "heartbeat"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := hostprovider.Default()
			sound(&config)
			if c.change != nil {
				c.change(&config)
			}
			var keys []string
			if err := config.Validate(); err != nil {
				for _, line := range strings.Split(err.Error(), "\n") {
					key, _, _ := strings.Cut(line, ":")
					keys = append(keys, key)
				}
			}
			require.Equal(t, c.want, keys)
		})
	}
	require.Equal(t, filepath.Join("/state", "scratch"), hostprovider.QEMUConfig{StateDir: "/state"}.Scratch())
	require.Equal(t, "/fast", hostprovider.QEMUConfig{StateDir: "/state", ScratchDir: "/fast"}.Scratch())
}
