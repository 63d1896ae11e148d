package inside

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/tools/guest"
)

// ModulesFolder holds the kernel modules in the initial RAM file system, and ModuleOrder their names in the order of loading.
const (
	ModulesFolder = "/modules"
	ModuleOrder   = ModulesFolder + "/order"
)

// osStateEnv hands the state of the OS disk's file system over to the second stage, in JSON.
const osStateEnv = "LANDFALL_OS_STATE"

// findTimeout bounds the wait for a disk to appear.
const findTimeout = 60 * time.Second

// Stage1 is /init of the initial RAM file system. It does not return when all goes well.
func Stage1() error {
	for _, m := range []struct{ source, target, fstype string }{
		{"dev", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sys", "/sys", "sysfs"},
	} {
		if err := mountOne(m.source, m.target, m.fstype, 0, ""); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), findTimeout)
	defer cancel()
	state, err := findFS(ctx, guest.OSLabel)
	if err != nil {
		return err
	}
	// From here on the journal is replayed, if there is something in it.
	if err := mountOne(state.Device, "/root", "ext4", unix.MS_NOATIME, "errors=remount-ro"); err != nil {
		return err
	}
	b, err := json.Marshal(state)
	if err != nil {
		return err
	}
	return switchRoot("/root", "/sbin/init", osStateEnv+"="+string(b))
}

// loadModules loads what the image's builder listed. A module whose hardware is not there refuses: that is fine.
func loadModules() error {
	b, err := os.ReadFile(ModuleOrder)
	if err != nil {
		return fmt.Errorf("load modules: %w", err)
	}
	hyperv := onHyperV()
	for name := range strings.FieldsSeq(string(b)) {
		if !hyperv && (strings.HasPrefix(name, "hv_") || strings.HasPrefix(name, "hyperv")) {
			continue
		}
		f, err := os.Open(filepath.Join(ModulesFolder, name))
		if err != nil {
			return fmt.Errorf("load modules: %w", err)
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			say(fmt.Sprintf("landfall-guest: module %s: %v", name, err))
		}
	}
	return nil
}

// onHyperV tells whether the machine's maker is Microsoft; its drivers take time to find out by themselves.
func onHyperV() bool {
	b, err := os.ReadFile("/sys/class/dmi/id/sys_vendor")
	return err == nil && strings.HasPrefix(string(b), "Microsoft")
}

// switchRoot makes root the file system of everything and runs init from it.
func switchRoot(root, init, env string) error {
	for _, m := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(m, root+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m, err)
		}
	}
	// What the RAM file system holds would stay in memory for ever.
	_ = os.RemoveAll(ModulesFolder)
	_ = os.Remove("/init")
	if err := os.Chdir(root); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	return fmt.Errorf("run %s: %w", init, unix.Exec(init, []string{"init"}, append(environment(), env)))
}

// environment is what processes of the guest get.
func environment() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux"}
}
