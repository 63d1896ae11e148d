package changetracker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

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
		"read unit":       func(d *changetrackerv1.ExportedDisk) { d.ReadUnitBytes = 512 },
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

// A reader of a detached source ends, and Detach does not return before: the hypervisor takes the export away then. So does
// one whose exports move, and it may read on from the new ones.
func TestReadersEndWithTheirSource(t *testing.T) {
	qemu := newHypervisor(t)
	qemu.start()
	moved := qemu.disk()
	moved.Uri += "&moved=1"
	for name, c := range map[string]struct {
		end  func(*host) error
		want error
	}{
		"detached": {func(h *host) error { h.detachSource(simLineage, 7); return nil }, ErrNotCut},
		"moved":    {func(h *host) error { return errOf(h.attachSource(pointOf(7, 2, moved))) }, ErrSourceLost},
		"replaced": {func(h *host) error { return errOf(h.attachSource(pointOf(8, 2, qemu.disk()))) }, ErrNotCut},
		"stopped":  {func(h *host) error { h.service.tracker.closeSources(); return nil }, ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
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
			_, err = h.attachSource(pointOf(7, 2, qemu.disk()))
			require.NoError(t, err, "a repeat, by a later epoch, leaves readers alone")
			s := tracker.sources[guestVM]
			s.mu.Lock()
			before := s.open
			s.mu.Unlock()
			go func() {
				defer close(gone)
				<-before.ctx.Done()
			}()
			require.NoError(t, c.end(h))
			require.ErrorIs(t, <-done, c.want)
		})
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

// The real filter: a point is read from its frozen copy while the guest writes. When the copy cannot be kept, the guest's
// write succeeds and the reader hears of it.
func TestSourceOfABrokenSnapshot(t *testing.T) {
	for _, broken := range []bool{false, true} {
		t.Run(fmt.Sprintf("broken=%t", broken), func(t *testing.T) {
			qemu := newHypervisor(t)
			scratch := qemu.dir + "/scratch"
			tool(t, "qemu-img", "create", "-q", "-f", "raw", scratch, fmt.Sprint(guestSize))
			target := "driver=blkdebug,node-name=tmp,image.driver=file,image.filename=" + scratch
			if broken {
				target += ",inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28"
			}
			qemu.run(
				"--blockdev", "driver=file,node-name=f,filename="+qemu.image,
				"--blockdev", "driver=qcow2,node-name=data,file=f",
				"--blockdev", target,
				"--blockdev", "driver=copy-before-write,node-name=cbw,file=data,target=tmp,on-cbw-error=break-snapshot,cbw-timeout=10",
				"--blockdev", "driver=snapshot-access,node-name=acc,file=cbw",
				"--nbd-server", "addr.type=unix,addr.path="+qemu.socket(),
				"--export", "type=nbd,id=os,node-name=acc,name=os,bitmaps.0.node=data,bitmaps.0.name=landfall-1",
				"--export", "type=nbd,id=guest,node-name=cbw,name=guest,writable=on",
			)
			h := newBareHost(t)
			_, err := h.attachSource(pointOf(7, 1, qemu.disk()))
			require.NoError(t, err)
			list, err := h.sourceChanges(7, 0)
			require.NoError(t, err)
			covers(t, qemu.content, list, qemu.dirty...)

			guest, err := nbd.Dial(testkit.Context(t), strings.Replace(qemu.uri(), "/os?", "/guest?", 1))
			require.NoError(t, err)
			require.NoError(t, guest.WriteAt(testkit.Context(t), bytes.Repeat([]byte{0xff}, 1<<20), 5<<20, false))
			require.NoError(t, guest.WriteZeroes(testkit.Context(t), extent.Range{Off: 6 << 20, Len: 64 << 10}, true))
			require.NoError(t, guest.WriteZeroes(testkit.Context(t), extent.Range{Off: 7 << 20, Len: 64 << 10}, false))
			require.NoError(t, guest.Trim(testkit.Context(t), extent.Range{Off: 64 << 10, Len: 64 << 10}))
			require.NoError(t, guest.Close())

			list, err = h.sourceChanges(7, 0)
			if broken {
				is(t, err, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN)
				return
			}
			require.NoError(t, err)
			covers(t, qemu.content, list, qemu.dirty...)
		})
	}
}
