package guestvm_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/tools/guest/guesttest"
	"github.com/landfall-dr/landfall/tools/guest/guestvm"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(cleaning{m})
}

// cleaning removes the built image after the tests.
type cleaning struct{ m *testing.M }

func (c cleaning) Run() int {
	defer guesttest.Cleanup()
	return c.m.Run()
}

func booting(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), guesttest.BootTimeout)
	t.Cleanup(cancel)
	return ctx
}

// ready waits for READY and logs how long it took from the start of QEMU.
func ready(t *testing.T, vm *guestvm.VM, began time.Time) {
	t.Helper()
	require.NoError(t, vm.WaitReady(booting(t)))
	t.Logf("start to READY: %.1f s", time.Since(began).Seconds())
}

// A guest boots in each mode, is killed while it writes, and what it left is
// consistent and has all that it acknowledged; after a power button it has no journal to replay.
func TestBootKillBoot(t *testing.T) {
	for _, c := range []struct {
		mode   guestvm.Mode
		format image.Format
	}{{guestvm.BIOS, image.VHDX}, {guestvm.UEFI, image.QCOW2}, {guestvm.Gen1, image.VPC}} {
		t.Run(string(c.mode)+"-"+string(c.format), func(t *testing.T) {
			cfg := guesttest.Config(t, c.mode, c.format)

			began := time.Now()
			vm := guesttest.Start(t, cfg)
			ready(t, vm, began)
			first, err := vm.WaitReport(booting(t))
			require.NoError(t, err)
			require.True(t, first.OK && first.Fresh, "%+v", first)
			require.False(t, first.JournalReplayed.OS || first.JournalReplayed.Data, "%+v", first)
			require.NoError(t, vm.WaitAcked(booting(t), 30))
			require.NoError(t, vm.Kill())
			acked := vm.Acked()
			vm.Close()

			began = time.Now()
			vm = guesttest.Start(t, cfg)
			ready(t, vm, began)
			second, err := vm.WaitReport(booting(t))
			require.NoError(t, err)
			require.True(t, second.OK, "%+v", second)
			require.False(t, second.Fresh)
			require.GreaterOrEqual(t, second.Commit, acked)
			require.LessOrEqual(t, second.Commit, second.Intent)
			require.LessOrEqual(t, second.Intent, second.Commit+1)
			require.NotZero(t, second.Files)
			require.True(t, second.JournalReplayed.OS && second.JournalReplayed.Data, "%+v", second)

			// It goes on with the ledger where it ended.
			require.NoError(t, vm.WaitAcked(booting(t), second.Intent+5))
			began = time.Now()
			require.NoError(t, vm.PowerOff(booting(t)))
			t.Logf("power button to the end of QEMU: %.1f s", time.Since(began).Seconds())
			acked = vm.Acked()
			vm.Close()

			vm = guesttest.Start(t, cfg)
			third, err := vm.WaitReport(booting(t))
			require.NoError(t, err)
			require.True(t, third.OK, "%+v", third)
			require.Equal(t, second.Ledger, third.Ledger)
			require.GreaterOrEqual(t, third.Commit, acked)
			require.Equal(t, third.Commit, third.Intent, "an orderly end finishes its step")
			require.False(t, third.JournalReplayed.OS || third.JournalReplayed.Data, "%+v", third)
		})
	}
}

// What the lab does in a running guest: commands, verification beside the writer, freezing, shutdown by the agent.
func TestRunningGuest(t *testing.T) {
	cfg := guesttest.Config(t, guestvm.BIOS, image.QCOW2)
	vm := guesttest.Start(t, cfg)
	require.NoError(t, vm.WaitReady(booting(t)))
	require.NoError(t, vm.WaitAcked(booting(t), 8))

	load, err := vm.WriteLoad(booting(t), "20MB", "data")
	require.NoError(t, err)
	require.Equal(t, int64(20_000_000), load.Bytes)
	t.Logf("20 MB written durably in the guest: %d ms", load.TookMS)
	latency, err := vm.MeasureLatency(booting(t), 500*time.Millisecond, "os")
	require.NoError(t, err)
	require.NotZero(t, latency.Writes)
	t.Logf("durable 4 KiB writes: %+v", latency)

	// As fast as it can, and verified between two steps all the same; then at rest.
	require.NoError(t, vm.SetRate(booting(t), 0))
	require.NoError(t, vm.WaitAcked(booting(t), vm.Acked()+100))
	report, err := vm.Verify(booting(t))
	require.NoError(t, err)
	require.True(t, report.OK, "%+v", report)
	require.Equal(t, report.Intent, report.Commit)
	require.NoError(t, vm.SetRate(booting(t), -1))
	report, err = vm.Verify(booting(t))
	require.NoError(t, err)
	again, err := vm.Verify(booting(t))
	require.NoError(t, err)
	require.LessOrEqual(t, again.Commit, report.Commit+1)
	require.NoError(t, vm.SetRate(booting(t), 50))
	require.NoError(t, vm.WaitAcked(booting(t), again.Commit+3))

	// A frozen guest writes nothing: what is on the disks then needs no replay.
	var frozen int
	require.NoError(t, vm.Agent(booting(t), "guest-fsfreeze-freeze", nil, &frozen))
	require.Equal(t, 2, frozen)
	at := vm.Acked()
	copied := cfg
	copied.Name, copied.Dir, copied.Sockets = "copy", t.TempDir(), ""
	copied.OS.Path, copied.Data.Path = copied.Dir+"/os.qcow2", copied.Dir+"/data.qcow2"
	// All that the guest wrote is in QEMU's caches or its files; stopping the machine puts it all into the files.
	require.NoError(t, vm.QMP(booting(t), "stop", nil, nil))
	copyFile(t, cfg.OS.Path, copied.OS.Path)
	copyFile(t, cfg.Data.Path, copied.Data.Path)
	require.NoError(t, vm.QMP(booting(t), "cont", nil, nil))
	var thawed int
	require.NoError(t, vm.Agent(booting(t), "guest-fsfreeze-thaw", nil, &thawed))
	require.Equal(t, 2, thawed)
	require.LessOrEqual(t, vm.Acked(), at+1)
	require.NoError(t, vm.WaitAcked(booting(t), at+3))

	// guest-shutdown does not answer: the machine just ends.
	go func() { _ = vm.Agent(booting(t), "guest-shutdown", nil, nil) }()
	require.NoError(t, vm.WaitExit(booting(t)))
	vm.Close()

	// The copy comes up without the lab's ports, as on a recovery target: it acknowledges on its console.
	copied.NoLab = true
	vm = guesttest.Start(t, copied)
	require.NoError(t, vm.WaitReady(booting(t)))
	report, err = vm.WaitReport(booting(t))
	require.NoError(t, err)
	require.True(t, report.OK, "%+v", report)
	require.False(t, report.JournalReplayed.OS || report.JournalReplayed.Data, "%+v", report)
	require.GreaterOrEqual(t, report.Commit, at)
	require.Eventually(t, func() bool { return strings.Contains(vm.Console(), "LANDFALL-ACK ") }, time.Minute, 50*time.Millisecond)
}

// The negative control: disks of two instants are found out.
func TestDisksOfTwoInstants(t *testing.T) {
	cfg := guesttest.Config(t, guestvm.BIOS, image.Raw)
	vm := guesttest.Start(t, cfg)
	require.NoError(t, vm.WaitAcked(booting(t), 10))
	require.NoError(t, vm.QMP(booting(t), "stop", nil, nil))
	old := cfg.Dir + "/old.raw"
	copyFile(t, cfg.Data.Path, old)
	require.NoError(t, vm.QMP(booting(t), "cont", nil, nil))
	require.NoError(t, vm.WaitAcked(booting(t), vm.Acked()+10))
	require.NoError(t, vm.Kill())
	vm.Close()

	cfg.Data.Path = old
	vm = guesttest.Start(t, cfg)
	require.NoError(t, vm.WaitReady(booting(t)), "it comes up to tell")
	report, err := vm.WaitReport(booting(t))
	require.NoError(t, err)
	require.False(t, report.OK)
	require.Contains(t, strings.Join(report.Bad, "\n"), "the data disk is older")
	vm.Close()

	cfg.Data = guestvm.Disk{}
	vm = guesttest.Start(t, cfg)
	require.NoError(t, vm.WaitReady(booting(t)), "it comes up to tell")
	report, err = vm.WaitReport(booting(t))
	require.NoError(t, err)
	require.False(t, report.OK)
	require.Contains(t, strings.Join(report.Bad, "\n"), "no file system landfall-data")
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(to, b, 0o600))
}
