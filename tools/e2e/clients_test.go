package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
)

// TestForeignWriters lets programs that were not written here write through the exports: qemu-io with data, zeroes and
// discards, and nbdcopy with a whole disk. The same is done to plain files, and qemu-img compares what a failover made.
func TestForeignWriters(t *testing.T) {
	qemuIO, qemuImg, nbdcopy := tool(t, "qemu-io"), tool(t, "qemu-img"), tool(t, "nbdcopy")
	for _, f := range forms {
		t.Run(f.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), overall)
			defer cancel()
			run := func(name string, args ...string) {
				t.Helper()
				out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
				require.NoError(t, err, "%s %v\n%s", name, args, out)
			}
			p := f.make(t)
			m := newMachine(p, 3, 48*mib, 32*mib)
			mirror := []string{filepath.Join(p.dir, "os.mirror"), filepath.Join(p.dir, "data.mirror")}
			for d, disk := range m.guest.Disks {
				content := make([]byte, disk.Size)
				m.initial(d, content, 0)
				require.NoError(t, os.WriteFile(mirror[d], content, 0o600))
			}
			p.startAll()
			uris := p.uris()
			both := func(d int, commands ...string) {
				t.Helper()
				for _, to := range []string{uris[d], mirror[d]} {
					args := []string{"-f", "raw", "--discard=unmap"}
					for _, c := range commands {
						args = append(args, "-c", c)
					}
					run(qemuIO, append(args, to)...)
				}
			}
			both(0, "write -P 0x11 1M 3M", "flush")
			p.protect(ctx)

			both(0, "write -P 0x5a 4k 60k", "write -P 0xa5 20M 2M", "write -z 2M 512k", "write -P 0x77 21M 4k", "flush")
			both(1, "write -P 0x33 512 1024", "write -z -u 8M 1M", "write -f -P 0x44 31M 1M", "aio_write -P 0x61 10M 64k", "aio_write -P 0x62 11M 64k", "aio_flush", "flush")
			points := m.since(time.Now(), 1, 60*time.Second)
			older := points[len(points)-1].Ordinal
			var kept []string
			for d := range mirror {
				kept = append(kept, mirror[d]+".older")
				content, err := os.ReadFile(mirror[d])
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(kept[d], content, 0o600))
			}

			content := make([]byte, m.guest.Disks[1].Size) // the whole data disk anew, a third of it zeros
			for off := int64(0); off < int64(len(content)); off += mib {
				if off/mib%3 != 0 {
					testkit.FillAt(content[off:off+mib], off, 99)
				}
			}
			require.NoError(t, os.WriteFile(mirror[1], content, 0o600))
			run(nbdcopy, "--flush", mirror[1], uris[1])
			both(0, "write -P 0x01 47M 1M", "write -P 0x02 0 4k", "flush")
			points = m.since(time.Now(), 1, 60*time.Second)
			latest := points[len(points)-1].Ordinal

			compare := func(ordinal uint64, want []string) {
				t.Helper()
				n := strconv.FormatUint(ordinal, 10)
				out := filepath.Join(p.dir, "drill-"+n)
				require.NoError(t, p.landfall(ctx, nil, "failover", "test", machineName, "--point", n, "--out", out, "--wait"))
				for d, disk := range m.guest.Disks {
					image, err := vdisk.Open(filepath.Join(out, disk.ID+".vhd"), vdisk.FormatVHD, true)
					require.NoError(t, err)
					require.Equal(t, disk.Size, image.Size())
					require.NoError(t, image.Close())
					run(qemuImg, "compare", "-f", "raw", "-F", "vpc", want[d], filepath.Join(out, disk.ID+".vhd"))
				}
				require.NoError(t, p.landfall(ctx, nil, "failover", "cleanup", machineName, "--wait"))
			}
			compare(uint64(older), kept)
			compare(uint64(latest), mirror)
		})
	}
}
