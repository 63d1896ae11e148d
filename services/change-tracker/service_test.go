package changetracker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		runChild()
		return
	}
	goleak.VerifyTestMain(m)
}

// host is a change-tracker on real files behind real gRPC and NBD.
type host struct {
	t       testing.TB
	dir     string
	disks   []*typesv1.Disk
	service *Service
	stop    func()
	network *rpc.Network
	dialer  *rpc.Dialer
	// client may call everything.
	client changetrackerv1.ChangeTrackerServiceClient
}

const (
	testVM   = "0f6c2f5e-93f5-4ad1-a3bb-3c6d0f5f9b11"
	diskSize = 24 << 20
)

// newHost makes a machine with a raw disk "os" and a VHD "data" and starts the tracker.
func newHost(t testing.TB) *host {
	h := &host{t: t, dir: t.TempDir()}
	for id, format := range map[string]vdisk.Format{"os": vdisk.FormatRaw, "data": vdisk.FormatVHD} {
		path := filepath.Join(h.dir, id+"."+string(format))
		img, err := vdisk.Create(path, format, diskSize)
		require.NoError(t, err)
		b := make([]byte, 3<<20)
		testkit.Fill(b, 5)
		_, err = img.WriteAt(b, 4<<20)
		require.NoError(t, err)
		require.NoError(t, img.Close())
		f := typesv1.DiskFormat_DISK_FORMAT_RAW
		if format == vdisk.FormatVHD {
			f = typesv1.DiskFormat_DISK_FORMAT_VHD
		}
		h.disks = append(h.disks, &typesv1.Disk{Id: id, SizeBytes: diskSize, Path: path, Format: f})
	}
	h.start()
	h.attach()
	return h
}

func (h *host) start() {
	ctx, cancel := context.WithCancel(context.Background())
	logger := slog.New(slog.DiscardHandler)
	s, err := New(ctx, Config{StateDir: filepath.Join(h.dir, "state"), NBDAddress: "127.0.0.1:0", MaxLogEntries: 1 << 20},
		Deps{Clock: time.Now, Logger: logger})
	require.NoError(h.t, err)
	h.service, h.network = s, &rpc.Network{}
	id := pki.ServiceIdentity("change-tracker")
	srv, err := rpc.NewServer(rpc.ServerOptions{Name: "change-tracker", Identity: rpc.Identity{Peer: id}, Logger: logger})
	require.NoError(h.t, err)
	s.Register(srv)
	lis, err := h.network.Listen(ctx, "mem:change-tracker")
	require.NoError(h.t, err)
	caller := pki.ServiceIdentity("host-provider")
	caller.Aliases = []string{"scheduler", "uploader", "resync-engine"}
	h.dialer = rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: caller}, Network: h.network})
	conn, err := h.dialer.Conn("mem:change-tracker")
	require.NoError(h.t, err)
	h.client = changetrackerv1.NewChangeTrackerServiceClient(conn)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Run(ctx, lis) })
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			h.t.Errorf("run: %v", err)
		}
	})
	h.stop = sync.OnceFunc(func() {
		require.NoError(h.t, h.dialer.Close())
		cancel()
		wg.Wait()
	})
	h.t.Cleanup(func() { h.stop() })
}

func (h *host) attach() {
	r, err := h.client.AttachMachine(testkit.Context(h.t), &changetrackerv1.AttachMachineRequest{
		Vm: testVM, StateDir: h.dir, Disks: h.disks,
	})
	require.NoError(h.t, err)
	h.disks = r.Disks
}

func (h *host) uri(disk string) string {
	for _, d := range h.disks {
		if d.Id == disk {
			return d.ExportUri
		}
	}
	h.t.Fatalf("no disk %s", disk)
	return ""
}

// tool runs a program that the package needs on its test machine; without CI=true a missing one skips the test.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is needed in CI", name)
		}
		t.Skipf("%s is not installed", name)
	}
	out, err := exec.CommandContext(testkit.Context(t), path, args...).CombinedOutput()
	require.NoError(t, err, "%s %s\n%s", name, strings.Join(args, " "), out)
	return string(out)
}

// imageOf reads a disk as the guest sees it, through the tracker's own image.
func (h *host) imageOf(id string) []byte {
	d, err := h.service.tracker.disk(testVM + "/" + id)
	require.NoError(h.t, err)
	b := make([]byte, d.Size())
	_, err = d.ReadAt(b, 0)
	if !errors.Is(err, io.EOF) {
		require.NoError(h.t, err)
	}
	return b
}

type replica map[string][]byte

func (h *host) newReplica() replica {
	r := replica{}
	for _, d := range h.disks {
		r[d.Id] = make([]byte, d.SizeBytes)
	}
	return r
}

func (h *host) changes(point uint64, r replica) int {
	n := 0
	for _, d := range h.disks {
		stream, err := h.client.ReadChanges(testkit.Context(h.t), &changetrackerv1.ReadChangesRequest{
			Vm: testVM, Lineage: simLineage, Point: point, Disk: d.Id,
		})
		require.NoError(h.t, err)
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(h.t, err)
			n += len(m.Data)
			put(r[d.Id], m.Offset, m.Length, m.Zero, m.Data)
		}
	}
	return n
}

func (h *host) ranges(pass uint64, r replica) int {
	n := 0
	for _, d := range h.disks {
		for off := int64(0); off < d.SizeBytes; off += 8 << 20 {
			stream, err := h.client.ReadRanges(testkit.Context(h.t), &changetrackerv1.ReadRangesRequest{
				Vm: testVM, Lineage: simLineage, Pass: pass, Disk: d.Id, Window: &typesv1.ByteRange{Offset: off, Length: 8 << 20},
			})
			require.NoError(h.t, err)
			for {
				m, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				require.NoError(h.t, err)
				n += len(m.Data)
				put(r[d.Id], m.Offset, m.Length, m.Zero, m.Data)
			}
		}
	}
	return n
}

func put(image []byte, off, n int64, zero bool, data []byte) {
	if zero {
		clear(image[off : off+n])
	} else {
		copy(image[off:], data)
	}
}

func (h *host) protect(r replica) {
	ctx := testkit.Context(h.t)
	_, err := h.client.StartTracking(ctx, &changetrackerv1.StartTrackingRequest{Vm: testVM, Lineage: simLineage, Epoch: 1})
	require.NoError(h.t, err)
	h.pass(1, typesv1.PassScope_PASS_SCOPE_FULL, r)
	h.point(2, r)
}

func (h *host) pass(n uint64, scope typesv1.PassScope, r replica) int {
	ctx := testkit.Context(h.t)
	_, err := h.client.BeginPass(ctx, &changetrackerv1.BeginPassRequest{Vm: testVM, Lineage: simLineage, Pass: n, Epoch: 1, Scope: scope})
	require.NoError(h.t, err)
	bytes := h.ranges(n, r)
	_, err = h.client.SettlePass(ctx, &changetrackerv1.SettlePassRequest{
		Vm: testVM, Lineage: simLineage, Pass: n, Epoch: 1, Outcome: typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED,
	})
	require.NoError(h.t, err)
	return bytes
}

// point cuts with the guest at rest, ships, checks and commits. It returns the bytes of data shipped.
func (h *host) point(n uint64, r replica) int {
	ctx := testkit.Context(h.t)
	cut, err := h.client.SwitchLogs(ctx, &changetrackerv1.SwitchLogsRequest{Vm: testVM, Lineage: simLineage, Point: n, Epoch: 1})
	require.NoError(h.t, err)
	require.NotNil(h.t, cut.Point.CutTime)
	shipped := h.changes(n, r)
	for _, d := range h.disks {
		require.Equal(h.t, sha256.Sum256(h.imageOf(d.Id)), sha256.Sum256(r[d.Id]), "disk %s at point %d", d.Id, n)
	}
	st, err := h.client.SettleLogs(ctx, &changetrackerv1.SettleLogsRequest{
		Vm: testVM, Lineage: simLineage, Point: n, Epoch: 1, Outcome: typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED,
	})
	require.NoError(h.t, err)
	require.Equal(h.t, n, st.Status.Base)
	return shipped
}

// Clients not written here do the writing, on both formats; each point equals the image.
func TestForeignClientsWriteAndPointsAreRight(t *testing.T) {
	h := newHost(t)
	r := h.newReplica()
	h.protect(r)
	next := uint64(3)
	step := func(name string, run func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			run(t)
			if !t.Skipped() {
				h.point(next, r)
				next++
			}
		})
	}
	local := filepath.Join(t.TempDir(), "local.img")
	content := make([]byte, diskSize)
	testkit.Fill(content[1<<20:7<<20], 9)
	require.NoError(t, os.WriteFile(local, content, 0o600))
	back := filepath.Join(t.TempDir(), "back.img")
	step("qemu-io", func(t *testing.T) {
		for _, d := range []string{"os", "data"} {
			out := tool(t, "qemu-io", "-f", "raw", h.uri(d),
				"-c", "write -P 0xab 0 64k", "-c", "write -P 0xcd 32k 128k", "-c", "write -f -P 1 5M 4k", "-c", "discard 6M 1M",
				"-c", "write -z 4M 512k", "-c", "write -z -u 10M 64k", "-c", "flush", "-c", "read -P 0xcd 32k 128k", "-c", "read -P 0 6M 1M")
			require.NotContains(t, out, "Pattern verification failed")
			require.NotContains(t, out, "failed")
		}
	})
	step("nbdcopy", func(t *testing.T) {
		tool(t, "nbdcopy", "--connections=4", "--flush", local, h.uri("os"))
		tool(t, "nbdcopy", h.uri("os"), back)
		got, err := os.ReadFile(back)
		require.NoError(t, err)
		require.True(t, bytes.Equal(content, got))
	})
	step("qemu-img", func(t *testing.T) {
		tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", local, h.uri("data"))
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", local, h.uri("data"))
		require.Contains(t, tool(t, "qemu-img", "map", "--output=json", "-f", "raw", h.uri("data")), `"zero": true`)
	})
	step("nbdinfo", func(t *testing.T) {
		list := tool(t, "nbdinfo", "--list", "--no-content", strings.TrimSuffix(h.uri("os"), "/"+testVM+"/os"))
		require.Contains(t, list, testVM+"/os")
		require.Contains(t, list, testVM+"/data")
		info := tool(t, "nbdinfo", h.uri("os"))
		for _, want := range []string{"can_multi_conn: true", "can_fua: true", "can_zero: true", "can_trim: true", "can_fast_zero: true", "base:allocation"} {
			require.Contains(t, info, want)
		}
	})
	step("fio", func(t *testing.T) {
		// In a folder of its own: fio leaves state files behind.
		file := filepath.Join(t.TempDir(), "fio.out")
		tool(t, "fio", "--name=w", "--ioengine=nbd", "--uri="+h.uri("os"), "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=4M",
			"--verify=crc32c", "--do_verify=1", "--end_fsync=1", "--randseed=7", "--output="+file, "--verify_state_save=0")
	})
}

// What the API refuses, with its reason, and nothing half-done left behind.
func TestRefusals(t *testing.T) {
	h := newHost(t)
	ctx := testkit.Context(t)
	attach := func(vm string, disks ...*typesv1.Disk) error {
		_, err := h.client.AttachMachine(ctx, &changetrackerv1.AttachMachineRequest{Vm: vm, StateDir: t.TempDir(), Disks: disks})
		return err
	}
	file := func(name string, size int) string {
		path := filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(path, make([]byte, size), 0o600))
		return path
	}
	raw := func(id, path string) *typesv1.Disk {
		return &typesv1.Disk{Id: id, SizeBytes: 512, Path: path, Format: typesv1.DiskFormat_DISK_FORMAT_RAW}
	}
	link := filepath.Join(t.TempDir(), "hard.img")
	free := file("free.img", 1<<20)
	require.NoError(t, os.Link(free, link))
	symlink := filepath.Join(t.TempDir(), "soft.img")
	require.NoError(t, os.Symlink(h.disks[0].Path, symlink))
	for name, tc := range map[string]struct {
		err    error
		reason typesv1.ErrorReason
	}{
		"missing image":       {attach("a", raw("os", filepath.Join(t.TempDir(), "none.img"))), typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING},
		"odd size":            {attach("a", raw("os", file("odd.img", 1000))), typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED},
		"disk named twice":    {attach("a", raw("os", free), raw("os", free)), typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE},
		"hard link":           {attach("a", raw("os", free), raw("data", link)), typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE},
		"of another machine":  {attach("a", raw("os", symlink)), typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE},
		"unspecified format":  {attach("a", &typesv1.Disk{Id: "os", SizeBytes: 512, Path: free}), typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED},
		"unknown machine":     {second(h.client.GetTracking(ctx, &changetrackerv1.GetTrackingRequest{Vm: "nobody"})), typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND},
		"not tracked":         {second(h.client.SwitchLogs(ctx, &changetrackerv1.SwitchLogsRequest{Vm: testVM, Lineage: simLineage, Point: 1, Epoch: 1})), typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED},
		"state dir of others": {second(h.client.AttachMachine(ctx, &changetrackerv1.AttachMachineRequest{Vm: "a", StateDir: h.dir, Disks: []*typesv1.Disk{raw("os", free)}})), typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, errcat.Code(tc.reason), errcat.Code(errcat.Reason(tc.err)), "%v", tc.err)
		})
	}
	left, err := os.ReadDir(filepath.Join(h.dir, "state"))
	require.NoError(t, err)
	require.Len(t, left, 1, "only the machine that was attached")
	require.NoError(t, attach("a", raw("os", free)), "a refusal holds no image")
}

func second[T any](_ T, err error) error { return err }

// A restart exports again by itself, goes on tracking, and StopTracking and DetachMachine leave nothing behind.
func TestRestartAndRemoval(t *testing.T) {
	h := newHost(t)
	ctx := testkit.Context(t)
	r := h.newReplica()
	h.protect(r)
	tool(t, "qemu-io", "-f", "raw", h.uri("os"), "-c", "write -P 7 1M 64k")
	h.stop()
	h.start()
	h.attach() // asks for the new addresses only
	tool(t, "qemu-io", "-f", "raw", h.uri("os"), "-c", "write -P 8 2M 64k")
	shipped := h.point(3, r)
	require.Equal(t, 128<<10, shipped, "only what was written before and after the restart")

	_, err := h.client.DetachMachine(ctx, &changetrackerv1.DetachMachineRequest{Vm: testVM})
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, errcat.Reason(err))
	for range 2 {
		_, err = h.client.StopTracking(ctx, &changetrackerv1.StopTrackingRequest{Vm: testVM, Lineage: simLineage, Epoch: 1})
		require.NoError(t, err)
	}
	_, err = h.client.DetachMachine(ctx, &changetrackerv1.DetachMachineRequest{Vm: testVM})
	require.NoError(t, err)
	var names []string
	left, err := os.ReadDir(h.dir)
	require.NoError(t, err)
	for _, e := range left {
		names = append(names, e.Name())
	}
	require.Equal(t, []string{".change-tracker.lock", "data.vhd", "os.raw", "state", "tracking.json"}, names)
	h.stop()
	h.start()
	require.Empty(t, h.service.tracker.Exports())
}

func TestHashRangesMatchesTheImage(t *testing.T) {
	h := newHost(t)
	h.protect(h.newReplica())
	img := h.imageOf("os")
	for _, window := range []*typesv1.ByteRange{nil, {Offset: 3 << 20, Length: 2 << 20}} {
		stream, err := h.client.HashRanges(testkit.Context(t), &changetrackerv1.HashRangesRequest{
			Vm: testVM, Lineage: simLineage, Disk: "os", Window: window, ChunkBytes: 65536,
		})
		require.NoError(t, err)
		at, end := window.GetOffset(), window.GetOffset()+window.GetLength()
		if window == nil {
			end = diskSize
		}
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err)
			require.Equal(t, at, m.Offset)
			for i := range m.Chunks {
				chunk := img[at : at+65536]
				if m.Zero {
					require.True(t, isZero(chunk))
				} else {
					sum := sha256.Sum256(chunk)
					require.Equal(t, sum[:], m.Digests[i*32:(i+1)*32])
				}
				at += 65536
			}
		}
		require.Equal(t, end, at)
	}
}

// The first FULL pass reads only what is there; later ones send zeros for the rest.
func TestFullPassSkipsAbsentSpace(t *testing.T) {
	h := newHost(t)
	r := h.newReplica()
	ctx := testkit.Context(t)
	_, err := h.client.StartTracking(ctx, &changetrackerv1.StartTrackingRequest{Vm: testVM, Lineage: simLineage, Epoch: 1})
	require.NoError(t, err)
	require.Equal(t, 2*(3<<20), h.pass(1, typesv1.PassScope_PASS_SCOPE_FULL, r))
	h.point(2, r)
	for _, b := range r {
		b[20<<20] = 1 // a target that is not fresh
	}
	h.pass(3, typesv1.PassScope_PASS_SCOPE_FULL, r)
	h.point(4, r)
}

// Two configurations and what is wrong with them, all at once.
func TestConfigNamesEveryProblem(t *testing.T) {
	err := Config{StateDir: "relative", NBDAddress: "0.0.0.0:1"}.Validate()
	for _, key := range []string{"state_dir", "nbd_address", "max_log_entries"} {
		require.ErrorContains(t, err, key)
	}
	c := Default()
	c.StateDir = t.TempDir()
	require.NoError(t, c.Validate())
}

// A write of the last bytes of a disk with an odd number of extents, and ranges that do not fit, by the domain itself.
func TestWritesBeyondTheDiskAreRefused(t *testing.T) {
	h := newHost(t)
	d, err := h.service.tracker.disk(testVM + "/os")
	require.NoError(t, err)
	require.NoError(t, d.WriteAt([]byte{1}, d.Size()-1, true))
	require.Error(t, d.WriteAt([]byte{1, 2}, d.Size()-1, false))
	require.Error(t, d.Zero(extent.Range{Off: d.Size(), Len: 1}, false, false))
	require.NoError(t, d.WriteAt(nil, 0, false))

}
