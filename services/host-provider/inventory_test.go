package hostprovider_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestInventory(t *testing.T) {
	g := newRig(t)
	ctx := testkit.Context(t)
	_, _, err := g.driver.Machines(ctx)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE), "before the first look nothing is known: %v", err)
	_, err = g.driver.Machine(ctx, id('a'))
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE), "%v", err)

	g.file("web/vm.yaml", []byte(`version: 1
id: AAAAAAAA-AAAA-4AAA-8AAA-AAAAAAAAAAAA
name: web
generation: 2
cpus: 4
memory: 8GiB
network_adapters:
  - {name: lan, mac_address: "00:15:5d:00:00:01", network: office}
disks:
  - {id: os, image: os.vhd, os: true}
  - {id: data, image: ../shelf/data.img, format: raw}
`))
	g.vhd("web/os.vhd", 3*mib, nil)
	g.raw("shelf/data.img", mib+512)
	g.machine("db", id('b'), "db")
	g.file("broken/vm.yaml", []byte("version: 1\nid: nonsense\n"))
	g.machine("hollow", id('c'), "hollow")
	require.NoError(t, os.Remove(filepath.Join(g.root, "hollow/os.raw")))
	g.file("typo/vm.yml", []byte(yaml(id('d'), "typo")))
	g.file("notes/readme.txt", nil) // no machine
	g.file("loose.txt", nil)

	g.refresh()
	machines, problems, err := g.driver.Machines(ctx)
	require.NoError(t, err)
	require.Len(t, machines, 2)
	require.Equal(t, "db", machines[0].DisplayName)
	want := &typesv1.Machine{
		Name: "sites/lab/vms/" + id('a'), Id: id('a'), DisplayName: "web", Generation: 2, Cpus: 4, MemoryBytes: 8 << 30, Host: "sites/lab/hosts/host-1",
		NetworkAdapters: []*typesv1.NetworkAdapter{{Name: "lan", MacAddress: "00:15:5d:00:00:01", Network: "office"}},
		Disks: []*typesv1.Disk{
			{Id: "os", SizeBytes: 3 * mib, Path: filepath.Join(g.root, "web/os.vhd"), Format: typesv1.DiskFormat_DISK_FORMAT_VHD, OsDisk: true, ExportUri: "nbd://127.0.0.1:10809/" + id('a') + "/os"},
			{Id: "data", SizeBytes: mib + 512, Path: filepath.Join(g.root, "shelf/data.img"), Format: typesv1.DiskFormat_DISK_FORMAT_RAW, ExportUri: "nbd://127.0.0.1:10809/" + id('a') + "/data"},
		},
	}
	require.Empty(t, cmp.Diff(want, machines[1], protocmp.Transform()))
	require.Equal(t, filepath.Join(g.root, "web/.landfall"), g.tracker.attached[id('a')].StateDir)
	var text []string
	for _, p := range problems {
		text = append(text, p.What)
		require.NotEmpty(t, p.Action)
	}
	all := strings.Join(text, "\n")
	require.Contains(t, all, `"nonsense" is not a GUID`)
	require.Contains(t, all, "hollow")
	require.Contains(t, all, "vm.yml, but the file must be called vm.yaml")

	// Names.
	for _, name := range []string{id('a'), strings.ToUpper(id('a')), "web"} {
		m, err := g.driver.Machine(ctx, name)
		require.NoError(t, err, name)
		require.Equal(t, id('a'), m.Id)
	}
	_, err = g.driver.Machine(ctx, "nobody")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND), "%v", err)
	for name, reason := range map[string]typesv1.ErrorReason{ // it is here, and the answer says what is wrong with it
		"hollow": typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, id('c'): typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING,
		"broken": typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, id('d'): typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND,
	} {
		_, err = g.driver.Machine(ctx, name)
		require.Truef(t, errcat.Is(err, reason), "%s: want %s, have %v", name, reason, err)
	}
	g.machine("web-2", id('e'), "web")
	g.refresh()
	_, err = g.driver.Machine(ctx, "web")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND), "%v", err)
	require.ErrorContains(t, err, "use the id")
	_, _, err = g.driver.Check(ctx, "web")
	require.ErrorContains(t, err, "use the id")
	_, err = g.driver.Machine(ctx, id('e'))
	require.NoError(t, err)

	// Refresh is idempotent.
	first, firstProblems, err := g.driver.Machines(ctx)
	require.NoError(t, err)
	g.refresh()
	again, againProblems, err := g.driver.Machines(ctx)
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(first, again, protocmp.Transform()))
	require.Empty(t, cmp.Diff(firstProblems, againProblems, protocmp.Transform()))

	// A folder that is gone is gone.
	require.NoError(t, os.RemoveAll(filepath.Join(g.root, "web-2")))
	g.refresh()
	_, err = g.driver.Machine(ctx, id('e'))
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND), "%v", err)
}

// A machine that was attached stays while its folder is broken: its guest runs and its points go on.
func TestAttachedStays(t *testing.T) {
	for name, spoil := range map[string]func(g *rig){
		"definition being edited": func(g *rig) { g.file("web/vm.yaml", []byte("version: 1\nid: ")) },
		"image not readable now":  func(g *rig) { require.NoError(g.t, os.Remove(filepath.Join(g.root, "web/os.raw"))) },
		"a copy of the folder":    func(g *rig) { g.machine("a-copy", id('a'), "web") },
		"a copy names the image": func(g *rig) {
			g.file("a-copy/vm.yaml", []byte(yaml(id('c'), "thief", "{id: os, image: ../web/os.raw, os: true}")))
		},
		"the tracker refuses": func(g *rig) {
			g.tracker.set(func(k *tracker) {
				k.refuse = errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE, "somebody has it open")
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			ctx := testkit.Context(t)
			g.machine("web", id('a'), "web")
			g.machine("db", id('b'), "db")
			g.refresh()
			before, err := g.driver.Machine(ctx, id('a'))
			require.NoError(t, err)
			spoil(g)
			g.refresh()
			after, err := g.driver.Machine(ctx, "web")
			require.NoError(t, err)
			require.Empty(t, cmp.Diff(before, after, protocmp.Transform()))
			machines, problems, err := g.driver.Machines(ctx)
			require.NoError(t, err)
			require.Len(t, machines, 2)
			require.NotEmpty(t, problems, "and the trouble is listed")
			require.Equal(t, filepath.Join(g.root, "web/os.raw"), g.tracker.attached[id('a')].Disks[0].Path, "nothing else is attached in its place")
		})
	}
}

// Without the change-tracker what was known stays known.
func TestTrackerAway(t *testing.T) {
	g := newRig(t)
	ctx := testkit.Context(t)
	g.machine("web", id('a'), "web")
	g.refresh()
	g.stop()
	require.True(t, errcat.Is(g.driver.Refresh(ctx), typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE))
	_, err := g.driver.Machine(ctx, "web")
	require.NoError(t, err)
	_, _, err = g.driver.Check(ctx, "web")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE), "a check that could not be made is no verdict: %v", err)
	require.NoError(t, os.RemoveAll(g.root))
	require.True(t, errcat.Is(g.driver.Refresh(ctx), typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE))
	_, err = g.driver.Machine(ctx, "web")
	require.NoError(t, err, "a volume that is not mounted is no empty host")
}

// Every check, each with its reason; two at once are both reported.
func TestPrerequisites(t *testing.T) {
	const image = "disk-image "
	for _, c := range []struct {
		name   string
		make   func(g *rig)
		vm     string // default web
		want   []string
		says   []string
		warns  []string
		absent bool // the machine cannot be described
	}{
		{name: "sound", make: func(g *rig) { g.machine("web", id('a'), "web") }},
		{name: "missing image", make: func(g *rig) { g.file("web/vm.yaml", []byte(yaml(id('a'), "web"))) }, want: []string{image + "DISK_IMAGE_MISSING"}, says: []string{"os.raw"}},
		{name: "truncated raw", make: func(g *rig) { g.machine("web", id('a'), "web"); g.raw("web/os.raw", mib+100) }, want: []string{image + "DISK_IMAGE_TRUNCATED"}},
		{name: "empty raw", make: func(g *rig) { g.machine("web", id('a'), "web"); g.raw("web/os.raw", 0) }, want: []string{image + "DISK_IMAGE_TRUNCATED"}},
		{name: "truncated VHD", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.vhd, os: true}")))
			g.vhd("web/os.vhd", 2*mib, nil)
			require.NoError(g.t, os.Truncate(filepath.Join(g.root, "web/os.vhd"), mib))
		}, want: []string{image + "DISK_IMAGE_TRUNCATED"}},
		{name: "bad footer", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.vhd, os: true}")))
			g.vhd("web/os.vhd", 2*mib, func(_ *vdisk.Footer, b []byte) { b[100] ^= 1 })
		}, want: []string{image + "DISK_IMAGE_TRUNCATED"}, says: []string{"footer"}},
		{name: "dynamic VHD", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.vhd, os: true}")))
			g.vhd("web/os.vhd", 2*mib, func(f *vdisk.Footer, b []byte) {
				f.Type = vdisk.TypeDynamic
				d := f.Bytes()
				copy(b, d[:])
			})
		}, want: []string{image + "DISK_FORMAT_UNSUPPORTED"}, says: []string{"dynamic"}},
		{name: "qcow2 taken for raw", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.img, os: true}")))
			g.file("web/os.img", append([]byte("QFI\xfb"), make([]byte, mib-4)...))
		}, want: []string{image + "DISK_FORMAT_UNSUPPORTED"}, says: []string{"qcow2"}},
		{name: "a VHD that nobody calls so", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.img, os: true}")))
			g.vhd("web/os.img", 2*mib, nil)
		}, want: []string{image + "DISK_FORMAT_UNSUPPORTED"}, says: []string{"neither its name nor vm.yaml"}},
		{name: "a raw disk whose guest wrote a footer", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.img, format: raw, os: true}")))
			g.vhd("web/os.img", 2*mib, nil)
		}, warns: []string{"disk-alignment"}},
		{name: "image is a folder", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web")))
			require.NoError(g.t, os.Mkdir(filepath.Join(g.root, "web/os.raw"), 0o750))
		}, want: []string{image + "DISK_FORMAT_UNSUPPORTED"}},
		{name: "too large", make: func(g *rig) { g.machine("web", id('a'), "web"); g.raw("web/os.raw", 2040<<30+mib) }, want: []string{image + "DISK_TOO_LARGE"}, warns: []string{"*"}},
		{name: "named twice", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.raw, os: true}", "{id: data, image: ./os.raw}")))
			g.raw("web/os.raw", mib)
		}, want: []string{image + "DISK_DUPLICATE", image + "DISK_DUPLICATE"}},
		{name: "named twice by a symbolic link", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.raw, os: true}", "{id: data, image: data.raw}")))
			g.raw("web/os.raw", mib)
			require.NoError(g.t, os.Symlink("os.raw", filepath.Join(g.root, "web/data.raw")))
		}, want: []string{image + "DISK_DUPLICATE", image + "DISK_DUPLICATE"}},
		{name: "named twice by a hard link", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.raw, os: true}", "{id: data, image: data.raw}")))
			g.raw("web/os.raw", mib)
			require.NoError(g.t, os.Link(filepath.Join(g.root, "web/os.raw"), filepath.Join(g.root, "web/data.raw")))
		}, want: []string{image + "DISK_DUPLICATE", image + "DISK_DUPLICATE"}},
		{name: "named by a machine that sorts behind", make: func(g *rig) {
			g.machine("web", id('a'), "web")
			g.file("zzz/vm.yaml", []byte(yaml(id('b'), "zzz", "{id: os, image: ../web/os.raw, os: true}")))
		}, want: []string{image + "DISK_DUPLICATE"}, says: []string{"of zzz"}},
		{name: "named by a machine that sorts before", make: func(g *rig) {
			g.machine("web", id('a'), "web")
			g.file("aaa/vm.yaml", []byte(yaml(id('b'), "aaa", "{id: os, image: ../web/os.raw, os: true}")))
		}, want: []string{image + "DISK_DUPLICATE"}, says: []string{"of aaa"}},
		{name: "two machines with one id", make: func(g *rig) {
			g.machine("web", id('a'), "web")
			g.machine("web-copy", strings.ToUpper(id('a')), "copy")
		}, want: []string{"machine-id VM_DEFINITION_INVALID"}, says: []string{"web-copy"}},
		{name: "misaligned", make: func(g *rig) { g.machine("web", id('a'), "web"); g.raw("web/os.raw", mib+512) }, warns: []string{"disk-alignment"}},
		{name: "no adapter", make: func(g *rig) {
			g.machine("web", id('a'), "web")
			g.file("web/vm.yaml", []byte(strings.Replace(yaml(id('a'), "web"), "[{name: lan, network: office}]", "[]", 1)))
		}, warns: []string{"network"}},
		{name: "no OS disk and a twin", absent: true, make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.raw}", "{id: os, image: x.raw}")))
		}, want: []string{"vm-definition VM_DEFINITION_INVALID", "vm-definition VM_DEFINITION_INVALID"}, says: []string{"exactly one must have `os: true`, not 0", `"os" is named twice`}},
		{name: "two OS disks", absent: true, make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.raw, os: true}", "{id: data, image: x.raw, os: true}")))
		}, want: []string{"vm-definition VM_DEFINITION_INVALID"}, says: []string{"not 2"}},
		{name: "bad yaml", vm: "web-folder", absent: true, make: func(g *rig) { g.file("web-folder/vm.yaml", []byte("version: [1\n")) }, want: []string{"vm-definition VM_DEFINITION_INVALID"}},
		{name: "empty", vm: "web-folder", absent: true, make: func(g *rig) { g.file("web-folder/vm.yaml", nil) }, want: []string{"vm-definition VM_DEFINITION_INVALID"}, says: []string{"vm.yaml is empty"}},
		{name: "unknown keys and values all at once, found by name", absent: true, make: func(g *rig) {
			g.file("web/vm.yaml", []byte(strings.NewReplacer("cpus: 2", "cpu: 2", "4GiB", "plenty").Replace(yaml(id('a'), "web"))))
		}, want: repeat("vm-definition VM_DEFINITION_INVALID", 3), says: []string{`unknown key "cpu"`, "cpus: 0", `"plenty"`}},
		{name: "two documents", absent: true, make: func(g *rig) { g.file("web/vm.yaml", []byte(yaml(id('a'), "web")+"---\nname: other\n")) }, want: []string{"vm-definition VM_DEFINITION_INVALID"}, says: []string{"one document"}},
		{name: "id is no GUID", absent: true, make: func(g *rig) { g.file("web/vm.yaml", []byte(yaml("web-1", "web"))) }, want: []string{"vm-definition VM_DEFINITION_INVALID"}, says: []string{"not a GUID"}},
		{name: "version of the future", absent: true, make: func(g *rig) {
			g.file("web/vm.yaml", []byte(strings.Replace(yaml(id('a'), "web"), "version: 1", "version: 2", 1)))
		}, want: []string{"vm-definition VM_DEFINITION_INVALID"}, says: []string{"version"}},
		{name: "two images at once", make: func(g *rig) {
			g.file("web/vm.yaml", []byte(yaml(id('a'), "web", "{id: os, image: os.raw, os: true}", "{id: data, image: gone.raw}")))
			g.raw("web/os.raw", 700)
		}, want: []string{image + "DISK_IMAGE_MISSING", image + "DISK_IMAGE_TRUNCATED"}},
		{name: "the change-tracker refuses", make: func(g *rig) {
			g.machine("web", id('a'), "web")
			g.tracker.refuse = errcat.New(typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE, "somebody has it open")
		}, want: []string{"attach DISK_IN_USE"}, says: []string{"somebody"}},
		{name: "tracking is broken", make: func(g *rig) {
			g.machine("web", id('a'), "web")
			g.tracker.broken = errcat.New(typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN, "the sidecar is damaged")
		}, want: []string{"change-tracker TRACKING_BROKEN"}, says: []string{"sidecar"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t)
			c.make(g)
			if c.vm == "" {
				c.vm = "web"
			}
			findings, machine, err := g.driver.Check(testkit.Context(t), c.vm)
			require.NoError(t, err)
			if c.want == nil {
				c.want = []string{}
			}
			require.Equal(t, c.want, reasons(findings), "%v", findings)
			require.Equal(t, c.absent, machine == nil)
			var text, warned []string
			for _, f := range findings {
				require.NotEmpty(t, f.What)
				require.NotEmpty(t, f.Action, f.What)
				text = append(text, f.What)
				if f.Severity == hostproviderv1.Severity_SEVERITY_WARNING && f.Check != "free-space" {
					warned = append(warned, f.Check)
				}
			}
			for _, s := range c.says {
				require.Contains(t, strings.Join(text, "\n"), s)
			}
			if len(c.warns) != 1 || c.warns[0] != "*" {
				require.Equal(t, c.warns, warned)
			}
			// The inventory agrees: what forbids protection keeps a machine out of it, with the same reasons.
			if err := g.driver.Refresh(testkit.Context(t)); err == nil && c.name != "tracking is broken" {
				_, err := g.driver.Machine(testkit.Context(t), c.vm)
				require.Equal(t, len(c.want) == 0, err == nil, "%v", err)
			}
		})
	}
	g := newRig(t)
	_, _, err := g.driver.Check(testkit.Context(t), "nobody")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND), "%v", err)
}

func repeat(s string, n int) (out []string) {
	for range n {
		out = append(out, s)
	}
	return out
}
