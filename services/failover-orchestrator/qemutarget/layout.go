package qemutarget

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// Names in the folder, beside those of target vhd. All are in the marker.
const (
	// ConsoleFile has what the guest wrote to its first serial port since the machine was last started.
	ConsoleFile = "console.log"
	// ScreenshotFile is what the machine's screen showed when it had proved itself, or when the wait for that ended.
	ScreenshotFile = "screenshot.png"
	// ScreenshotPPMFile is the same from a QEMU that cannot write PNG.
	ScreenshotPPMFile = "screenshot.ppm"
	// MonitorSocket is QEMU's monitor (QMP). It serves one client at a time; this package holds it for moments only.
	MonitorSocket = "qmp.sock"
	// AgentSocket is the guest agent's channel. It serves one client at a time; Boot lets go of it.
	AgentSocket   = "qga.sock"
	variablesFile = "uefi-vars.fd"
	stateFile     = "qemu.json"
	logFile       = "qemu.log"
	pidFile       = "qemu.pid"
	lockFile      = "qemu.lock"
)

// OverlayFile is the name of a disk's overlay: what the machine wrote.
func OverlayFile(disk string) string { return disk + ".qcow2" }

// files are the names in the marker, in the order in which people want to read them.
func files(m *typesv1.Machine) []string {
	names := append(vhdtarget.Files(m), ConsoleFile, ScreenshotFile, ScreenshotPPMFile)
	for _, d := range m.GetDisks() {
		names = append(names, OverlayFile(d.GetId()))
	}
	return append(names, variablesFile, stateFile, logFile, pidFile, lockFile, MonitorSocket, AgentSocket)
}

const (
	mebibyte      = 1 << 20
	defaultMemory = 1 << 30
	maxDisks      = 24 // with the other devices all slots of the root bus
	maxNICs       = 4
	ideDisks      = 4
)

// layout is a machine as QEMU is told to make it.
type layout struct {
	boot    failoverv1.BootMode // never unspecified
	memory  int64               // MiB
	cpus    int32
	disks   []*typesv1.Disk // the one to boot from first where the order decides it
	osDisk  string
	nics    []string // MAC addresses, "" lets QEMU choose
	network failoverv1.TargetNetwork
	// pattern is what the console must show; nil waits for the guest agent, unless noWait.
	pattern *regexp.Regexp
	noWait  bool
	timeout time.Duration
}

// bootMode is how a machine boots: as it is asked for, else as its firmware and generation say.
func bootMode(m *typesv1.Machine, asked failoverv1.BootMode) failoverv1.BootMode {
	switch {
	case asked != failoverv1.BootMode_BOOT_MODE_UNSPECIFIED:
		return asked
	case m.GetFirmware() == typesv1.Firmware_FIRMWARE_UEFI:
		return failoverv1.BootMode_BOOT_MODE_UEFI
	case m.GetGeneration() == 1:
		return failoverv1.BootMode_BOOT_MODE_GENERATION_1
	case m.GetGeneration() == 2 && m.GetFirmware() == typesv1.Firmware_FIRMWARE_UNSPECIFIED:
		return failoverv1.BootMode_BOOT_MODE_UEFI
	}
	return failoverv1.BootMode_BOOT_MODE_BIOS
}

// layoutOf decides everything about the machine that the settings leave open.
func layoutOf(m *typesv1.Machine, q *failoverv1.QemuTarget) (layout, error) {
	l := layout{
		boot: bootMode(m, q.GetBoot()), memory: defaultMemory / mebibyte, cpus: 1, network: q.GetNetwork(),
		noWait: q.GetNoWait(), timeout: 300 * time.Second,
	}
	if _, known := failoverv1.BootMode_name[int32(l.boot)]; !known {
		return l, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "boot mode %d is not known", l.boot)
	}
	if _, known := failoverv1.TargetNetwork_name[int32(l.network)]; !known {
		return l, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "network %d is not known", l.network)
	}
	for _, memory := range []int64{m.GetMemoryBytes(), q.GetMemoryBytes()} { // the last that says something
		if memory > 0 {
			l.memory = max(memory/mebibyte, 1)
		}
	}
	for _, cpus := range []int32{m.GetCpus(), q.GetCpus()} {
		if cpus > 0 {
			l.cpus = cpus
		}
	}
	if s := q.GetBootTimeoutSeconds(); s > 0 {
		l.timeout = time.Duration(s) * time.Second
	}
	if p := q.GetConsolePattern(); p != "" {
		var err error
		if l.pattern, err = regexp.Compile(p); err != nil {
			return l, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "console pattern %q: %v", p, err)
		}
	}
	if n := len(m.GetDisks()); n > maxDisks {
		return l, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNSUPPORTED, "the machine has %d disks, target qemu takes at most %d", n, maxDisks)
	}
	l.disks = slices.Clone(m.GetDisks())
	system := max(slices.IndexFunc(l.disks, (*typesv1.Disk).GetOsDisk), 0)
	if len(l.disks) > 0 {
		l.osDisk = l.disks[system].GetId()
	}
	if l.boot == failoverv1.BootMode_BOOT_MODE_GENERATION_1 && system > 0 { // IDE 0:0, as Hyper-V has it
		d := l.disks[system]
		l.disks = slices.Insert(slices.Delete(l.disks, system, system+1), 0, d)
	}
	for _, a := range m.GetNetworkAdapters() {
		mac := a.GetMacAddress()
		if _, err := net.ParseMAC(mac); err != nil {
			mac = ""
		}
		if len(l.nics) < maxNICs {
			l.nics = append(l.nics, mac)
		}
	}
	if l.network == failoverv1.TargetNetwork_TARGET_NETWORK_USER && len(l.nics) == 0 {
		l.nics = []string{""}
	}
	return l, nil
}

// identity is the UUID of the machine of a failover in a folder: the same in every process.
func identity(p target.Plan) string {
	return uuid.NewHash(sha256.New(), uuid.NameSpaceURL, []byte("landfall:failovers/"+p.Failover+"\x00"+p.Dir), 8).String()
}

// machineName is what the machine is called.
func machineName(p target.Plan) string { return "landfall-" + p.Failover }

// arguments is QEMU's command line. Files are absolute, because a daemon leaves its folder; sockets are relative,
// because their addresses may have 107 bytes only.
func (l layout) arguments(c Config, p target.Plan, fw firmware) []string {
	in := func(name string) string { return filepath.Join(p.Dir, name) }
	generation1 := l.boot == failoverv1.BootMode_BOOT_MODE_GENERATION_1
	machine, nic := "q35", "virtio-net-pci"
	if generation1 {
		machine, nic = "pc", "e1000"
	}
	args := []string{
		"-name", escape(machineName(p)), "-uuid", identity(p), "-no-user-config", "-nodefaults",
		"-accel", c.Accelerator, "-cpu", c.CPU, "-m", strconv.FormatInt(l.memory, 10) + "M", "-smp", strconv.Itoa(int(l.cpus)),
		"-rtc", "base=utc", "-boot", "strict=on", "-display", "none", "-device", "VGA",
		"-daemonize", "-pidfile", in(pidFile),
		"-chardev", "socket,id=monitor,path=" + MonitorSocket + ",server=on,wait=off", "-mon", "chardev=monitor,mode=control",
		"-chardev", "file,id=console,path=" + escape(in(ConsoleFile)), "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path=" + AgentSocket + ",server=on,wait=off", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
	}
	if l.boot == failoverv1.BootMode_BOOT_MODE_UEFI {
		machine += ",pflash0=code,pflash1=variables"
		args = append(args,
			"-blockdev", block(map[string]any{"driver": "raw", "node-name": "code", "read-only": true, "file": file(fw.code)}),
			"-blockdev", block(map[string]any{"driver": "raw", "node-name": "variables", "file": file(in(variablesFile))}))
	}
	args = append(args, "-machine", machine)
	for i, d := range l.disks {
		base, node := fmt.Sprintf("vhd%d", i), fmt.Sprintf("disk%d", i)
		args = append(args,
			"-blockdev", block(map[string]any{"driver": "vpc", "node-name": base, "read-only": true, "file": file(in(vhdtarget.DiskFile(d.GetId())))}),
			"-blockdev", block(map[string]any{"driver": "qcow2", "node-name": node, "discard": "unmap", "backing": base, "file": file(in(OverlayFile(d.GetId())))}))
		device := fmt.Sprintf("virtio-blk-pci,drive=%s,id=dev-%s,serial=%.20s", node, node, d.GetId())
		if generation1 && i < ideDisks {
			device = fmt.Sprintf("ide-hd,drive=%s,id=dev-%s,bus=ide.%d,unit=%d,serial=%.20s", node, node, i/2, i%2, d.GetId())
		}
		args = append(args, "-device", device+fmt.Sprintf(",bootindex=%d", l.bootIndex(i)))
	}
	for i, mac := range l.nics {
		backend := fmt.Sprintf("hubport,id=net%d,hubid=%d", i, i)
		if i == 0 && l.network == failoverv1.TargetNetwork_TARGET_NETWORK_USER {
			backend = "user,id=net0"
		}
		device := fmt.Sprintf("%s,netdev=net%d,romfile=", nic, i)
		if mac != "" {
			device += ",mac=" + mac
		}
		args = append(args, "-netdev", backend, "-device", device)
	}
	return args
}

// bootIndex is the order in which firmware tries the disks: the machine's OS disk, then the others as they come.
func (l layout) bootIndex(i int) int {
	if l.disks[i].GetId() == l.osDisk {
		return 1
	}
	return i + 2
}

// escape makes a value safe inside an option list, where a comma ends a value.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }

func file(path string) map[string]any { return map[string]any{"driver": "file", "filename": path} }

func block(node map[string]any) string {
	raw, err := json.Marshal(node)
	if err != nil { // strings and booleans only
		panic(err)
	}
	return string(raw)
}
