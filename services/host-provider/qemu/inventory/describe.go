package inventory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Monitor is what the inventory needs of a *[qmp.Monitor]: questions that change nothing.
type Monitor interface {
	Execute(ctx context.Context, command string, args, result any) error
}

// Live is what a QEMU says of itself.
type Live struct {
	// Name by -name; empty without.
	Name string
	// UUID by -uuid; empty without.
	UUID string
	// Status of query-status, for example "running".
	Status string
	// CPUs and MemoryBytes that the guest has now.
	CPUs        int
	MemoryBytes int64
	Adapters    []*typesv1.NetworkAdapter
	// Folder that the process runs in, where this system can tell; relative paths are relative to it.
	Folder string
	// Flash: there is a pflash node, as UEFI needs.
	Flash bool
	// Disks that a guest device holds writable.
	Disks []LiveDisk
	// ReadOnly and Removable are nodes or devices that hold what is never replicated.
	ReadOnly, Removable []string
}

// LiveDisk is a node with a guest device in front of it.
type LiveDisk struct {
	// Node is the format node, below filters. Empty when it cannot be told because a filter hides it.
	Node string
	// Top is the node that the device holds: Node, or a filter.
	Top string
	// Device is the QOM path.
	Device string
	// Driver of the format node, for example "vhdx".
	Driver string
	Size   int64
	Path   string
	// Backing is the image below an overlay; empty for a whole one.
	Backing string
	// Shared: the device lets others write to the image (share-rw).
	Shared bool
	// BootIndex orders devices for the firmware; negative without one.
	BootIndex int
}

// PowerState is what a status of query-status means for the guest. Off are one that powered itself down and one that never
// ran (-S): every other stop has a guest with unwritten data, which can be continued.
func PowerState(status string) typesv1.PowerState {
	switch status {
	case "running":
		return typesv1.PowerState_POWER_STATE_RUNNING
	case "shutdown", "prelaunch":
		return typesv1.PowerState_POWER_STATE_OFF
	case "":
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED
	}
	return typesv1.PowerState_POWER_STATE_PAUSED
}

// formats are the drivers whose nodes are replicated.
var formats = map[string]typesv1.DiskFormat{
	"vhdx": typesv1.DiskFormat_DISK_FORMAT_VHDX, "qcow2": typesv1.DiskFormat_DISK_FORMAT_QCOW2, "vpc": typesv1.DiskFormat_DISK_FORMAT_VHD,
	"raw": typesv1.DiskFormat_DISK_FORMAT_RAW,
	// A device may hold the protocol's node, without a raw node above it: the same sectors.
	"file": typesv1.DiskFormat_DISK_FORMAT_RAW, "host_device": typesv1.DiskFormat_DISK_FORMAT_RAW,
}

// filters are the drivers that only pass on: the format node is below.
var filters = map[string]bool{"copy-before-write": true, "throttle": true, "copy-on-read": true, "compress": true, "preallocate": true, "mirror_top": true, "commit_top": true, "replication": true}

// passes says that a node is no disk but stands in front of one: a filter, or anything that the driver put there.
func passes(n *blockNode) bool { return filters[n.Driver] || strings.HasPrefix(n.Name, "landfall-") }

// flash is how QEMU calls a machine's own flash, by path or by drive.
var flash = regexp.MustCompile(`^/machine/[^/]*flash[0-9]*$|^pflash[0-9]+$`)

type blockNode struct {
	Name    string `json:"node-name"`
	Driver  string `json:"drv"`
	RO      bool   `json:"ro"`
	File    string `json:"file"`
	Backing string `json:"backing_file"`
	Depth   int    `json:"backing_file_depth"`
	Image   struct {
		Size    int64  `json:"virtual-size"`
		Backing string `json:"full-backing-filename"`
	} `json:"image"`
}

// Describe asks a QEMU for everything. Errors are the monitor's.
func Describe(ctx context.Context, m Monitor) (*Live, error) {
	l := &Live{}
	var (
		name   struct{ Name string }
		id     struct{ UUID string }
		status struct{ Status string }
		memory struct {
			Base    int64 `json:"base-memory"`
			Plugged int64 `json:"plugged-memory"`
		}
		cpus []struct {
			Thread int `json:"thread-id"`
		}
		blocks []struct {
			Device    string     `json:"device"`
			QDev      string     `json:"qdev"`
			Removable bool       `json:"removable"`
			Inserted  *blockNode `json:"inserted"`
		}
	)
	for _, q := range []struct {
		command string
		into    any
	}{
		{"query-name", &name}, {"query-uuid", &id}, {"query-status", &status}, {"query-memory-size-summary", &memory},
		{"query-cpus-fast", &cpus}, {"query-block", &blocks},
	} {
		if err := m.Execute(ctx, q.command, nil, q.into); err != nil {
			return nil, fmt.Errorf("describe machine: %w", err)
		}
	}
	if u, err := uuid.Parse(id.UUID); err == nil && u != uuid.Nil {
		l.UUID = u.String()
	}
	l.Name, l.Status, l.CPUs, l.MemoryBytes = name.Name, status.Status, len(cpus), memory.Base+memory.Plugged
	if len(cpus) > 0 {
		l.Folder = workingFolder(cpus[0].Thread)
	}
	var below *graph
	for _, b := range blocks {
		if flash.MatchString(b.QDev) || flash.MatchString(b.Device) {
			l.Flash = true
			continue
		}
		if b.QDev == "" || b.Inserted == nil { // no guest device, or an empty drive
			continue
		}
		switch n := b.Inserted; {
		case b.Removable:
			l.Removable = append(l.Removable, cmp.Or(b.Device, n.Name))
		case n.RO:
			l.ReadOnly = append(l.ReadOnly, n.Name)
		default:
			if passes(n) && below == nil {
				var err error
				if below, err = readGraph(ctx, m); err != nil {
					return nil, err
				}
			}
			d, err := describeDisk(ctx, m, devicePath(b.QDev), n, below)
			if err != nil {
				return nil, err
			}
			l.Disks = append(l.Disks, d)
		}
	}
	var err error
	l.Adapters, err = adapters(ctx, m)
	return l, err
}

func describeDisk(ctx context.Context, m Monitor, device string, top *blockNode, below *graph) (LiveDisk, error) {
	n := top
	if passes(top) {
		n = below.format(top.Name)
	}
	d := LiveDisk{Top: top.Name, Device: device, BootIndex: -1}
	if n != nil {
		d.Node, d.Driver, d.Size, d.Path = n.Name, n.Driver, n.Image.Size, n.File
		if n.Depth > 0 {
			d.Backing = cmp.Or(n.Image.Backing, n.Backing)
		}
	}
	for property, into := range map[string]any{"bootindex": &d.BootIndex, "share-rw": &d.Shared} {
		err := m.Execute(ctx, "qom-get", map[string]any{"path": device, "property": property}, into)
		if err != nil && !qmp.Refused(err) { // a device without the property never boots, and shares nothing
			return d, fmt.Errorf("describe disk: %w", err)
		}
	}
	return d, nil
}

// graph is who is below whom.
type graph struct {
	child map[string]string
	nodes map[string]*blockNode
}

// readGraph is asked for only when a filter hides a format node. A QEMU that cannot draw it leaves the disk unknown.
func readGraph(ctx context.Context, m Monitor) (*graph, error) {
	var drawn struct {
		Nodes []struct {
			ID   uint64 `json:"id"`
			Name string `json:"name"`
		} `json:"nodes"`
		Edges []struct {
			Parent uint64 `json:"parent"`
			Child  uint64 `json:"child"`
			Name   string `json:"name"`
		} `json:"edges"`
	}
	g := &graph{child: map[string]string{}, nodes: map[string]*blockNode{}}
	if err := m.Execute(ctx, "x-debug-query-block-graph", nil, &drawn); err != nil {
		if qmp.Refused(err) {
			return g, nil
		}
		return nil, fmt.Errorf("ask for the block graph: %w", err)
	}
	var nodes []*blockNode
	if err := m.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return nil, fmt.Errorf("ask for block nodes: %w", err)
	}
	for _, n := range nodes {
		g.nodes[n.Name] = n
	}
	names := map[uint64]string{}
	for _, n := range drawn.Nodes {
		names[n.ID] = n.Name
	}
	for _, e := range drawn.Edges {
		parent := g.nodes[names[e.Parent]]
		if parent == nil || !passes(parent) {
			continue
		}
		if e.Name == "file" || e.Name == "backing" { // a copy-before-write filter has its scratch as "target"
			g.child[parent.Name] = names[e.Child]
		}
	}
	return g, nil
}

// format finds the format node below a filter; nil when it cannot be told.
func (g *graph) format(top string) *blockNode {
	name := top
	for range len(g.nodes) {
		next, ok := g.child[name]
		if !ok {
			break
		}
		name = next
	}
	n := g.nodes[name]
	if n == nil || passes(n) {
		return nil
	}
	return n
}

// adapters are the guest's NICs: devices with a MAC address, by their names.
func adapters(ctx context.Context, m Monitor) ([]*typesv1.NetworkAdapter, error) {
	var out []*typesv1.NetworkAdapter
	for _, folder := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		var children []struct{ Name, Type string }
		if err := m.Execute(ctx, "qom-list", map[string]any{"path": folder}, &children); err != nil {
			if qmp.Refused(err) {
				continue
			}
			return nil, fmt.Errorf("list devices: %w", err)
		}
		for _, c := range children {
			if !isNIC(c.Type) {
				continue
			}
			path := folder + "/" + c.Name
			var mac, network string
			for property, into := range map[string]*string{"mac": &mac, "netdev": &network} {
				if err := m.Execute(ctx, "qom-get", map[string]any{"path": path, "property": property}, into); err != nil && !qmp.Refused(err) {
					return nil, fmt.Errorf("describe adapter: %w", err)
				}
			}
			if mac != "" {
				out = append(out, &typesv1.NetworkAdapter{Name: c.Name, MacAddress: mac, Network: network})
			}
		}
	}
	for i, j := 0, len(out)-1; i < j; i, j = i+1, j-1 { // QEMU lists the last one first
		out[i], out[j] = out[j], out[i]
	}
	return out, nil
}

// isNIC goes by the type's name, so that not every device is asked for a MAC address.
func isNIC(kind string) bool {
	for _, s := range []string{"net", "e1000", "rtl8139", "i825", "ne2k", "pcnet", "tulip", "igb"} {
		if strings.Contains(kind, s) {
			return true
		}
	}
	return false
}

// errNoDisks: QEMU is there, and nothing in it can be replicated.
var errNoDisks = errors.New("the guest has no writable disk")

// workingFolder is a process's own, by one of its threads; empty where /proc is not, or the process is in another container.
func workingFolder(thread int) string {
	folder, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", thread))
	if err != nil {
		return ""
	}
	return folder
}

// absolute makes the path of an image absolute where that is sure: in one of the folders there is such a file.
func absolute(path string, folders ...string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	for _, f := range folders {
		if whole := filepath.Join(f, path); f != "" {
			if _, err := os.Stat(whole); err == nil {
				return whole
			}
		}
	}
	return path
}
