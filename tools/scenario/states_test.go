package scenario

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

// While the first copy is under way there is nothing to fail over to, and the machine is protected already; who waits may
// stop waiting without stopping the work; and the protection can be ended at that point.
func TestDuringInitialReplication(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("quick", "1s")
	held, release := make(chan struct{}, 64), make(chan struct{})
	disarm := failpoint.ArmFunc("uploader/before-segment", func() error {
		held <- struct{}{}
		<-release
		return nil
	})
	over := sync.OnceFunc(func() { disarm(); close(release) })
	defer over()

	job := strings.TrimSpace(l.ok("protect", "web-01", "--policy", "quick").out)
	<-held
	out := filepath.Join(l.root, "out")
	text := ""
	for _, args := range [][]string{
		{"failover", "test", "web-01", "--out", out},
		{"failover", "test", "web-01", "--out", out, "--point", "latest-processed"},
		{"failover", "test", "web-01", "--out", out, "--check"},
		{"protect", "web-01", "--policy", "quick"},
		{"resync", "web-01"},
		{"policy", "delete", "quick"},
	} {
		r := l.run(args...)
		require.Equal(t, 1, r.code, "%v %s", args, r.out)
		require.Contains(t, r.err, "what to do: ")
		require.NotContains(t, r.err, "INTERNAL")
		text += l.transcript(r)
	}
	require.NoDirExists(t, out)
	require.NotContains(t, l.ok("failover", "list").out, "web-01")
	require.Contains(t, l.ok("status", "web-01").out, "initial replication")

	// Interrupted while it waits: exit 1, and the job goes on.
	waiting := l.stream("jobs", "show", job, "--watch")
	testkit.Eventually(t, patience, func() bool { return strings.Contains(waiting.String(), "initial-replication") }, "it follows the job")
	waiting.stop()
	require.Equal(t, 1, <-waiting.done)
	require.Contains(t, waiting.String(), "goes on")
	text += "# interrupted\n" + l.normal(waiting.String()[strings.LastIndex(waiting.String(), "stopped"):])
	golden(t, "during-copy.golden", text)

	over()
	l.awaitPoint("web-01", 3)
	require.Contains(t, l.ok("jobs", "show", job).out, "succeeded")

	// The same again, ended half-way: nothing stands in the way of a new protection.
	l.ok("unprotect", "web-01", "--wait")
	first := l.lineages()
	held, release = make(chan struct{}, 64), make(chan struct{})
	disarm = failpoint.ArmFunc("uploader/before-manifest", func() error {
		held <- struct{}{}
		<-release
		return nil
	})
	again := sync.OnceFunc(func() { disarm(); close(release) })
	defer again()
	l.ok("protect", "web-01", "--policy", "quick")
	<-held
	l.ok("unprotect", "web-01", "--wait")
	again()
	require.NotContains(t, l.ok("status").out, "web-01")
	l.ok("protect", "web-01", "--policy", "quick", "--wait")
	l.awaitPoint("web-01", 3)
	require.Greater(t, len(l.lineages()), len(first), "every protection has a lineage of its own")
	l.same("web-01", "os", filepath.Join(l.images, "web-01", "os.raw"))
}

// lineages lists the containers of journals.
func (l *lab) lineages() []string {
	l.t.Helper()
	found, err := filepath.Glob(filepath.Join(l.state, "store", "containers", "lfj-*"))
	require.NoError(l.t, err)
	return found
}

// same takes a test failover of the newest point and compares a disk with the image, which nobody writes to now.
func (l *lab) same(vm, disk, image string) {
	l.t.Helper()
	out := filepath.Join(l.t.TempDir(), "out")
	l.ok("failover", "test", vm, "--out", out, "--wait")
	l.equal(filepath.Join(out, disk+".vhd"), image)
	l.ok("failover", "cleanup", vm, "--wait")
	require.NoDirExists(l.t, out)
}

// equal compares a recovered disk with a raw image byte by byte.
func (l *lab) equal(vhd, image string) {
	l.t.Helper()
	want, err := os.ReadFile(image)
	require.NoError(l.t, err)
	d, err := vdisk.Open(vhd, vdisk.FormatVHD, true)
	require.NoError(l.t, err)
	defer d.Close()
	require.EqualValues(l.t, len(want), d.Size())
	got := make([]byte, len(want))
	_, err = d.ReadAt(got, 0)
	require.NoError(l.t, err)
	for i := 0; i < len(want); i += 4096 {
		require.True(l.t, bytes.Equal(want[i:i+4096], got[i:i+4096]), "they differ at %d", i)
	}
}

// A product that is stopped and started again goes on where it was: same protection, next point a delta, old points
// there, and a test failover that waited for clean-up still does.
func TestStoppedAndStarted(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	l.policy("quick", "1s")
	l.ok("protect", "web-01", "--policy", "quick", "--wait")
	before := l.awaitPoint("web-01", 3)
	out := filepath.Join(l.root, "out")
	l.ok("failover", "test", "web-01", "--out", out, "--wait")
	l.stop()

	l.up()
	d := l.disk("web-01", "os")
	p := make([]byte, 128<<10)
	testkit.Fill(p, 99)
	_, err := d.WriteAt(p, 10*mib)
	require.NoError(t, err)
	require.NoError(t, d.Flush())
	after := l.awaitPoint("web-01", l.status("web-01").LastPoint+2)
	require.Equal(t, before.Lineage, after.Lineage)
	require.EqualValues(t, 1, after.Counters.Full, "the copy was made once")
	require.GreaterOrEqual(t, after.Counters.Points, before.Counters.Points)
	require.Less(t, after.Counters.Shipped, int64(5*mib), "a delta, not the disk: %d", after.Counters.Shipped)
	l.ok("failover", "cleanup", "web-01", "--wait")
	require.NoDirExists(t, out)
	l.same("web-01", "os", filepath.Join(l.images, "web-01", "os.raw"))
}

// interrupted runs a command under a context that is over.
func (l *lab) interrupted(args ...string) result {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return l.runIn(ctx, "", args...)
}

// Interrupted before it began, a command fails in words.
func TestInterruptedCommand(t *testing.T) {
	l := newLab(t)
	l.web()
	l.up()
	r := l.interrupted("vms")
	require.Equal(t, 1, r.code)
	require.Contains(t, r.err, "CANCELLED")
}
