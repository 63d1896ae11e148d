package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/tools/guest"
)

// Image is a guest that was built: two raw files.
type Image struct {
	OS, Data string
}

// inputs is what goes onto the OS disk.
type inputs struct {
	kernel, initramfs, program, busybox []byte
	applets                             []string
	agentRoots                          []string // unpacked packages
}

// guestProgram is built when Options names none.
const guestProgram = "github.com/landfall-dr/landfall/tools/guest/cmd/landfall-guest"

// kernelArgs: console output goes to the screen and to the serial port, which
// is the console proper; a panic ends the machine at once (QEMU has -no-reboot).
const kernelArgs = "root=none console=tty0 console=ttyS0,115200 loglevel=4 panic=-1 mitigations=off nokaslr"

// Build makes both disks in Options.Out.
func Build(ctx context.Context, o Options) (Image, error) {
	if err := o.Validate(); err != nil {
		return Image{}, fmt.Errorf("build a guest: %w", err)
	}
	if err := Missing(false); err != nil {
		return Image{}, fmt.Errorf("build a guest: %w", err)
	}
	for _, d := range []string{o.Cache, o.Out} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return Image{}, fmt.Errorf("build a guest: %w", err)
		}
	}
	work, err := os.MkdirTemp(o.Out, ".build-")
	if err != nil {
		return Image{}, fmt.Errorf("build a guest: %w", err)
	}
	defer os.RemoveAll(work)
	img := Image{OS: filepath.Join(o.Out, "os.raw"), Data: filepath.Join(o.Out, "data.raw")}
	if err := buildIn(ctx, o, work, img); err != nil {
		return Image{}, fmt.Errorf("build a guest: %w", err)
	}
	return img, nil
}

func buildIn(ctx context.Context, o Options, work string, img Image) error {
	var in inputs
	var bootImg, coreImg []byte
	esp := filepath.Join(work, "efi.img")
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		in, err = gather(gctx, o, work)
		return err
	})
	g.Go(func() (err error) {
		bootImg, coreImg, err = loaders(gctx, o, work, esp)
		return err
	})
	g.Go(func() error { return makeExt4(gctx, img.Data, o.DataBytes, guest.DataLabel, "") })
	if err := g.Wait(); err != nil {
		return err
	}
	stage := filepath.Join(work, "root")
	if err := stageRoot(stage, o, in); err != nil {
		return fmt.Errorf("files of the OS disk: %w", err)
	}
	parts := layout(o.OSBytes)
	rootImg := filepath.Join(work, "root.img")
	if err := makeExt4(ctx, rootImg, parts[2].len, guest.OSLabel, stage); err != nil {
		return err
	}
	return assemble(img.OS, o.OSBytes, parts, bootImg, coreImg, esp, rootImg)
}

// gather fetches and builds everything that goes onto the OS disk.
func gather(ctx context.Context, o Options, work string) (inputs, error) {
	var in inputs
	set, err := resolve(ctx, o.Cache)
	if err != nil {
		return in, err
	}
	var kernelRoot string
	in.agentRoots = make([]string, len(set.Agent))
	g, gctx := errgroup.WithContext(ctx)
	// One after the other: two apts at a time get into each other's way.
	g.Go(func() (err error) {
		kernelRoot, err = unpack(gctx, o.Cache, set.Kernel, "kernel", wantOfKernel)
		for i := 0; err == nil && i < len(set.Agent); i++ {
			in.agentRoots[i], err = unpack(gctx, o.Cache, set.Agent[i], "agent", wantOfAgent)
		}
		return err
	})
	g.Go(func() (err error) {
		in.program, err = buildProgram(gctx, o.Program, work)
		return err
	})
	g.Go(func() (err error) {
		in.busybox, in.applets, err = staticBusybox(gctx)
		return err
	})
	if err := g.Wait(); err != nil {
		return in, err
	}
	if err := remember(o.Cache, set); err != nil {
		return in, err
	}
	kernels, err := filepath.Glob(filepath.Join(kernelRoot, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return in, fmt.Errorf("package %s has %d kernels", set.Kernel.Name, len(kernels))
	}
	if in.kernel, err = os.ReadFile(kernels[0]); err != nil {
		return in, err
	}
	order, err := moduleSet(kernelRoot)
	if err != nil {
		return in, err
	}
	in.initramfs, err = initramfs(in.program, order)
	return in, err
}

func wantOfKernel(name string) bool {
	return strings.HasPrefix(name, "/boot/vmlinuz-") || strings.HasSuffix(name, ".ko") &&
		(strings.Contains(name, "/drivers/") || strings.Contains(name, "/crypto/") || strings.Contains(name, "/net/core/") || strings.Contains(name, "/lib/"))
}

func wantOfAgent(name string) bool {
	return name == agentPath || strings.Contains(name, ".so")
}

// buildProgram compiles landfall-guest, or reads the one that was named.
func buildProgram(ctx context.Context, given, work string) ([]byte, error) {
	if given != "" {
		return os.ReadFile(given)
	}
	out := filepath.Join(work, "landfall-guest")
	_, err := command(ctx, "", []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64"},
		"go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, guestProgram)
	if err != nil {
		return nil, fmt.Errorf("build landfall-guest (the working folder must be in the repository): %w", err)
	}
	return os.ReadFile(out)
}

// grubConfig finds the OS disk by its label, whatever number the firmware gave it.
// protocol "16" enters the kernel in real mode, as a BIOS loader may: under
// software emulation it takes 0.5 s from there to the kernel's first line, and 2.5 s from GRUB's 32-bit entry.
func grubConfig(protocol, extra string) string {
	return "search --no-floppy --label " + guest.OSLabel + " --set root\n" +
		"linux" + protocol + " " + kernelPath + " " + strings.TrimSpace(kernelArgs+" "+extra) + "\n" +
		"initrd" + protocol + " " + initramfsPath + "\nboot\n"
}

// loaders makes GRUB for BIOS (boot.img and core.img) and the EFI partition with GRUB in it.
func loaders(ctx context.Context, o Options, work, esp string) (boot, core []byte, err error) {
	coreFile, efiFile := filepath.Join(work, "core.img"), filepath.Join(work, "BOOTX64.EFI")
	for _, l := range []struct {
		format, out, protocol string
		modules               []string
	}{
		{"i386-pc", coreFile, "16", []string{"biosdisk", "linux16"}},
		{"x86_64-efi", efiFile, "", []string{"fat", "linux", "all_video"}},
	} {
		config := l.out + ".cfg"
		if err := os.WriteFile(config, []byte(grubConfig(l.protocol, o.KernelArgs)), 0o644); err != nil {
			return nil, nil, err
		}
		args := append([]string{"-O", l.format, "-o", l.out, "-c", config, "-p", "/grub", "part_gpt", "ext2", "search", "search_label", "normal", "boot"}, l.modules...)
		if _, err := command(ctx, "", nil, "grub-mkimage", args...); err != nil {
			return nil, nil, err
		}
	}
	env := []string{"MTOOLS_SKIP_CHECK=1", "MTOOLSRC=/dev/null"}
	for _, c := range [][]string{
		{"mformat", "-i", esp, "-C", "-T", strconv.Itoa(efiLen / sector), "-v", "LANDFALL", "::"},
		{"mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"},
		{"mcopy", "-i", esp, efiFile, "::/EFI/BOOT/BOOTX64.EFI"},
	} {
		if _, err := command(ctx, "", env, c[0], c[1:]...); err != nil {
			return nil, nil, err
		}
	}
	if boot, err = os.ReadFile("/usr/lib/grub/i386-pc/boot.img"); err != nil {
		return nil, nil, err
	}
	core, err = os.ReadFile(coreFile)
	return boot, core, err
}

// makeExt4 makes a file with an ext4 of this size, filled from a folder if there is one.
// Tables and journal are written now: a kernel that does it later in the background writes without being asked.
// Newer features that GRUB does not read are off.
func makeExt4(ctx context.Context, file string, size int64, label, from string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	args := []string{"-q", "-F", "-t", "ext4", "-b", "4096", "-N", "8192", "-m", "0", "-J", "size=8", "-L", label,
		"-O", "^metadata_csum_seed,^orphan_file", "-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard"}
	if from != "" {
		args = append(args, "-d", from)
	}
	_, err = command(ctx, "", nil, "mke2fs", append(args, file)...)
	return err
}

// assemble writes the OS disk.
func assemble(file string, size int64, parts []partition, boot, core []byte, esp, root string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("OS disk: %w", err)
	}
	defer func() {
		if errClose := f.Close(); err == nil && errClose != nil {
			err = fmt.Errorf("OS disk: %w", errClose)
		}
	}()
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("OS disk: %w", err)
	}
	if err := writeGPT(f, size, parts); err != nil {
		return err
	}
	if err := writeGRUB(f, boot, core, parts[0]); err != nil {
		return err
	}
	if err := copySparse(f, parts[1].off, esp); err != nil {
		return fmt.Errorf("EFI partition: %w", err)
	}
	if err := copySparse(f, parts[2].off, root); err != nil {
		return fmt.Errorf("root partition: %w", err)
	}
	return nil
}
