package changetracker

import (
	"bytes"
	"fmt"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
)

// BenchmarkSource reads a disk of 256 MiB of data from QEMU: a whole pass, beside nbdcopy on the same export, and a
// point whose changes are every other 64 KiB of it.
func BenchmarkSource(b *testing.B) {
	const size, unit = 256 << 20, 64 << 10
	h := &hypervisor{t: b, dir: b.TempDir()}
	h.image = h.dir + "/os.qcow2"
	tool(b, "qemu-img", "create", "-q", "-f", "qcow2", h.image, fmt.Sprint(size))
	tool(b, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 7 0 %d", size), h.image)
	tool(b, "qemu-img", "bitmap", "--add", h.image, "landfall-1")
	var script bytes.Buffer
	for off := 0; off < size; off += 2 * unit {
		fmt.Fprintf(&script, "write -q -P 9 %d %d\n", off, unit)
	}
	cmd := exec.Command("qemu-io", "-f", "qcow2", h.image)
	cmd.Stdin = &script
	require.NoError(b, cmd.Run())
	tool(b, "qemu-img", "bitmap", "--disable", h.image, "landfall-1")
	h.start()
	host := newBareHost(b)
	disk := h.disk()
	disk.SizeBytes = size
	tracker := host.service.tracker
	ctx := testkit.Context(b)
	b.Run("pass", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		live := proto.Clone(disk).(*changetrackerv1.ExportedDisk)
		live.ReadUnitBytes = 0 // only frozen copies are read in small units
		_, err := host.attachSource(passOf(1, 1, live))
		require.NoError(b, err)
		for b.Loop() {
			n := int64(0)
			require.NoError(b, tracker.ReadRanges(ctx, guestVM, simLineage, 1, "os", extent.Range{}, nil, func(c Chunk) error { n += c.Len; return nil }))
			require.Equal(b, int64(size), n)
		}
	})
	b.Run("nbdcopy", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			tool(b, "nbdcopy", h.uri(), "null:")
		}
	})
	b.Run("point", func(b *testing.B) {
		b.SetBytes(size / 2)
		b.ReportAllocs()
		_, err := host.attachSource(pointOf(2, 1, disk))
		require.NoError(b, err)
		for b.Loop() {
			n := int64(0)
			require.NoError(b, tracker.ReadChanges(ctx, guestVM, simLineage, 2, "os", 0, func(c Chunk) error { n += c.Len; return nil }))
			require.Equal(b, int64(size/2), n)
		}
	})
}
