package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"

	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	"github.com/landfall-dr/landfall/tools/cli"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// run runs the command line with a state folder where nothing runs.
func run(t *testing.T, state string, args ...string) (code int, out, errOut string) {
	t.Helper()
	t.Setenv("LANDFALL_STATE", state)
	var stdout, stderr bytes.Buffer
	code = cli.Main(testkit.Context(t), args, strings.NewReader(""), &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if os.Getenv("LANDFALL_UPDATE") != "" {
		require.NoError(t, os.MkdirAll("testdata", 0o750))
		require.NoError(t, os.WriteFile(path, []byte(got), 0o600))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err, "LANDFALL_UPDATE=1 go test writes it")
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s differs; LANDFALL_UPDATE=1 go test rewrites it:\n%s", path, diff)
	}
}

// subcommands are the names under "Available Commands:" of a help text.
var subcommands = regexp.MustCompile(`(?m)^  ([a-z-]+) +\S`)

// help collects the help of a command and of all below it.
func help(t *testing.T, b *strings.Builder, command ...string) {
	t.Helper()
	code, out, errOut := run(t, "/state", append(command, "--help")...)
	require.Zero(t, code, errOut)
	require.Empty(t, errOut)
	fmt.Fprintf(b, "$ landfall %s\n%s\n", strings.Join(append(command, "--help"), " "), out)
	_, list, found := strings.Cut(out, "Available Commands:\n")
	if len(command) > 0 && !found {
		require.Contains(t, out, "Examples:", "%v", command)
	}
	list, _, _ = strings.Cut(list, "\n\n")
	for _, m := range subcommands.FindAllStringSubmatch(list, -1) {
		if m[1] != "help" && m[1] != "completion" {
			help(t, b, append(append([]string{}, command...), m[1])...)
		}
	}
}

// The help of every command is golden: it is part of the contract, and is read when it changes.
func TestHelp(t *testing.T) {
	var b strings.Builder
	help(t, &b)
	for _, c := range []string{"up", "hosts", "vms show", "protect", "unprotect", "status", "points", "points list", "points hold", "points release", "points clear-suspicion", "pause", "resume", "resync", "failover test",
		"failover cleanup", "failover list", "policy get", "policy apply", "policy delete", "bandwidth get", "bandwidth set", "bandwidth clear", "jobs show", "events", "hrl inspect", "disk info", "disk map",
		"disk convert", "disk compare", "version"} {
		require.Contains(t, b.String(), "$ landfall "+c+" --help\n")
	}
	golden(t, "help.golden", b.String())
}

// A wrong command line exits with 2, says what is wrong and shows the usage.
func TestWrongUsage(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	var b strings.Builder
	for _, args := range [][]string{
		{"frobnicate"}, {"failover"}, {"failover", "frobnicate"}, {"protect"}, {"protect", "a", "b"}, {"protect", "a", "--frob"}, {"points", "a", "--limit", "many"},
		{"failover", "test", "a"}, {"failover", "test", "a", "--out", "x", "--point", "yesterday"}, {"failover", "test", "a", "--out", "x", "--point", "0"},
		{"failover", "test", "a", "--out", "x", "--target", "azure"}, {"failover", "cleanup"}, {"policy", "apply"}, {"bandwidth"}, {"bandwidth", "set"}, {"bandwidth", "set", "--limit", "fast"}, {"bandwidth", "set", "--limit", "1MiB/s", "-f", "x"}, {"up"}, {"up", "here"}, {"up", "--images", "a", "--qemu", "b"}, {"up", "--images", "a", "--qemu-scratch", "b"},
		{"vms", "-o", "xml"}, {"disk", "info"}, {"hrl", "inspect"},
	} {
		code, out, errOut := run(t, state, args...)
		require.Equal(t, 2, code, "landfall %s\n%s", strings.Join(args, " "), errOut)
		require.Empty(t, out)
		first, rest, _ := strings.Cut(errOut, "\n")
		require.True(t, strings.HasPrefix(first, "landfall: "), first)
		require.Contains(t, rest, "Usage:\n  landfall", "%v", args)
		fmt.Fprintf(&b, "$ landfall %s\n%s\n\n", strings.Join(args, " "), first)
	}
	golden(t, "usage.golden", b.String())
	require.NoDirExists(t, state)
}

// dialing is the part of a message that grpc and the system word.
var dialing = regexp.MustCompile(`(?m)(no connection to \S+: ).*connection refused"?$`)

// Without a server, or with a state folder that is not one, every command that needs it says so and leaves nothing.
func TestNoServer(t *testing.T) {
	root := t.TempDir()
	absent, broken, silent := filepath.Join(root, "absent"), filepath.Join(root, "broken"), filepath.Join(root, "silent")
	for dir, text := range map[string]string{broken: "version: 1\nsight: local\n", silent: ""} {
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, cli.ClientFile), []byte(text), 0o600))
	}
	authority, err := pki.Open(filepath.Join(silent, "pki"), time.Now)
	require.NoError(t, err)
	_, err = authority.Ensure(filepath.Join(silent, "c"), pki.Request{Identity: pki.UserIdentity("cli", pki.RoleAdmin)})
	require.NoError(t, err)
	address := testkit.FreeAddr(t)
	require.NoError(t, cli.WriteClientConfig(silent, cli.ClientConfig{Site: "local", Certificates: "c", Endpoints: map[string]string{"scheduler": address}}))

	var b strings.Builder
	for _, state := range []string{absent, broken, silent} {
		for _, args := range [][]string{{"vms"}, {"status", "--watch"}, {"events", "--follow"}, {"protect", "a", "--wait"}, {"failover", "list"}} {
			started := time.Now()
			code, out, errOut := run(t, state, args...)
			require.Equal(t, 1, code)
			require.Empty(t, out)
			require.Less(t, time.Since(started), 20*time.Second)
			for _, part := range []string{"what happened: ", "reason: ", "likely cause: ", "what to do: "} {
				require.Contains(t, errOut, part)
			}
			require.NotContains(t, errOut, "INTERNAL")
			if args[0] == "vms" || args[0] == "failover" {
				errOut = dialing.ReplaceAllString(errOut, "$1<error>")
				errOut = strings.NewReplacer(root, "<dir>", address, "127.0.0.1:<port>").Replace(errOut)
				fmt.Fprintf(&b, "$ landfall %s --state <dir>/%s\n%s\n", strings.Join(args, " "), filepath.Base(state), errOut)
			}
		}
	}
	golden(t, "no-server.golden", b.String())
	require.NoDirExists(t, absent)
}

// A machine that is named like a subcommand of points is reached all the same.
func TestPointsOfAMachineNamedLikeACommand(t *testing.T) {
	state := filepath.Join(t.TempDir(), "absent")
	for _, args := range [][]string{{"points", "--", "open"}, {"points", "list", "open"}, {"points", "--limit", "3", "--", "hold"}, {"points", "sites/local/vms/hold"}} {
		code, _, errOut := run(t, state, args...)
		require.Equal(t, 1, code, "%v goes on to the server\n%s", args, errOut)
		require.NotContains(t, errOut, "Usage:")
	}
	code, _, errOut := run(t, state, "points", "hold", "web-01", "--hold", "case-17")
	require.Equal(t, 2, code)
	require.Contains(t, errOut, "point")
}

// `landfall up` refuses what it cannot run with before it makes anything.
func TestUpRefuses(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	state := filepath.Join(root, "state")
	for _, images := range []string{filepath.Join(root, "nothing"), file} {
		code, _, errOut := run(t, state, "up", "--images", images)
		require.Equal(t, 1, code)
		require.Contains(t, errOut, images)
		require.Contains(t, errOut, "INVALID_ARGUMENT")
		require.NoDirExists(t, state)
	}
}

// `landfall up` on a new state folder makes the policy that `landfall protect` uses, says that it is up, and ends well when
// it is interrupted; a second one on the same folder is refused.
func TestUpMakesADefaultPolicy(t *testing.T) {
	root := t.TempDir()
	state, images := filepath.Join(root, "state"), filepath.Join(root, "images")
	require.NoError(t, os.Mkdir(images, 0o700))
	ctx, cancel := context.WithCancel(testkit.Context(t))
	defer cancel()
	done := make(chan int, 1)
	var stdout, stderr bytes.Buffer // read when it has ended
	go func() {
		done <- cli.Main(ctx, []string{"up", "--state", state, "--images", images}, strings.NewReader(""), &stdout, &stderr)
	}()
	testkit.Eventually(t, 30*time.Second, func() bool {
		_, out, _ := run(t, state, "policy", "get", "default")
		return strings.Contains(out, "30s")
	}, "the default policy")
	code, _, errOut := run(t, state, "up", "--images", images)
	require.Equal(t, 1, code)
	require.Contains(t, errOut, "another landfall runs on this state folder")
	cancel()
	require.Zero(t, <-done, "%s", &stderr)
	require.Contains(t, stdout.String(), "landfall is up: API 127.0.0.1:")
}

// What the disk commands print as documents.
func TestDiskDocuments(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.vhd")
	d, err := vdisk.CreateVHD(path, 1<<20)
	require.NoError(t, err)
	_, err = d.WriteAt(bytes.Repeat([]byte{1}, 4096), 65536)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	code, out, errOut := run(t, "/state", "disk", "info", path, "-o", "yaml")
	require.Zero(t, code, errOut)
	var info map[string]any
	require.NoError(t, yaml.Unmarshal([]byte(out), &info))
	require.Equal(t, "vhd", info["format"])
	require.EqualValues(t, 1<<20, info["size_bytes"])
	require.Contains(t, info, "unique_id")
	code, out, _ = run(t, "/state", "disk", "compare", path, path, "-o", "json")
	require.Zero(t, code)
	require.JSONEq(t, `{"identical": true}`, out)
}
