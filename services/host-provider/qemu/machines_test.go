package qemu

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/libs/testkit"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// checked runs the checks and returns what was found, without what the description itself says.
func (g *powered) checked() (codes []string, text string) {
	g.t.Helper()
	findings, m, err := g.driver.Check(testkit.Context(g.t), "web")
	require.NoError(g.t, err)
	require.NotNil(g.t, m)
	codes = []string{}
	var all []string
	for _, f := range findings {
		require.NotEmpty(g.t, f.What)
		require.NotEmpty(g.t, f.Action, f.What)
		all = append(all, f.What)
		if f.Check == "network" {
			continue
		}
		code := strings.ToLower(strings.TrimPrefix(f.Severity.String(), "SEVERITY_")) + " " + f.Check
		if f.Reason != typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
			code += " " + errcat.Code(f.Reason)
		}
		codes = append(codes, code)
	}
	slices.Sort(codes)
	return codes, strings.Join(all, "\n")
}

func TestCheck(t *testing.T) {
	g := newPowered(t, false)
	ctx := testkit.Context(t)
	g.run()
	codes, text := g.checked()
	require.Equal(t, []string{"warning guest-agent"}, codes, text)
	require.Contains(t, text, "nothing listens")

	missing := agentCommands("guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-shutdown")
	answer := missing
	g.agent(map[string]func() any{"guest-info": func() any { return answer }})
	codes, text = g.checked()
	require.Equal(t, []string{"warning guest-agent"}, codes, text)
	require.Contains(t, text, "does not offer guest-fsfreeze-status")
	answer = agentCommands("guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status")
	codes, text = g.checked()
	require.Empty(t, codes, text)

	m, err := g.pool.Get(ctx, g.path("web.qmp"))
	require.NoError(t, err)
	foreign := func(command string, args arguments) {
		t.Helper()
		require.NoError(t, m.Execute(ctx, command, args, nil))
	}
	foreign("nbd-server-start", arguments{"addr": arguments{"type": "unix", "data": arguments{"path": g.path("f.nbd")}}})
	foreign("block-export-add", arguments{"type": "nbd", "id": "theirs", "node-name": "os"})
	codes, text = g.checked()
	require.Equal(t, []string{"error nbd-server SOURCE_EXPORT_INVALID"}, codes, text)
	require.Contains(t, text, "theirs")
	foreign("nbd-server-stop", arguments{})
	testkit.Eventually(t, 10e9, func() bool {
		codes, _ = g.checked()
		return len(codes) == 0
	})

	foreign("blockdev-add", arguments{"driver": "null-co", "node-name": "hole", "size": 1 << 20, "read-zeroes": true})
	foreign("blockdev-backup", arguments{"job-id": "backup", "device": "os", "target": "hole", "sync": "none"})
	codes, text = g.checked()
	require.Equal(t, []string{"warning block-jobs"}, codes, text)
	foreign("block-job-cancel", arguments{"device": "backup"})

	require.NoError(t, os.RemoveAll(g.path("scratch")))
	require.NoError(t, os.WriteFile(g.path("scratch"), nil, 0o600))
	testkit.Eventually(t, 10e9, func() bool {
		codes, text = g.checked()
		return slices.Equal([]string{"error scratch LOW_DISK_SPACE"}, codes)
	})
	require.NoError(t, os.Remove(g.path("scratch")))
	g.driver.cfg.MinScratch = 1 << 60
	codes, text = g.checked()
	require.Equal(t, []string{"error scratch LOW_DISK_SPACE"}, codes, text)
	_, _, err = g.driver.Check(ctx, "nobody")
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND)
}

// Before the first look nothing is known; a machine that cannot be described is a problem with a reason.
func TestMachines(t *testing.T) {
	g := newPowered(t, false)
	ctx := testkit.Context(t)
	require.Equal(t, "qemu", g.driver.Name())
	_, _, err := g.driver.Machines(ctx)
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
	_, err = g.driver.Machine(ctx, "web")
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
	require.NoError(t, os.WriteFile(g.path("m/web.yaml"), []byte("version: 1\nid: "+poweredVM+"\nname: web\n"), 0o600))
	require.NoError(t, g.driver.Refresh(ctx))
	machines, problems, err := g.driver.Machines(ctx)
	require.NoError(t, err)
	require.Empty(t, machines)
	require.Len(t, problems, 1)
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, problems[0].Reason)
	_, err = g.driver.Machine(ctx, "web")
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	findings, m, err := g.driver.Check(ctx, poweredVM)
	require.NoError(t, err)
	require.Nil(t, m)
	require.Equal(t, hostproviderv1.Severity_SEVERITY_ERROR, findings[0].Severity)
	_, err = g.driver.Stop(ctx, fenceOf(mine))
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	require.False(t, qmp.Refused(err))
	require.Equal(t, mine, g.driver.fence(poweredVM), "a machine is fenced whether it answers or not")
}
