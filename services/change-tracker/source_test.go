package changetracker

import (
	"bytes"
	"context"
	"crypto/sha256"
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

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"

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
	args := []string{
		"--blockdev", "driver=file,node-name=f,filename=" + h.image,
		"--blockdev", "driver=blkdebug,node-name=g,image=f" + strings.Join(append([]string{""}, debug...), ","),
		"--blockdev", "driver=qcow2,node-name=os,file=g",
		"--nbd-server", "addr.type=unix,addr.path=" + h.socket(),
		"--export", "type=nbd,id=os,node-name=os,name=os,bitmaps.0=landfall-1",
	}
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
	return &changetrackerv1.ExportedDisk{Disk: "os", SizeBytes: guestSize, Uri: h.uri(), ChangeContext: guestContext, Allocation: true}
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

func TestSourceOfAPoint(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start()
	h := newBareHost(t)
	_, err := h.sourceChanges(7, 0)
	is(t, err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND)

	r, err := h.attachSource(pointOf(7, 3, qemu.disk()))
	require.NoError(t, err)
	changed := int64(0)
	for _, d := range qemu.dirty {
		changed += d[1]
	}
	want := &changetrackerv1.AttachSourceResponse{Disks: []*typesv1.DiskChange{{Disk: "os", SizeBytes: guestSize, ChangeBytes: changed}}}
	require.Empty(t, cmp.Diff(want, r, protocmp.Transform()))
	r, err = h.attachSource(pointOf(7, 3, qemu.disk()))
	require.NoError(t, err, "idempotent")
	require.Empty(t, cmp.Diff(want, r, protocmp.Transform()))

	list, err := h.sourceChanges(7, 0)
	require.NoError(t, err)
	covers(t, qemu.content, list, qemu.dirty...)
	require.Contains(t, list, piece{off: 20 << 20, n: 1 << 20, zero: true}, "zeros are told from data")

	list, err = h.sourceChanges(7, 6<<20+512)
	require.NoError(t, err)
	covers(t, qemu.content, list, append([][2]int64{{6<<20 + 512, 2<<20 - 512}}, qemu.dirty[2:]...)...)
	list, err = h.sourceChanges(7, guestSize)
	require.NoError(t, err)
	require.Empty(t, list)

	for name, c := range map[string]struct {
		err    error
		reason typesv1.ErrorReason
	}{
		"another point": {errOf(h.sourceChanges(8, 0)), typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT},
		"a pass":        {errOf(h.sourceRanges(7, nil)), typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN},
		"epoch":         {errOf(h.attachSource(pointOf(8, 2, qemu.disk()))), typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH},
		"older ordinal": {errOf(h.attachSource(pointOf(6, 3, qemu.disk()))), typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED},
		"lineage": {errOf(h.attachSource(&changetrackerv1.AttachSourceRequest{
			Vm: guestVM, Lineage: "ffffffffffffffffffffffffffffffff", Ordinal: 8, Epoch: 9, Disks: []*changetrackerv1.ExportedDisk{qemu.disk()},
		})), typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH},
	} {
		t.Run(name, func(t *testing.T) { is(t, c.err, c.reason) })
	}

	// The process ends, QEMU too: the start does not need it, and what was attached is read when it is back.
	h.stop()
	qemu.kill()
	h.start()
	_, err = h.sourceChanges(7, 0)
	is(t, err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
	qemu.start()
	list, err = h.sourceChanges(7, 0)
	require.NoError(t, err)
	covers(t, qemu.content, list, qemu.dirty...)

	h.detachSource(simLineage, 6)
	_, err = h.sourceChanges(7, 0)
	require.NoError(t, err, "another ordinal was detached")
	h.detachSource(simLineage, 7)
	h.detachSource(simLineage, 7)
	_, err = h.sourceChanges(7, 0)
	is(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT)
	h.stop()
	h.start()
	_, err = h.sourceChanges(7, 0)
	is(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT)
	_, err = h.attachSource(pointOf(8, 2, qemu.disk()))
	is(t, err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)
	h.detachSource(simLineage, 0)
	_, err = h.attachSource(pointOf(1, 1, qemu.disk()))
	require.NoError(t, err, "everything was forgotten")
}

func errOf[T any](_ T, err error) error { return err }

// What an export lacks is never read as clean.
func TestSourceExportInvalid(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start()
	h := newBareHost(t)
	for name, change := range map[string]func(*changetrackerv1.ExportedDisk){
		"other size":      func(d *changetrackerv1.ExportedDisk) { d.SizeBytes -= 512 },
		"no context":      func(d *changetrackerv1.ExportedDisk) { d.ChangeContext = "" },
		"unknown context": func(d *changetrackerv1.ExportedDisk) { d.ChangeContext = "qemu:dirty-bitmap:landfall-2" },
		"unknown export":  func(d *changetrackerv1.ExportedDisk) { d.Uri = "nbd+unix:///data?socket=" + qemu.socket() },
		"no URI":          func(d *changetrackerv1.ExportedDisk) { d.Uri = "os" },
	} {
		t.Run(name, func(t *testing.T) {
			d := qemu.disk()
			change(d)
			is(t, errOf(h.attachSource(pointOf(7, 1, d))), typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID)
		})
	}
	gone := qemu.disk()
	gone.Uri = "nbd+unix:///os?socket=" + qemu.dir + "/none"
	is(t, errOf(h.attachSource(pointOf(7, 1, gone))), typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
	// The epoch of a call that failed counts.
	is(t, errOf(h.attachSource(pointOf(7, 5, gone))), typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
	is(t, errOf(h.attachSource(pointOf(7, 4, qemu.disk()))), typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)

	// The export is replaced behind the source's back: another size, then without its bitmap.
	_, err := h.attachSource(pointOf(7, 5, qemu.disk()))
	require.NoError(t, err)
	qemu.kill()
	tool(t, "qemu-img", "bitmap", "--remove", qemu.image, "landfall-1")
	tool(t, "qemu-img", "bitmap", "--add", qemu.image, "landfall-2")
	startPlain := func() func() {
		cmd := exec.Command("qemu-nbd", "-k", qemu.socket(), "-f", "qcow2", "-r", "-t", "-x", "os", "-B", "landfall-2", qemu.image)
		require.NoError(t, cmd.Start())
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		kill := func() { _ = cmd.Process.Kill(); <-ended; _ = os.Remove(qemu.socket()) }
		testkit.Eventually(t, 10*time.Second, func() error {
			c, err := net.Dial("unix", qemu.socket())
			if err == nil {
				err = c.Close()
			}
			return err
		})
		return kill
	}
	kill := startPlain()
	_, err = h.sourceChanges(7, 0)
	kill()
	is(t, err, typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID)
	require.True(t, errcat.Recoverable(err))
}

// The frozen copy cannot be read: the point is given up, and nothing was taken for clean or zero.
func TestSourceSnapshotBroken(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start("inject-error.0.event=read_aio", "inject-error.0.errno=5")
	h := newBareHost(t)
	_, err := h.attachSource(pointOf(7, 1, qemu.disk()))
	require.NoError(t, err)
	list, err := h.sourceChanges(7, 0)
	is(t, err, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN)
	require.Empty(t, list)
	require.True(t, errcat.Recoverable(err))
}

func TestSourceOfAPass(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start()
	whole := [2]int64{0, guestSize}
	for _, allocation := range []bool{true, false} {
		t.Run(fmt.Sprintf("allocation=%t", allocation), func(t *testing.T) {
			h := newBareHost(t)
			d := qemu.disk()
			d.Allocation, d.ChangeContext = allocation, ""
			r, err := h.attachSource(passOf(3, typesv1.PassScope_PASS_SCOPE_FULL, d))
			require.NoError(t, err)
			if allocation {
				require.Less(t, r.Disks[0].ChangeBytes, int64(16<<20))
			} else {
				require.Equal(t, int64(guestSize), r.Disks[0].ChangeBytes)
			}
			list, err := h.sourceRanges(3, nil)
			require.NoError(t, err)
			covers(t, qemu.content, list, whole)
			require.Less(t, len(list), 40, "runs of zeros are joined")
			for _, window := range [][2]int64{{0, 8 << 20}, {8 << 20, 8 << 20}, {40 << 20, 8 << 20}, {1000, 5000}, {4<<20 - 512, 1024}} {
				list, err := h.sourceRanges(3, &typesv1.ByteRange{Offset: window[0], Length: window[1]})
				require.NoError(t, err)
				covers(t, qemu.content, list, [2]int64{window[0], min(window[1], guestSize-window[0])})
			}
			_, err = h.sourceRanges(4, nil)
			is(t, err, typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN)
			_, err = h.sourceChanges(3, 0)
			is(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT)

			_, err = h.attachSource(passOf(4, typesv1.PassScope_PASS_SCOPE_COMPARE, d))
			require.NoError(t, err)
			list, err = h.sourceRanges(4, nil)
			require.NoError(t, err)
			require.Empty(t, list, "a comparing pass holds no ranges")
			var ranges []*typesv1.ByteRange
			var want [][2]int64
			for off := int64(512); off < guestSize; off += 123 * 512 {
				n := min(int64(7*512), guestSize-off)
				ranges = append(ranges, &typesv1.ByteRange{Offset: off, Length: n})
				want = append(want, [2]int64{off, n})
			}
			list, err = h.sourceRanges(4, nil, ranges...)
			require.NoError(t, err)
			covers(t, qemu.content, list, want...)

			for _, step := range []int64{4096, 64 << 10, 1 << 20} {
				stream, err := h.client.HashRanges(testkit.Context(t), &changetrackerv1.HashRangesRequest{
					Vm: guestVM, Lineage: simLineage, Disk: "os", ChunkBytes: step,
				})
				require.NoError(t, err)
				at := int64(0)
				for {
					m, err := stream.Recv()
					if errors.Is(err, io.EOF) {
						break
					}
					require.NoError(t, err)
					require.Equal(t, at, m.Offset)
					for i := range m.Chunks {
						chunk := qemu.content[at:min(at+step, guestSize)]
						if m.Zero {
							require.True(t, allZero(chunk))
						} else {
							sum := sha256.Sum256(chunk)
							require.Equal(t, sum[:], m.Digests[i*32:][:32])
						}
						at = min(at+step, guestSize)
					}
				}
				require.Equal(t, int64(guestSize), at)
			}
			is(t, errOf(h.attachSource(passOf(5, typesv1.PassScope_PASS_SCOPE_DIRTY, d))), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
		})
	}
}

// A reader of a detached source ends, and Detach does not return before: the hypervisor takes the export away then.
func TestDetachEndsReaders(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start()
	h := newBareHost(t)
	_, err := h.attachSource(pointOf(7, 1, qemu.disk()))
	require.NoError(t, err)
	tracker := h.service.tracker
	begun, gone := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		first := true
		done <- tracker.ReadChanges(context.Background(), guestVM, simLineage, 7, "os", 0, func(Chunk) error {
			if first {
				first = false
				close(begun)
				<-gone
			}
			return nil
		})
	}()
	<-begun
	s := tracker.sources[guestVM]
	go func() {
		defer close(gone)
		testkit.Eventually(t, 10*time.Second, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.open == nil })
	}()
	h.detachSource(simLineage, 7)
	select {
	case err := <-done:
		require.ErrorIs(t, err, ErrNotCut)
	default:
		select {
		case err := <-done:
			require.ErrorIs(t, err, ErrNotCut)
		case <-time.After(5 * time.Second):
			t.Fatal("the reader goes on")
		}
	}
}

// Death at every operation of AttachSource and DetachSource: what was answered is found again.
func TestSourceRecordAgainstDeath(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start()
	spec := SourceSpec{ID: "vm", Lineage: simLineage, Epoch: 1, Ordinal: 5, Disks: []SourceDisk{{ID: "os", Size: guestSize, URI: qemu.uri(), Context: guestContext}}}
	for n := 0; ; n++ {
		w := newWorld(1, true, none)
		open := func() *Tracker {
			tr := w.tracker()
			require.NoError(t, tr.Restore())
			return tr
		}
		read := func(tr *Tracker) error {
			return tr.ReadChanges(testkit.Context(t), "vm", simLineage, 5, "os", 0, func(Chunk) error { return nil })
		}
		limit := func() { w.fs.mu.Lock(); w.fs.left = n; w.fs.mu.Unlock() }
		tr := open()
		limit()
		_, attached := tr.AttachSource(testkit.Context(t), spec)
		died := w.fs.isDead()
		w.end(tr)
		tr = open()
		if attached == nil {
			require.NoError(t, read(tr), "step %d", n)
		}
		_, err := tr.AttachSource(testkit.Context(t), spec)
		require.NoError(t, err)
		limit()
		detached := tr.DetachSource("vm", simLineage, 5)
		died = died || w.fs.isDead()
		w.end(tr)
		tr = open()
		if err := read(tr); detached == nil {
			require.ErrorIs(t, err, ErrNotCut, "step %d", n)
		} else if err != nil {
			require.ErrorIs(t, err, ErrNotCut)
		}
		w.end(tr)
		if !died {
			return
		}
	}
}
