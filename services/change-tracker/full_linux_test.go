package changetracker

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// smallHost has one disk without holes, of 14 MiB, on a volume of 20 MiB.
func smallHost(t *testing.T) *host {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=20m"); err != nil {
		t.Skipf("mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	const size = 14 << 20
	image := make([]byte, size) // no holes: the guest's own blocks have their space
	testkit.Fill(image, 1)
	path := filepath.Join(dir, "os.img")
	require.NoError(t, os.WriteFile(path, image, 0o600))
	h := &host{t: t, dir: dir, disks: []*typesv1.Disk{{Id: "os", SizeBytes: size, Path: path, Format: typesv1.DiskFormat_DISK_FORMAT_RAW}}}
	h.start()
	h.attach()
	return h
}

// A volume that is full when the tracker starts keeps no guest from its disks.
func TestFullVolumeKeepsNoGuestFromItsDisk(t *testing.T) {
	h := smallHost(t)
	h.protect(h.newReplica())
	h.stop()
	hog, err := os.Create(filepath.Join(h.dir, "hog"))
	require.NoError(t, err)
	for p := make([]byte, 4096); err == nil; {
		_, err = hog.Write(p)
	}
	require.ErrorIs(t, err, unix.ENOSPC)
	require.NoError(t, hog.Close())

	h.start()
	d, err := h.service.tracker.disk(testVM + "/os")
	require.NoError(t, err, "the disk is exported again")
	p := make([]byte, 64<<10)
	testkit.Fill(p, 3)
	require.NoError(t, d.WriteAt(p, 1<<20, true))
	status, err := h.client.GetTracking(testkit.Context(t), &changetrackerv1.GetTrackingRequest{Vm: testVM})
	require.NoError(t, err)
	require.False(t, status.Status.Tracking, "nobody may believe a baseline that is not kept")
	require.NoError(t, os.Remove(hog.Name()))
	h.protect(h.newReplica()) // with room again, protection begins anew
}

// A volume that fills up during a write fails no guest write, on a real file system (needs root for its own tmpfs).
func TestFullVolumeFailsNoGuestWrite(t *testing.T) {
	h := smallHost(t)
	r := h.newReplica()
	h.protect(r)

	d, err := h.service.tracker.disk(testVM + "/os")
	require.NoError(t, err)
	p := make([]byte, 256<<10)
	for i := range 26 { // 6.5 MiB of log on 6 MiB of space, below half of the disk
		testkit.Fill(p, uint64(i))
		require.NoError(t, d.WriteAt(p, int64(i%20)*int64(len(p)), i%5 == 0))
	}
	require.Equal(t, degraded, d.getMode())
	ctx := testkit.Context(t)
	_, err = h.client.SwitchLogs(ctx, &changetrackerv1.SwitchLogsRequest{Vm: testVM, Lineage: simLineage, Point: 3, Epoch: 1})
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED, errcat.Reason(err))
	require.LessOrEqual(t, h.pass(4, typesv1.PassScope_PASS_SCOPE_DIRTY, r), 6<<20, "the changed extents, not the disk")
	h.point(5, r)
}
