package qemu

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/nbd"
	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	mib       = 1 << 20
	imageSize = 8 * mib
	vmA       = "5a1e0000-0000-4000-8000-000000000001"
	lineageA  = "0123456789abcdef0123456789abcdef"
	crash     = typesv1.Consistency_CONSISTENCY_CRASH
	app       = typesv1.Consistency_CONSISTENCY_APPLICATION
	full      = typesv1.PassScope_PASS_SCOPE_FULL
	compare   = typesv1.PassScope_PASS_SCOPE_COMPARE
	commit    = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
	giveUp    = typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
)

// programs skips a test where QEMU is not installed; in CI it must be.
func programs(t testing.TB) {
	t.Helper()
	for _, p := range []string{"qemu-system-x86_64", "qemu-img", "nbdinfo", "nbdcopy"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", p)
			}
			t.Skipf("%s is not installed", p)
		}
	}
}

// lab is one QEMU, what its guest wrote, and a replica that points are put into.
type lab struct {
	t       testing.TB
	dir     string
	formats []string // of the disks "d0", "d1", ..
	machine string   // q35 or pc
	extra   []string
	boot    bool
	images  string // folder of the images, when not dir
	// device is added to the option of every virtio device.
	device string
	config Config

	qemu    *exec.Cmd
	exited  chan struct{}
	second  *qmp.Monitor // the harness's
	driver  *Driver
	pool    *qmp.Pool
	tracker *fakeTracker
	agent   string

	guest   map[string][]byte
	replica map[string][]byte
	ordinal uint64
	epoch   uint64
}

type option func(*lab)

func formats(f ...string) option { return func(l *lab) { l.formats = f } }
func configured(f func(*Config)) option {
	return func(l *lab) { f(&l.config) }
}

func newLab(t testing.TB, options ...option) *lab {
	t.Helper()
	programs(t)
	dir, err := os.MkdirTemp("", "lf") // short: sockets
	require.NoError(t, err)
	l := &lab{
		t: t, dir: dir, formats: []string{"vhdx", "qcow2"}, machine: "q35", epoch: 1, tracker: &fakeTracker{},
		guest: map[string][]byte{}, replica: map[string][]byte{},
	}
	l.config = Config{StateDir: filepath.Join(dir, "state"), ScratchDir: filepath.Join(dir, "scratch"), SocketDir: filepath.Join(dir, "s"), MinScratch: 1}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, o := range options {
		o(l)
	}
	for i, f := range l.formats {
		create := []string{"create", "-q", "-f", f}
		if f == "vpc" {
			create = append(create, "-o", "subformat=fixed,force_size=on")
		}
		run(t, "qemu-img", append(create, l.image(i), strconv.Itoa(imageSize))...)
		l.guest[disk(i)], l.replica[disk(i)] = make([]byte, imageSize), make([]byte, imageSize)
	}
	if l.boot {
		l.install()
	}
	l.start()
	t.Cleanup(func() {
		l.stopDriver()
		l.kill()
	})
	l.startDriver()
	return l
}

func disk(i int) string                { return "d" + strconv.Itoa(i) }
func (l *lab) image(i int) string      { return filepath.Join(cmp.Or(l.images, l.dir), disk(i)+".img") }
func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

func run(t testing.TB, program string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s %v: %s", program, args, stderr.String())
	return string(out)
}

// start starts the QEMU, stopped (-S): no guest is needed, its devices are written to by hand.
func (l *lab) start() {
	l.t.Helper()
	machine := l.machine
	if machine == "scsi" {
		machine = "q35"
	}
	a := []string{
		"-S", "-machine", machine, "-accel", "tcg,thread=multi", "-m", "64", "-display", "none", "-nodefaults",
		"-qmp", "unix:" + l.path("q1") + ",server=on,wait=off", "-qmp", "unix:" + l.path("q2") + ",server=on,wait=off",
	}
	a = append(a, l.extra...)
	for i, f := range l.formats {
		a = append(a, "-blockdev", fmt.Sprintf("driver=%s,node-name=%s,discard=unmap,file.driver=file,file.filename=%s", f, disk(i), l.image(i)))
		switch l.machine {
		case "scsi":
			a = append(a, "-device", fmt.Sprintf("scsi-hd,drive=%s,id=dev-%s,bus=hba.0", disk(i), disk(i)))
		case "pc":
			a = append(a, "-device", fmt.Sprintf("ide-hd,drive=%s,id=dev-%s,bus=ide.%d,bootindex=%d", disk(i), disk(i), i, i+1))
		default:
			a = append(a, "-device", fmt.Sprintf("virtio-blk-pci,drive=%s,id=dev-%s,bootindex=%d%s", disk(i), disk(i), i+1, l.device))
		}
	}
	l.qemu = exec.Command("qemu-system-x86_64", a...)
	var stderr bytes.Buffer
	l.qemu.Stderr = &stderr
	l.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(l.t, l.qemu.Start())
	l.exited = make(chan struct{})
	go func() {
		if err := l.qemu.Wait(); err != nil && err.Error() != "signal: killed" {
			l.t.Log("qemu ended by itself:", err, stderr.String())
		}
		close(l.exited)
	}()
	testkit.Eventually(l.t, 20*time.Second, func() error {
		select {
		case <-l.exited:
			require.Fail(l.t, "qemu ended", stderr.String())
		default:
		}
		m, err := qmp.Dial(l.ctx(), l.path("q2"))
		l.second = m
		return err
	})
}

// kill ends the QEMU as a crash does.
func (l *lab) kill() {
	_ = l.qemu.Process.Kill()
	<-l.exited
	_ = l.second.Close()
}

func (l *lab) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	l.t.Cleanup(cancel)
	return ctx
}

func (l *lab) startDriver() {
	l.t.Helper()
	l.build()
	require.NoError(l.t, l.driver.Refresh(l.ctx()))
}

func (l *lab) build() {
	l.t.Helper()
	l.pool = qmp.NewPool()
	d, err := New(l.config, Deps{Inventory: l, Pool: l.pool, Tracker: l.tracker, Log: slog.New(slog.NewTextHandler(testWriter{l.t}, nil))})
	require.NoError(l.t, err)
	l.driver = d
}

// stopDriver ends the driver as a kill does, as far as QEMU and the record see: nothing more is done, the monitor closes.
func (l *lab) stopDriver() {
	l.driver.step = func(string) error { return errKilled }
	l.pool.Close()
	l.driver.Close()
}

func (l *lab) restartDriver() {
	l.t.Helper()
	l.stopDriver()
	l.startDriver()
}

var errKilled = errors.New("the driver was killed")

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// The lab is the driver's inventory.

func (l *lab) Refresh(context.Context) error { return nil }
func (l *lab) All() []*inventory.Machine     { return []*inventory.Machine{l.machineOf()} }
func (l *lab) Problems() ([]*hostproviderv1.Finding, error) {
	return nil, nil
}
func (l *lab) Find(string) (*inventory.Machine, error) { return l.machineOf(), nil }
func (l *lab) Check(context.Context, string) (*inventory.Machine, []*hostproviderv1.Finding, bool, error) {
	return l.machineOf(), nil, true, nil
}
func (l *lab) Lookup(id string) (*inventory.Machine, error) {
	if id != vmA {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "no machine %s", id)
	}
	return l.machineOf(), nil
}

func (l *lab) machineOf() *inventory.Machine {
	m := &inventory.Machine{ID: vmA, Name: "lab", QMPSocket: l.path("q1"), AgentSocket: l.agent, Description: &typesv1.Machine{Id: vmA}}
	for i := range l.formats {
		m.Disks = append(m.Disks, inventory.Disk{ID: disk(i), Node: disk(i), Device: "/machine/peripheral/dev-" + disk(i), Size: imageSize, Path: l.image(i)})
	}
	return m
}

// front is how HMP names the device.
func (l *lab) front(d string) string {
	if l.machine != "q35" {
		return "/machine/peripheral/dev-" + d
	}
	return "/machine/peripheral/dev-" + d + "/virtio-backend"
}

func (l *lab) io(d, command string) {
	l.t.Helper()
	out, err := l.second.HMP(l.ctx(), fmt.Sprintf("qemu-io -d %s %q", l.front(d), command))
	require.NoError(l.t, err)
	require.NotContains(l.t, strings.ToLower(out), "error", command)
	require.NotContains(l.t, strings.ToLower(out), "fail", command)
}

// write writes as the guest's device does.
func (l *lab) write(d string, off, n int, pattern byte) {
	l.t.Helper()
	l.io(d, fmt.Sprintf("write -P %d %d %d", pattern, off, n))
	copy(l.guest[d][off:off+n], bytes.Repeat([]byte{pattern}, n))
}

func (l *lab) zero(d string, off, n int) {
	l.t.Helper()
	l.io(d, fmt.Sprintf("write -z %d %d", off, n))
	clear(l.guest[d][off : off+n])
}

func (l *lab) next() uint64 {
	l.ordinal++
	return l.ordinal
}

func (l *lab) establish() {
	l.t.Helper()
	_, err := l.driver.Establish(l.ctx(), vmA, lineageA, l.epoch)
	require.NoError(l.t, err)
}

func (l *lab) cut(n uint64) (hostprovider.CutResult, error) {
	return l.driver.Cut(l.ctx(), hostprovider.Cut{VM: vmA, Lineage: lineageA, Point: n, Epoch: l.epoch, Consistency: crash})
}

func (l *lab) settle(n uint64, o typesv1.SettleOutcome) (*typesv1.TrackingStatus, error) {
	return l.driver.Settle(l.ctx(), hostprovider.Settle{VM: vmA, Lineage: lineageA, Point: n, Epoch: l.epoch, Outcome: o})
}

func (l *lab) begin(n uint64, scope typesv1.PassScope) (*typesv1.HostPoint, error) {
	return l.driver.BeginPass(l.ctx(), hostprovider.Pass{VM: vmA, Lineage: lineageA, Pass: n, Epoch: l.epoch, Scope: scope})
}

func (l *lab) settlePass(n uint64, o typesv1.SettleOutcome) (*typesv1.TrackingStatus, error) {
	return l.driver.SettlePass(l.ctx(), hostprovider.Settle{VM: vmA, Lineage: lineageA, Point: n, Epoch: l.epoch, Outcome: o})
}

func (l *lab) points() *typesv1.TrackingStatus {
	l.t.Helper()
	s, err := l.driver.Points(l.ctx(), vmA)
	require.NoError(l.t, err)
	return s
}

// copyAll runs a pass, with a write behind it.
func (l *lab) copyAll(scope typesv1.PassScope) {
	l.t.Helper()
	n := l.next()
	_, err := l.begin(n, scope)
	require.NoError(l.t, err)
	l.write("d0", 5*mib, 4096, byte(n))
	l.ship(n)
	l.write("d1", 5*mib, 4096, byte(n))
	_, err = l.settlePass(n, commit)
	require.NoError(l.t, err)
}

// ship reads what is open from the newest source into the replica.
func (l *lab) ship(n uint64) {
	l.t.Helper()
	src := l.tracker.source()
	require.NotNil(l.t, src)
	require.Equal(l.t, n, src.Ordinal)
	require.Len(l.t, src.Disks, len(l.formats))
	for _, d := range src.Disks {
		require.EqualValues(l.t, imageSize, d.SizeBytes)
		content := l.read(d)
		if d.ChangeContext == "" {
			l.replica[d.Disk] = content
			continue
		}
		for _, e := range dirty(l.t, d) {
			copy(l.replica[d.Disk][e.Offset:e.Offset+e.Length], content[e.Offset:e.Offset+e.Length])
		}
	}
}

// read reads an export as the change-tracker does: no read crosses the unit that the driver names.
func (l *lab) read(d *changetrackerv1.ExportedDisk) []byte {
	l.t.Helper()
	c, err := nbd.Dial(l.ctx(), d.Uri)
	require.NoError(l.t, err)
	defer func() { _ = c.Close() }()
	c.LimitReads(d.ReadUnitBytes)
	content := make([]byte, imageSize)
	require.NoError(l.t, c.ReadAt(l.ctx(), content, 0))
	return content
}

type mapped struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"`
}

// dirty lists the changed ranges; a missing context is a failure of nbdinfo.
func dirty(t testing.TB, d *changetrackerv1.ExportedDisk) (out []mapped) {
	t.Helper()
	var all []mapped
	require.NoError(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--json", "--map="+d.ChangeContext, d.Uri)), &all))
	for _, e := range all {
		if e.Type&1 == 1 {
			out = append(out, e)
		}
	}
	return out
}

// snapshot is a copy of what the guest wrote.
func (l *lab) snapshot() map[string][]byte {
	out := map[string][]byte{}
	for d, b := range l.guest {
		out[d] = bytes.Clone(b)
	}
	return out
}

func (l *lab) same(want map[string][]byte, what string) {
	l.t.Helper()
	for d, b := range want {
		if !bytes.Equal(b, l.replica[d]) {
			i := 0
			for b[i] == l.replica[d][i] {
				i++
			}
			require.Failf(l.t, "replica differs", "%s: disk %s at %d: guest %d, replica %d", what, d, i, b[i], l.replica[d][i])
		}
	}
}

// point cuts, writes, ships, compares and commits.
func (l *lab) point() {
	l.t.Helper()
	n := l.next()
	_, err := l.cut(n)
	require.NoError(l.t, err)
	want := l.snapshot()
	l.write("d0", int(n%7)*mib+100, 70000, byte(100+n))
	l.ship(n)
	l.same(want, fmt.Sprintf("point %d", n))
	_, err = l.settle(n, commit)
	require.NoError(l.t, err)
}

// tidy requires that QEMU has nothing of ours but one recording bitmap per disk.
func (l *lab) tidy(bitmaps int) {
	l.t.Helper()
	s, err := observe(l.ctx(), l.second)
	require.NoError(l.t, err)
	for n, v := range s.nodes {
		require.False(l.t, ours(n), "node %s is left", n)
		count := 0
		for b := range v.bitmaps {
			if ours(b) {
				count++
			}
		}
		if _, ok := l.guest[n]; ok {
			require.Equal(l.t, bitmaps, count, "bitmaps of %s", n)
		}
	}
	for _, e := range s.exports {
		require.False(l.t, ours(e.ID), "export %s is left", e.ID)
	}
	require.Empty(l.t, s.jobs)
	for i := range l.formats {
		root, ok := s.root("/machine/peripheral/dev-" + disk(i))
		require.True(l.t, ok)
		require.Equal(l.t, disk(i), root)
	}
	left, err := filepath.Glob(filepath.Join(l.config.ScratchDir, prefix+"*"))
	require.NoError(l.t, err)
	require.Empty(l.t, left)
}

func requireReason(t testing.TB, err error, want typesv1.ErrorReason) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, want, errcat.Reason(err), "%v", err)
}

// fakeTracker remembers sources. It is down when err is set.
type fakeTracker struct {
	changetrackerv1.ChangeTrackerServiceClient
	mu       sync.Mutex
	newest   *changetrackerv1.AttachSourceRequest
	attached int
	err      error
}

func (f *fakeTracker) AttachSource(_ context.Context, r *changetrackerv1.AttachSourceRequest, _ ...grpc.CallOption) (*changetrackerv1.AttachSourceResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	for _, d := range r.Disks {
		if _, err := url.Parse(d.Uri); err != nil {
			return nil, err
		}
	}
	f.newest = r
	f.attached++
	out := &changetrackerv1.AttachSourceResponse{}
	for _, d := range r.Disks {
		out.Disks = append(out.Disks, &typesv1.DiskChange{Disk: d.Disk, SizeBytes: d.SizeBytes, ChangeBytes: 4096})
	}
	return out, nil
}

func (f *fakeTracker) DetachSource(_ context.Context, r *changetrackerv1.DetachSourceRequest, _ ...grpc.CallOption) (*changetrackerv1.DetachSourceResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	if f.newest != nil && (r.Ordinal == 0 || r.Ordinal == f.newest.Ordinal) {
		f.newest = nil
	}
	return &changetrackerv1.DetachSourceResponse{}, nil
}

func (f *fakeTracker) source() *changetrackerv1.AttachSourceRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.newest
}

func (f *fakeTracker) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}
