package uploader_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/services/uploader"
)

func TestConfigReportsEveryProblem(t *testing.T) {
	c := uploader.Default()
	require.ErrorContains(t, c.Validate(), "site")
	c.Site = "lab"
	require.NoError(t, c.Validate())
	c.Roles, c.Ship.Buffers, c.Ship.Compression, c.Apply.Lease = []uploader.Role{"fly"}, 0, "zip", 1
	c.Retain.Parallel, c.Retain.StepTimeout = 65, 0
	err := c.Validate()
	for _, key := range []string{"roles", "ship.buffers", "ship.compression", "apply.lease", "retain.parallel", "retain.step_timeout"} {
		require.ErrorContains(t, err, key)
	}
	_, err = uploader.New(c, uploader.Deps{})
	require.ErrorContains(t, err, "a bus is needed")
}
