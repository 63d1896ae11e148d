package scenario

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	nooptrace "go.opentelemetry.io/otel/trace/noop"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/tools/allinone"
	"github.com/landfall-dr/landfall/tools/cli"
	"github.com/landfall-dr/landfall/tools/nbdclient"
)

// runAsLandfall, set in the environment, makes this test program the landfall program: the same code, one build.
const runAsLandfall = "LANDFALL_SCENARIO_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(runAsLandfall) != "" {
		os.Exit(cli.Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

const (
	mib = 1 << 20
	// patience bounds every wait for something that takes a second on an idle machine.
	patience = 45 * time.Second
)

// lab is one running product: its folders and the command line that finds it.
type lab struct {
	t             *testing.T
	root          string
	images, state string
	qemu          allinone.QEMU    // instead of images, where it says something
	store         backend.Settings // where lineages are, where it is not a folder of the state
	retryUnit     time.Duration    // of the ladder, where a test waits for it
	logs          *testkit.Logs
	tracer        trace.TracerProvider
	stop          func()
}

// newLab makes the folders. Nothing runs yet.
func newLab(t *testing.T) *lab {
	root := t.TempDir()
	l := &lab{t: t, root: root, images: filepath.Join(root, "images"), state: filepath.Join(root, "state"), logs: testkit.NewLogs(t), tracer: nooptrace.NewTracerProvider()}
	require.NoError(t, os.MkdirAll(l.images, 0o750))
	return l
}

// id is the GUID of machine number n.
func id(n int) string { return fmt.Sprintf("6f2b6a0e-7c39-4d0e-9a55-0d4c1f6b%04x", n) }

// machine writes a machine's folder; disks are the lines below "disks:" in vm.yaml.
func (l *lab) machine(name string, n int, disks ...string) (folder string) {
	folder = filepath.Join(l.images, name)
	require.NoError(l.t, os.MkdirAll(folder, 0o750))
	yaml := fmt.Sprintf(`version: 1
id: %s
name: %s
generation: 2
cpus: 1
memory: 1GiB
network_adapters:
  - {name: eth0, mac_address: "00:15:5d:00:00:%02x", network: production}
disks:
`, id(n), name, n)
	for _, d := range disks {
		yaml += "  - " + d + "\n"
	}
	require.NoError(l.t, os.WriteFile(filepath.Join(folder, "vm.yaml"), []byte(yaml), 0o600))
	return folder
}

// raw makes a sparse raw image whose first data bytes are not zero.
func raw(t *testing.T, path string, size, data int64) {
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, f.Truncate(size))
	p := make([]byte, data)
	testkit.Fill(p, uint64(size))
	_, err = f.Write(p)
	require.NoError(t, err)
}

// web makes the good machine: web-01 with one raw disk of 16 MiB, 4 of them data.
func (l *lab) web() {
	raw(l.t, filepath.Join(l.machine("web-01", 1, "{id: os, image: os.raw, os: true}"), "os.raw"), 16*mib, 4*mib)
}

// up runs the product until the test ends or stop is called, which waits for its end.
func (l *lab) up() {
	begun := time.Now()
	defer func() { l.t.Logf("up in %s", time.Since(begun).Round(time.Millisecond)) }()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	images := l.images
	if l.qemu.Machines != "" {
		images = ""
	}
	go func() {
		ended <- allinone.Run(ctx, allinone.Options{
			State: l.state, Store: l.store, RetryUnit: l.retryUnit, Images: images, QEMU: l.qemu, Listen: "127.0.0.1:0", NBDListen: "127.0.0.1:0", Site: "local", Host: "host-1", Version: "test",
			Logger: slog.New(l.logs.Handler()), Tracer: l.tracer, Meter: noop.NewMeterProvider(), Clock: time.Now, Signals: make(chan os.Signal),
			OnReady: func(address string) {
				err := cli.WriteClientConfig(l.state, cli.ClientConfig{
					Site: "local", Certificates: allinone.ClientCertificates, Endpoints: map[string]string{"scheduler": address, "failover-orchestrator": address},
				})
				if err == nil {
					close(ready)
				}
			},
		})
	}()
	over := false
	l.stop = func() {
		if over {
			return
		}
		over = true
		begun := time.Now()
		defer func() { l.t.Logf("stopped in %s", time.Since(begun).Round(time.Millisecond)) }()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				require.ErrorIs(l.t, err, context.Canceled)
			}
		case <-time.After(patience):
			l.t.Error("the product did not stop")
		}
	}
	l.t.Cleanup(l.stop)
	select {
	case <-ready:
	case err := <-ended:
		over = true
		require.NoError(l.t, err, "the product ended")
		l.t.Fatal("the product ended")
	case <-time.After(patience):
		l.t.Fatal("the product did not start")
	}
	testkit.Eventually(l.t, patience, func() bool { return strings.Contains(l.run("hosts").out, "host-1") }, "the host registers")
}

// result is how a command ended.
type result struct {
	args     []string
	code     int
	out, err string
}

// run runs one command of the command line against the product.
func (l *lab) run(args ...string) result { return l.runIn(testkit.Context(l.t), "", args...) }

func (l *lab) runIn(ctx context.Context, stdin string, args ...string) result {
	var out, errOut bytes.Buffer
	full := args
	if !contains(args, "--state") {
		full = append(append([]string{}, args...), "--state", l.state)
	}
	code := cli.Main(ctx, full, strings.NewReader(stdin), &out, &errOut)
	return result{args: args, code: code, out: out.String(), err: errOut.String()}
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}

// ok runs a command that must succeed.
func (l *lab) ok(args ...string) result {
	l.t.Helper()
	r := l.run(args...)
	require.Zero(l.t, r.code, "landfall %s\n%s%s", strings.Join(args, " "), r.out, r.err)
	return r
}

// get decodes a command's JSON.
func (l *lab) get(into any, args ...string) {
	l.t.Helper()
	r := l.ok(append(args, "-o", "json")...)
	require.NoError(l.t, json.Unmarshal([]byte(r.out), into), r.out)
}

// policy makes a policy with a copy interval.
func (l *lab) policy(name, interval string) {
	l.t.Helper()
	r := l.runIn(testkit.Context(l.t), "name: "+name+"\ncopy_interval: "+interval+"\n", "policy", "apply", "-f", "-")
	require.Zero(l.t, r.code, r.err)
}

// vmStatus is `status VM -o json`, as far as the tests look at it.
type vmStatus struct {
	State     string    `json:"state"`
	Lineage   string    `json:"lineage"`
	LastPoint uint64    `json:"last_point,string"`
	LastTime  time.Time `json:"last_point_time"`
	Processed uint64    `json:"processed_point,string"`
	Counters  struct {
		Points  int64 `json:"points,string"`
		Shipped int64 `json:"shipped_bytes,string"`
		Changed int64 `json:"changed_bytes,string"`
		Full    int64 `json:"full_passes,string"`
	} `json:"counters"`
}

func (l *lab) status(vm string) (s vmStatus) {
	l.t.Helper()
	l.get(&s, "status", vm)
	return s
}

// awaitPoint waits until point n or a later one is processed.
func (l *lab) awaitPoint(vm string, n uint64) vmStatus {
	l.t.Helper()
	var s vmStatus
	testkit.Eventually(l.t, patience, func() bool { s = l.status(vm); return s.Processed >= n }, fmt.Sprintf("point %d is processed", n))
	return s
}

// disk opens a disk of a machine as its guest does.
func (l *lab) disk(vm, disk string) *nbdclient.Client {
	l.t.Helper()
	c, err := nbdclient.Dial(testkit.Context(l.t), l.export(vm, disk))
	require.NoError(l.t, err)
	l.t.Cleanup(func() { _ = c.Close() })
	return c
}

// export is the address at which a machine's guest finds a disk.
func (l *lab) export(vm, disk string) string {
	l.t.Helper()
	var v struct {
		Machine struct {
			Disks []struct {
				ID  string `json:"id"`
				URI string `json:"export_uri"`
			} `json:"disks"`
		} `json:"machine"`
	}
	l.get(&v, "vms", "show", vm)
	for _, d := range v.Machine.Disks {
		if d.ID == disk {
			return d.URI
		}
	}
	l.t.Fatalf("%s has no disk %s", vm, disk)
	return ""
}

// Patterns of what differs from run to run, and their names in golden files.
var patterns = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "<id>"},
	{regexp.MustCompile(`\b[0-9a-f]{32}\b`), "<lineage>"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z?`), "<time>"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:<port>"},
	{regexp.MustCompile(`\.landfall-probe-\d+`), ".landfall-probe-<n>"},
	{regexp.MustCompile(`\d+(\.\d+)? [KMG]iB/s  ETA \S+`), "<rate>"},
	{regexp.MustCompile(`(?m)(no connection to \S+: ).*connection refused"?$`), "$1<error>"},
	{regexp.MustCompile(`(?m)[ \t]+$`), ""},
}

// normal replaces what differs from run to run.
func (l *lab) normal(s string) string {
	s = strings.ReplaceAll(s, l.root, "<dir>")
	s = strings.ReplaceAll(s, id(1), "<web-01>")
	for _, p := range patterns {
		s = p.re.ReplaceAllString(s, p.to)
	}
	return s
}

// misused runs a command that is wrong as it stands: nobody is asked. Only its first line is text, usage follows.
func (l *lab) misused(args ...string) string {
	l.t.Helper()
	r := l.run(args...)
	require.Equal(l.t, 2, r.code, "landfall %s\n%s%s", strings.Join(args, " "), r.out, r.err)
	require.Empty(l.t, r.out)
	first, usage, _ := strings.Cut(r.err, "\n")
	require.Contains(l.t, usage, "Usage:\n  landfall", "landfall %s", strings.Join(args, " "))
	r.err = first + "\n"
	return l.transcript(r)
}

// transcript is a command as a reader sees it.
func (l *lab) transcript(r result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "$ landfall %s\n%s%s[exit %d]\n\n", strings.Join(r.args, " "), r.out, r.err, r.code)
	return l.normal(b.String())
}

// golden compares with a file of testdata, or with LANDFALL_UPDATE=1 writes it.
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
