package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// commandTimeout bounds each external command; a download on a slow line is the longest.
const commandTimeout = 3 * time.Minute

// commandPackages tells for each external command which Debian package has it.
var commandPackages = map[string]string{
	"apt-cache": "apt", "apt-get": "apt", "dpkg-deb": "dpkg", "go": "golang-go",
	"mke2fs": "e2fsprogs", "mformat": "mtools", "mmd": "mtools", "mcopy": "mtools",
	"grub-mkimage": "grub-common", "qemu-img": "qemu-utils", "busybox": "busybox-static",
	"qemu-system-x86_64": "qemu-system-x86",
}

// filePackages tells the same for files.
var filePackages = map[string]string{
	"/usr/lib/grub/i386-pc/boot.img":      "grub-pc-bin",
	"/usr/lib/grub/x86_64-efi/modinfo.sh": "grub-efi-amd64-bin",
	"/usr/share/OVMF/OVMF_CODE_4M.fd":     "ovmf",
}

// ErrMissing is wrapped when the machine lacks a program or a file; the text names the Debian package.
var ErrMissing = errors.New("missing on this machine")

// lookup finds a command; administrators' folders are searched too, as they are not on every user's path.
func lookup(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if info, err := os.Stat(dir + name); err == nil && info.Mode()&0o111 != 0 {
			return dir + name, nil
		}
	}
	return "", fmt.Errorf("%s: %w (Debian package %s)", name, ErrMissing, commandPackages[name])
}

// Missing tells what this machine lacks to build (and, when run is set, to run) the guest; nil when nothing.
func Missing(run bool) error {
	var errs []error
	for _, name := range []string{"go", "dpkg-deb", "mke2fs", "mformat", "mmd", "mcopy", "grub-mkimage", "busybox", "qemu-img", "qemu-system-x86_64"} {
		if _, err := lookup(name); err != nil && (run || name != "qemu-system-x86_64") {
			errs = append(errs, err)
		}
	}
	for _, path := range []string{"/usr/lib/grub/i386-pc/boot.img", "/usr/lib/grub/x86_64-efi/modinfo.sh", "/usr/share/OVMF/OVMF_CODE_4M.fd"} {
		if _, err := os.Stat(path); err != nil && (run || !strings.Contains(path, "OVMF")) {
			errs = append(errs, fmt.Errorf("%s: %w (Debian package %s)", path, ErrMissing, filePackages[path]))
		}
	}
	return errors.Join(errs...)
}

// command runs a program to its end and returns its standard output. What it says on standard error is in the error.
func command(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	path, err := lookup(name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Env = append(cmd.Env, env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(stderr.String())
		if len(text) > 2000 {
			text = text[len(text)-2000:]
		}
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
	}
	return stdout.Bytes(), nil
}
