package scenario

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	"github.com/landfall-dr/landfall/tools/allinone"
	"github.com/landfall-dr/landfall/tools/cli"
)

// rpoLine grows by itself.
var rpoLine = regexp.MustCompile(`(?m)^ *"rpo":.*$`)

// rpoText is the same in tables.
var rpoText = regexp.MustCompile(`(?m)(RPO: |protected normal )[0-9.µnm]+s`)

// stepTime is how long a step of a job took.
var stepTime = regexp.MustCompile(`(?m)^(Step \S+: \S+) in [0-9.]+ s(:|$)`)

// left is everything that a command may leave behind, as text.
func (l *lab) left() string {
	l.t.Helper()
	var b strings.Builder
	for _, args := range [][]string{{"vms"}, {"status", "-o", "json"}, {"jobs"}, {"failover", "list"}, {"policy", "get"}} {
		r := l.ok(args...)
		b.WriteString(strings.Join(args, " ") + "\n" + rpoLine.ReplaceAllString(r.out, ""))
	}
	for _, dir := range []string{filepath.Join(l.state, "store", "containers"), l.images, l.root, l.qemu.Machines, l.qemu.Scratch} {
		entries, err := os.ReadDir(dir)
		if os.IsNotExist(err) {
			continue
		}
		require.NoError(l.t, err)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		sort.Strings(names)
		b.WriteString(strings.Join(names, "\n") + "\n")
	}
	return b.String()
}

// refused runs a command that must fail, explain itself, and leave nothing.
func (l *lab) refused(stdin string, args ...string) string {
	l.t.Helper()
	return l.transcript(l.refuse(stdin, args...))
}

func (l *lab) refuse(stdin string, args ...string) result {
	l.t.Helper()
	before := l.left()
	r := l.runIn(testkit.Context(l.t), stdin, args...)
	require.Equal(l.t, 1, r.code, "landfall %s\n%s%s", strings.Join(args, " "), r.out, r.err)
	for _, part := range []string{"what happened: ", "reason: ", "likely cause: ", "what to do: "} {
		require.Contains(l.t, r.err, part, "landfall %s", strings.Join(args, " "))
	}
	require.NotContains(l.t, r.err, "INTERNAL", "landfall %s", strings.Join(args, " "))
	require.NotContains(l.t, r.err, "UNSPECIFIED", "landfall %s", strings.Join(args, " "))
	require.Empty(l.t, r.out)
	require.Equal(l.t, before, l.left(), "landfall %s left something behind", strings.Join(args, " "))
	return r
}

// Machines that cannot be protected, policies that cannot be, names that do not exist.
func TestBadMachinesAndPolicies(t *testing.T) {
	l := newLab(t)
	l.web()
	l.machine("gone", 2, "{id: os, image: gone.raw, os: true}")
	odd := l.machine("odd", 3, "{id: os, image: os.raw, os: true}")
	raw(t, filepath.Join(odd, "os.raw"), mib+100, 1000)
	cut := l.machine("cut", 4, "{id: os, image: os.vhd, os: true}")
	d, err := vdisk.CreateVHD(filepath.Join(cut, "os.vhd"), 4*mib)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	require.NoError(t, os.Truncate(filepath.Join(cut, "os.vhd"), 3*mib))
	twice := l.machine("twice", 5, "{id: os, image: os.raw, os: true}", "{id: data, image: ./os.raw}")
	raw(t, filepath.Join(twice, "os.raw"), 4*mib, mib)
	sameID := l.machine("same-id", 6, "{id: os, image: a.raw, os: true}", "{id: os, image: b.raw}")
	raw(t, filepath.Join(sameID, "a.raw"), 4*mib, mib)
	raw(t, filepath.Join(sameID, "b.raw"), 4*mib, mib)
	l.up()
	l.policy("good", "30s")

	text := l.transcript(l.ok("vms"))
	for _, args := range [][]string{
		{"protect", "nobody", "--policy", "good"},
		{"protect", "web-01", "--policy", "none"},
		{"protect", "gone", "--policy", "good"},
		{"protect", "odd", "--policy", "good", "--wait"},
		{"protect", "cut", "--policy", "good"},
		{"protect", "twice", "--policy", "good"},
		{"protect", "twice", "--policy", "good", "--check"},
		{"protect", "same-id", "--policy", "good"},
		{"protect", "../../etc", "--policy", "good"},
		{"vms", "show", "nobody"},
		{"vms", "show", "gone"},
		{"status", "web-01"},
		{"points", "web-01"},
		{"pause", "web-01"},
		{"resume", "web-01"},
		{"resync", "web-01"},
		{"unprotect", "web-01"},
		{"failover", "test", "web-01", "--out", filepath.Join(l.root, "out")},
		{"failover", "test", "nobody", "--out", filepath.Join(l.root, "out")},
		{"failover", "cleanup", "web-01"},
		{"jobs", "show", "nothing"},
		{"jobs", "show", "6f2b6a0e-7c39-7d0e-9a55-0d4c1f6bffff"},
		{"policy", "get", "none"},
		{"policy", "apply", "-f", "/nowhere/policy.yaml"},
	} {
		text += l.refused("", args...)
	}
	for _, policy := range []string{
		"name: p\ncopy_interval: 0s\n", "name: p\ncopy_interval: 1h\n", "name: p\ncopy_interval: -5s\n", "name: p\ncopy_interval: abc\n",
		"name: p\ncopy_interval: 30\n", "name: p\n", "copy_interval: 30s\n", "name: p\ncopy_intervall: 30s\n", "name: Gold!\ncopy_interval: 30s\n",
		"name: p\ncopy_interval: 30s\nparallel_uploads: many\n", "- 1\n", "", "name: [\n",
	} {
		text += "> " + strings.ReplaceAll(policy, "\n", "\n> ") + "\n" + l.refused(policy, "policy", "apply", "-f", "-")
	}
	text += l.transcript(l.ok("protect", "web-01", "--policy", "good", "--check"))
	require.NotContains(t, l.ok("status").out, "web-01", "a check leaves nothing")
	text += l.transcript(l.ok("policy", "delete", "none"))
	golden(t, "bad-machines.golden", text)
}

// Targets, points and states that do not fit, on a protected machine.
func TestBadFailovers(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("calm", "15m")
	l.ok("protect", "web-01", "--policy", "calm", "--wait")
	l.awaitPoint("web-01", 3) // the first delta follows at once, then it is calm

	full := filepath.Join(l.root, "full")
	require.NoError(t, os.MkdirAll(full, 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(full, "thesis.doc"), []byte("mine"), 0o600))
	file := filepath.Join(l.root, "a-file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	out := filepath.Join(l.root, "out")

	text := ""
	cases := [][]string{
		{"protect", "web-01", "--policy", "calm"},
		{"failover", "test", "web-01", "--out", full},
		{"failover", "test", "web-01", "--out", file},
		{"failover", "test", "web-01", "--out", filepath.Join(l.root, "no", "such", "parent")},
		{"failover", "test", "web-01", "--out", out, "--point", "99"},
		{"failover", "test", "web-01", "--out", out, "--point", "1"},
		{"failover", "test", "web-01", "--out", out, "--point", "latest-app"},
		{"failover", "cleanup", "web-01"},
		{"failover", "cleanup", "--failover", "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6bffff"},
		{"policy", "delete", "calm"},
	}
	if runtime.GOOS == "linux" {
		cases = append(cases, []string{"failover", "test", "web-01", "--out", "/proc/landfall"})
	}
	for _, args := range cases {
		text += l.refused("", args...)
	}
	require.FileExists(t, filepath.Join(full, "thesis.doc"))
	require.NoDirExists(t, out)

	l.ok("failover", "test", "web-01", "--out", out, "--wait")
	text += l.refused("", "failover", "test", "web-01", "--out", out+"2")
	text += l.transcript(l.ok("failover", "list"))
	l.ok("failover", "cleanup", "web-01", "--wait")
	text += l.transcript(l.ok("failover", "list"))
	require.NoDirExists(t, out)
	l.ok("unprotect", "web-01", "--wait")
	text += l.refused("", "unprotect", "web-01")
	text += l.refused("", "status", "web-01")
	golden(t, "bad-failovers.golden", text)
}

// as gives the command line another certificate and returns the state folder to use.
func (l *lab) as(name string, authority *pki.Authority, lifetime time.Duration, role pki.Role) (state string) {
	l.t.Helper()
	state = filepath.Join(l.t.TempDir(), name)
	require.NoError(l.t, os.MkdirAll(state, 0o700))
	_, err := authority.Ensure(filepath.Join(state, allinone.ClientCertificates), pki.Request{Identity: pki.UserIdentity(name, role), Lifetime: lifetime})
	require.NoError(l.t, err)
	mine, err := os.ReadFile(filepath.Join(l.state, cli.ClientFile))
	require.NoError(l.t, err)
	require.NoError(l.t, os.WriteFile(filepath.Join(state, cli.ClientFile), mine, 0o600))
	return state
}

// Certificates of another authority, expired, of too small a role; no server; no state folder.
func TestWrongCertificates(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("good", "30s")
	ours, err := pki.Open(filepath.Join(l.state, "pki"), time.Now)
	require.NoError(t, err)
	theirs, err := pki.Open(filepath.Join(t.TempDir(), "pki"), time.Now)
	require.NoError(t, err)
	lastYear, err := pki.Open(filepath.Join(l.state, "pki"), func() time.Time { return time.Now().Add(-365 * 24 * time.Hour) })
	require.NoError(t, err)

	text := ""
	add := func(name, state string, args ...string) {
		text += "# " + name + "\n" + strings.ReplaceAll(l.refused("", append(args, "--state", state)...), state, "<state>")
	}
	viewer := l.as("viewer", ours, 0, pki.RoleViewer)
	require.Zero(t, l.run("vms", "--state", viewer).code, "a viewer may look")
	add("a viewer wants to change something", viewer, "protect", "web-01", "--policy", "good")
	add("a viewer wants to fail over", viewer, "failover", "test", "web-01", "--out", "/tmp/x")
	add("a certificate of another authority", l.as("stranger", theirs, 0, pki.RoleAdmin), "vms")
	trusting := l.as("trusting-stranger", theirs, 0, pki.RoleAdmin) // trusts our server, but is not trusted by it
	require.NoError(t, os.WriteFile(filepath.Join(trusting, allinone.ClientCertificates, pki.CAFile), ours.Certificate(), 0o600))
	add("a certificate of another authority that trusts ours", trusting, "protect", "web-01", "--policy", "good")
	add("an expired certificate", l.as("late", lastYear, 24*time.Hour, pki.RoleAdmin), "protect", "web-01", "--policy", "good")
	without := l.as("without", ours, 0, pki.RoleAdmin)
	require.NoError(t, os.RemoveAll(filepath.Join(without, allinone.ClientCertificates)))
	add("no certificate", without, "vms")
	nowhere := filepath.Join(t.TempDir(), "nowhere")
	add("no state folder", nowhere, "vms")
	require.NoDirExists(t, nowhere)

	l.stop()
	ctx, cancel := context.WithTimeout(testkit.Context(t), 40*time.Second)
	defer cancel()
	started := time.Now()
	r := l.runIn(ctx, "", "protect", "web-01", "--policy", "good")
	require.Equal(t, 1, r.code)
	require.Less(t, time.Since(started), 15*time.Second, "nobody waits long for a server that is not there")
	text += "# no server\n" + l.transcript(r)
	golden(t, "wrong-certificates.golden", text)
}
