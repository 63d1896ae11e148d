package changetracker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	guestVM      = "7d6f7a3e-1111-4222-8333-944455556666"
	guestSize    = 40<<20 + 3*512
	guestContext = "qemu:dirty-bitmap:landfall-1"
)

// hypervisor is a QEMU that exports one disk with a bitmap of changes by NBD: qemu-storage-daemon has QEMU's block layer
// and no guest.
type hypervisor struct {
	t       testing.TB
	dir     string
	image   string
	content []byte
	dirty   [][2]int64
	kill    func()
}

// newHypervisor makes a qcow2 disk: data before its bitmap, and changes after it.
func newHypervisor(t testing.TB) *hypervisor {
	t.Helper()
	dir, err := os.MkdirTemp("", "hv") // t.TempDir may be too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &hypervisor{t: t, dir: dir, image: filepath.Join(dir, "os.qcow2"), content: make([]byte, guestSize)}
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", h.image, fmt.Sprint(guestSize))
	write := func(pattern byte, off, n int64) string {
		copy(h.content[off:], bytes.Repeat([]byte{pattern}, int(n)))
		return fmt.Sprintf("write -P %d %d %d", pattern, off, n)
	}
	tool(t, "qemu-io", "-f", "qcow2", "-c", write(0x11, 4<<20, 5<<20), "-c", write(0x12, guestSize-4096, 4096), h.image)
	tool(t, "qemu-img", "bitmap", "--add", h.image, "landfall-1")
	tool(t, "qemu-io", "-f", "qcow2", "-c", write(0x21, 64<<10, 64<<10), "-c", write(0x22, 5<<20, 3<<20),
		"-c", write(0, 20<<20, 1<<20), "-c", write(0x23, 30<<20, 192<<10), "-c", write(0x24, guestSize-1024, 1024), h.image)
	tool(t, "qemu-img", "bitmap", "--disable", h.image, "landfall-1")
	h.dirty = [][2]int64{{64 << 10, 64 << 10}, {5 << 20, 3 << 20}, {20 << 20, 1 << 20}, {30 << 20, 192 << 10}, {40 << 20, 3 * 512}}
	return h
}

func (h *hypervisor) socket() string { return filepath.Join(h.dir, "s") }

func (h *hypervisor) uri() string {
	return (&url.URL{Scheme: "nbd+unix", Path: "/os", RawQuery: "socket=" + url.QueryEscape(h.socket())}).String()
}

// start runs QEMU; debug goes between the file and the format.
func (h *hypervisor) start(debug ...string) {
	h.t.Helper()
	h.run(
		"--blockdev", "driver=file,node-name=f,filename="+h.image,
		"--blockdev", "driver=blkdebug,node-name=g,image=f"+strings.Join(append([]string{""}, debug...), ","),
		"--blockdev", "driver=qcow2,node-name=os,file=g",
		"--nbd-server", "addr.type=unix,addr.path="+h.socket(),
		"--export", "type=nbd,id=os,node-name=os,name=os,bitmaps.0=landfall-1",
	)
}

// run runs QEMU until kill, or until the test ends.
func (h *hypervisor) run(args ...string) {
	h.t.Helper()
	path, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		tool(h.t, "qemu-storage-daemon") // skips, or fails in CI
	}
	said, err := os.Create(filepath.Join(h.dir, "said"))
	require.NoError(h.t, err)
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = said, said
	require.NoError(h.t, cmd.Start())
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	done := false
	h.kill = func() {
		if !done {
			done = true
			_ = cmd.Process.Signal(syscall.SIGTERM) // a killed one would leave the bitmap inconsistent
			<-ended
			_ = said.Close()
			_ = os.Remove(h.socket())
		}
	}
	h.t.Cleanup(h.kill)
	testkit.Eventually(h.t, 10*time.Second, func() error {
		c, err := net.Dial("unix", h.socket())
		if err != nil {
			text, _ := os.ReadFile(said.Name())
			return fmt.Errorf("%w\n%s", err, text)
		}
		return c.Close()
	})
}

func (h *hypervisor) disk() *changetrackerv1.ExportedDisk {
	return &changetrackerv1.ExportedDisk{Disk: "os", SizeBytes: guestSize, Uri: h.uri(), ChangeContext: guestContext, Allocation: true, ReadUnitBytes: 64 << 10}
}

func pointOf(ordinal, epoch uint64, disks ...*changetrackerv1.ExportedDisk) *changetrackerv1.AttachSourceRequest {
	return &changetrackerv1.AttachSourceRequest{Vm: guestVM, Lineage: simLineage, Ordinal: ordinal, Epoch: epoch, Disks: disks}
}

func passOf(ordinal uint64, scope typesv1.PassScope, disks ...*changetrackerv1.ExportedDisk) *changetrackerv1.AttachSourceRequest {
	r := pointOf(ordinal, 1, disks...)
	r.Scope = scope
	return r
}

// newBareHost is a tracker without machines.
func newBareHost(t testing.TB) *host {
	h := &host{t: t, dir: t.TempDir()}
	h.start()
	return h
}

func (h *host) attachSource(r *changetrackerv1.AttachSourceRequest) (*changetrackerv1.AttachSourceResponse, error) {
	return h.client.AttachSource(testkit.Context(h.t), r)
}

func (h *host) detachSource(lineage string, ordinal uint64) {
	h.t.Helper()
	_, err := h.client.DetachSource(testkit.Context(h.t), &changetrackerv1.DetachSourceRequest{Vm: guestVM, Lineage: lineage, Ordinal: ordinal})
	require.NoError(h.t, err)
}

type piece struct {
	off, n int64
	zero   bool
	data   []byte
}

type chunkStream[M chunkMessage] interface{ Recv() (M, error) }

type chunkMessage interface {
	GetOffset() int64
	GetLength() int64
	GetZero() bool
	GetData() []byte
}

// gather reads a stream to its end and checks the contract of its chunks.
func gather[M chunkMessage](t testing.TB, stream chunkStream[M]) (list []piece, err error) {
	end := int64(0)
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return list, err
		}
		require.GreaterOrEqual(t, m.GetOffset(), end)
		require.Positive(t, m.GetLength())
		require.LessOrEqual(t, len(m.GetData()), 1<<20)
		require.Equal(t, m.GetZero(), len(m.GetData()) == 0)
		end = m.GetOffset() + m.GetLength()
		list = append(list, piece{m.GetOffset(), m.GetLength(), m.GetZero(), bytes.Clone(m.GetData())})
	}
}

func (h *host) sourceChanges(point uint64, from int64) ([]piece, error) {
	stream, err := h.client.ReadChanges(testkit.Context(h.t), &changetrackerv1.ReadChangesRequest{
		Vm: guestVM, Lineage: simLineage, Point: point, Disk: "os", ResumeOffset: from,
	})
	if err != nil {
		return nil, err
	}
	return gather(h.t, stream)
}

func (h *host) sourceRanges(pass uint64, window *typesv1.ByteRange, ranges ...*typesv1.ByteRange) ([]piece, error) {
	stream, err := h.client.ReadRanges(testkit.Context(h.t), &changetrackerv1.ReadRangesRequest{
		Vm: guestVM, Lineage: simLineage, Pass: pass, Disk: "os", Window: window, Ranges: ranges,
	})
	if err != nil {
		return nil, err
	}
	return gather(h.t, stream)
}

func allZero(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }

// covers requires that the pieces are the content of exactly the ranges.
func covers(t testing.TB, content []byte, list []piece, ranges ...[2]int64) {
	t.Helper()
	i, at := 0, int64(0)
	if len(ranges) > 0 {
		at = ranges[0][0]
	}
	for _, p := range list {
		for p.n > 0 {
			require.Less(t, i, len(ranges), "piece at %d", p.off)
			require.Equal(t, at, p.off)
			n := min(p.n, ranges[i][0]+ranges[i][1]-at)
			want := content[at : at+n]
			if p.zero {
				require.True(t, allZero(want), "zero at %d", at)
			} else {
				require.True(t, bytes.Equal(want, p.data[:n]), "data at %d", at)
				p.data = p.data[n:]
			}
			p.off, p.n, at = p.off+n, p.n-n, at+n
			if at == ranges[i][0]+ranges[i][1] {
				if i++; i < len(ranges) {
					at = ranges[i][0]
				}
			}
		}
	}
	require.Equal(t, len(ranges), i, "ends at %d", at)
}

func is(t testing.TB, err error, reason typesv1.ErrorReason) {
	t.Helper()
	require.Error(t, err)
	require.True(t, errcat.Is(errcat.FromError(err), reason), "%v", err)
}
