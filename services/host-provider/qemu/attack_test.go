package qemu

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
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
