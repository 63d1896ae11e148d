package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// account is a lab whose lineages are in a storage account that keeps every rule of the service, and that tests break.
type account struct {
	*lab
	srv    *azurefake.Server
	sas    string       // file with the SAS that the product uses
	ahead  atomic.Int64 // storage time minus ours
	writes uint64       // of the guest
}

// newAccount makes the account and the good machine. The product reaches it by a SAS in a file, as one that something renews.
func newAccount(t *testing.T) *account {
	a := bareAccount(t)
	a.renew(a.srv.SAS("rwdlac", time.Now().Add(time.Hour)))
	a.store.URL = a.srv.URL()
	require.NoError(t, a.store.Azure.SAS.UnmarshalText([]byte("file:"+a.sas)))
	return a
}

// bareAccount is newAccount before the product has credentials.
func bareAccount(t *testing.T) *account {
	a := &account{lab: newLab(t)}
	a.srv = azurefake.New(azurefake.Options{Account: "contosodr", Now: func() time.Time { return time.Now().Add(time.Duration(a.ahead.Load())) }}).Start(t)
	a.sas = filepath.Join(a.root, "sas")
	a.store = backend.DefaultSettings()
	a.store.Azure.RetryFor = time.Second // how long one call is repeated; the ladder decides after that
	a.retryUnit = 20 * time.Millisecond
	a.web()
	return a
}

// renew puts another SAS where the product takes it from.
func (a *account) renew(sas string) {
	require.NoError(a.t, os.WriteFile(a.sas, []byte(sas+"\n"), 0o600))
}

// applyNow is a policy under which no received point waits to be merged with others.
func (a *account) applyNow(name, interval, more string) {
	a.t.Helper()
	r := a.runIn(testkit.Context(a.t), "name: "+name+"\ncopy_interval: "+interval+"\napply_delay: 0s\n"+more, "policy", "apply", "-f", "-")
	require.Zero(a.t, r.code, r.err)
}

// protect brings the machine to its second point or beyond.
func (a *account) protect(policy string) vmStatus {
	a.t.Helper()
	a.ok("protect", "web-01", "--policy", policy, "--wait")
	return a.awaitPoint("web-01", 3)
}

// owner is the account as its owner opens it: every right.
func (a *account) owner() blobstore.Store {
	a.t.Helper()
	s := backend.DefaultSettings()
	s.Azure.ConnectionString = config.NewSecret(a.srv.ConnectionString())
	store, err := backend.Open(testkit.Context(a.t), s, backend.Options{})
	require.NoError(a.t, err)
	a.t.Cleanup(func() { require.NoError(a.t, store.Close()) })
	return store
}

// write is one more write of the guest, flushed.
func (a *account) write() {
	a.t.Helper()
	d := a.disk("web-01", "os")
	a.writes++
	p := make([]byte, 64<<10)
	testkit.Fill(p, 1000+a.writes)
	_, err := d.WriteAt(p, int64(a.writes%200)*(64<<10))
	require.NoError(a.t, err)
	require.NoError(a.t, d.Flush())
	require.NoError(a.t, d.Close())
}

// points are the ordinals of `landfall points`, newest first.
func (a *account) points() (ordinals []string) {
	a.t.Helper()
	var list pointList
	a.get(&list, "points", "web-01")
	for _, p := range list.Points {
		ordinals = append(ordinals, p.Ordinal)
	}
	return ordinals
}

// whole proves a cure: replication goes on by itself, every point that was there still is, and the newest point that was cut
// after the guest's last write is, byte for byte, what the guest has.
func (a *account) whole(before []string) {
	a.t.Helper()
	a.write()
	wrote := time.Now()
	testkit.Eventually(a.t, patience, func() error {
		s := a.full("web-01")
		if !a.status("web-01").LastTime.After(wrote) || !s.calm() || s.State != "PROTECTION_STATE_PROTECTED" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	}, "the machine is healthy and has new points")
	require.Subset(a.t, a.points(), before, "a point that was received is gone")
	a.newest()
}

// newest compares the newest point in storage with the guest's disk.
func (a *account) newest() {
	a.t.Helper()
	ctx := testkit.Context(a.t)
	chain, err := replica.Open(ctx, a.owner(), replica.Lineage(a.status("web-01").Lineage))
	require.NoError(a.t, err)
	points, err := chain.Points(ctx)
	require.NoError(a.t, err)
	want, err := os.ReadFile(filepath.Join(a.images, "web-01", "os.raw"))
	require.NoError(a.t, err)
	require.NoError(a.t, a.pointIs(ctx, chain, points[len(points)-1].Seq, func(got []byte) error {
		if !bytes.Equal(want, got) {
			return errors.New("the newest point is not what the guest has")
		}
		return nil
	}))
}

// pointIs reads the whole disk at a point.
func (a *account) pointIs(ctx context.Context, chain *replica.Replica, seq replica.Seq, check func([]byte) error) error {
	src, err := chain.SourceAt(ctx, seq, "os")
	if err != nil {
		return err
	}
	got := make([]byte, src.Disk().Size)
	for off := 0; off < len(got); off += 4 * mib {
		if err := src.ReadAt(ctx, got[off:min(off+4*mib, len(got))], int64(off)); err != nil {
			return err
		}
	}
	return check(got)
}

// fullStatus is more of `status VM -o json`.
type fullStatus struct {
	State   string `json:"state"`
	Health  string `json:"health"`
	Reasons []struct {
		Reason string `json:"reason"`
		What   string `json:"what"`
	} `json:"health_reasons"`
	Retry struct {
		Error struct {
			Reason string `json:"reason"`
			What   string `json:"what"`
		} `json:"error"`
	} `json:"retry"`
	ApplyError *struct {
		Reason string `json:"reason"`
		What   string `json:"what"`
	} `json:"apply_error"`
}

// calm says that nothing is wrong now: cycles that were missed meanwhile, by the harm or by a slow machine, may still be told.
func (s fullStatus) calm() bool {
	for _, r := range s.Reasons {
		if r.Reason != "CYCLES_MISSED" {
			return false
		}
	}
	return true
}

func (a *account) full(vm string) (s fullStatus) {
	a.t.Helper()
	a.get(&s, "status", vm)
	return s
}

// says waits until `landfall status` gives this reason, and returns what it prints and the event that said so first.
func (a *account) says(reason string) string {
	a.t.Helper()
	var out result
	testkit.Eventually(a.t, patience, func() error {
		out = a.ok("status", "web-01")
		s := a.full("web-01")
		// A series of failures is one reason of health, whose text names the first of them.
		series := s.Retry.Error.Reason == reason && (strings.Contains(out.out, "because:        REPLICATION_FAILING") || strings.Contains(out.out, "because:        REPLICATION_ERROR"))
		if !series && !strings.Contains(out.out, "because:        "+reason) {
			return errors.New(out.out)
		}
		return nil
	}, "status says "+reason)
	return a.because(out) + a.event(reason)
}

// because is the part of a status that says what is wrong.
func (a *account) because(r result) string {
	var b strings.Builder
	b.WriteString("$ landfall " + strings.Join(r.args, " ") + "\n")
	for line := range strings.Lines(r.out) {
		if regexp.MustCompile(`^(State:|Health:|  because:|  what to do:)`).MatchString(line) {
			b.WriteString(line)
		}
	}
	return a.steady(b.String()) + "\n"
}

// event says whether `landfall events` has the failure.
func (a *account) event(reason string) string {
	a.t.Helper()
	for line := range strings.Lines(a.ok("events").out) {
		if strings.Contains(line, "ship.failed") && strings.Contains(line, reason) {
			return "event ship.failed " + reason + "\n"
		}
	}
	return ""
}

// Patterns of what differs from run to run in texts about storage.
var storagePatterns = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`\(request [0-9A-Fa-f-]+\)`), "(request <request>)"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "<sha256>"},
	{regexp.MustCompile(`\d+ bytes, where its manifest says \d+`), "<n> bytes, where its manifest says <n>"},
	{regexp.MustCompile(`gave up after \d+ tries`), "gave up after <n> tries"},
	{regexp.MustCompile(`attempt \d+ failed`), "attempt <n> failed"},
	{regexp.MustCompile(`\b(point|manifest|points|pass|sequence|at|to|checkpoint|log/0*|ordinal) ?\d+\b`), "$1 <n>"},
	{regexp.MustCompile(`log/\d+\.json`), "log/<n>.json"},
	{regexp.MustCompile(`seg/[0-9a-z-]+/[a-z0-9-]+`), "seg/<segment>"},
	{regexp.MustCompile(`(failed: |replication stopped: |replica disks: |what happened: |error: +).*?(storage (credentials refused|operation not permitted|is full|answered|container)|container missing|clocks too far apart|a replica disk was changed|gave up after)`), "$1... $2"},
	{regexp.MustCompile(`clock is (59m\d\ds|1h0m\ds)`), "clock is 1h0m0s"},
	{regexp.MustCompile(`"?0x8DE[0-9A-F]+"?`), "<etag>"},
	{regexp.MustCompile(`\d+(\.\d+)? (ms|MiB/s|KiB/s)\b`), "<figure>"},
	{regexp.MustCompile(`(?m)^[a-z-]+ +in progress.*\n`), ""}, // which of them are seen is a matter of time
	{regexp.MustCompile(`(?m)^ *\d+% .*\n`), ""},
	{regexp.MustCompile(`(?m)because:.*RPO_ABOVE.*\n.*\n|.*CYCLES_MISSED.*\n.*\n`), ""},
}

func (a *account) steady(s string) string {
	s = a.normal(s)
	for _, p := range storagePatterns {
		s = p.re.ReplaceAllString(s, p.to)
	}
	return s
}

// fails runs a command that must fail with this reason, explained.
func (a *account) fails(reason string, args ...string) string {
	a.t.Helper()
	r := a.run(args...)
	require.Equal(a.t, 1, r.code, "landfall %s\n%s%s", strings.Join(args, " "), r.out, r.err)
	require.Contains(a.t, r.err, reason)
	for _, part := range []string{"what happened: ", "likely cause: ", "what to do: "} {
		require.Contains(a.t, r.err, part)
	}
	return a.steady(a.transcript(r))
}

// intercept refuses or breaks requests as f says until the test heals them.
func (a *account) intercept(f func(*http.Request) azurefake.Fault) (heal func()) {
	a.srv.SetIntercept(f)
	return func() { a.srv.SetIntercept(nil) }
}

// in tells whether a request is about a container of this kind.
func in(r *http.Request, kind string) bool { return strings.Contains(r.URL.Path, "/lf"+kind+"-") }

// container is one of the lineage's.
func (a *account) container(kind string) string {
	return "lf" + kind + "-" + a.status("web-01").Lineage
}

// segments are the names of the newest point's segments.
func (a *account) segments(store blobstore.Store) []string {
	a.t.Helper()
	ctx := testkit.Context(a.t)
	chain, err := replica.Open(ctx, store, replica.Lineage(a.status("web-01").Lineage))
	require.NoError(a.t, err)
	points, err := chain.Points(ctx)
	require.NoError(a.t, err)
	for i := len(points) - 1; i >= 0; i-- {
		m, err := chain.Find(ctx, points[i].Ordinal)
		require.NoError(a.t, err)
		var names []string
		for _, d := range m.Disks {
			for _, s := range d.Segments {
				names = append(names, s.Name)
			}
		}
		if len(names) > 0 {
			return names
		}
	}
	a.t.Fatal("no point has a segment")
	return nil
}

// read is a whole blob.
func read(ctx context.Context, t *testing.T, c blobstore.Container, name string) []byte {
	t.Helper()
	r, _, err := c.Get(ctx, name, 0, -1)
	require.NoError(t, err)
	defer r.Close()
	p, err := io.ReadAll(r)
	require.NoError(t, err)
	return p
}
