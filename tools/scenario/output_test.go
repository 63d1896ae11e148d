package scenario

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/tools/cli"
)

// keysOf lists the paths of all keys of a decoded document; elements of lists share one.
func keysOf(v any) []string {
	seen := map[string]bool{}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				seen[path+k] = true
				walk(path+k+".", e)
			}
		case []any:
			for _, e := range v {
				walk(strings.TrimSuffix(path, ".")+"[].", e)
			}
		}
	}
	walk("", v)
	keys := make([]string, 0, len(seen))
	for k := range seen {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// document runs a command as JSON and as YAML and returns the keys, which are the same.
func (l *lab) document(args ...string) string {
	l.t.Helper()
	var fromJSON, fromYAML any
	r := l.ok(append(slices.Clone(args), "-o", "json")...)
	require.NoError(l.t, json.Unmarshal([]byte(r.out), &fromJSON), r.out)
	require.NoError(l.t, yaml.Unmarshal([]byte(l.ok(append(slices.Clone(args), "-o", "yaml")...).out), &fromYAML))
	keys := keysOf(fromJSON)
	require.Equal(l.t, keys, keysOf(fromYAML), "%v", args)
	return "$ landfall " + strings.Join(args, " ") + " -o json\n" + strings.Join(keys, "\n") + "\n\n"
}

// The keys of every document are a contract for scripts.
func TestDocumentsAndTables(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("calm", "15m")
	tables := l.transcript(l.ok("vms")) + l.transcript(l.ok("vms", "show", "web-01")) + l.transcript(l.ok("status")) + l.transcript(l.ok("policy", "get"))
	l.ok("protect", "web-01", "--policy", "calm", "--wait")
	l.awaitPoint("web-01", 3)
	out := filepath.Join(l.root, "out")
	l.ok("failover", "test", "web-01", "--out", out, "--wait")
	var jobs struct {
		Jobs []struct {
			Name string `json:"name"`
			Kind string `json:"kind"`
		} `json:"jobs"`
	}
	l.get(&jobs, "jobs")
	require.Len(t, jobs.Jobs, 2)
	require.Equal(t, "JOB_KIND_TEST_FAILOVER", jobs.Jobs[0].Kind, "newest first")

	keys := ""
	for _, args := range [][]string{
		{"hosts"}, {"vms"}, {"vms", "show", "web-01"}, {"status"}, {"status", "web-01"}, {"points", "web-01"}, {"policy", "get"}, {"policy", "get", "calm"},
		{"jobs"}, {"failover", "list"}, {"failover", "list", "web-01"}, {"version"},
		{"disk", "info", filepath.Join(out, "os.vhd")}, {"disk", "map", filepath.Join(out, "os.vhd")},
	} {
		keys += l.document(args...)
	}
	keys += l.document("jobs", "show", jobs.Jobs[0].Name)
	keys += l.document("jobs", "show", jobs.Jobs[1].Name)
	golden(t, "keys.golden", l.normal(keys))

	for _, args := range [][]string{{"status"}, {"status", "web-01"}, {"points", "web-01"}, {"jobs"}, {"jobs", "show", jobs.Jobs[0].Name}, {"jobs", "show", jobs.Jobs[1].Name}} {
		tables += l.transcript(l.ok(args...))
	}
	r := l.ok("jobs", "show", jobs.Jobs[1].Name, "--watch") // it has ended: shown once
	require.Contains(t, r.out, "succeeded")
	golden(t, "tables.golden", squeeze(tables))

	// What a machine's disk, its recovered copy and a converted one have in common.
	raws, vhd, again := filepath.Join(l.root, "copy.raw"), filepath.Join(out, "os.vhd"), filepath.Join(l.root, "again.vhd")
	disks := l.transcript(l.ok("disk", "info", vhd)) + l.transcript(l.ok("disk", "map", vhd))
	disks += l.transcript(l.ok("disk", "convert", vhd, raws, "--to", "raw"))
	disks += l.transcript(l.ok("disk", "convert", raws, again, "--to", "vhd"))
	disks += l.transcript(l.ok("disk", "compare", vhd, raws)) + l.transcript(l.ok("disk", "compare", again, raws))
	disks += l.refused("", "disk", "convert", raws, again)
	disks += l.refused("", "disk", "convert", raws, filepath.Join(l.root, "x"), "--to", "qcow2")
	disks += l.refused("", "disk", "info", filepath.Join(l.root, "nothing"))
	f, err := os.OpenFile(raws, os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte{1}, 9*mib+17)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	r = l.run("disk", "compare", vhd, raws)
	require.Equal(t, 1, r.code)
	disks += l.transcript(r)
	require.NoError(t, os.Truncate(raws, 1000))
	disks += l.refused("", "disk", "info", raws)
	require.NoError(t, os.Truncate(again, mib))
	disks += l.refused("", "disk", "info", again, "--format", "vhd")
	golden(t, "disks.golden", disks)
}

// squeeze makes tables independent of the width of what was replaced in them, and of sizes and times that vary.
func squeeze(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString(strings.Join(strings.Fields(line), " ") + "\n")
	}
	return stepTime.ReplaceAllString(rpoText.ReplaceAllString(b.String(), "$1<rpo>"), "$1 in <time>$2")
}

// stream runs a command that goes on until it is interrupted.
type stream struct {
	mu   sync.Mutex
	text bytes.Buffer
	stop context.CancelFunc
	done chan int
}

func (s *stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *stream) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

func (l *lab) stream(args ...string) *stream {
	ctx, cancel := context.WithCancel(testkit.Context(l.t))
	s := &stream{stop: cancel, done: make(chan int, 1)}
	go func() {
		s.done <- cli.Main(ctx, append(args, "--state", l.state), strings.NewReader(""), s, s)
	}()
	return s
}

// Watching goes on until it is interrupted, and that is its normal end.
func TestWatching(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("calm", "15m")
	watch, follow, all := l.stream("status", "--watch"), l.stream("events", "--follow", "--vm", "web-01", "-o", "json"), l.stream("events", "--follow")
	l.ok("protect", "web-01", "--policy", "calm", "--wait")
	l.awaitPoint("web-01", 3)
	for what, s := range map[string]*stream{"protected": watch, "recovery-point.processed": all} {
		testkit.Eventually(t, patience, func() bool { return strings.Contains(s.String(), what) }, what)
	}
	for _, s := range []*stream{watch, follow, all} {
		s.stop()
		select {
		case code := <-s.done:
			require.Zero(t, code, s.String())
		case <-testkit.Context(t).Done():
			t.Fatal("it does not stop")
		}
		require.NotContains(t, s.String(), "what happened")
	}

	// Without --follow: what is there, then the end. All types are in the catalogue.
	rows := catalogue(t)
	dec := json.NewDecoder(strings.NewReader(l.ok("events", "-o", "json").out))
	types := map[string]int{}
	for dec.More() {
		var e struct {
			Type    string `json:"type"`
			Subject string `json:"subject"`
			ID      string `json:"id"`
			Payload string `json:"payload"`
		}
		require.NoError(t, dec.Decode(&e))
		name := strings.TrimPrefix(e.Type, "landfall.v1.")
		require.Contains(t, rows, name)
		require.NotEmpty(t, e.Subject)
		require.NotEmpty(t, e.ID)
		require.True(t, json.Valid([]byte(e.Payload)), e.Payload)
		types[name]++
	}
	for _, name := range []string{"protection-state.changed", "job.changed", "pass-task.shipped", "recovery-point.received", "recovery-point.processed"} {
		require.Positive(t, types[name], "%s in %v", name, types)
	}
	one := l.ok("events", "--vm", "web-01").out
	require.Contains(t, one, "recovery-point.received")
}

// hrlDocument is `hrl inspect -o json` as far as the test looks at it.
type hrlDocument struct {
	Blocks []struct {
		Entries []struct {
			Offset int64  `json:"byte_offset"`
			Length int64  `json:"data_length"`
			Sum    string `json:"sha256"`
		} `json:"entries"`
	} `json:"blocks"`
}

// The log that the product keeps of a guest's writes is readable while it grows, as far as it is provably whole, and once
// it is sealed it has every write, in order.
func TestInspectLiveLog(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("quick", "1s")
	l.ok("protect", "web-01", "--policy", "quick", "--wait")
	l.awaitPoint("web-01", 3)
	held, release := make(chan struct{}, 1), make(chan struct{})
	disarm := failpoint.ArmFunc("uploader/before-manifest", func() error {
		held <- struct{}{}
		<-release
		return nil
	})
	over := sync.OnceFunc(func() { disarm(); close(release) })
	defer over()
	wait := func() {
		t.Helper()
		select {
		case <-held:
		case <-testkit.Context(t).Done():
			t.Fatal("no point is shipped")
		}
	}
	wait() // a point is on its way: there is no cut until it has arrived

	d := l.disk("web-01", "os")
	type write struct {
		off, length int64
		sum         string
	}
	var want []write
	for i := range 150 {
		p := make([]byte, (i%5+1)*4096)
		testkit.Fill(p, uint64(i))
		off := int64(5*mib + i*65536)
		_, err := d.WriteAt(p, off)
		require.NoError(t, err)
		sum := sha256.Sum256(p)
		want = append(want, write{off, int64(len(p)), hex.EncodeToString(sum[:])})
	}
	require.NoError(t, d.Flush())

	logs := func() []string {
		t.Helper()
		var found []string
		for _, pattern := range []string{"*.hrl", "*/*.hrl"} {
			some, err := filepath.Glob(filepath.Join(l.images, "web-01", pattern))
			require.NoError(t, err)
			found = append(found, some...)
		}
		return found
	}
	read := func(path string) (all []write, text string) {
		t.Helper()
		var doc hrlDocument
		l.get(&doc, "hrl", "inspect", path)
		for _, b := range doc.Blocks {
			for _, e := range b.Entries {
				all = append(all, write{e.Offset, e.Length, e.Sum})
			}
		}
		return all, l.ok("hrl", "inspect", path).out
	}
	open := 0
	for _, path := range logs() {
		got, text := read(path)
		if len(got) == 0 {
			continue // the one on its way: the guest had not written then
		}
		open++
		require.Contains(t, text, "Not closed", "%s is still written to", path)
		require.GreaterOrEqual(t, len(got), 100, "whole blocks are whole")
		require.Equal(t, want[:len(got)], got)
	}
	require.Equal(t, 1, open, "a log lies beside the disk")

	release <- struct{}{}
	wait() // the next point was cut: its log is sealed and on its way
	sealed := 0
	for _, path := range logs() {
		got, text := read(path)
		if len(got) == 0 {
			continue
		}
		sealed++
		require.Equal(t, want, got)
		require.NotContains(t, text, "Not closed")
		keys := l.document("hrl", "inspect", path)
		golden(t, "hrl-keys.golden", keys[strings.Index(keys, "\n")+1:])
	}
	require.Equal(t, 1, sealed)
	over()

	for _, path := range []string{filepath.Join(l.images, "web-01", "os.raw"), filepath.Join(l.root, "nothing")} {
		r := l.run("hrl", "inspect", path)
		require.Equal(t, 1, r.code)
		require.Contains(t, r.err, "INVALID_ARGUMENT")
		require.Contains(t, r.err, path)
	}
	l.awaitPoint("web-01", l.status("web-01").LastPoint+1)
}
