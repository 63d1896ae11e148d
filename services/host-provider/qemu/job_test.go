package qemu

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func byJobs(c *Config) { c.ForceBackupJob = true }

func TestWriteQcow2(t *testing.T) {
	programs(t)
	for _, size := range []int64{512, 8 * mib, 512 * mib, 512*mib + 512, 5 << 40} {
		path := filepath.Join(t.TempDir(), "i")
		require.NoError(t, writeQcow2(path, size))
		run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
	}
}

func TestJobs(t *testing.T) {
	t.Parallel()
	l := newLab(t, configured(byJobs))
	l.establish()
	l.copyAll(full)
	l.point()
	l.point()
	n := l.next()
	l.write("d1", 0, 4096, 9)
	_, err := l.cut(n)
	require.NoError(t, err)
	l.write("d1", 4096, 4096, 9)
	l.restartDriver()
	_, err = l.settle(n, giveUp)
	require.NoError(t, err)
	l.point()
	l.tidy(1)
	for at := 1; ; at += 9 {
		k := &killer{at: at}
		l.killed("cut", k)
		if !k.killed() {
			break
		}
	}
}

func TestJobsInstant(t *testing.T) {
	t.Parallel()
	l := bootWriter(t, formats("raw", "vhdx"), configured(byJobs))
	torn, _ := l.cuts(t, 3)
	require.Zero(t, torn)
}

// TestJobsScratchFull: the guest is stopped by QEMU, and goes on; also when it was stopped while no driver was there.
func TestJobsScratchFull(t *testing.T) {
	l := bootWriter(t, formats("raw", "vhdx"), configured(byJobs), func(l *lab) {
		require.NoError(l.t, os.MkdirAll(l.config.ScratchDir, 0o700))
		if err := syscall.Mount("landfall-test", l.config.ScratchDir, "tmpfs", 0, "size=448k"); err != nil {
			l.t.Skipf("no tmpfs can be mounted here: %v", err)
		}
		l.t.Cleanup(func() { _ = syscall.Unmount(l.config.ScratchDir, syscall.MNT_DETACH) })
	})
	status := func() (s struct{ Status string }) {
		require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &s))
		return s
	}
	l.establish()
	p := l.next()
	_, err := l.begin(p, full)
	require.NoError(t, err)
	_, err = l.settlePass(p, commit)
	require.NoError(t, err)
	for _, alone := range []bool{false, true} {
		events := l.second.Subscribe(1000)
		p = l.next()
		if alone {
			dead := false
			l.driver.step = func(name string) error { // it dies as soon as the jobs run
				if dead = dead || name == "transaction-done"; dead {
					l.pool.Close() // its watcher dies with it
					return errKilled
				}
				return nil
			}
		}
		_, err = l.cut(p)
		if alone {
			require.ErrorIs(t, err, errKilled)
			l.stopDriver()
			testkit.Eventually(t, 20*time.Second, func() bool { return status().Status == "io-error" })
			l.startDriver()
		}
		testkit.Eventually(t, 20*time.Second, func() bool {
			s, err := observe(l.ctx(), l.second)
			return err == nil && len(s.jobs) == 0 && status().Status == "running"
		})
		stopped := false
		events.Close()
		for e := range events.Events() {
			stopped = stopped || e.Name == "STOP"
		}
		require.True(t, stopped, "the copy never filled up: the test proves nothing")
		if !alone && err == nil {
			l.points()
			_, err = l.cut(p)
			requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN)
		}
		_, err = l.settle(p, giveUp)
		require.NoError(t, err)
		l.tidy(1)
	}
	require.NoError(t, syscall.Mount("landfall-test", l.config.ScratchDir, "tmpfs", syscall.MS_REMOUNT, "size=16m"))
	torn, _ := l.cutsOnly(t, 2)
	require.Zero(t, torn)
}
