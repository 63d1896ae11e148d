package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/libs/testkit"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

// TestIOThreadIsRefused: reading such a disk would abort this QEMU, and the guest with it.
func TestIOThreadIsRefused(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]option{
		"virtio-blk": func(l *lab) { l.extra, l.device = []string{"-object", "iothread,id=io0"}, ",iothread=io0" },
		"scsi": func(l *lab) {
			l.machine = "scsi"
			l.extra = []string{"-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=hba,iothread=io0"}
		},
	} {
		l := newLab(t, o)
		if l.second.Version().Major >= safeIOThread {
			t.Skip("this QEMU has not the defect")
		}
		l.establish()
		_, err := l.begin(l.next(), full)
		requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID)
		require.ErrorContains(t, err, "iothread", name)
		l.tidy(0)
	}
}

func TestSCSI(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(l *lab) {
		l.machine = "scsi"
		l.extra = []string{"-object", "iothread,id=other", "-device", "virtio-scsi-pci,id=hba"}
	})
	l.establish()
	l.copyAll(full)
	l.point()
	l.point()
	l.tidy(1)
}

// TestHypervisorKilled: no answer is no loss; a QEMU that answers without the bitmaps is.
func TestHypervisorKilled(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	l.copyAll(full)
	l.point()
	n := l.next()
	_, err := l.cut(n)
	require.NoError(t, err)
	l.ship(n)
	l.kill()
	start := time.Now()
	_, err = l.driver.Points(l.ctx(), vmA)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	require.Less(t, time.Since(start), 5*time.Second)
	require.NoError(t, l.driver.Refresh(l.ctx()))
	// What was read before is right: the point may be the base, and nothing may follow it.
	_, err = l.settle(n, commit)
	require.NoError(t, err)
	_, err = l.cut(l.next())
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	l.start()
	l.write("d0", 0, 4096, 77)                         // unseen
	testkit.Eventually(t, 5*time.Second, func() bool { // a failed connect is remembered for a moment
		_, err := l.driver.Points(l.ctx(), vmA)
		return err == nil
	})
	s := l.points()
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, s.ResyncReason)
	require.Contains(t, s.ResyncDetail, "restarted")
	require.Equal(t, n, s.Base)
	_, err = l.cut(l.next())
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
	l.restartDriver()
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, l.points().ResyncReason)
	l.copyAll(compare)
	require.Zero(t, l.points().ResyncReason)
	l.point()
	l.tidy(1)

	// In a pass: it is given up, and said to be.
	n = l.next()
	_, err = l.begin(n, compare)
	require.NoError(t, err)
	l.kill()
	l.start()
	testkit.Eventually(t, 5*time.Second, func() bool { return l.driver.Refresh(l.ctx()) == nil && l.points().ResyncReason != 0 })
	_, err = l.settlePass(n, commit)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)
	l.copyAll(compare)
	l.point()
}

// TestHypervisorHangs: a QEMU that does not answer holds nobody up, and what it does late is seen.
func TestHypervisorHangs(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	l.copyAll(full)
	l.point()
	n := l.next()
	moments := []string{"blockdev-reopen"} // each takes the driver's own time limits
	if os.Getenv("LANDFALL_EVERY_STEP") != "" {
		moments = append(moments, "transaction", "block-export-add")
	}
	for _, moment := range moments {
		hung := false
		l.driver.step = func(name string) error {
			if name == moment && !hung {
				hung = true
				return l.qemu.Process.Signal(syscall.SIGSTOP)
			}
			return nil
		}
		ctx, cancel := context.WithTimeout(l.ctx(), 300*time.Millisecond)
		_, err := l.driver.Cut(ctx, hostprovider.Cut{VM: vmA, Lineage: lineageA, Point: n, Epoch: l.epoch, Consistency: crash})
		cancel()
		l.driver.step = nil
		requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
		start := time.Now()
		_, err = l.driver.Points(l.ctx(), vmA)
		requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
		require.Less(t, time.Since(start), 2*pointsTimeout)
		require.NoError(t, l.qemu.Process.Signal(syscall.SIGCONT))
		l.write("d0", 0, 5000, 44)
		require.Zero(t, l.points().ResyncReason)
		l.tidy(1)
	}
	_, err := l.cut(n)
	require.NoError(t, err)
	want := l.snapshot()
	l.ship(n)
	l.same(want, "point")
	_, err = l.settle(n, commit)
	require.NoError(t, err)
	l.point()
}

// TestBitmapTampered: each way in which a bitmap can be not what it was. Nothing is guessed.
func TestBitmapTampered(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	for _, how := range []string{"block-dirty-bitmap-remove", "block-dirty-bitmap-disable", "block-dirty-bitmap-clear", "overlay"} {
		l.copyAll(compare)
		l.point()
		want := typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST
		switch how {
		case "overlay":
			require.NoError(t, tamperOverlay(l))
		case "block-dirty-bitmap-clear":
			continue // cannot be seen: a clean bitmap is what an idle disk has. Nobody but us may hold our monitor.
		default:
			args := arguments{"node": "d1", "name": bitmapName(lineageA, l.driver.vms[vmA].rec.Active)}
			require.NoError(t, l.second.Execute(l.ctx(), how, args, nil))
		}
		_, err := l.cut(l.next())
		requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
		require.Equal(t, want, l.points().ResyncReason, how)
	}
	require.Contains(t, l.points().ResyncDetail, "overlay")
}

func tamperOverlay(l *lab) error {
	run(l.t, "qemu-img", "create", "-q", "-f", "qcow2", l.path("o.qcow2"), "8M")
	err := l.second.Execute(l.ctx(), "blockdev-add", arguments{
		"driver": "qcow2", "node-name": "overlay", "backing": nil, "file": arguments{"driver": "file", "filename": l.path("o.qcow2")},
	}, nil)
	if err != nil {
		return err
	}
	return l.second.Execute(l.ctx(), "blockdev-snapshot", arguments{"node": "d1", "overlay": "overlay"}, nil)
}

// TestScratchFull: the guest goes on, the point is broken, the next is right.
func TestScratchFull(t *testing.T) {
	l := newLab(t)
	require.NoError(t, os.MkdirAll(l.config.ScratchDir, 0o700))
	if err := syscall.Mount("landfall-test", l.config.ScratchDir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(l.config.ScratchDir, syscall.MNT_DETACH) })
	require.NoError(t, l.second.Execute(l.ctx(), "cont", nil, nil))
	l.establish()
	l.copyAll(full)
	l.write("d0", 0, 3*mib, 5)
	n := l.next()
	_, err := l.cut(n)
	require.NoError(t, err)
	l.write("d0", 0, 2*mib, 6) // more than the copy can hold: the write succeeds
	var status struct{ Status string }
	require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &status))
	require.Equal(t, "running", status.Status)
	uri := l.tracker.source().Disks[0].Uri
	require.Error(t, command("nbdcopy", uri, "/dev/null"), "a broken copy must not be read")
	_, err = l.settle(n, giveUp)
	require.NoError(t, err)
	l.tidy(1)
	l.point()
	require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &status))
	require.Equal(t, "running", status.Status)

	// Too little to begin with.
	l.driver.cfg.MinScratch = mib
	_, err = l.cut(l.next())
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE)
	l.tidy(1)
}

// TestForeignThings: another backup tool works on the same QEMU.
func TestForeignThings(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	foreign := func(command string, args any) {
		t.Helper()
		require.NoError(t, l.second.Execute(l.ctx(), command, args, nil))
	}
	l.establish()
	l.copyAll(full)
	foreign("block-dirty-bitmap-add", arguments{"node": "d0", "name": "theirs"})
	foreign("nbd-server-start", arguments{"addr": arguments{"type": "unix", "data": arguments{"path": l.path("their.nbd")}}})
	foreign("block-export-add", arguments{"type": "nbd", "id": "their", "node-name": "d1", "name": "their"})
	base := l.points().Base
	n := l.next()
	_, err := l.cut(n)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID)
	require.ErrorContains(t, err, "another program")
	l.tidy(1)
	l.restartDriver()
	require.Equal(t, base, l.points().Base)
	run(t, "nbdinfo", "nbd+unix:///their?socket="+l.path("their.nbd"))
	foreign("nbd-server-stop", nil)
	_, err = l.cut(n) // it was refused, not settled
	require.NoError(t, err)
	want := l.snapshot()
	l.ship(n)
	l.same(want, "point")
	// An export of theirs on our server keeps it.
	foreign("block-export-add", arguments{"type": "nbd", "id": "their", "node-name": "d1", "name": "their"})
	_, err = l.settle(n, commit)
	require.NoError(t, err)
	l.tidy(1)
	held, err := l.driver.hold(l.ctx(), vmA)
	require.NoError(t, err)
	path := held.rec.Server
	held.release()
	run(t, "nbdinfo", "nbd+unix:///their?socket="+path)
	l.point()
	run(t, "nbdinfo", "nbd+unix:///their?socket="+path)
	foreign("block-export-del", arguments{"id": "their", "mode": "hard"})
	l.point()
	require.False(t, serverAnswers(path), "the server is stopped when nobody needs it")
	s, err := observe(l.ctx(), l.second)
	require.NoError(t, err)
	require.Contains(t, s.nodes["d0"].bitmaps, "theirs")
	require.True(t, s.nodes["d0"].bitmaps["theirs"].Recording)

	// Their job puts a filter over a disk: it is waited for.
	run(t, "qemu-img", "create", "-q", "-f", "raw", l.path("b.raw"), "8M")
	foreign("blockdev-add", arguments{"driver": "file", "node-name": "backup", "filename": l.path("b.raw")})
	foreign("blockdev-backup", arguments{"device": "d0", "target": "backup", "sync": "none", "job-id": "their"})
	_, err = l.cut(l.next())
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
	require.ErrorContains(t, err, "another program")
	l.restartDriver()
	foreign("block-job-cancel", arguments{"device": "their", "force": true})
	testkit.Eventually(t, 5*time.Second, func() bool {
		s, err := observe(l.ctx(), l.second)
		root, _ := s.root("/machine/peripheral/dev-d0")
		return err == nil && root == "d0"
	})
	l.point()
}

// TestMonitorInUse: a second client is met with silence.
func TestMonitorInUse(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	l.copyAll(full)
	l.stopDriver()
	var other *qmp.Monitor
	testkit.Eventually(t, 5*time.Second, func() (err error) {
		other, err = qmp.Dial(l.ctx(), l.path("q1"))
		return err
	})
	l.startDriver()
	_, err := l.driver.Points(l.ctx(), vmA)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	require.ErrorIs(t, err, qmp.ErrInUse)
	require.NoError(t, other.Close())
	testkit.Eventually(t, 5*time.Second, func() error {
		_, err := l.driver.Points(l.ctx(), vmA)
		return err
	})
	l.point()
}

// TestTrackerDown: a point that cannot be read yet is kept, and offered again.
func TestTrackerDown(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	l.copyAll(full)
	l.tracker.fail(errors.New("down"))
	n := l.next()
	_, err := l.cut(n)
	require.Error(t, err)
	want := l.snapshot()
	l.write("d1", 0, 9999, 3)
	l.tracker.fail(nil)
	require.NoError(t, l.driver.Refresh(l.ctx()))
	l.ship(n)
	l.same(want, "point")
	l.tracker.newest = nil // it lost its state
	_, err = l.cut(n)
	require.NoError(t, err)
	require.Equal(t, n, l.tracker.source().Ordinal)
	_, err = l.settle(n, commit)
	require.NoError(t, err)
	require.Nil(t, l.tracker.source())
	l.point()
}

// agentd is a guest agent.
type agentd struct {
	mu       sync.Mutex
	frozen   bool
	log      []string
	hang     chan struct{} // freeze waits for it
	refuse   bool
	listener net.Listener
	served   sync.WaitGroup
}

func newAgent(t testing.TB, l *lab) *agentd {
	t.Helper()
	a := &agentd{}
	l.agent = l.path("ga")
	var err error
	a.listener, err = net.Listen("unix", l.agent)
	require.NoError(t, err)
	a.served.Go(func() {
		for {
			c, err := a.listener.Accept()
			if err != nil {
				return
			}
			a.serve(c) // one at a time, as a chardev does
		}
	})
	t.Cleanup(func() {
		_ = a.listener.Close()
		a.served.Wait()
	})
	return a
}

func (a *agentd) serve(c net.Conn) {
	defer func() { _ = c.Close() }()
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		var m struct {
			Execute   string
			Arguments struct{ ID int64 }
		}
		if json.Unmarshal([]byte(strings.ReplaceAll(line, "\xff", "")), &m) != nil {
			continue
		}
		var out any
		a.mu.Lock()
		if m.Execute != "guest-sync-delimited" {
			a.log = append(a.log, m.Execute)
		}
		prefix := ""
		switch m.Execute {
		case "guest-sync-delimited":
			prefix, out = "\xff", arguments{"return": m.Arguments.ID}
		case "guest-fsfreeze-freeze":
			if hang := a.hang; hang != nil {
				a.mu.Unlock()
				<-hang
				a.mu.Lock()
			}
			out = arguments{"return": 2}
			if a.refuse {
				out = arguments{"error": arguments{"class": "GenericError", "desc": "no"}}
			} else {
				a.frozen = true
			}
		case "guest-fsfreeze-thaw":
			n := 0
			if a.frozen {
				n = 2
			}
			a.frozen, out = false, arguments{"return": n}
		}
		a.mu.Unlock()
		b, _ := json.Marshal(out)
		if _, err := c.Write(append([]byte(prefix), append(b, '\n')...)); err != nil {
			return
		}
	}
}

func (a *agentd) isFrozen() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.frozen
}

func (l *lab) cutApp(n uint64) (hostprovider.CutResult, error) {
	return l.driver.Cut(l.ctx(), hostprovider.Cut{VM: vmA, Lineage: lineageA, Point: n, Epoch: l.epoch, Consistency: app})
}

func TestApplicationConsistency(t *testing.T) {
	t.Parallel()
	l := newLab(t, configured(func(c *Config) { c.FreezeLimit = time.Second }))
	require.NoError(t, l.second.Execute(l.ctx(), "cont", nil, nil))
	l.establish()
	l.copyAll(full)
	settle := func(n uint64) {
		t.Helper()
		want := l.snapshot()
		l.ship(n)
		l.same(want, "point")
		_, err := l.settle(n, commit)
		require.NoError(t, err)
		require.False(t, l.driver.vms[vmA].rec.Freezing)
	}
	n := l.next()
	r, err := l.cutApp(n)
	require.NoError(t, err)
	require.Equal(t, crash, r.Consistency)
	requireReason(t, r.Degraded, typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED)
	settle(n)

	a := newAgent(t, l)
	n = l.next()
	r, err = l.cutApp(n)
	require.NoError(t, err)
	require.NoError(t, r.Degraded)
	require.Equal(t, app, r.Consistency)
	require.False(t, a.isFrozen())
	require.Equal(t, []string{"guest-fsfreeze-freeze", "guest-fsfreeze-thaw"}, a.log)
	again, err := l.cutApp(n)
	require.NoError(t, err)
	require.Equal(t, app, again.Consistency)
	settle(n)

	a.refuse = true
	n = l.next()
	r, err = l.cutApp(n)
	require.NoError(t, err)
	require.Equal(t, crash, r.Consistency)
	require.Error(t, r.Degraded)
	settle(n)
	a.refuse = false

	// The cut hangs while the guest is frozen: the watchdog thaws, the point is crash-consistent.
	n = l.next()
	l.driver.step = func(name string) error {
		if name == "blockdev-reopen" {
			testkit.Eventually(t, 10*time.Second, func() bool { return !a.isFrozen() })
		}
		return nil
	}
	r, err = l.cutApp(n)
	l.driver.step = nil
	require.NoError(t, err)
	require.Equal(t, crash, r.Consistency)
	require.Error(t, r.Degraded)
	settle(n)

	// The freeze hangs, and is done late: it is thawed all the same.
	a.hang = make(chan struct{})
	n = l.next()
	release := time.AfterFunc(3*time.Second, func() { close(a.hang) })
	defer release.Stop()
	r, err = l.cutApp(n)
	require.NoError(t, err)
	require.Equal(t, crash, r.Consistency)
	testkit.Eventually(t, 10*time.Second, func() bool { return !a.isFrozen() })
	a.mu.Lock()
	a.hang = nil
	a.mu.Unlock()
	require.NoError(t, l.driver.Refresh(l.ctx()))
	settle(n)

	// The driver dies while the guest is frozen: the next one thaws first.
	l.config.FreezeLimit = 8 * time.Second
	l.restartDriver()
	n = l.next()
	for _, moment := range []string{"freeze-done", "transaction", "blockdev-reopen-done", "thaw"} {
		begun, dead := false, false
		l.driver.step = func(name string) error {
			begun = begun || name == "freeze" // a thaw before it is of an earlier cut
			if dead = dead || begun && name == moment; dead {
				return errKilled
			}
			return nil
		}
		_, err = l.cutApp(n)
		require.ErrorIs(t, err, errKilled, moment)
		require.True(t, a.isFrozen(), moment)
		l.restartDriver()
		require.False(t, a.isFrozen(), moment)
		l.tidy(1)
	}
	r, err = l.cutApp(n)
	require.NoError(t, err)
	require.Equal(t, app, r.Consistency)
	settle(n)
}

// TestRules: protocol rule 4 where the suites do not look.
func TestRules(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	_, err := l.begin(l.next(), typesv1.PassScope_PASS_SCOPE_DIRTY)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	l.copyAll(full)
	n := l.next()
	_, err = l.settle(n, commit)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT)
	_, err = l.cut(n)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)
	l.epoch = 7
	l.point()
	l.restartDriver()
	l.epoch = 6
	_, err = l.cut(l.next())
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)
	l.epoch = 7
	n = l.next()
	_, err = l.begin(n, compare)
	require.NoError(t, err)
	_, err = l.settle(n, commit)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	_, err = l.cut(n + 1)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_OPEN)
	s, err := l.settlePass(n, giveUp)
	require.NoError(t, err)
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_TRACKING_GAP, s.ResyncReason)
	l.tidy(0)
	_, err = l.cut(l.next())
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
	l.copyAll(compare)
	l.point()
	_, err = l.driver.Establish(l.ctx(), vmA, strings.Repeat("f", 32), 9)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH)

	// Outcomes are bounded.
	held, err := l.driver.hold(l.ctx(), vmA)
	require.NoError(t, err)
	require.NoError(t, held.update(func(r *record) {
		for range 2 * maxOutcomes {
			r.settle(point{Ordinal: r.Highest + 1, Phase: abandoned})
		}
	}))
	require.Len(t, held.rec.Outcomes, maxOutcomes)
	floor := held.rec.Floor
	l.ordinal = held.rec.Highest
	held.release()
	_, err = l.cut(floor)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)
	_, err = l.settle(floor, giveUp)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)
	l.point()

	// A record that cannot be read is no reason to guess.
	l.stopDriver()
	require.NoError(t, os.WriteFile(recordPath(l.config.StateDir, vmA), []byte("{"), 0o600))
	l.startDriver()
	_, err = l.driver.Points(l.ctx(), vmA)
	requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN)
}

// TestDissolveWithoutHypervisor: what is left in a QEMU that does not answer goes when it does.
func TestDissolveWithoutHypervisor(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.establish()
	l.copyAll(full)
	_, err := l.cut(l.next())
	require.NoError(t, err)
	l.stopDriver()
	var other *qmp.Monitor
	testkit.Eventually(t, 5*time.Second, func() (err error) {
		other, err = qmp.Dial(l.ctx(), l.path("q1"))
		return err
	})
	l.startDriver()
	require.NoError(t, l.driver.Dissolve(l.ctx(), vmA, lineageA, 1))
	require.NoError(t, l.driver.Dissolve(l.ctx(), vmA, lineageA, 1))
	require.NoError(t, other.Close())
	testkit.Eventually(t, 5*time.Second, func() bool {
		require.NoError(t, l.driver.Refresh(l.ctx()))
		s, err := observe(l.ctx(), l.second)
		return err == nil && len(s.exports) == 0
	})
	l.tidy(0)
}

func command(program string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return exec.CommandContext(ctx, program, args...).Run()
}
