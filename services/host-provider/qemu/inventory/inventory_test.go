package inventory

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	"github.com/landfall-dr/landfall/libs/testkit"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const mibytes = 1 << 20

// needQEMU skips where there is none, but never in CI.
func needQEMU(t *testing.T) {
	t.Helper()
	for _, p := range []string{"qemu-system-x86_64", "qemu-img"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is needed: %v", p, err)
			}
			t.Skipf("%s is not installed: this test needs QEMU", p)
		}
	}
}

// rig is a folder of machines and its inventory.
type rig struct {
	t             *testing.T
	folder, state string
	pool          *qmp.Pool
	keep          func(string) bool
	*Inventory
}

func newRig(t *testing.T) *rig {
	t.Helper()
	folder, err := os.MkdirTemp("", "lfi") // short: a socket's path has 107 bytes
	require.NoError(t, err)
	g := &rig{t: t, folder: folder, state: t.TempDir()}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(folder)) })
	g.open()
	return g
}

// open makes the inventory anew, as a restarted host-provider does.
func (g *rig) open() {
	g.t.Helper()
	if g.pool != nil {
		g.pool.Close()
	}
	g.pool = qmp.NewPool()
	g.t.Cleanup(g.pool.Close)
	var err error
	g.Inventory, err = New(Options{Folder: g.folder, StateDir: g.state, Monitors: g.pool, Site: "lab", Host: "host-1", Logger: testkit.Logger(g.t), Keep: func(id string) bool {
		return g.keep == nil || g.keep(id)
	}})
	require.NoError(g.t, err)
}

func (g *rig) file(name, content string) {
	g.t.Helper()
	require.NoError(g.t, os.WriteFile(filepath.Join(g.folder, name), []byte(content), 0o600))
}

func (g *rig) image(format, name, size string, more ...string) {
	g.t.Helper()
	out, err := exec.Command("qemu-img", slices.Concat([]string{"create", "-q", "-f", format}, more, []string{filepath.Join(g.folder, name), size})...).CombinedOutput()
	require.NoError(g.t, err, string(out))
}

func (g *rig) path(name string) string { return filepath.Join(g.folder, name) }

// qemu starts a QEMU whose guest does nothing, and returns how to kill it.
func (g *rig) qemu(socket string, args ...string) (kill func()) {
	g.t.Helper()
	c := exec.Command("qemu-system-x86_64", append([]string{"-S", "-machine", "q35", "-accel", "tcg,thread=multi", "-m", "64", "-display", "none", "-nodefaults",
		"-qmp", "unix:" + socket + ",server=on,wait=off"}, args...)...)
	c.Dir = g.folder
	var stderr strings.Builder
	c.Stderr = &stderr
	require.NoError(g.t, c.Start())
	gone := make(chan struct{})
	go func() {
		_ = c.Wait()
		close(gone)
	}()
	killed := false
	kill = func() {
		if !killed {
			killed = true
			_ = c.Process.Kill()
			<-gone
		}
	}
	g.t.Cleanup(kill)
	testkit.Eventually(g.t, 10*time.Second, func() error {
		select {
		case <-gone:
			return fmt.Errorf("QEMU ended: %s", stderr.String())
		default:
		}
		_, err := os.Stat(filepath.Join(g.folder, socket))
		return err
	})
	return kill
}

// codes are findings as "SEVERITY check REASON", sorted.
func codes(findings []*hostproviderv1.Finding) []string {
	out := []string{}
	for _, f := range findings {
		severity := strings.ToLower(strings.TrimPrefix(f.Severity.String(), "SEVERITY_"))
		code := severity + " " + f.Check
		if f.Reason != typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
			code += " " + errcat.Code(f.Reason)
		}
		out = append(out, code)
	}
	slices.Sort(out)
	return out
}

func text(findings []*hostproviderv1.Finding) string {
	var b strings.Builder
	for _, f := range findings {
		fmt.Fprintln(&b, f.What, "->", f.Action)
	}
	return b.String()
}

const (
	webID = "3f0c2a52-7a51-4f0e-9a38-6b1c5d0e7a11"
	dbID  = "3f0c2a52-7a51-4f0e-9a38-6b1c5d0e7a22"
)

func disk(format, node, file, device string) []string {
	return []string{
		"-blockdev", fmt.Sprintf("driver=%s,node-name=%s,file.driver=file,file.filename=%s", format, node, file), "-device", "virtio-blk-pci,drive=" + node + ",id=" + device,
	}
}

// shared lets others write to the disk too.
func shared(args []string) []string {
	args[len(args)-1] += ",share-rw=on"
	return args
}

// A socket without a definition is described by its QEMU alone: UEFI, two disks, a NIC, a CD-ROM that is left out. It stays
// as it was when QEMU is killed, over a restart of the driver, and is found again when QEMU is back.
func TestBareSocket(t *testing.T) {
	needQEMU(t)
	g := newRig(t)
	ctx := testkit.Context(t)
	_, err := g.Find("web")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE), "%v", err)
	g.image("vhdx", "os.vhdx", "32M")
	g.image("qcow2", "base.qcow2", "16M")
	g.image("qcow2", "data.qcow2", "16M", "-b", "base.qcow2", "-F", "qcow2")
	g.image("raw", "vars.fd", "512K")
	g.image("raw", "code.fd", "512K")
	g.image("raw", "cd.iso", "1M")
	args := slices.Concat([]string{"-name", "Web 1", "-uuid", webID, "-smp", "2",
		"-drive", "if=pflash,format=raw,readonly=on,file=code.fd", "-drive", "if=pflash,format=raw,file=vars.fd",
		"-device", "virtio-scsi-pci,id=scsi0", "-drive", "if=none,id=cd,media=cdrom,format=raw,readonly=on,file=cd.iso", "-device", "scsi-cd,drive=cd",
		"-netdev", "user,id=lan,restrict=on", "-device", "virtio-net-pci,netdev=lan,id=nic0,mac=52:54:00:12:34:56"},
		disk("qcow2", "Data_1", "data.qcow2", "dev-data"), disk("vhdx", "os", "os.vhdx", "dev-os"))
	args[len(args)-1] += ",bootindex=1"
	kill := g.qemu("web.qmp", args...)
	g.file("web.qga", "")
	require.NoError(t, g.Refresh(ctx))
	m, err := g.Find("Web 1")
	require.NoError(t, err)
	want := &typesv1.Machine{
		Name: "sites/lab/vms/" + webID, Id: webID, DisplayName: "Web 1", Generation: 2, Cpus: 2, MemoryBytes: 64 * mibytes,
		NetworkAdapters: []*typesv1.NetworkAdapter{{Name: "nic0", MacAddress: "52:54:00:12:34:56", Network: "lan"}},
		Disks: []*typesv1.Disk{
			{Id: "data-1", SizeBytes: 16 * mibytes, Path: g.path("data.qcow2"), Format: typesv1.DiskFormat_DISK_FORMAT_QCOW2},
			{Id: "os", SizeBytes: 32 * mibytes, Path: g.path("os.vhdx"), Format: typesv1.DiskFormat_DISK_FORMAT_VHDX, OsDisk: true},
		},
		Host: "sites/lab/hosts/host-1", Firmware: typesv1.Firmware_FIRMWARE_UEFI, PowerState: typesv1.PowerState_POWER_STATE_OFF,
	}
	require.Empty(t, cmp.Diff(want, m.Description, protocmp.Transform()))
	require.Equal(t, []Disk{
		{ID: "data-1", Node: "Data_1", Device: "/machine/peripheral/dev-data", Size: 16 * mibytes, Format: typesv1.DiskFormat_DISK_FORMAT_QCOW2, Path: g.path("data.qcow2")},
		{ID: "os", Node: "os", Device: "/machine/peripheral/dev-os", Size: 32 * mibytes, Format: typesv1.DiskFormat_DISK_FORMAT_VHDX, Path: g.path("os.vhdx"), OSDisk: true},
	}, m.Disks)
	require.Equal(t, filepath.Join(g.folder, "web.qga"), m.AgentSocket)
	_, findings, answered, err := g.Check(ctx, webID)
	require.NoError(t, err)
	require.True(t, answered)
	require.Equal(t, []string{"info disk", "warning disk"}, codes(findings), text(findings))
	require.Contains(t, text(findings), "overlay of base.qcow2")

	// A copy-before-write filter in front of a disk, as in a cut, hides nothing.
	mon, err := g.pool.Get(ctx, m.QMPSocket)
	require.NoError(t, err)
	g.image("qcow2", "scratch.qcow2", "32M")
	for _, c := range []struct {
		command string
		args    map[string]any
	}{
		{"blockdev-add", map[string]any{"driver": "qcow2", "node-name": "landfall-s", "file": map[string]any{"driver": "file", "filename": "scratch.qcow2"}}},
		{"blockdev-add", map[string]any{"driver": "copy-before-write", "node-name": "landfall-f", "file": "os", "target": "landfall-s"}},
		{"qom-set", map[string]any{"path": m.Disks[1].Device, "property": "drive", "value": "landfall-f"}},
	} {
		require.NoError(t, mon.Execute(ctx, c.command, c.args, nil))
	}
	require.NoError(t, g.Refresh(ctx))
	filtered, err := g.Lookup(webID)
	require.NoError(t, err)
	require.Equal(t, m.Disks, filtered.Disks)
	require.NoError(t, filtered.Problem)

	kill()
	require.NoError(t, os.Remove(filepath.Join(g.folder, "web.qmp"))) // a QEMU that ends by itself does this
	for range 2 {
		require.NoError(t, g.Refresh(ctx))
		m, err = g.Find(webID)
		require.NoError(t, err)
		require.Equal(t, typesv1.PowerState_POWER_STATE_UNSPECIFIED, m.Description.PowerState)
		require.Empty(t, cmp.Diff(still(want), still(m.Description), protocmp.Transform()))
		require.Equal(t, filtered.Disks, m.Disks)
		problems, err := g.Problems()
		require.NoError(t, err)
		require.Empty(t, problems, "a machine that is off is no problem")
		_, findings, answered, err := g.Check(ctx, "Web 1")
		require.NoError(t, err)
		require.False(t, answered)
		require.Equal(t, []string{"error monitor HYPERVISOR_UNREACHABLE"}, codes(findings))
		g.open()
	}
	require.NoError(t, g.Refresh(ctx))
	g.qemu("web.qmp", args...)
	testkit.Eventually(t, 10*time.Second, func() bool {
		require.NoError(t, g.Refresh(ctx))
		m, err = g.Find("Web 1")
		return err == nil && m.Description.PowerState == typesv1.PowerState_POWER_STATE_OFF
	})
}

// One that nobody keeps goes with its socket.
func TestBareSocketGoes(t *testing.T) {
	needQEMU(t)
	g := newRig(t)
	ctx := testkit.Context(t)
	g.image("raw", "os.raw", "1M")
	kill := g.qemu("web.qmp", append(disk("raw", "os", "os.raw", "dev-os"), "-uuid", webID)...)
	require.NoError(t, g.Refresh(ctx))
	m, err := g.Find("web")
	require.NoError(t, err)
	require.Equal(t, typesv1.Firmware_FIRMWARE_BIOS, m.Description.Firmware)
	require.EqualValues(t, 1, m.Description.Generation)
	kill()
	require.NoError(t, g.Refresh(ctx), "a stale socket is left by kill -9")
	_, err = g.Find("web")
	require.NoError(t, err)
	require.NoError(t, os.Remove(filepath.Join(g.folder, "web.qmp")))
	g.keep = func(id string) bool { return id != webID }
	require.NoError(t, g.Refresh(ctx))
	_, err = g.Find("web")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND), "%v", err)
	g.open()
	require.NoError(t, g.Refresh(ctx))
	require.Empty(t, g.All())
}

// What is wrong with one machine is found by name, with what to do, and harms no other one.
func TestDefinitionsAndQEMU(t *testing.T) {
	needQEMU(t)
	g := newRig(t)
	ctx := testkit.Context(t)
	for _, name := range []string{"a", "b", "c", "d"} {
		g.image("raw", name+".raw", "1M")
	}
	g.image("raw", "odd.raw", "1537K")
	g.qemu("one.qmp", slices.Concat([]string{"-uuid", webID, "-drive", "if=none,id=old,format=raw,file=c.raw", "-device", "virtio-blk-pci,drive=old,id=dev-old"},
		disk("raw", "a", "a.raw", "dev-a"), shared(disk("raw", "b", "b.raw", "dev-b")), disk("raw", "odd", "odd.raw", "dev-odd"), disk("raw", "d", "d.raw", "dev-d"))...)
	g.qemu("none.qmp", "-name", "nobody")
	for _, c := range []struct {
		name, yaml string
		want       []string
		says       string
		disks      []string
	}{
		{name: "listed disks, in order", yaml: "id: " + webID + "\ndisks: [{id: data, device: dev-d}, {id: os, node: a, os: true}]\nname: web\nfirmware: uefi\n", disks: []string{"data", "os*"},
			want: []string{"warning disk", "warning disk", "warning disk", "warning network"}, says: "disk odd"},
		{name: "disk that is not there", yaml: "disks: [{id: os, node: z}]\n", want: []string{"error disk DISK_IMAGE_MISSING"}, says: "disk os: QEMU has no writable disk with node z"},
		{name: "all disks, one without a name", yaml: "name: web\n", want: []string{"error disk DISK_FORMAT_UNSUPPORTED", "error disk DISK_FORMAT_UNSUPPORTED", "warning disk-alignment"}, says: "node-name=NAME"},
		{name: "another machine's id", yaml: "id: " + dbID + "\ndisks: [{id: os, node: a}]\n", want: []string{"error machine-id VM_DEFINITION_INVALID"}, says: webID},
		{name: "no id anywhere", yaml: "qmp: none.qmp\n", want: []string{"error disk DISK_IMAGE_MISSING", "error machine-id VM_DEFINITION_INVALID"}, says: "no writable disk"},
		{name: "nothing listens", yaml: "qmp: nothing.qmp\nid: " + webID + "\n", want: []string{"error monitor HYPERVISOR_UNREACHABLE"}, says: "nothing.qmp,server=on,wait=off"},
		{name: "shared disk", yaml: "disks: [{id: os, node: b}]\n", want: []string{"error disk DISK_FORMAT_UNSUPPORTED"}, says: "share-rw=on"},
		{name: "odd size", yaml: "disks: [{id: os, node: odd}]\n", disks: []string{"os*"}, want: []string{"warning disk", "warning disk", "warning disk", "warning disk", "warning disk-alignment", "warning network"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g.state = t.TempDir()
			g.open()
			g.file("one.yaml", "version: 1\n"+c.yaml)
			m, findings, _, err := g.Check(ctx, "one")
			if err != nil {
				m, findings, _, err = g.Check(ctx, "web")
			}
			require.NoError(t, err)
			errors := errorsOf(findings)
			if len(errors) > 0 {
				findings = slices.DeleteFunc(findings, func(f *hostproviderv1.Finding) bool {
					return f.Severity == hostproviderv1.Severity_SEVERITY_WARNING && f.Check == "disk"
				})
			}
			require.Equal(t, c.want, codes(findings), text(findings))
			require.Contains(t, text(findings), c.says)
			require.Equal(t, c.disks == nil, m == nil)
			var disks []string
			if m != nil {
				for _, d := range m.Disks {
					if d.OSDisk {
						d.ID += "*"
					}
					disks = append(disks, d.ID)
				}
			}
			require.Equal(t, c.disks, disks)
			problems, err := g.Problems()
			require.NoError(t, err)
			for _, e := range errors {
				require.True(t, slices.ContainsFunc(problems, func(p *hostproviderv1.Finding) bool { return p.What == e.What }), e.What)
			}
			if len(errors) > 0 {
				_, err = g.Find("one")
				require.Error(t, err)
				require.False(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND), "%v", err)
			}
		})
	}
}

// A machine whose definition is spoilt later, or that gets a twin, stays as it was, and both say so.
func TestIncumbentStays(t *testing.T) {
	needQEMU(t)
	g := newRig(t)
	ctx := testkit.Context(t)
	g.image("raw", "a.raw", "1M")
	g.image("raw", "b.raw", "1M")
	g.qemu("web.qmp", append(disk("raw", "a", "a.raw", "dev-a"), "-uuid", webID)...)
	g.file("web.yaml", "version: 1\ndisks: [{id: os, node: a}]\n")
	require.NoError(t, g.Refresh(ctx))
	g.file("web.yaml", "version: 1\ndisk: []\n")
	require.NoError(t, g.Refresh(ctx))
	m, err := g.Find(webID)
	require.NoError(t, err)
	require.NoError(t, m.Problem)
	require.Equal(t, "os", m.Disks[0].ID)
	require.Equal(t, typesv1.PowerState_POWER_STATE_OFF, m.Description.PowerState)
	problems, err := g.Problems()
	require.NoError(t, err)
	require.Equal(t, []string{"error vm-definition VM_DEFINITION_INVALID"}, codes(problems))
	require.Contains(t, text(problems), `unknown key "disk"`)

	g.file("web.yaml", "version: 1\ndisks: [{id: os, node: a}]\n")
	g.qemu("copy.qmp", append(disk("raw", "b", "b.raw", "dev-b"), "-uuid", webID)...)
	require.NoError(t, g.Refresh(ctx))
	m, err = g.Find(webID)
	require.NoError(t, err)
	require.Equal(t, "a", m.Disks[0].Node)
	require.NoError(t, m.Problem)
	require.Len(t, g.All(), 1)
	problems, err = g.Problems()
	require.NoError(t, err)
	require.Equal(t, []string{"error machine-id VM_DEFINITION_INVALID", "error machine-id VM_DEFINITION_INVALID"}, codes(problems))
	_, err = g.Find("copy")
	require.ErrorContains(t, err, "is also that of")

	g.file("thief.yaml", "version: 1\nqmp: web.qmp\n")
	g.file("x.yml", "version: 1\n")
	require.NoError(t, g.Refresh(ctx))
	problems, err = g.Problems()
	require.NoError(t, err)
	require.Contains(t, text(problems), "web.qmp is also that of")
	require.Contains(t, text(problems), "must be called x.yaml")
	_, err = g.Find("thief")
	require.Error(t, err)
	m, err = g.Find(webID)
	require.NoError(t, err)
	require.Equal(t, "a", m.Disks[0].Node)
}

// A monitor that serves somebody else is told from one that is off.
func TestMonitorInUse(t *testing.T) {
	needQEMU(t)
	g := newRig(t)
	ctx := testkit.Context(t)
	g.image("raw", "a.raw", "1M")
	g.qemu("web.qmp", append(disk("raw", "a", "a.raw", "dev-a"), "-uuid", webID)...)
	other, err := qmp.Dial(ctx, filepath.Join(g.folder, "web.qmp"))
	require.NoError(t, err)
	defer other.Close()
	g.file("web.yaml", "version: 1\nid: "+webID+"\n")
	_, findings, answered, err := g.Check(ctx, "web")
	require.NoError(t, err)
	require.False(t, answered)
	require.Equal(t, []string{"error monitor HYPERVISOR_UNREACHABLE"}, codes(findings))
	require.Contains(t, text(findings), "a monitor of its own")
	m, err := g.Lookup(webID)
	require.NoError(t, err)
	require.ErrorIs(t, m.Problem, qmp.ErrInUse)
}
