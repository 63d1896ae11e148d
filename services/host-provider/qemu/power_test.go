package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/libs/testkit"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

const (
	poweredVM = "3f0c2a52-7a51-4f0e-9a38-6b1c5d0e7a11"
	powerLine = "0123456789abcdef0123456789abcdef"
	mine      = "failovers/0198b0a5-0000-7000-8000-000000000001"
	others    = "failovers/0198b0a5-0000-7000-8000-000000000002"
)

// listener is a guest of one sector: it enables ACPI's power button, says so at the debug port, waits for the button and
// powers down.
var listener = []byte{
	0xFA,             // cli
	0xBA, 0x02, 0x06, // mov dx, 0x602 (PM1 enable)
	0xB8, 0x00, 0x01, // mov ax, 0x100 (power button)
	0xEF,       // out dx, ax
	0xB0, 0x4B, // mov al, 'K'
	0xE6, 0xE9, // out 0xe9, al
	0xBA, 0x00, 0x06, // mov dx, 0x600 (PM1 status)
	0xED,             // in ax, dx
	0xF6, 0xC4, 0x01, // test ah, 1
	0x74, 0xFA, // jz in
	0xBA, 0x04, 0x06, // mov dx, 0x604 (PM1a control)
	0xB8, 0x00, 0x20, // mov ax, 0x2000 (sleep type 0: off)
	0xEF,             // out dx, ax
	0xF4, 0xEB, 0xFD, // hlt, for ever
}

// powered is a machine of a real QEMU with a driver.
type powered struct {
	t      *testing.T
	dir    string
	args   []string
	pool   *qmp.Pool
	driver *Driver
	logs   *bytes.Buffer

	mu  sync.Mutex
	now time.Time
}

// newPowered makes a machine whose guest listens to the power button, if it is to; it is not started.
func newPowered(t *testing.T, listens bool, args ...string) *powered {
	t.Helper()
	for _, p := range []string{"qemu-system-x86_64", "qemu-img"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is needed: %v", p, err)
			}
			t.Skipf("%s is not installed: this test needs QEMU", p)
		}
	}
	dir, err := os.MkdirTemp("", "lfp") // short: a socket's path has 107 bytes
	require.NoError(t, err)
	g := &powered{t: t, dir: dir, now: time.Unix(1e9, 0)}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Mkdir(g.path("m"), 0o700))
	disk := make([]byte, 1<<20)
	if listens {
		copy(disk, listener)
		disk[510], disk[511] = 0x55, 0xAA
	}
	require.NoError(t, os.WriteFile(g.path("os.raw"), disk, 0o600))
	g.args = append([]string{
		"-name", "web", "-uuid", poweredVM, "-accel", "tcg,thread=multi", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none", "-debugcon", "file:ready",
		"-qmp", "unix:web.qmp,server=on,wait=off", "-qmp", "unix:test.qmp,server=on,wait=off",
		"-blockdev", "driver=raw,node-name=os,file.driver=file,file.filename=os.raw", "-device", "virtio-blk-pci,drive=os,id=dev-os",
	}, args...)
	g.define(true)
	g.open()
	t.Cleanup(func() { // whatever QEMU is left was started by the test or by the driver
		g.driver.Close()
		g.pool.Close()
		if m, err := qmp.Dial(context.Background(), g.path("test.qmp")); err == nil {
			_ = m.Execute(context.Background(), "quit", nil, nil)
			<-m.Done()
		}
	})
	return g
}

func (g *powered) path(name string) string { return filepath.Join(g.dir, name) }

// define writes the definition, with or without the command that starts the machine.
func (g *powered) define(start bool) {
	g.t.Helper()
	text := "version: 1\nqmp: ../web.qmp\nagent: ../web.qga\n"
	if start {
		argv, err := json.Marshal(append([]string{"qemu-system-x86_64"}, g.args...))
		require.NoError(g.t, err)
		text += "start: " + string(argv) + "\nstart_dir: ..\n"
	}
	require.NoError(g.t, os.WriteFile(g.path("m/web.yaml"), []byte(text), 0o600))
}

// open makes the driver, anew when there was one: as a restarted host-provider does.
func (g *powered) open() {
	g.t.Helper()
	if g.driver != nil {
		g.driver.Close()
		g.pool.Close()
	}
	g.pool, g.logs = qmp.NewPool(), &bytes.Buffer{}
	inv, err := inventory.New(inventory.Options{Folder: g.path("m"), StateDir: g.path("seen"), Monitors: g.pool, Site: "lab", Host: "host-1"})
	require.NoError(g.t, err)
	g.driver, err = New(Config{StateDir: g.path("state"), ScratchDir: g.path("scratch"), SocketDir: g.path("s"), MinScratch: 1}, Deps{
		Inventory: inv, Pool: g.pool, Tracker: &fakeTracker{}, Log: testkit.Logger(g.t), Clock: g.clock,
	})
	require.NoError(g.t, err)
}

func (g *powered) clock() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now
}

func (g *powered) pass(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now = g.now.Add(d)
}

// run starts the machine as an operator would; kill is kill -9.
func (g *powered) run(more ...string) (kill func()) {
	g.t.Helper()
	_ = os.Remove(g.path("ready"))
	c := exec.Command("qemu-system-x86_64", append(slices.Clone(g.args), more...)...)
	c.Dir = g.dir
	var stderr bytes.Buffer
	c.Stderr = &stderr
	require.NoError(g.t, c.Start())
	gone := make(chan struct{})
	go func() {
		_ = c.Wait()
		close(gone)
	}()
	kill = sync.OnceFunc(func() {
		_ = c.Process.Kill()
		<-gone
	})
	g.t.Cleanup(kill)
	testkit.Eventually(g.t, 20*time.Second, func() error {
		select {
		case <-gone:
			g.t.Fatalf("QEMU ended: %s", stderr.String())
		default:
		}
		return g.driver.inv.Refresh(testkit.Context(g.t))
	})
	testkit.Eventually(g.t, 20*time.Second, func() error {
		require.NoError(g.t, g.driver.Refresh(testkit.Context(g.t)))
		_, err := g.driver.Machine(testkit.Context(g.t), "web")
		return err
	})
	return kill
}

// listening waits until the guest can hear the power button.
func (g *powered) listening() {
	g.t.Helper()
	testkit.Eventually(g.t, 30*time.Second, func() bool {
		b, _ := os.ReadFile(g.path("ready"))
		return bytes.HasSuffix(b, []byte("K"))
	}, "the guest does not listen")
}

func (g *powered) protect() {
	g.t.Helper()
	_, err := g.driver.Establish(testkit.Context(g.t), poweredVM, powerLine, 1)
	require.NoError(g.t, err)
}

func fenceOf(failover string) hostprovider.Fence {
	return hostprovider.Fence{VM: poweredVM, Lineage: powerLine, Epoch: 1, Failover: failover}
}

func (g *powered) requireReason(err error, reason typesv1.ErrorReason) {
	g.t.Helper()
	require.True(g.t, errcat.Is(err, reason), "%v", err)
}

// off stops until the machine is off; every call is short.
func (g *powered) off(failover string) {
	g.t.Helper()
	testkit.Eventually(g.t, 30*time.Second, func() error {
		state, err := g.driver.Stop(testkit.Context(g.t), fenceOf(failover))
		if err == nil && state != typesv1.PowerState_POWER_STATE_OFF {
			err = fmt.Errorf("machine is %s", state)
		}
		return err
	})
}

// briefly calls Stop with little time, so that it does not wait.
func (g *powered) briefly(failover string) (typesv1.PowerState, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	return g.driver.Stop(ctx, fenceOf(failover))
}

func (g *powered) status() string {
	g.t.Helper()
	m, err := g.pool.Get(testkit.Context(g.t), g.path("web.qmp"))
	require.NoError(g.t, err)
	var s struct{ Status string }
	require.NoError(g.t, m.Execute(testkit.Context(g.t), "query-status", nil, &s))
	return s.Status
}

// The life of a planned failover: fence, button, QEMU outlives its guest; cancelled: the guest goes on in the same QEMU.
// Planned again: released, QEMU is gone; cancelled: started anew by its command. The fence outlives the driver.
func TestPlannedFailoverOfAMachine(t *testing.T) {
	for _, more := range [][]string{nil, {"-no-reboot"}} {
		t.Run(strings.Join(more, " "), func(t *testing.T) {
			g := newPowered(t, true, more...)
			ctx := testkit.Context(t)
			g.run()
			g.protect()
			g.listening()
			g.requireReason(g.driver.Release(ctx, fenceOf(mine)), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
			m, err := g.pool.Get(ctx, g.path("web.qmp"))
			require.NoError(t, err)
			require.NoError(t, m.Execute(ctx, "block-dirty-bitmap-add", arguments{"node": "os", "name": "kept"}, nil))

			g.off(mine)
			require.Equal(t, "shutdown", g.status(), "QEMU outlives its guest")
			g.off(mine)
			_, err = g.briefly(others)
			g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED)
			_, err = g.driver.Stop(ctx, hostprovider.Fence{VM: poweredVM, Lineage: strings.Repeat("f", 32), Epoch: 1, Failover: mine})
			g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH)
			_, err = g.driver.Stop(ctx, hostprovider.Fence{VM: poweredVM, Lineage: powerLine, Epoch: 0, Failover: mine})
			g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)

			g.open()
			require.NoError(t, g.driver.Refresh(ctx))
			machine, err := g.driver.Machine(ctx, "web")
			require.NoError(t, err)
			require.Equal(t, mine, machine.Fence, "the fence outlives the driver")
			require.Equal(t, typesv1.PowerState_POWER_STATE_OFF, machine.PowerState)
			for _, f := range []string{others, ""} {
				_, err = g.driver.Start(ctx, fenceOf(f))
				g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED)
			}
			require.NoError(t, os.Remove(g.path("ready")))
			require.NoError(t, os.WriteFile(g.path("ready"), nil, 0o600))
			for range 2 {
				state, err := g.driver.Start(ctx, fenceOf(mine))
				require.NoError(t, err)
				require.Equal(t, typesv1.PowerState_POWER_STATE_RUNNING, state)
			}
			machine, err = g.driver.Machine(ctx, "web")
			require.NoError(t, err)
			require.Empty(t, machine.Fence)
			m, err = g.pool.Get(ctx, g.path("web.qmp"))
			require.NoError(t, err)
			s, err := observe(ctx, m)
			require.NoError(t, err)
			require.Contains(t, s.nodes["os"].bitmaps, "kept", "the same QEMU, with its bitmaps")
			again, err := tryReset(ctx, m) // firmware does that when it starts for the second time after an operating system
			require.NoError(t, err)
			require.True(t, again, "the guest may reset the machine, whatever it was started with")

			g.pass(pressAgain)
			testkit.Eventually(t, 30*time.Second, func() error { // a button that is pressed too early is lost
				g.pass(pressAgain)
				state, err := g.briefly(others)
				if err == nil && state != typesv1.PowerState_POWER_STATE_OFF {
					err = fmt.Errorf("machine is %s", state)
				}
				return err
			})
			for range 2 {
				require.NoError(t, g.driver.Release(ctx, fenceOf(others)))
			}
			_, err = os.Stat(g.path("web.qmp"))
			require.ErrorIs(t, err, os.ErrNotExist, "QEMU is gone")
			g.off(others)

			_ = os.Remove(g.path("ready"))
			for range 2 {
				state, err := g.driver.Start(ctx, fenceOf(others))
				require.NoError(t, err)
				require.Equal(t, typesv1.PowerState_POWER_STATE_RUNNING, state)
			}
			g.listening()
		})
	}
}

// The last point is cut after the guest powered down, from the QEMU that outlived it; the record knows that the bitmaps went
// with the release, so that nothing is guessed after a cancel.
func TestLastPoint(t *testing.T) {
	g := newPowered(t, true)
	ctx := testkit.Context(t)
	g.run()
	g.protect()
	g.listening()
	pass := hostprovider.Pass{VM: poweredVM, Lineage: powerLine, Pass: 1, Epoch: 1, Scope: full}
	_, err := g.driver.BeginPass(ctx, pass)
	require.NoError(t, err)
	settle := hostprovider.Settle{VM: poweredVM, Lineage: powerLine, Point: 1, Epoch: 1, Outcome: commit}
	_, err = g.driver.SettlePass(ctx, settle)
	require.NoError(t, err)
	g.off(mine)
	cut, err := g.driver.Cut(ctx, hostprovider.Cut{VM: poweredVM, Lineage: powerLine, Point: 2, Epoch: 1, Consistency: crash})
	require.NoError(t, err)
	require.EqualValues(t, 1, cut.Point.Base)
	require.Equal(t, "shutdown", g.status(), "a cut does not wake the guest")
	g.requireReason(g.driver.Release(ctx, fenceOf(mine)), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	settle.Point = 2
	_, err = g.driver.Settle(ctx, settle)
	require.NoError(t, err)
	require.Equal(t, "shutdown", g.status())
	require.NoError(t, g.driver.Release(ctx, fenceOf(mine)))
	status, err := g.driver.Points(ctx, poweredVM)
	require.NoError(t, err)
	require.EqualValues(t, 2, status.Base)
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, status.ResyncReason)
	state, err := g.driver.Start(ctx, fenceOf(mine))
	require.NoError(t, err)
	require.Equal(t, typesv1.PowerState_POWER_STATE_RUNNING, state)
	_, err = g.driver.Cut(ctx, hostprovider.Cut{VM: poweredVM, Lineage: powerLine, Point: 3, Epoch: 1, Consistency: crash})
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
}

// A guest that ignores the button is asked by its agent; a machine that still runs cannot be released.
func TestButtonIgnored(t *testing.T) {
	g := newPowered(t, false)
	g.run()
	g.protect()
	asked := g.agent(map[string]func() any{"guest-shutdown": func() any {
		m, err := qmp.Dial(context.Background(), g.path("test.qmp"))
		if err == nil {
			_, err = m.HMP(context.Background(), "o/w 0x604 0x2000") // what ACPI does at last
			_ = m.Close()
		}
		if err != nil {
			t.Error(err)
		}
		return nil
	}})
	testkit.Eventually(t, 20*time.Second, func() error { // the firmware has set the registers up
		state, err := g.briefly(mine)
		require.NoError(t, err)
		require.Equal(t, typesv1.PowerState_POWER_STATE_RUNNING, state)
		require.Empty(t, asked(), "not before the button was given its time")
		m, err := g.pool.Get(testkit.Context(t), g.path("web.qmp"))
		require.NoError(t, err)
		text, err := m.HMP(testkit.Context(t), "i/w 0x604")
		if err == nil && !strings.Contains(text, "= 0x") {
			err = fmt.Errorf("%s", text)
		}
		return err
	})
	g.requireReason(g.driver.Release(testkit.Context(t), fenceOf(mine)), typesv1.ErrorReason_ERROR_REASON_INVALID_STATE)
	testkit.Eventually(t, 30*time.Second, func() error {
		g.pass(pressAgain)
		state, err := g.briefly(mine)
		if err == nil && state != typesv1.PowerState_POWER_STATE_OFF {
			err = fmt.Errorf("machine is %s", state)
		}
		return err
	})
	require.Contains(t, asked(), "guest-shutdown")
	require.Equal(t, "shutdown", g.status())
}

// Off is said when it is sure, and only then; the fence is durable before anything is asked.
func TestGone(t *testing.T) {
	g := newPowered(t, false)
	ctx := testkit.Context(t)
	g.define(false)
	kill := g.run("-S")
	g.protect()

	other := g.path("hidden.qmp")
	require.NoError(t, os.Rename(g.path("web.qmp"), other))
	g.pool.Forget(g.path("web.qmp"))
	_, err := g.briefly(mine)
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	require.ErrorContains(t, err, "open for writing")
	r, err := loadRecord(g.path("state"), poweredVM)
	require.NoError(t, err)
	require.Equal(t, mine, r.Fence)

	require.NoError(t, os.Rename(other, g.path("web.qmp")))
	thief, err := qmp.Dial(ctx, g.path("web.qmp"))
	require.NoError(t, err)
	testkit.Eventually(t, 10*time.Second, func() bool {
		g.pool.Forget(g.path("web.qmp"))
		_, err = g.driver.Stop(ctx, fenceOf(mine))
		require.Error(t, err)
		return errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	}, "a monitor that serves somebody else says nothing of its guest")
	require.ErrorIs(t, err, qmp.ErrInUse)
	require.NoError(t, thief.Close())

	kill()
	g.pool.Forget(g.path("web.qmp"))
	g.off(mine)
	require.NoError(t, os.Remove(g.path("web.qmp")))
	g.pool.Forget(g.path("web.qmp"))
	g.off(mine)
	require.NoError(t, g.driver.Release(ctx, fenceOf(mine)))

	// Somebody starts it anyway: it is seen, and shown.
	g.run()
	testkit.Eventually(t, 10*time.Second, func() bool {
		require.NoError(t, g.driver.Refresh(ctx))
		m, err := g.driver.Machine(ctx, poweredVM)
		require.NoError(t, err)
		require.Equal(t, mine, m.Fence)
		return m.PowerState == typesv1.PowerState_POWER_STATE_RUNNING
	})
	require.True(t, g.driver.power.told[poweredVM])
	findings, _, err := g.driver.Check(ctx, "web")
	require.NoError(t, err)
	require.True(t, slices.ContainsFunc(findings, func(f *hostproviderv1.Finding) bool {
		return f.Check == checkFence && f.Reason == typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED
	}), "%v", findings)
}

// Without a command nobody is started; with a wrong one its words are in the error.
func TestStartWithoutCommand(t *testing.T) {
	g := newPowered(t, false)
	ctx := testkit.Context(t)
	g.define(false)
	kill := g.run("-S")
	g.protect()
	g.off(mine) // it never ran
	require.Equal(t, "prelaunch", g.status())
	kill()
	g.pool.Forget(g.path("web.qmp"))
	state, err := g.driver.Start(ctx, fenceOf(mine))
	require.NoError(t, err)
	require.Equal(t, typesv1.PowerState_POWER_STATE_OFF, state)
	require.NoError(t, os.WriteFile(g.path("m/web.yaml"), []byte("version: 1\nqmp: ../web.qmp\nstart: [qemu-system-x86_64, -nonsense]\n"), 0o600))
	require.NoError(t, g.driver.Refresh(ctx))
	_, err = g.driver.Start(ctx, fenceOf(""))
	g.requireReason(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE)
	require.ErrorContains(t, err, "nonsense")
}

// agent is a guest agent that answers as scripted, and otherwise as one that can do everything. It returns what it was asked.
func (g *powered) agent(script map[string]func() any) (asked func() []string) {
	g.t.Helper()
	l, err := net.Listen("unix", g.path("web.qga"))
	require.NoError(g.t, err)
	var mu sync.Mutex
	var commands []string
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			for {
				line, err := r.ReadBytes('\n')
				if err != nil {
					break
				}
				var q struct {
					Execute   string         `json:"execute"`
					Arguments map[string]any `json:"arguments"`
				}
				_ = json.Unmarshal(bytes.TrimLeft(line, "\xff"), &q)
				var answer any
				switch s := script[q.Execute]; {
				case q.Execute == "guest-sync-delimited":
					b, _ := json.Marshal(map[string]any{"return": q.Arguments["id"]})
					_, _ = c.Write(append([]byte{0xff}, append(b, '\n')...))
					continue
				case s != nil:
					answer = s()
				case q.Execute == "guest-info":
					answer = agentCommands("guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status", "guest-shutdown")
				}
				mu.Lock()
				commands = append(commands, q.Execute)
				mu.Unlock()
				if answer == nil {
					continue // as at a shutdown: silence
				}
				b, _ := json.Marshal(map[string]any{"return": answer})
				_, _ = c.Write(append(b, '\n'))
			}
			_ = c.Close()
		}
	})
	g.t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(commands)
	}
}

func agentCommands(names ...string) any {
	var out []map[string]any
	for _, n := range names {
		out = append(out, map[string]any{"name": n, "enabled": true, "success-response": true})
	}
	return map[string]any{"version": "7.2.22", "supported_commands": out}
}
