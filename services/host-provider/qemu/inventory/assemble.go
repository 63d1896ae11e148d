package inventory

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/landfall-dr/landfall/libs/errcat"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Limits of the recovery side: a fixed VHD holds at most 2040 GiB ([VHD] and Azure), of whole MiB.
const (
	maxDiskBytes = 2040 << 30
	mib          = 1 << 20
	sector       = 512
)

// Names of checks in findings.
const (
	checkDefinition = "vm-definition"
	checkID         = "machine-id"
	checkMonitor    = "monitor"
	checkDisk       = "disk"
	checkAlignment  = "disk-alignment"
	checkNetwork    = "network"
)

// assemble joins what the definition says and what QEMU says. With a finding of SEVERITY_ERROR the machine is only good for
// naming it. held is what was seen of the machine before; nil when it is new.
func assemble(def *Definition, live *Live, held *Machine, site, host string) (*Machine, []*hostproviderv1.Finding) {
	var out []*hostproviderv1.Finding
	label := cmp.Or(def.Name, def.label)
	m := &Machine{
		ID: cmp.Or(def.ID, live.UUID), Name: def.Name, QMPSocket: def.QMP, AgentSocket: def.Agent, ScratchDir: def.Scratch,
		Start: def.Start, StartDir: def.StartDir,
	}
	if m.Name == "" && soundName(live.Name) {
		m.Name = live.Name
	}
	m.Name = cmp.Or(m.Name, def.label)
	switch {
	case m.ID == "":
		out = append(out, failed(checkID, typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, label+": QEMU has no UUID and the definition gives no id",
			"start QEMU with -uuid, or write an id into "+def.label+definitionSuffix))
	case def.ID != "" && live.UUID != "" && def.ID != live.UUID:
		out = append(out, failed(checkID, typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
			fmt.Sprintf("%s: the definition's id is %s, but QEMU at %s says that it is %s", label, def.ID, def.QMP, live.UUID),
			"correct id or qmp in the definition, or QEMU's -uuid: another machine's disks must not be taken for this one's"))
	}
	disks, findings := pickDisks(def, live, held, m.Name)
	out = append(out, findings...)
	m.Disks = disks
	if hasErrors(out) {
		return m, out
	}
	m.Description = describe(def, live, m, site, host)
	if len(m.Description.NetworkAdapters) == 0 {
		out = append(out, warning(checkNetwork, m.Name+" has no network adapter", "nobody will reach the recovered machine; add one if that is not meant"))
	}
	return m, out
}

func describe(def *Definition, live *Live, m *Machine, site, host string) *typesv1.Machine {
	firmware, _ := def.firmware() // checked when it was read
	if firmware == typesv1.Firmware_FIRMWARE_UNSPECIFIED {
		firmware = typesv1.Firmware_FIRMWARE_BIOS
		if live.Flash {
			firmware = typesv1.Firmware_FIRMWARE_UEFI
		}
	}
	generation := def.Generation
	if generation == 0 {
		generation = 1
		if firmware == typesv1.Firmware_FIRMWARE_UEFI {
			generation = 2
		}
	}
	d := &typesv1.Machine{
		Name: "sites/" + site + "/vms/" + m.ID, Id: m.ID, DisplayName: m.Name, Generation: int32(generation), Cpus: int32(live.CPUs),
		MemoryBytes: live.MemoryBytes, NetworkAdapters: live.Adapters, Host: "sites/" + site + "/hosts/" + host, Firmware: firmware,
		PowerState: PowerState(live.Status),
	}
	for _, k := range m.Disks {
		d.Disks = append(d.Disks, &typesv1.Disk{Id: k.ID, SizeBytes: k.Size, Path: k.Path, Format: k.Format, OsDisk: k.OSDisk})
	}
	return d
}

// pickDisks finds the replicated disks: those that the definition lists, or all writable ones, in order.
func pickDisks(def *Definition, live *Live, held *Machine, name string) (disks []Disk, out []*hostproviderv1.Finding) {
	bad := func(reason typesv1.ErrorReason, action, format string, args ...any) {
		out = append(out, failed(checkDisk, reason, name+": "+fmt.Sprintf(format, args...), action))
	}
	lives := make([]LiveDisk, len(live.Disks))
	for i, l := range live.Disks {
		lives[i] = recall(l, held)
	}
	used := map[int]bool{}
	take := func(i int, id string) {
		used[i] = true
		l := lives[i]
		out = append(out, inspect(l, name)...)
		disks = append(disks, Disk{ID: id, Node: l.Node, Device: l.Device, Size: l.Size, Format: formats[l.Driver], Path: absolute(l.Path, live.Folder, def.StartDir)})
	}
	boot := ""
	for _, k := range def.Disks {
		i := find(lives, k)
		if i < 0 {
			bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, "correct the definition, or attach the disk to the machine", "disk %s: QEMU has no writable disk with %s", k.ID, described(k))
			continue
		}
		take(i, k.ID)
		if k.OS {
			boot = k.ID
		}
	}
	owner := map[string]string{}
	for i, l := range lives {
		switch id := identify(l.Node); {
		case used[i]:
		case len(def.Disks) > 0:
			out = append(out, warning(checkDisk, fmt.Sprintf("%s: disk %s (%s) is not in the definition and will not be replicated", name, cmp.Or(l.Node, l.Top), l.Path),
				"list it under disks in the definition if it is to be recovered"))
		case id == "" && !isGenerated(l.Node):
			bad(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, "list the disks, each with an id, in the definition", "node %q makes no disk id", cmp.Or(l.Node, l.Top))
		case owner[id] != "" && !isGenerated(l.Node):
			bad(typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE, "list the disks, each with an id, in the definition", "nodes %q and %q both make disk id %s", owner[id], l.Node, id)
		default:
			owner[id] = l.Node
			take(i, id)
		}
	}
	for _, n := range live.ReadOnly {
		out = append(out, info(checkDisk, fmt.Sprintf("%s: disk %s is read-only and will not be replicated", name, n), "nothing, if the recovered machine does not need it"))
	}
	for _, n := range live.Removable {
		out = append(out, info(checkDisk, fmt.Sprintf("%s: drive %s holds a removable medium, which will not be replicated", name, n), "nothing, if the recovered machine does not need it"))
	}
	if len(disks) == 0 && !hasErrors(out) {
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, "attach a writable disk", "%v", errNoDisks)
	}
	if len(disks) > maxDisks {
		bad(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, "list the disks to replicate in the definition", "%d disks are more than %d", len(disks), maxDisks)
	}
	return markBoot(disks, boot, lives), out
}

// markBoot marks the disk that the machine boots from: the one that the definition says, the one with the lowest boot
// index, or the first.
func markBoot(disks []Disk, boot string, lives []LiveDisk) []Disk {
	if len(disks) == 0 {
		return disks
	}
	at, best := 0, -1
	for i, d := range disks {
		for _, l := range lives {
			if l.Device == d.Device && l.BootIndex >= 0 && (best < 0 || l.BootIndex < best) {
				at, best = i, l.BootIndex
			}
		}
	}
	for i := range disks {
		if boot != "" && disks[i].ID == boot {
			at = i
		}
	}
	disks[at].OSDisk = true
	return disks
}

// recall fills in what a filter hides from what was seen of the same device before.
func recall(l LiveDisk, held *Machine) LiveDisk {
	if l.Node != "" || held == nil {
		return l
	}
	for _, d := range held.Disks {
		if d.Device == l.Device {
			l.Node, l.Size, l.Path = d.Node, d.Size, d.Path
			for driver, f := range formats {
				if f == d.Format && driver != "file" && driver != "host_device" {
					l.Driver = driver
				}
			}
		}
	}
	return l
}

// find returns the disk that a definition means, or -1.
func find(lives []LiveDisk, k DiskDefinition) int {
	for i, l := range lives {
		if (k.Node == "" || k.Node == l.Node) && (k.Device == "" || devicePath(k.Device) == l.Device) {
			return i
		}
	}
	return -1
}

func described(k DiskDefinition) string {
	var parts []string
	if k.Node != "" {
		parts = append(parts, "node "+k.Node)
	}
	if k.Device != "" {
		parts = append(parts, "device "+k.Device)
	}
	return strings.Join(parts, " and ")
}

// inspect says what is wrong with one disk that is to be replicated.
func inspect(l LiveDisk, name string) (out []*hostproviderv1.Finding) {
	about := fmt.Sprintf("%s: disk %s (%s): ", name, cmp.Or(l.Node, l.Top), l.Path)
	bad := func(reason typesv1.ErrorReason, action, format string, args ...any) {
		out = append(out, failed(checkDisk, reason, about+fmt.Sprintf(format, args...), action))
	}
	if l.Node == "" {
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "wait until the backup or copy job that put it there has ended", "filter %s hides the disk's format node", l.Top)
		return out
	}
	if isGenerated(l.Node) {
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED,
			"start QEMU with `-blockdev driver=FORMAT,node-name=NAME,...` (or node-name=NAME in -drive): change tracking needs a name that stays",
			"its node's name is made up by QEMU and changes with every start")
	}
	if _, ok := formats[l.Driver]; !ok {
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "convert it with `qemu-img convert` to vhdx, qcow2, vpc or raw", "driver %s is not vhdx, qcow2, vpc or raw", l.Driver)
	}
	if l.Shared {
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "start QEMU without share-rw for the disk, or leave it out of the definition's disks",
			"its device has share-rw=on: what another machine writes to it is not seen here")
	}
	switch {
	case l.Size <= 0 || l.Size%sector != 0:
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED, "resize it to whole sectors of 512 bytes", "%d bytes are not a whole number of sectors", l.Size)
	case l.Size > maxDiskBytes:
		entry, _ := errcat.Lookup(typesv1.ErrorReason_ERROR_REASON_DISK_TOO_LARGE)
		bad(typesv1.ErrorReason_ERROR_REASON_DISK_TOO_LARGE, entry.Action, "%d bytes are more than the 2040 GiB of a fixed VHD", l.Size)
	case l.Size%mib != 0:
		out = append(out, warning(checkAlignment, about+fmt.Sprintf("%d bytes are not a whole number of MiB", l.Size),
			"the recovered disk is padded with zeros to the next MiB, as Azure demands; nothing to do"))
	}
	if l.Backing != "" {
		out = append(out, warning(checkDisk, about+"it is an overlay of "+l.Backing+": what the guest sees is replicated, as one whole disk",
			"nothing; but committing or streaming the overlay while it is protected costs a resynchronisation"))
	}
	return out
}

func failed(check string, reason typesv1.ErrorReason, what, action string) *hostproviderv1.Finding {
	return &hostproviderv1.Finding{Check: check, Severity: hostproviderv1.Severity_SEVERITY_ERROR, Reason: reason, What: what, Action: action}
}

func warning(check, what, action string) *hostproviderv1.Finding {
	return &hostproviderv1.Finding{Check: check, Severity: hostproviderv1.Severity_SEVERITY_WARNING, What: what, Action: action}
}

func info(check, what, action string) *hostproviderv1.Finding {
	return &hostproviderv1.Finding{Check: check, Severity: hostproviderv1.Severity_SEVERITY_INFO, What: what, Action: action}
}

func hasErrors(findings []*hostproviderv1.Finding) bool {
	return len(errorsOf(findings)) > 0
}

// errorsOf are the findings that forbid protection.
func errorsOf(findings []*hostproviderv1.Finding) (out []*hostproviderv1.Finding) {
	for _, f := range findings {
		if f.Severity == hostproviderv1.Severity_SEVERITY_ERROR {
			out = append(out, f)
		}
	}
	return out
}

// problem is the error of findings: the reason that all errors share, or VM_DEFINITION_INVALID, and what is wrong. Nil when
// there is none.
func problem(findings []*hostproviderv1.Finding) error {
	errs := errorsOf(findings)
	if len(errs) == 0 {
		return nil
	}
	reason := errs[0].Reason
	var what []string
	for _, f := range errs {
		text := f.What
		if f.Action != "" {
			text += " (" + f.Action + ")"
		}
		what = append(what, text)
		if f.Reason != reason {
			reason = typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID
		}
	}
	return errcat.New(reason, "%s", strings.Join(what, "; "))
}
