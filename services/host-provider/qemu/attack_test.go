package qemu

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// small makes the scratch folder one of its own, with so much room.
func small(size string) option {
	return func(l *lab) {
		require.NoError(l.t, os.MkdirAll(l.config.ScratchDir, 0o700))
		if err := syscall.Mount("landfall-test", l.config.ScratchDir, "tmpfs", 0, "size="+size); err != nil {
			l.t.Skipf("no tmpfs can be mounted here: %v", err)
		}
		l.t.Cleanup(func() { _ = syscall.Unmount(l.config.ScratchDir, syscall.MNT_DETACH) })
	}
}

// TestJobsGivenUpAreNotRead: the file of a job that was ended shows the guest's later writes, without an error. Nobody may
// read it any more before the guest goes on.
func TestJobsGivenUpAreNotRead(t *testing.T) {
	t.Parallel()
	l := bootWriter(t, formats("raw", "vhdx"), configured(byJobs), small("448k"))
	l.establish()
	p := l.next()
	_, err := l.begin(p, full)
	require.NoError(t, err)
	_, err = l.settlePass(p, commit)
	require.NoError(t, err)
	var uri string
	testkit.Eventually(t, 30*time.Second, func() bool { // the copy may fill up before the point is open
		p = l.next()
		if _, err = l.cut(p); err != nil {
			return false
		}
		uri = l.tracker.source().Disks[1].Uri
		return true
	})
	testkit.Eventually(t, 20*time.Second, func() bool {
		s, err := observe(l.ctx(), l.second)
		var status struct{ Status string }
		require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &status))
		return err == nil && len(s.jobs) == 0 && status.Status == "running"
	})
	require.Error(t, command("nbdcopy", uri, "/dev/null"), "later data is read as the point's")
	_, err = l.settle(p, giveUp)
	require.NoError(t, err)
	l.tidy(1)
}

// together puts everything of the driver, and the images when asked, into one small file system.
func together(size string) option {
	return func(l *lab) {
		dir := l.path("one")
		require.NoError(l.t, os.MkdirAll(dir, 0o700))
		if err := syscall.Mount("landfall-test", dir, "tmpfs", 0, "size="+size); err != nil {
			l.t.Skipf("no tmpfs can be mounted here: %v", err)
		}
		l.t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
		l.config.StateDir, l.config.ScratchDir = dir+"/state", dir+"/scratch"
	}
}

// TestScratchFillsTheState: by default the frozen copies are in the folder of the records. One that fills it does not keep its
// own point from being given up, by a driver that lived or one that was dead, whether the point was open or being made.
func TestScratchFillsTheState(t *testing.T) {
	for _, how := range []string{"alive", "restarted", "making"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, together("4m"))
			l.establish()
			l.copyAll(full)
			l.write("d0", 0, 6*mib, 5)
			n := l.next()
			if how == "making" {
				dead := false
				l.driver.step = func(name string) error {
					if dead = dead || name == "block-export-add"; dead {
						return errKilled
					}
					return nil
				}
			}
			_, err := l.cut(n)
			if how == "making" {
				require.ErrorIs(t, err, errKilled)
			} else {
				require.NoError(t, err)
			}
			if how != "alive" {
				l.stopDriver()
			}
			l.write("d0", 0, 6*mib, 6)
			if how != "alive" {
				l.startDriver()
			}
			_, err = l.settle(n, giveUp)
			require.NoError(t, err)
			l.tidy(1)
			l.point()
		})
	}
}

// TestScratchGivesWay: a copy that leaves too little room is given up before others in its file system run out.
func TestScratchGivesWay(t *testing.T) {
	t.Parallel()
	l := newLab(t, together("12m"), configured(func(c *Config) { c.MinScratch = 8 * mib }))
	l.establish()
	l.copyAll(full)
	n := l.next()
	_, err := l.cut(n)
	require.NoError(t, err)
	l.write("d0", 0, 8*mib, 6)
	l.write("d1", 0, 2*mib, 6)
	testkit.Eventually(t, 10*time.Second, func() bool {
		free, err := freeSpace(l.config.ScratchDir)
		return err == nil && free > 11*mib
	})
	_, err = l.cut(n)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN)
	_, err = l.settle(n, giveUp)
	require.NoError(t, err)
	l.tidy(1)
	l.point()
}

// TestScratchStopsTheGuest: the copy took the room that the guest's own image needed, while no driver was there. The one that
// comes gives the room back and lets the guest go on.
func TestScratchStopsTheGuest(t *testing.T) {
	t.Parallel()
	l := newLab(t, booted, formats("raw", "raw"), together("12m"), func(l *lab) { l.images = l.path("one") })
	l.establish()
	l.copyAll(full)
	l.write("d1", 0, 4*mib, 5)
	n := l.next()
	_, err := l.cut(n)
	require.NoError(t, err)
	l.write("d1", 0, 4*mib, 6) // copied
	l.stopDriver()
	junk, err := os.Create(l.path("one/junk"))
	require.NoError(t, err)
	for err == nil {
		_, err = junk.Write(make([]byte, 4096))
	}
	require.NoError(t, junk.Close())
	status := func(want string) {
		t.Helper()
		testkit.Eventually(t, 20*time.Second, func() bool {
			var s struct{ Status string }
			require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &s))
			return s.Status == want
		})
	}
	require.NoError(t, l.second.Execute(l.ctx(), "cont", nil, nil))
	status("io-error")
	l.startDriver()
	status("running")
	_, err = l.settle(n, giveUp)
	require.NoError(t, err)
	l.tidy(1)
}

// TestStateDeleted: everything that the driver kept is deleted while a point is open. The guest is freed of the filter without
// being asked for, and the machine can be protected again.
func TestStateDeleted(t *testing.T) {
	for _, what := range []string{"sockets", "all"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.establish()
			l.copyAll(full)
			n := l.next()
			_, err := l.cut(n)
			require.NoError(t, err)
			l.stopDriver()
			require.NoError(t, os.RemoveAll(l.config.SocketDir))
			if what == "sockets" {
				l.startDriver()
				_, err = l.settle(n, giveUp)
				require.NoError(t, err)
				l.point()
				return
			}
			require.NoError(t, os.RemoveAll(l.config.StateDir))
			require.NoError(t, os.RemoveAll(l.config.ScratchDir))
			l.startDriver()
			s, err := observe(l.ctx(), l.second)
			require.NoError(t, err)
			for n := range s.nodes {
				require.False(t, ours(n), "node %s is left", n)
			}
			l.write("d0", 0, 5000, 9)
			l.establish()
			_, err = l.cut(l.next())
			requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED)
			l.copyAll(full)
			l.point()
			l.tidy(1)
		})
	}
}
