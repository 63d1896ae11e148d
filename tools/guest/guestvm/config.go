package guestvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

// Mode is how a machine starts.
type Mode string

// The modes.
const (
	BIOS Mode = "bios" // q35, virtio-blk
	UEFI Mode = "uefi" // q35, virtio-blk, OVMF
	Gen1 Mode = "gen1" // i440FX, IDE, BIOS: what generation 1 of Hyper-V is
)

// Modes lists all modes.
var Modes = []Mode{BIOS, UEFI, Gen1}

// Names of the disks' nodes and devices in QEMU.
const (
	OSNode     = "os"
	DataNode   = "data"
	OSDevice   = "dev-os"
	DataDevice = "dev-data"
)

// Firmware of OVMF, and the state that each machine has a copy of.
const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// maxSocketPath: the kernel takes 107 bytes.
const maxSocketPath = 107

// Disk is a disk image.
type Disk struct {
	Path   string
	Format image.Format
}

// Config describes a machine.
type Config struct {
	// Name is in the names of all files of the machine.
	Name string
	// Dir is an existing folder for the console's text, QEMU's messages and the firmware's state.
	Dir string
	// Sockets is a folder for the sockets, with a short path. Empty: Start makes one and Close removes it.
	Sockets string
	Mode    Mode
	OS      Disk
	Data    Disk // no data disk when Path is empty
	// MemoryMiB and CPUs default to 512 and 1.
	MemoryMiB, CPUs int
	// NoLab leaves out the ports of the lab in the guest: what a recovery target knows nothing of.
	NoLab bool
	// Extra arguments for QEMU, at the end.
	Extra []string
}

// socket is the path of one of the machine's sockets.
func (c Config) socket(kind string) string { return filepath.Join(c.Sockets, c.Name+"."+kind) }

// QMPPath is the monitor of the system under test.
func (c Config) QMPPath() string { return c.socket("qmp") }

// AgentPath is the guest agent of the system under test.
func (c Config) AgentPath() string { return c.socket("qga") }

func (c Config) labQMPPath() string   { return c.socket("lab-qmp") }
func (c Config) labAgentPath() string { return c.socket("lab-qga") }
func (c Config) ackPath() string      { return c.socket("ack") }

// ConsolePath is the file with the text of the serial console.
func (c Config) ConsolePath() string { return filepath.Join(c.Dir, c.Name+".console") }

func (c Config) stderrPath() string { return filepath.Join(c.Dir, c.Name+".qemu") }
func (c Config) varsPath() string   { return filepath.Join(c.Dir, c.Name+".vars.fd") }

// validate tells all that is wrong.
func (c Config) validate() error {
	var errs []error
	if c.Name == "" || c.Dir == "" || c.Sockets == "" || c.OS.Path == "" {
		errs = append(errs, errors.New("name, folder, sockets' folder and OS disk are needed"))
	}
	if p := c.labQMPPath(); len(p) > maxSocketPath {
		errs = append(errs, fmt.Errorf("socket %s: a path of at most %d bytes", p, maxSocketPath))
	}
	switch c.Mode {
	case BIOS, UEFI, Gen1:
	default:
		errs = append(errs, fmt.Errorf("mode %q: bios, uefi or gen1", c.Mode))
	}
	return errors.Join(errs...)
}

// Args are QEMU's arguments for the machine, without the program's name: for
// tests in which the system under test starts QEMU itself. In mode UEFI the
// first call copies the firmware's state into Dir.
func (c Config) Args() ([]string, error) {
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("machine %s: %w", c.Name, err)
	}
	memory, cpus := c.MemoryMiB, c.CPUs
	if memory == 0 {
		memory = 512
	}
	if cpus == 0 {
		cpus = 1
	}
	machine, device := "q35", "virtio-blk-pci"
	if c.Mode == Gen1 {
		machine, device = "pc", "ide-hd"
	}
	args := []string{
		"-name", c.Name, "-accel", "tcg,thread=multi", "-machine", machine,
		"-m", strconv.Itoa(memory), "-smp", strconv.Itoa(cpus),
		"-nodefaults", "-no-reboot", "-display", "none", "-vga", "std",
		"-serial", "file:" + c.ConsolePath(),
		"-qmp", "unix:" + c.QMPPath() + ",server=on,wait=off",
		"-qmp", "unix:" + c.labQMPPath() + ",server=on,wait=off",
		"-device", "virtio-serial",
	}
	ports := []struct{ id, path, name string }{{"qga", c.AgentPath(), guest.AgentPort}}
	if !c.NoLab {
		ports = append(ports, []struct{ id, path, name string }{
			{"labqga", c.labAgentPath(), guest.LabAgentPort}, {"ack", c.ackPath(), guest.AckPort},
		}...)
	}
	for _, p := range ports {
		args = append(args, "-chardev", "socket,id="+p.id+",path="+p.path+",server=on,wait=off",
			"-device", "virtserialport,chardev="+p.id+",name="+p.name)
	}
	if c.Mode == UEFI {
		if err := copyOnce(ovmfVars, c.varsPath()); err != nil {
			return nil, fmt.Errorf("firmware of %s (Debian package ovmf): %w", c.Name, err)
		}
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file="+ovmfCode,
			"-drive", "if=pflash,format=raw,file="+c.varsPath())
	}
	for _, d := range []struct {
		disk         Disk
		node, device string
		boot         string
	}{{c.OS, OSNode, OSDevice, ",bootindex=1"}, {c.Data, DataNode, DataDevice, ""}} {
		if d.disk.Path == "" {
			continue
		}
		// The format is always named: a fixed VHD looks like a raw disk.
		args = append(args, "-blockdev",
			fmt.Sprintf("driver=%s,node-name=%s,discard=unmap,file.driver=file,file.filename=%s", d.disk.Format, d.node, d.disk.Path),
			"-device", fmt.Sprintf("%s,drive=%s,id=%s%s", device, d.node, d.device, d.boot))
	}
	return append(args, c.Extra...), nil
}

func copyOnce(from, to string) error {
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer out.Close()
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Sync()
}

// MakeDisks makes a machine's own disks from an image, in a folder: os.<format> and data.<format>.
func MakeDisks(ctx context.Context, img image.Image, dir string, format image.Format) (osDisk, data Disk, err error) {
	osDisk = Disk{filepath.Join(dir, "os."+string(format)), format}
	data = Disk{filepath.Join(dir, "data."+string(format)), format}
	if err := image.Convert(ctx, img.OS, osDisk.Path, format); err != nil {
		return osDisk, data, err
	}
	return osDisk, data, image.Convert(ctx, img.Data, data.Path, format)
}
