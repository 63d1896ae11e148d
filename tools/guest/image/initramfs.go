package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// modules are loaded in this order, each after what it depends on. Disks come
// first: while their drivers look for them the others are loaded.
// Hyper-V's are there so that the guest should start on Hyper-V and Azure too.
var modules = []string{
	"virtio_pci", "virtio_blk", "ata_piix", "sd_mod", "virtio_scsi", "hv_vmbus", "hv_storvsc",
	"crc32c_intel", "virtio_console", "evdev", "button", "virtio_rng", "hv_utils", "hyperv_keyboard", "virtio_net",
}

// moduleSet finds the named modules and what they depend on in an unpacked
// kernel package: module files in the order of loading. What a kernel has not
// (built in, or not for this configuration) is left out.
func moduleSet(root string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, ".ko") {
			files[moduleName(p)] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []string
	var add func(name string) error
	add = func(name string) error {
		file, ok := files[name]
		if !ok || slices.Contains(order, file) {
			return nil
		}
		depends, err := moduleDepends(file)
		if err != nil {
			return err
		}
		for _, d := range depends {
			if err := add(d); err != nil {
				return err
			}
		}
		order = append(order, file)
		return nil
	}
	for _, m := range modules {
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for _, must := range []string{"virtio_pci", "virtio_blk", "ata_piix", "sd_mod", "virtio_console", "evdev", "button"} {
		if files[must] == "" {
			return nil, fmt.Errorf("the kernel package has no module %s", must)
		}
	}
	return order, nil
}

// moduleName is a file's module name: dashes and underscores are the same.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(filepath.ToSlash(file)), ".ko"), "-", "_")
}

// moduleDepends reads what a module says itself about others it needs.
func moduleDepends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", filepath.Base(file), err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("module %s: no .modinfo", filepath.Base(file))
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", filepath.Base(file), err)
	}
	var names []string
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			for name := range strings.SplitSeq(list, ",") {
				names = append(names, strings.ReplaceAll(name, "-", "_"))
			}
		}
	}
	return names, nil
}

// initramfs packs the program and the modules as the kernel takes them.
func initramfs(program []byte, moduleFiles []string) ([]byte, error) {
	var archive cpio
	for _, dir := range []string{"dev", "proc", "sys", "root", "modules"} {
		archive.dir(dir)
	}
	archive.console()
	archive.file("init", 0o755, program)
	var order []string
	for _, m := range moduleFiles {
		b, err := os.ReadFile(m)
		if err != nil {
			return nil, fmt.Errorf("initial RAM file system: %w", err)
		}
		name := moduleName(m) + ".ko"
		archive.file("modules/"+name, 0o644, b)
		order = append(order, name)
	}
	archive.file("modules/order", 0o644, []byte(strings.Join(order, "\n")+"\n"))
	archive.end()

	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.DefaultCompression)
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(archive.out.Bytes()); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// cpio writes an archive in the "newc" format, which has a header of hexadecimal words before each name.
type cpio struct {
	out   bytes.Buffer
	inode int
}

// Types of files in the mode word.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeChar = 0o020000
)

func (c *cpio) entry(name string, mode int, major, minor int, content []byte) {
	c.inode++
	fmt.Fprintf(&c.out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0)
	c.out.WriteString(name)
	c.out.WriteByte(0)
	c.pad()
	c.out.Write(content)
	c.pad()
}

func (c *cpio) pad() {
	for c.out.Len()%4 != 0 {
		c.out.WriteByte(0)
	}
}

func (c *cpio) dir(name string) { c.entry(name, modeDir|0o755, 0, 0, nil) }
func (c *cpio) file(name string, perm int, content []byte) {
	c.entry(name, modeFile|perm, 0, 0, content)
}
func (c *cpio) console() { c.entry("dev/console", modeChar|0o600, 5, 1, nil) }
func (c *cpio) end()     { c.entry("TRAILER!!!", 0, 0, 0, nil) }
