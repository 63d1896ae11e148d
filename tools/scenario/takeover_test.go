package scenario

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// installed skips a test where one of the programs is missing; in CI that is a failure.
func installed(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed, and CI=true", p)
			}
			t.Skipf("%s is not installed", p)
		}
	}
}

// fenced waits until the host has said that the source of a failed-over machine is off: from then on nothing moves.
func (l *lab) fenced(vm string) {
	l.t.Helper()
	var s struct {
		State    string `json:"state"`
		Failover struct {
			Fenced bool `json:"source_fenced"`
		} `json:"failover"`
	}
	testkit.Eventually(l.t, patience, func() bool {
		l.get(&s, "status", vm)
		return s.State == "PROTECTION_STATE_FAILED_OVER" && s.Failover.Fenced
	}, "the source is fenced")
}

// in waits until a machine is in a state.
func (l *lab) in(vm, state string) {
	l.t.Helper()
	testkit.Eventually(l.t, patience, func() bool { return l.status(vm).State == "PROTECTION_STATE_"+state }, vm+" is "+state)
}

// What is not a failover at all: wrong command lines, machines that have no replica.
func TestBadTakeoverCommands(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	out := filepath.Join(l.root, "out")
	text := ""
	for _, verb := range []string{"planned", "unplanned"} {
		text += l.misused("failover", verb, "web-01")
		text += l.misused("failover", verb, "--out", out)
	}
	for _, flags := range [][]string{
		{"--point", "yesterday"}, {"--point", "0"}, {"--target", "azure"}, {"--boot", "bios"}, {"--network", "user"}, {"--memory-mib", "512"}, {"--console-pattern", "login:"},
		{"--target", "qemu", "--boot", "efi"}, {"--target", "qemu", "--network", "bridge"}, {"--target", "qemu", "--boot-timeout", "0s"},
		{"--target", "qemu", "--boot-timeout", "2h"}, {"--target", "qemu", "--boot-timeout", "soon"}, {"--target", "qemu", "--memory-mib", "-1"},
		{"--target", "qemu", "--memory-mib", "99999999999"}, {"--target", "qemu", "--memory-mib", "lots"}, {"--target", "qemu", "--cpus", "many"},
	} {
		text += l.misused(append([]string{"failover", "unplanned", "web-01", "--out", out}, flags...)...)
	}
	text += l.misused("failover", "planned", "web-01", "--out", out, "--point", "latest")
	text += l.misused("failover", "planned", "web-01", "--out", out, "--accept-unfenced")
	text += l.misused("failover", "commit")
	text += l.misused("failover", "cancel")
	for _, args := range [][]string{
		{"failover", "planned", "nobody", "--out", out},
		{"failover", "unplanned", "web-01", "--out", out, "--target", "qemu", "--cpus", "-1"},
		{"failover", "unplanned", "web-01", "--out", out, "--target", "qemu", "--cpus", "4096"},
		{"failover", "planned", "web-01", "--out", out},
		{"failover", "unplanned", "web-01", "--out", out},
		{"failover", "unplanned", "web-01", "--out", out, "--accept-unfenced"},
		{"failover", "commit", "web-01"},
		{"failover", "cancel", "web-01"},
		{"failover", "commit", "--failover", "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6bffff"},
		{"failover", "cancel", "--failover", "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6bffff"},
	} {
		text += l.refused("", args...)
	}
	require.NoDirExists(t, out)
	golden(t, "bad-takeover-commands.golden", text)
}

// Failovers that a protected machine refuses: points, folders, targets, a source that is not known to be off.
func TestBadTakeovers(t *testing.T) {
	installed(t, "qemu-system-x86_64", "qemu-img")
	l := newLab(t)
	l.web()
	l.up()
	l.policy("calm", "15m")
	l.ok("protect", "web-01", "--policy", "calm", "--wait")
	l.awaitPoint("web-01", 3)

	full := filepath.Join(l.root, "full")
	require.NoError(t, os.MkdirAll(full, 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(full, "thesis.doc"), []byte("mine"), 0o600))
	file := filepath.Join(l.root, "a-file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	out := filepath.Join(l.root, "out")

	text := ""
	unplanned := func(dir string, flags ...string) {
		t.Helper()
		text += l.refused("", append([]string{"failover", "unplanned", "web-01", "--accept-unfenced", "--out", dir}, flags...)...)
	}
	text += l.refused("", "failover", "unplanned", "web-01", "--out", out)
	text += l.refused("", "failover", "commit", "web-01")
	text += l.refused("", "failover", "cancel", "web-01")
	unplanned(out, "--point", "99")
	unplanned(out, "--point", "latest-app")
	unplanned(full)
	unplanned(filepath.Join(file, "below"))
	unplanned(filepath.Join(l.root, "no", "such", "parent"))
	unplanned(l.images)
	unplanned(out, "--target", "qemu", "--console-pattern", "(login")
	unplanned(out, "--target", "qemu", "--console-pattern", "(?=login)")
	for _, args := range [][]string{
		{"failover", "planned", "web-01", "--out", full},
		{"failover", "planned", "web-01", "--out", file},
		{"failover", "test", "web-01", "--out", out, "--target", "qemu", "--console-pattern", "[0-"},
	} {
		text += l.refused("", args...)
	}
	// Where QEMU is not installed.
	empty := filepath.Join(l.root, "empty")
	require.NoError(t, os.Mkdir(empty, 0o750))
	path := os.Getenv("PATH")
	require.NoError(t, os.Setenv("PATH", empty))
	t.Cleanup(func() { require.NoError(t, os.Setenv("PATH", path)) })
	unplanned(out, "--target", "qemu", "--boot", "bios")
	some := filepath.Join(l.root, "some")
	require.NoError(t, os.Mkdir(some, 0o750))
	if runtime.GOOS != "windows" {
		require.NoError(t, os.WriteFile(filepath.Join(some, "qemu-system-x86_64"), []byte("#!/bin/sh\nexit 1\n"), 0o700))
		require.NoError(t, os.Setenv("PATH", some))
		text += l.refused("", "failover", "test", "web-01", "--out", out, "--target", "qemu", "--boot", "bios")
	}
	require.NoError(t, os.Setenv("PATH", path))

	// A test failover stands in the way of a planned one; it is neither committed nor cancelled.
	l.ok("failover", "test", "web-01", "--out", out, "--wait")
	var list struct {
		Failovers []struct {
			Name string `json:"name"`
		} `json:"failovers"`
	}
	l.get(&list, "failover", "list")
	text += l.refused("", "failover", "planned", "web-01", "--out", out+"2")
	text += l.refused("", "failover", "commit", "web-01")
	text += l.refused("", "failover", "cancel", "web-01")
	text += l.refused("", "failover", "commit", "--failover", filepath.Base(list.Failovers[0].Name))
	text += l.refused("", "failover", "cancel", "--failover", filepath.Base(list.Failovers[0].Name))
	text += l.refused("", "failover", "unplanned", "web-01", "--accept-unfenced", "--out", out)
	l.ok("failover", "cleanup", "web-01", "--wait")
	require.NoDirExists(t, out)
	require.FileExists(t, filepath.Join(full, "thesis.doc"))
	golden(t, "bad-takeovers.golden", text)
}

// What is refused while a failover stands, after it was committed, and after it was cancelled.
func TestBadDecisions(t *testing.T) {
	l := newLab(t)
	l.web()
	raw(l.t, filepath.Join(l.machine("web-02", 2, "{id: os, image: os.raw, os: true}"), "os.raw"), 16*mib, mib)
	l.up()
	l.policy("calm", "15m")
	out := filepath.Join(l.root, "out")
	text := ""
	add := func(title string, commands ...[]string) {
		t.Helper()
		text += "# " + title + "\n"
		for _, args := range commands {
			text += l.refused("", args...)
		}
	}
	for _, vm := range []string{"web-01", "web-02"} {
		l.ok("protect", vm, "--policy", "calm", "--wait")
		l.awaitPoint(vm, 3)
	}

	l.ok("failover", "unplanned", "web-01", "--accept-unfenced", "--out", out, "--wait")
	l.fenced("web-01")
	add("it waits for commit",
		[]string{"failover", "planned", "web-01", "--out", out + "2"},
		[]string{"failover", "unplanned", "web-01", "--accept-unfenced", "--out", out + "2"},
		[]string{"failover", "test", "web-01", "--out", out + "2"},
		[]string{"failover", "cleanup", "web-01"},
		[]string{"protect", "web-01", "--policy", "calm"},
		[]string{"pause", "web-01"},
		[]string{"resume", "web-01"},
		[]string{"resync", "web-01"})
	var list struct {
		Failovers []struct {
			Name string `json:"name"`
		} `json:"failovers"`
	}
	l.get(&list, "failover", "list", "web-01")
	add("it is no test", []string{"failover", "cleanup", "--failover", filepath.Base(list.Failovers[0].Name)})
	text += l.transcript(l.ok("failover", "list"))
	l.ok("failover", "commit", "web-01", "--wait")
	l.in("web-01", "COMMITTED")
	add("it is committed",
		[]string{"failover", "cancel", "web-01"},
		[]string{"failover", "cancel", "--failover", filepath.Base(list.Failovers[0].Name)},
		[]string{"failover", "planned", "web-01", "--out", out + "2"},
		[]string{"failover", "unplanned", "web-01", "--accept-unfenced", "--out", out + "2"},
		[]string{"failover", "test", "web-01", "--out", out + "2"},
		[]string{"protect", "web-01", "--policy", "calm"},
		[]string{"pause", "web-01"},
		[]string{"resync", "web-01"})
	again := l.ok("failover", "commit", "web-01")
	require.NotEmpty(t, strings.TrimSpace(again.out), "the same job is the answer")
	require.FileExists(t, filepath.Join(out, "os.vhd"))

	second := out + "-02"
	l.ok("failover", "planned", "web-02", "--out", second, "--wait")
	l.in("web-02", "FAILED_OVER")
	add("planned: it waits for commit", []string{"failover", "planned", "web-02", "--out", second + "2"})
	final := l.status("web-02").LastPoint
	l.ok("failover", "cancel", "web-02", "--wait")
	require.NoDirExists(t, second)
	l.in("web-02", "PROTECTED")
	l.awaitPoint("web-02", final+1) // it is protected as before, and then it is calm
	add("it is cancelled", []string{"failover", "commit", "web-02"})
	again = l.ok("failover", "cancel", "web-02")
	require.NotEmpty(t, strings.TrimSpace(again.out), "the same job is the answer")
	golden(t, "bad-decisions.golden", text)
}

// Intervals of application-consistent points that no policy can have.
func TestBadApplicationIntervals(t *testing.T) {
	l := newLab(t)
	l.up()
	text := ""
	for _, policy := range []string{
		"name: p\ncopy_interval: 30s\napp_consistent_interval: 1s\n", "name: p\ncopy_interval: 15m\napp_consistent_interval: 5m\n",
		"name: p\ncopy_interval: 30s\napp_consistent_interval: 48h\n", "name: p\ncopy_interval: 30s\napp_consistent_interval: -1h\n",
		"name: p\ncopy_interval: 30s\napp_consistent_interval: hourly\n", "name: p\ncopy_interval: 30s\napp_consistent_interval: 60\n",
		"name: p\ncopy_interval: 30s\napp_consistent_intervall: 1h\n",
	} {
		text += "> " + strings.ReplaceAll(strings.TrimSuffix(policy, "\n"), "\n", "\n> ") + "\n" + l.refused(policy, "policy", "apply", "-f", "-")
	}
	golden(t, "bad-app-intervals.golden", text)
}

// `landfall up` with no folder, both, or one that is none.
func TestBadUp(t *testing.T) {
	l := newLab(t)
	file := filepath.Join(l.root, "a-file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	text := l.misused("up") + l.misused("up", "--images", l.images, "--qemu", l.images) +
		l.misused("up", "--images", l.images, "--qemu-scratch", l.root) + l.misused("up", "--images", l.images, "--qemu-sockets", l.root)
	for _, args := range [][]string{
		{"up", "--images", file}, {"up", "--images", filepath.Join(l.root, "nothing")}, {"up", "--qemu", file}, {"up", "--qemu", filepath.Join(l.root, "nothing")},
		{"up", "--images", l.images, "--listen", "not an address"}, {"up", "--images", l.images, "--host", "h_1"},
		{"up", "--images", l.images, "--site", "Not A Site"},
	} {
		r := l.run(args...)
		require.Equal(t, 1, r.code, "landfall %s", strings.Join(args, " "))
		for _, part := range []string{"what happened: ", "reason: ", "likely cause: ", "what to do: "} {
			require.Contains(t, r.err, part, "landfall %s", strings.Join(args, " "))
		}
		r.err = r.err[strings.Index(r.err, "what happened: "):] // after the log
		text += l.transcript(r)
	}
	golden(t, "bad-up.golden", text)
}
