package scenario

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

const (
	// bigSize is the disk's size, in bytes; data is scattered over all of it.
	bigSize = 20 << 30
	// scattered is how many extents of 1 MiB hold data: 256 MiB.
	scattered = 256
	// memoryBound is what no process may exceed, in bytes (VmHWM).
	memoryBound = 256 * mib
)

var highWater = regexp.MustCompile(`(?m)^VmHWM:\s*(\d+) kB$`)

// peak is the most memory that a process ever held, in bytes.
func peak(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	m := highWater.FindSubmatch(status)
	require.NotNil(t, m, "%s", status)
	kb, err := strconv.ParseInt(string(m[1]), 10, 64)
	require.NoError(t, err)
	return kb << 10
}

// place is where extent i of the big disk lies, in bytes: spread over the disk, not aligned to windows.
func place(i int) int64 {
	const step = bigSize / scattered
	return int64(i)*step + int64(i%7)*4096
}

// A disk of 20 GiB, almost all of it absent, is copied, followed and failed over by a process that holds less than
// 256 MiB; time and memory follow the data, not the size.
func TestBigSparseDiskInLittleMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("moves 256 MiB several times")
	}
	l := newLab(t)
	path := filepath.Join(l.machine("big-01", 1, "{id: os, image: os.raw, os: true}"), "os.raw")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, f.Truncate(bigSize))
	p := make([]byte, mib)
	for i := range scattered {
		testkit.Fill(p, uint64(i))
		_, err := f.WriteAt(p, place(i))
		require.NoError(t, err)
	}

	var log bytes.Buffer
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(testkit.Context(t), self, "up", "--state", l.state, "--images", l.images)
	cmd.Env = append(os.Environ(), runAsLandfall+"=1")
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	started := time.Now()
	require.NoError(t, cmd.Start())
	ended := false
	defer func() {
		if !ended {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if t.Failed() {
			t.Log(log.String())
		}
	}()
	testkit.Eventually(t, patience, func() bool { return strings.Contains(l.run("vms").out, "big-01") }, "the machine is listed")
	idle := peak(t, cmd.Process.Pid)

	l.policy("quick", "2s")
	l.ok("protect", "big-01", "--policy", "quick", "--wait")
	copied, copyTime := peak(t, cmd.Process.Pid), time.Since(started)

	// The guest writes 32 MiB here and there.
	d := l.disk("big-01", "os")
	const changed = 32
	for i := range changed {
		testkit.Fill(p, uint64(1000+i))
		_, err := d.WriteAt(p, place(i*8)+3*mib)
		require.NoError(t, err)
	}
	require.NoError(t, d.Flush())
	l.awaitPoint("big-01", l.status("big-01").LastPoint+2)
	followed := peak(t, cmd.Process.Pid)

	out := filepath.Join(l.root, "out")
	begun := time.Now()
	l.ok("failover", "test", "big-01", "--out", out, "--wait")
	drilled, drillTime := peak(t, cmd.Process.Pid), time.Since(begun)

	image, err := vdisk.Open(filepath.Join(out, "os.vhd"), vdisk.FormatVHD, true)
	require.NoError(t, err)
	defer image.Close()
	require.EqualValues(t, bigSize, image.Size())
	got := make([]byte, mib)
	check := func(seed int, off int64) {
		t.Helper()
		testkit.Fill(p, uint64(seed))
		_, err := image.ReadAt(got, off)
		require.NoError(t, err)
		require.True(t, bytes.Equal(p, got), "at %d", off)
	}
	for i := range scattered {
		check(i, place(i))
	}
	for i := range changed {
		check(1000+i, place(i*8)+3*mib)
	}
	var status struct {
		Counters json.RawMessage `json:"counters"`
	}
	l.get(&status, "status", "big-01")
	l.ok("failover", "cleanup", "big-01", "--wait")
	last := peak(t, cmd.Process.Pid)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), "the program ends well")
	ended = true
	t.Logf("VmHWM in MiB: idle %d, copied %d, followed %d, failed over %d, at the end %d; copy %.1fs, failover %.1fs; %s",
		idle/mib, copied/mib, followed/mib, drilled/mib, last/mib, copyTime.Seconds(), drillTime.Seconds(), status.Counters)
	require.Less(t, last, int64(memoryBound), "VmHWM")
	var counters struct {
		Shipped int64 `json:"shipped_bytes,string"`
	}
	require.NoError(t, json.Unmarshal(status.Counters, &counters))
	require.InDelta(t, (scattered+changed)*mib, counters.Shipped, 16*mib, "shipped is the data, in the copy and after it")
}
