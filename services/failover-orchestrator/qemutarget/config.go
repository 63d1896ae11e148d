package qemutarget

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Config is how this machine runs QEMU.
type Config struct {
	// Program is QEMU: a name that is looked for in PATH, or a path.
	Program string `koanf:"program"`
	// ImageProgram is qemu-img: a name that is looked for in PATH, or a path.
	ImageProgram string `koanf:"image_program"`
	// Accelerator is QEMU's -accel. It is never looked for: /dev/kvm may be there and not work.
	Accelerator string `koanf:"accelerator"`
	// CPU is QEMU's -cpu.
	CPU string `koanf:"cpu"`
	// FirmwareCode and FirmwareVariables are OVMF's two files; both empty looks where distributions put them.
	FirmwareCode      string `koanf:"firmware_code"`
	FirmwareVariables string `koanf:"firmware_variables"`
	// StartTimeout bounds the time that QEMU has until its monitor answers, and until it is gone when it is ended.
	StartTimeout time.Duration `koanf:"start_timeout"`
	// ShutdownTimeout is how long a guest that was asked to power down may take before it is ended by force.
	ShutdownTimeout time.Duration `koanf:"shutdown_timeout"`
}

// Default is software emulation: it works everywhere.
func Default() Config {
	return Config{
		Program: "qemu-system-x86_64", ImageProgram: "qemu-img",
		Accelerator: "tcg,thread=multi", CPU: "max,la57=off",
		StartTimeout: 30 * time.Second, ShutdownTimeout: time.Minute,
	}
}

// Problems are all that is wrong, each with its key first.
func (c Config) Problems() (problems []error) {
	for _, s := range []struct{ key, value string }{
		{"program", c.Program}, {"image_program", c.ImageProgram}, {"accelerator", c.Accelerator}, {"cpu", c.CPU},
	} {
		if s.value == "" || strings.HasPrefix(s.value, "-") {
			problems = append(problems, fmt.Errorf("%s: %q must be a value, not empty and not an option", s.key, s.value))
		}
	}
	if (c.FirmwareCode == "") != (c.FirmwareVariables == "") {
		problems = append(problems, errors.New("firmware_code: must be given together with firmware_variables"))
	}
	for _, s := range []struct {
		key   string
		value time.Duration
	}{{"start_timeout", c.StartTimeout}, {"shutdown_timeout", c.ShutdownTimeout}} {
		if s.value < time.Second || s.value > 10*time.Minute {
			problems = append(problems, fmt.Errorf("%s: %s must be 1s to 10m", s.key, s.value))
		}
	}
	return problems
}

// firmware is a pair of OVMF files that fit each other.
type firmware struct{ code, variables string }

// usualFirmware is where Debian and Ubuntu, Fedora, Arch and QEMU's own packages put OVMF without secure boot.
var usualFirmware = []firmware{
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
	{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
	{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
	{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
	{"/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"},
	{"/opt/homebrew/share/qemu/edk2-x86_64-code.fd", "/opt/homebrew/share/qemu/edk2-i386-vars.fd"},
}

func (c Config) firmware() (firmware, error) {
	candidates := usualFirmware
	if c.FirmwareCode != "" {
		candidates = []firmware{{c.FirmwareCode, c.FirmwareVariables}}
	}
	for _, f := range candidates {
		if regular(f.code) && regular(f.variables) {
			return f, nil
		}
	}
	if c.FirmwareCode != "" {
		return firmware{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, "the UEFI firmware %s with %s is not there", c.FirmwareCode, c.FirmwareVariables)
	}
	return firmware{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, "UEFI firmware for QEMU is not installed (Debian package ovmf)")
}

func regular(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// lookUp finds a program; pkg is the Debian package that has it.
func lookUp(program, pkg string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, "%s is not installed (Debian package %s)", program, pkg).With("package", pkg)
	}
	return path, nil
}
