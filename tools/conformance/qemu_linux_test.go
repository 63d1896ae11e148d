package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hostsuite"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// qemuProgram runs the machines; software emulation always.
const qemuProgram = "qemu-system-x86_64"

// virtual is a machine of a real QEMU without an operating system: its firmware finds nothing to boot from, and the
// test writes through the guest's devices in its place.
type virtual struct {
	*host
	dir, format string
	disks       []*typesv1.Disk

	mu      sync.Mutex
	kill    func()
	monitor *qmp.Monitor
	hangUp  func()
}

func newVirtual(format string) func(t *testing.T) hostsuite.Rig {
	return func(t *testing.T) hostsuite.Rig {
		r := &virtual{dir: shortDir(t), format: format}
		for _, disk := range []string{"os", "data"} {
			args := []string{"create", "-q", "-f", format, r.path(disk), fmt.Sprint(diskSize)}
			if format == "vpc" {
				args = append(args, "-o", "subformat=fixed,force_size=on") // else it rounds up to whole cylinders
			}
			r.image(args...)
		}
		machines := filepath.Join(r.dir, "m")
		require.NoError(t, os.MkdirAll(machines, 0o700))
		start, err := json.Marshal(append([]string{qemuProgram}, r.arguments()...))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(machines, "web-01.yaml"), []byte("version: 1\nid: "+machineID+"\nname: web-01\nqmp: "+r.socket("landfall")+"\nstart: "+string(start)+"\n"), 0o600))
		r.host = &host{t: t} // for run
		r.run()
		t.Cleanup(func() {
			r.hangUp()
			r.kill()
			r.quit()
		})
		r.host = startHost(t, settings{Dir: r.dir, Driver: "qemu", Images: machines, NBD: "unix:" + filepath.Join(r.dir, "s", "nbd")})
		r.disks = r.machine().Machine.Disks
		return r
	}
}

func (r *virtual) path(disk string) string   { return filepath.Join(r.dir, disk+"."+r.format) }
func (r *virtual) socket(name string) string { return filepath.Join(r.dir, name+".qmp") }

func (r *virtual) image(args ...string) {
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		panic(fmt.Sprintf("qemu-img %v: %v: %s", args, err, out))
	}
}

func (r *virtual) arguments() []string {
	args := []string{
		"-name", "web-01", "-uuid", machineID, "-accel", "tcg,thread=multi", "-machine", "q35", "-m", "64", "-nodefaults", "-no-reboot", "-display", "none",
		"-qmp", "unix:" + r.socket("landfall") + ",server=on,wait=off", "-qmp", "unix:" + r.socket("test") + ",server=on,wait=off",
	}
	for _, disk := range []string{"os", "data"} {
		args = append(args,
			"-blockdev", "driver="+r.format+",node-name="+disk+",discard=unmap,file.driver=file,file.filename="+r.path(disk),
			"-device", "virtio-blk-pci,drive="+disk+",id=dev-"+disk)
	}
	return args
}

// run starts QEMU and waits for the test's own monitor.
func (r *virtual) run() {
	t := r.t
	t.Helper()
	log, err := os.OpenFile(filepath.Join(r.dir, "qemu.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	defer log.Close()
	cmd := exec.Command(qemuProgram, r.arguments()...)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	r.kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	testkit.Eventually(t, 30*time.Second, func() error {
		select {
		case <-done:
			b, _ := os.ReadFile(filepath.Join(r.dir, "qemu.log"))
			t.Fatalf("QEMU ended: %s", b)
		default:
		}
		ctx, cancel := context.WithTimeout(testkit.Context(t), 5*time.Second)
		defer cancel()
		var err error
		r.monitor, err = qmp.Dial(ctx, r.socket("test"))
		return err
	})
	// The guest's part of a power button: nothing but firmware runs, so the test does what ACPI would.
	events := r.monitor.Subscribe(64)
	var wg sync.WaitGroup
	monitor := r.monitor
	wg.Go(func() {
		for e := range events.Events() {
			if e.Name == "POWERDOWN" {
				powerDown(monitor)
			}
		}
	})
	r.hangUp = sync.OnceFunc(func() {
		events.Close()
		_ = monitor.Close()
		wg.Wait()
	})
}

// quit ends the QEMU that the driver started in the place of ours.
func (r *virtual) quit() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	m, err := qmp.Dial(ctx, r.socket("test"))
	if err != nil {
		return // there is none
	}
	defer m.Close()
	_ = m.Execute(ctx, "quit", nil, nil)
	<-m.Done()
}

// powerDown does what ACPI in a guest does at the power button, as soon as the firmware has set the registers up.
func powerDown(m *qmp.Monitor) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_ = testkit.Poll(ctx, func(ctx context.Context) (bool, error) {
		if _, err := m.HMP(ctx, "o/w 0x604 0x2000"); err != nil { // PM1a control: sleep type 5, sleep enable
			return false, err
		}
		var status struct{ Running bool }
		err := m.Execute(ctx, "query-status", nil, &status)
		return !status.Running, err
	})
}

func (r *virtual) VM() string             { return machineID }
func (r *virtual) Disks() []*typesv1.Disk { return r.disks }

func (r *virtual) Restart() {
	r.host.close()
	r.host.kill()
	r.host.start()
	r.machine()
}

// KillHypervisor implements hostsuite.Losing.
func (r *virtual) KillHypervisor() {
	r.hangUp()
	r.kill()
	r.run()
}

func (r *virtual) Lost() typesv1.ResyncReason { return typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST }

// io has a device's request done as its guest would, if there is a guest that runs.
func (r *virtual) io(disk, command string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(testkit.Context(r.t), 30*time.Second)
	defer cancel()
	var status struct{ Status string }
	if err := r.monitor.Execute(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if status.Status != "running" && status.Status != "paused" { // paused for a moment by a cut: a guest would wait
		return errors.New("the guest is off: " + status.Status)
	}
	out, err := r.monitor.HMP(ctx, `qemu-io -d /machine/peripheral/dev-`+disk+`/virtio-backend "`+command+`"`)
	if out = strings.TrimSpace(out); err == nil && out != "" { // what went well is printed elsewhere
		err = errors.New(out)
	}
	return err
}

func (r *virtual) Write(disk string, off int64, p []byte) error {
	file := filepath.Join(r.dir, "write-"+disk)
	if err := os.WriteFile(file, p, 0o600); err != nil {
		return err
	}
	return r.io(disk, fmt.Sprintf("write -s %s %d %d", file, off, len(p)))
}

func (r *virtual) Zero(disk string, off, n int64) error {
	return r.io(disk, fmt.Sprintf("write -z -u %d %d", off, n))
}

func TestQEMU(t *testing.T) {
	if _, err := exec.LookPath(qemuProgram); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("CI must have " + qemuProgram + " (Debian: qemu-system-x86)")
		}
		t.Skip("needs " + qemuProgram + " (Debian: qemu-system-x86)")
	}
	for _, format := range []string{"vhdx", "qcow2", "vpc", "raw"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel() // most of the time goes by waiting
			hostsuite.Run(t, newVirtual(format))
		})
	}
}
