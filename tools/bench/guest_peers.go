package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/tools/guest/guestvm"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

type object = map[string]any

// pushBackup is QEMU's own incremental backup: it writes the changes itself.
type pushBackup struct {
	g      *labGuest
	folder string
	n      int
}

func (b *pushBackup) disks() []string { return []string{guestvm.OSNode, guestvm.DataNode} }

func (b *pushBackup) base(node string) string { return filepath.Join(b.folder, node+".base") }

func (b *pushBackup) increment(node string) string {
	return filepath.Join(b.folder, fmt.Sprintf("%s.%d", node, b.n))
}

// full copies the disks as a whole and begins to track.
func (b *pushBackup) full(ctx context.Context) error {
	var actions []object
	for _, node := range b.disks() {
		actions = append(actions, object{"type": "block-dirty-bitmap-add", "data": object{"node": node, "name": "bench"}})
	}
	_, err := b.backup(ctx, actions, "full", "raw", b.base)
	return err
}

// backup runs a job for each disk, all from one instant, and waits for their end.
func (b *pushBackup) backup(ctx context.Context, actions []object, sync, format string, file func(string) string) (u usage, err error) {
	begin, guest := time.Now(), b.g.cpu()
	for _, node := range b.disks() {
		create := []string{"create", "-q", "-f", format}
		size := strconv.Itoa(256 * mib)
		if sync == "incremental" {
			create = append(create, "-b", b.base(node), "-F", "raw")
		}
		made, err := run(ctx, "qemu-img", append(create, file(node), size)...)
		if err != nil {
			return u, err
		}
		u = u.plus(made)
		target := object{"driver": format, "node-name": "to-" + node, "file": object{"driver": "file", "filename": file(node)}}
		if format == "qcow2" {
			target["backing"] = nil
		}
		if err := b.g.vm.QMP(ctx, "blockdev-add", target, nil); err != nil {
			return u, err
		}
		data := object{"job-id": "bench-" + node, "device": node, "target": "to-" + node, "sync": sync}
		if sync == "incremental" {
			data["bitmap"] = "bench"
		}
		actions = append(actions, object{"type": "blockdev-backup", "data": data})
	}
	if err := b.g.vm.QMP(ctx, "transaction", object{"actions": actions}, nil); err != nil {
		return u, err
	}
	seen := len(b.g.vm.Events())
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for {
		var jobs []object
		if err := b.g.vm.QMP(ctx, "query-block-jobs", nil, &jobs); err != nil {
			return u, err
		}
		if len(jobs) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return u, ctx.Err()
		case <-t.C:
		}
	}
	for _, e := range b.g.vm.Events()[seen:] {
		if e.Name == "BLOCK_JOB_COMPLETED" && strings.Contains(string(e.Data), `"error"`) {
			return u, fmt.Errorf("backup job: %s", e.Data)
		}
	}
	for _, node := range b.disks() {
		if err := b.g.vm.QMP(ctx, "blockdev-del", object{"node-name": "to-" + node}, nil); err != nil {
			return u, err
		}
		if _, err := syncFile(file(node)); err != nil {
			return u, err
		}
	}
	u.wall = time.Since(begin)
	u.cpu += b.g.cpu() - guest
	return u, nil
}

// next takes an increment and says what it took and how large it is; then, outside that, puts it into the full copy.
func (b *pushBackup) next(ctx context.Context) (u usage, size int64, err error) {
	b.n++
	if u, err = b.backup(ctx, nil, "incremental", "qcow2", b.increment); err != nil {
		return u, 0, err
	}
	for _, node := range b.disks() {
		info, err := os.Stat(b.increment(node))
		if err != nil {
			return u, 0, err
		}
		size += allocated(info)
		if _, err := run(ctx, "qemu-img", "commit", "-q", b.increment(node)); err != nil {
			return u, 0, err
		}
	}
	return u, size, nil
}

func pushDelta(ctx context.Context, o *Options, folder string) (s sample, err error) {
	g, err := startGuest(ctx, o, folder, image.QCOW2)
	if err != nil {
		return s, err
	}
	defer g.end()
	b := &pushBackup{g: g, folder: folder}
	if err := g.quiet(ctx); err != nil {
		return s, err
	}
	if err := b.full(ctx); err != nil {
		return s, err
	}
	if s, err = peerDelta(ctx, g, b.next); err != nil {
		return s, err
	}
	if err := g.vm.QMP(ctx, "stop", nil, nil); err != nil {
		return s, err
	}
	if _, _, err := b.next(ctx); err != nil {
		return s, err
	}
	return s, errors.Join(sameAsSource(ctx, g, g.config.OS.Path, b.base(guestvm.OSNode), image.Raw), sameAsSource(ctx, g, g.config.Data.Path, b.base(guestvm.DataNode), image.Raw))
}

// peerDelta has a peer take the increments of a run.
func peerDelta(ctx context.Context, g *labGuest, next func(context.Context) (usage, int64, error)) (s sample, err error) {
	var rounds []sample
	for range deltaRounds {
		before, err := g.devicesWrote(ctx)
		if err == nil {
			_, err = g.vm.WriteLoad(ctx, deltaSize, deltaDisk)
		}
		if err != nil {
			return s, err
		}
		after, err := g.devicesWrote(ctx)
		if err != nil {
			return s, err
		}
		u, size, err := next(ctx)
		if err != nil {
			return s, err
		}
		rounds = append(rounds, sample{usage: u, in: after - before, out: size, figures: []figure{
			{name: "whole command", unit: "s", value: u.wall.Seconds()},
			{name: "CPU, the source's QEMU included", unit: "s", value: u.cpu.Seconds()},
			{name: "stored / written by the program", unit: "x", value: float64(size) / deltaBytes},
		}})
	}
	return medians(rounds), nil
}

// virtnbdMissing says why virtnbdbackup cannot run here; empty when it can. It drives libvirt, which must answer: without
// systemd, `virtlogd -d; libvirtd -d`, with user and group root, no security driver, no cgroups and no namespaces in qemu.conf.
func virtnbdMissing() string {
	for _, tool := range []string{"virtnbdbackup", "virtnbdrestore", "virsh"} {
		if _, err := exec.LookPath(tool); err != nil {
			return tool + " is not on PATH (Debian packages virtnbdbackup, libvirt-clients)"
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "virsh", "-c", libvirt, "version").CombinedOutput(); err != nil {
		return "libvirt does not answer at " + libvirt + ": " + strings.TrimSpace(string(out))
	}
	return ""
}

const libvirt = "qemu:///system"

// domain is the lab guest as libvirt starts it, without the system's own agent: a cut without a freeze, as the other
// subjects make it.
const domain = `<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>%[1]s</name><uuid>%[2]s</uuid><memory unit='MiB'>512</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='%[3]s'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='%[4]s'/><target dev='vdb' bus='virtio'/></disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='vga'/></video>
    <serial type='file'><source path='%[5]s'/><target port='0'/></serial>
    <channel type='unix'><source mode='bind' path='%[6]s.lab-qga'/><target type='virtio' name='org.landfall.agent.0'/></channel>
    <channel type='unix'><source mode='bind' path='%[6]s.ack'/><target type='virtio' name='org.landfall.ack.0'/></channel>
  </devices>
  <qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:%[6]s.lab-qmp,server=on,wait=off'/></qemu:commandline>
</domain>
`

// virtnbd is the lab guest under libvirt.
type virtnbd struct {
	g *labGuest
	// qemu and daemon are process ids.
	qemu, daemon int
	backups      string
	size         int64
}

func virtnbdDelta(ctx context.Context, o *Options, folder string) (s sample, err error) {
	folder, err = filepath.Abs(folder)
	if err != nil {
		return s, err
	}
	sockets, err := os.MkdirTemp("", "lfb")
	if err != nil {
		return s, err
	}
	v := &virtnbd{backups: filepath.Join(folder, "backup")}
	v.g = &labGuest{sockets: sockets, config: guestvm.Config{Name: machine, Dir: folder, Sockets: sockets, Mode: guestvm.BIOS}}
	defer v.g.end()
	if v.g.config.OS, v.g.config.Data, err = guestvm.MakeDisks(ctx, guestImage(o), folder, image.QCOW2); err != nil {
		return s, err
	}
	definition := filepath.Join(folder, "domain.xml")
	text := fmt.Sprintf(domain, machine, machineID, v.g.config.OS.Path, v.g.config.Data.Path, v.g.config.ConsolePath(), filepath.Join(sockets, machine))
	if err := os.WriteFile(definition, []byte(text), 0o600); err != nil {
		return s, err
	}
	if _, err := run(ctx, "virsh", "-c", libvirt, "define", definition); err != nil {
		return s, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
		defer cancel()
		_, _ = run(ctx, "virsh", "-c", libvirt, "destroy", machine) // it may be off already
		_, gone := run(ctx, "virsh", "-c", libvirt, "undefine", "--checkpoints-metadata", machine)
		err = errors.Join(err, gone)
	}()
	if _, err := run(ctx, "virsh", "-c", libvirt, "start", machine); err != nil {
		return s, err
	}
	boot, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if v.g.vm, err = guestvm.Attach(boot, v.g.config); err != nil {
		return s, err
	}
	if err := v.g.vm.WaitReady(boot); err != nil {
		return s, err
	}
	if err := v.g.quiet(ctx); err != nil {
		return s, err
	}
	v.qemu, v.daemon = pidIn("/run/libvirt/qemu/"+machine+".pid"), pidIn("/run/libvirtd.pid")
	if _, _, err := v.backup(ctx, "full"); err != nil {
		return s, err
	}
	if s, err = peerDelta(ctx, v.g, func(ctx context.Context) (usage, int64, error) { return v.backup(ctx, "inc") }); err != nil {
		return s, err
	}
	if err := v.g.vm.QMP(ctx, "stop", nil, nil); err != nil {
		return s, err
	}
	restored := filepath.Join(folder, "restored")
	if _, err := run(ctx, "virtnbdrestore", "-n", "-i", v.backups, "-o", restored); err != nil {
		return s, err
	}
	return s, errors.Join(sameAsSource(ctx, v.g, v.g.config.OS.Path, filepath.Join(restored, filepath.Base(v.g.config.OS.Path)), image.QCOW2),
		sameAsSource(ctx, v.g, v.g.config.Data.Path, filepath.Join(restored, filepath.Base(v.g.config.Data.Path)), image.QCOW2))
}

// pidIn reads a file with a process id; 0 when there is none.
func pidIn(file string) int {
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(raw)))
	return pid
}

// backup runs the command as a user would.
func (v *virtnbd) backup(ctx context.Context, level string) (u usage, size int64, err error) {
	both := func() time.Duration {
		a, _, _ := cpuOf(v.qemu)
		b, _, _ := cpuOf(v.daemon)
		return a + b
	}
	before := both()
	if u, err = run(ctx, "virtnbdbackup", "-n", "-d", machine, "-l", level, "-o", v.backups); err != nil {
		return u, 0, err
	}
	u.cpu += both() - before
	took, all, err := syncFolder(v.backups)
	u.wall += took
	size, v.size = all-v.size, all
	return u, size, err
}
