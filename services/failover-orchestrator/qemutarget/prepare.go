package qemutarget

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

const (
	stateVersion = 1
	footerBytes  = 512
)

// state is stateFile (docs/formats/qemu-target.md): durable before QEMU is started.
type state struct {
	V       int       `json:"v"`
	UUID    string    `json:"uuid"`
	Boot    string    `json:"boot"`
	Started time.Time `json:"started"`
}

func readState(dir string) (s state, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	if err == nil && s.V != stateVersion {
		err = fmt.Errorf("it is of version %d, this program reads %d", s.V, stateVersion)
	}
	return s, err
}

// prepare makes what the machine needs beside its VHDs, unless it is there: it may hold what the guest wrote. The
// caller has the folder's lock.
func (t *Target) prepare(ctx context.Context, lock *os.File, f *vhdtarget.Folder, p target.Plan, l layout, fw firmware) error {
	if len(l.disks) == 0 {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "the machine has no disks")
	}
	for _, d := range l.disks {
		if err := t.overlay(ctx, lock, f, p.Dir, d.GetId()); err != nil {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "make the overlay of disk %s", d.GetId())
		}
	}
	if l.boot == failoverv1.BootMode_BOOT_MODE_UEFI && !regular(filepath.Join(p.Dir, variablesFile)) {
		raw, err := os.ReadFile(fw.variables)
		if err != nil {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, err, "read the UEFI variables")
		}
		if err := f.Write(variablesFile, raw); err != nil {
			return err
		}
	}
	// What an earlier machine left would be taken for this one's.
	for _, name := range []string{ConsoleFile, ScreenshotFile, ScreenshotPPMFile, MonitorSocket, AgentSocket, pidFile} {
		if err := os.Remove(filepath.Join(p.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove what an earlier start left")
		}
	}
	raw, err := json.Marshal(state{V: stateVersion, UUID: identity(p), Boot: l.boot.String(), Started: t.now().UTC()})
	if err != nil {
		return fmt.Errorf("encode %s: %w", stateFile, err)
	}
	return f.Write(stateFile, append(raw, '\n'))
}

// overlay makes a disk's overlay under its final name, whole and durable, or leaves the one that is there.
func (t *Target) overlay(ctx context.Context, lock *os.File, f *vhdtarget.Folder, dir, disk string) error {
	name := OverlayFile(disk)
	if regular(filepath.Join(dir, name)) {
		return nil
	}
	program, err := lookUp(t.config.ImageProgram, imagePackage)
	if err != nil {
		return err
	}
	vhd, err := os.Stat(filepath.Join(dir, vhdtarget.DiskFile(disk)))
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, vhdtarget.Partial(name))
	// The format must be named: a fixed VHD looks like a raw disk that is 512 bytes too long.
	if err := run(ctx, lock, program, "create", "-q", "-f", "qcow2", "-F", "vpc", "-b", vhdtarget.DiskFile(disk), temp); err != nil {
		return err
	}
	size, err := finishOverlay(temp)
	if err != nil {
		return err
	}
	// QEMU believes a VHD's size only of some creators, and makes up another one from its geometry else.
	if want := vhd.Size() - footerBytes; size != want {
		return fmt.Errorf("QEMU sees %d bytes in %s, which has %d", size, vhdtarget.DiskFile(disk), want)
	}
	return f.Finish(name)
}

// finishOverlay makes a new qcow2 file durable and reads its virtual size.
func finishOverlay(path string) (size int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var header [32]byte
	if _, err := f.ReadAt(header[:], 0); err != nil {
		return 0, err
	}
	return int64(binary.BigEndian.Uint64(header[24:])), f.Sync()
}
