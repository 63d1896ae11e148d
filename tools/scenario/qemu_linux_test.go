package scenario

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/tools/allinone"
)

// generated is a node's name that QEMU made up.
var generated = regexp.MustCompile(`#block\d+`)

// qemuLab is a lab whose machines are QEMU processes. Sockets have short paths, so their folder is not the test's.
func qemuLab(t *testing.T) *lab {
	t.Helper()
	installed(t, "qemu-system-x86_64")
	l := newLab(t)
	short, err := os.MkdirTemp("", "lf")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(short)) })
	l.qemu = allinone.QEMU{Machines: filepath.Join(short, "m"), Scratch: filepath.Join(l.root, "scratch"), Sockets: filepath.Join(short, "s")}
	require.NoError(t, os.Mkdir(l.qemu.Machines, 0o750))
	return l
}

// start runs a QEMU whose guest never begins, with its monitor at NAME.qmp, until the test ends.
func (l *lab) start(name string, n int, args ...string) {
	l.t.Helper()
	image := filepath.Join(l.root, name+".raw")
	raw(l.t, image, 8*mib, mib)
	monitor := filepath.Join(l.qemu.Machines, name+".qmp")
	full := []string{
		"-S", "-machine", "q35", "-accel", "tcg,thread=multi", "-display", "none", "-nodefaults", "-m", "64", "-name", name, "-uuid", id(n),
		"-qmp", "unix:" + monitor + ",server=on,wait=off",
	}
	for _, a := range args {
		full = append(full, strings.ReplaceAll(a, "IMAGE", image))
	}
	cmd := exec.CommandContext(testkit.Context(l.t), "qemu-system-x86_64", full...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it does not outlive a test that is killed
	cmd.WaitDelay = 10 * time.Second
	require.NoError(l.t, cmd.Start())
	l.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if l.t.Failed() {
			l.t.Logf("%s: %s", name, log.String())
		}
	})
	testkit.Eventually(l.t, patience, func() bool { _, err := os.Stat(monitor); return err == nil }, monitor)
}

// define writes NAME.yaml.
func (l *lab) define(name, text string) {
	l.t.Helper()
	require.NoError(l.t, os.WriteFile(filepath.Join(l.qemu.Machines, name), []byte(text), 0o600))
}

// dead leaves a socket that nobody listens at.
func (l *lab) dead(name string) {
	l.t.Helper()
	s, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(l.qemu.Machines, name), Net: "unix"})
	require.NoError(l.t, err)
	s.SetUnlinkOnClose(false)
	require.NoError(l.t, s.Close())
}

// What cannot be protected in a folder of QEMU machines: definitions, sockets, disks. Real QEMU, no guest.
func TestBadQEMUMachines(t *testing.T) {
	l := qemuLab(t)
	good := []string{"-blockdev", "driver=raw,node-name=os,file.driver=file,file.filename=IMAGE", "-device", "virtio-blk-pci,drive=os,id=dev-os"}
	l.start("good", 1, good...)
	l.start("nameless", 2, "-drive", "if=virtio,format=raw,file=IMAGE")
	l.start("busy", 3, good...)
	taken, err := net.Dial("unix", filepath.Join(l.qemu.Machines, "busy.qmp"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = taken.Close() })
	greeting := make([]byte, 1)
	_, err = taken.Read(greeting) // the monitor serves this client now
	require.NoError(t, err)
	l.start("diskless", 4)
	l.start("shared", 5, "-blockdev", "driver=raw,node-name=os,file.driver=file,file.filename=IMAGE", "-device", "virtio-blk-pci,drive=os,id=dev-os,share-rw=on")
	l.start("listed", 6, good...)
	l.define("listed.yaml", "version: 1\ndisks:\n  - {id: os, node: os}\n  - {id: data, node: data}\n")
	l.start("other-id", 7, good...)
	l.define("other-id.yaml", fmt.Sprintf("version: 1\nid: %s\n", id(77)))
	l.dead("dead.qmp")
	l.define("absent.yaml", fmt.Sprintf("version: 1\nid: %s\nname: absent\n", id(8)))
	l.define("unknown-key.yaml", "version: 1\nqpm: /run/x.qmp\ndisks:\n  - {id: os, nod: os}\n")
	l.define("no-version.yaml", "name: no-version\n")
	l.define("empty.yaml", "")
	l.define("ending.yml", "version: 1\n")
	l.define("long.yaml", fmt.Sprintf("version: 1\nid: %s\nqmp: /run/%s/x.qmp\n", id(9), strings.Repeat("deep/", 25)))
	for _, name := range []string{"twin-a", "twin-b"} {
		l.define(name+".yaml", fmt.Sprintf("version: 1\nid: %s\nname: %s\n", id(10), name))
	}
	for _, name := range []string{"share-a", "share-b"} {
		l.define(name+".yaml", "version: 1\nname: "+name+"\nqmp: one.qmp\n")
	}
	l.up()
	l.policy("good", "30s")
	testkit.Eventually(t, patience, func() bool { return strings.Contains(l.ok("vms").out, "good") }, "the folder was looked at")

	text := l.transcript(l.ok("vms"))
	for _, vm := range []string{
		"nameless", "busy", "diskless", "shared", "listed", "other-id", "dead", "absent", "unknown-key", "no-version", "empty", "ending", "long", "twin-a", "twin-b", "share-a", "nobody",
	} {
		text += l.refused("", "protect", vm, "--policy", "good")
	}
	text += l.transcript(l.ok("protect", "good", "--policy", "good", "--check"))
	golden(t, "bad-qemu-machines.golden", generated.ReplaceAllString(strings.ReplaceAll(text, filepath.Dir(l.qemu.Machines), "<short>"), "#block<n>"))
}
