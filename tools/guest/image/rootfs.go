package image

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/tools/guest"
)

// Where things stand on the OS disk.
const (
	kernelPath    = "/boot/vmlinuz"
	initramfsPath = "/boot/initrd.img"
	agentPath     = "/usr/sbin/qemu-ga"
	libraryFolder = "/usr/lib/x86_64-linux-gnu"
)

// stageRoot fills dir with all files of the OS disk.
func stageRoot(dir string, o Options, in inputs) error {
	for _, d := range []string{
		"boot", "dev", "proc", "sys", "run", "tmp", "root", "data", "etc", "var/lib/landfall", "usr/bin", "usr/sbin", "usr/lib64",
		strings.TrimPrefix(libraryFolder, "/"),
	} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	settings, err := json.Marshal(o.Settings)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		path string
		mode os.FileMode
		data []byte
	}{
		{kernelPath, 0o644, in.kernel},
		{initramfsPath, 0o644, in.initramfs},
		{guest.Program, 0o755, in.program},
		{"/usr/bin/busybox", 0o755, in.busybox},
		{guest.SettingsPath, 0o644, append(settings, '\n')},
		{"/etc/hostname", 0o644, []byte("landfall-guest\n")},
		{"/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")},
		{"/etc/group", 0o644, []byte("root:x:0:\n")},
	} {
		if err := os.WriteFile(filepath.Join(dir, f.path), f.data, f.mode); err != nil {
			return err
		}
	}
	for _, name := range []string{"init", "shutdown", "poweroff", "halt", "reboot"} {
		if err := os.Symlink(guest.Program, filepath.Join(dir, "usr/sbin", name)); err != nil {
			return err
		}
	}
	for _, applet := range in.applets {
		if err := linkApplet(dir, applet); err != nil {
			return err
		}
	}
	return copyAgent(dir, in.agentRoots)
}

// linkApplet makes a name of busybox. Not over what is there: the list names busybox itself, init and poweroff too.
func linkApplet(dir, applet string) error {
	for _, d := range []string{"usr/bin", "usr/sbin"} {
		if _, err := os.Lstat(filepath.Join(dir, d, applet)); err == nil {
			return nil
		}
	}
	return os.Symlink("/usr/bin/busybox", filepath.Join(dir, "usr/bin", applet))
}

// copyAgent copies the guest agent and the libraries that it needs, found by following what each ELF file says.
func copyAgent(dir string, roots []string) error {
	agent, err := findFile(roots, agentPath)
	if err != nil {
		return err
	}
	if err := copyFile(agent, filepath.Join(dir, agentPath), 0o755); err != nil {
		return err
	}
	loader, err := findLibrary(roots, "ld-linux-x86-64.so.2")
	if err != nil {
		return err
	}
	if err := copyFile(loader, filepath.Join(dir, "usr/lib64/ld-linux-x86-64.so.2"), 0o755); err != nil {
		return err
	}
	done := []string{"ld-linux-x86-64.so.2"}
	for todo := []string{agent}; len(todo) > 0; todo = todo[1:] {
		needs, err := needed(todo[0])
		if err != nil {
			return err
		}
		for _, name := range needs {
			if slices.Contains(done, name) {
				continue
			}
			done = append(done, name)
			file, err := findLibrary(roots, name)
			if err != nil {
				return fmt.Errorf("%s needs it: %w", filepath.Base(todo[0]), err)
			}
			if err := copyFile(file, filepath.Join(dir, libraryFolder, name), 0o755); err != nil {
				return err
			}
			todo = append(todo, file)
		}
	}
	return nil
}

// needed lists the libraries that an ELF file asks for.
func needed(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", filepath.Base(file), err)
	}
	defer f.Close()
	return f.ImportedLibraries()
}

func findLibrary(roots []string, name string) (string, error) {
	for _, dir := range []string{libraryFolder, "/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64"} {
		if f, err := findFile(roots, path.Join(dir, name)); err == nil {
			return f, nil
		}
	}
	return "", fmt.Errorf("library %s: in none of the packages of the guest agent", name)
}

// findFile finds a file in the unpacked packages and follows links within its package.
func findFile(roots []string, name string) (string, error) {
	for _, root := range roots {
		p := name
		for range 8 {
			file := filepath.Join(root, p)
			to, err := os.Readlink(file)
			if err != nil {
				if _, err := os.Stat(file); err == nil {
					return file, nil
				}
				break
			}
			if !path.IsAbs(to) {
				to = path.Join(path.Dir(p), to)
			}
			p = to
		}
	}
	return "", fmt.Errorf("%s: %w in the packages", name, fs.ErrNotExist)
}

func copyFile(from, to string, mode os.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}

// staticBusybox reads the machine's busybox and its list of names.
func staticBusybox(ctx context.Context) (program []byte, applets []string, err error) {
	file, err := lookup("busybox")
	if err != nil {
		return nil, nil, err
	}
	if libraries, err := needed(file); err != nil || len(libraries) > 0 {
		return nil, nil, errors.Join(fmt.Errorf("%s: not a static program: %w (Debian package busybox-static)", file, ErrMissing), err)
	}
	if program, err = os.ReadFile(file); err != nil {
		return nil, nil, err
	}
	out, err := command(ctx, "", nil, "busybox", "--list")
	return program, strings.Fields(string(out)), err
}
