package scenario

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// The volume of the disks fills up with logs while the guest writes: it sees no error, its data is on the disk, and the
// next points are right. Needs root for a small tmpfs.
func TestFullVolumeDuringGuestWrites(t *testing.T) {
	l := newLab(t)
	if err := unix.Mount("tmpfs", l.images, "tmpfs", 0, "size=20m"); err != nil {
		t.Skipf("mount a small tmpfs: %v", err)
	}
	unmounted := false
	t.Cleanup(func() { // after the product has ended, whose clean-up was registered later
		if !unmounted {
			require.NoError(t, unix.Unmount(l.images, unix.MNT_DETACH))
		}
	})
	const size = 14 * mib
	image := filepath.Join(l.machine("web-01", 1, "{id: os, image: os.raw, os: true}"), "os.raw")
	data := make([]byte, size) // no holes: what the guest writes has its space
	testkit.Fill(data, 1)
	require.NoError(t, os.WriteFile(image, data, 0o600))
	l.up()
	l.policy("quick", "1s")
	l.ok("protect", "web-01", "--policy", "quick", "--wait")
	l.awaitPoint("web-01", 3)
	l.ok("pause", "web-01") // changes pile up
	testkit.Eventually(t, patience, func() bool { return strings.Contains(l.ok("status", "web-01").out, "paused") }, "it is paused")

	d := l.disk("web-01", "os")
	var fs unix.Statfs_t
	tightest := uint64(size)
	p := make([]byte, 256<<10)
	for i := range 26 { // 6.5 MiB of log on less than 6 MiB of space, below half of the disk
		testkit.Fill(p, uint64(100+i))
		off := int64(i%20) * int64(len(p))
		_, err := d.WriteAt(p, off)
		require.NoError(t, err, "the guest's write %d", i)
		copy(data[off:], p)
		if i%5 == 0 {
			require.NoError(t, d.Flush())
		}
		require.NoError(t, unix.Statfs(l.images, &fs))
		tightest = min(tightest, fs.Bavail*uint64(fs.Bsize))
	}
	require.NoError(t, d.Flush())
	t.Logf("least space seen: %d KiB", tightest>>10)
	got := make([]byte, len(data))
	for off := 0; off < size; off += mib {
		_, err := d.ReadAt(got[off:off+mib], int64(off))
		require.NoError(t, err)
	}
	require.Equal(t, data, got, "the guest reads what it wrote")

	l.ok("resume", "web-01")
	s := l.awaitPoint("web-01", l.status("web-01").LastPoint+2)
	require.EqualValues(t, 1, s.Counters.Full, "the changed extents were sent again, not the disk")
	l.same("web-01", "os", image)
	onDisk, err := os.ReadFile(image)
	require.NoError(t, err)
	require.Equal(t, data, onDisk)
}
