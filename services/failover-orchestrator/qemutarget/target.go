package qemutarget

import (
	"context"
	"errors"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// The Debian packages that have the programs.
const (
	systemPackage = "qemu-system-x86"
	imagePackage  = "qemu-utils"
)

// Target is recovery target "qemu".
type Target struct {
	config Config
	now    func() time.Time
}

var _ target.Target = (*Target)(nil)

// New returns the target; config is valid. now is the clock by which the boot is timed: it is stored, and read by later
// processes.
func New(config Config, now func() time.Time) *Target { return &Target{config: config, now: now} }

// Kind implements target.Target.
func (t *Target) Kind() failoverv1.TargetKind { return failoverv1.TargetKind_TARGET_KIND_QEMU }

// Boots implements target.Target.
func (t *Target) Boots() bool { return true }

// Check implements target.Target.
func (t *Target) Check(ctx context.Context, p target.Plan) (existed bool, err error) {
	f, err := vhdtarget.New(p.Dir, p.Failover)
	if err != nil {
		return false, err
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if _, _, err := t.able(p); err != nil {
		return false, err
	}
	return f.Check()
}

// able says what the machine will be, or why it cannot be made here.
func (t *Target) able(p target.Plan) (l layout, fw firmware, err error) {
	if err := supported(); err != nil {
		return l, fw, err
	}
	if l, err = layoutOf(p.Machine, p.Qemu); err != nil {
		return l, fw, err
	}
	if err := reachable(p.Dir); err != nil {
		return l, fw, err
	}
	if _, err := lookUp(t.config.Program, systemPackage); err != nil {
		return l, fw, err
	}
	if _, err := lookUp(t.config.ImageProgram, imagePackage); err != nil {
		return l, fw, err
	}
	if l.boot == failoverv1.BootMode_BOOT_MODE_UEFI {
		fw, err = t.config.firmware()
	}
	return l, fw, err
}

// Claim implements target.Target.
func (t *Target) Claim(ctx context.Context, p target.Plan, existed bool) ([]string, error) {
	f, err := vhdtarget.New(p.Dir, p.Failover)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return f.Take(existed, files(p.Machine))
}

// Sink implements target.Target: the disks are those of target vhd.
func (t *Target) Sink(ctx context.Context, p target.Plan) (target.Sink, error) {
	return vhdtarget.Target{}.Sink(ctx, p)
}

// DiskFile implements target.Target.
func (t *Target) DiskFile(disk string) string { return vhdtarget.DiskFile(disk) }

// Describe implements target.Target. Overlays are made by Boot, which has the lock that keeps them from being made twice.
func (t *Target) Describe(ctx context.Context, p target.Plan, vm []byte) error {
	return vhdtarget.Target{}.Describe(ctx, p, vm)
}

// Owner implements target.Target.
func (t *Target) Owner(p target.Plan) (string, error) { return vhdtarget.Target{}.Owner(p) }

// Running implements target.Target.
func (t *Target) Running(ctx context.Context, p target.Plan) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	m := machineOf(p)
	alive, err := m.alive()
	return alive, m.trouble(err)
}

// Shutdown implements target.Target.
func (t *Target) Shutdown(ctx context.Context, p target.Plan) error {
	m := machineOf(p)
	if err := m.shutdown(ctx, t.config.ShutdownTimeout); err != nil {
		return m.trouble(err)
	}
	return m.end(ctx, t.config.StartTimeout)
}

// Remove implements target.Target. The machine is ended by what is known of it, marker or none: its UUID is this
// failover's alone.
func (t *Target) Remove(ctx context.Context, p target.Plan, existed bool) (detail string, err error) {
	f, err := vhdtarget.New(p.Dir, p.Failover)
	if err != nil {
		return "", err
	}
	m := machineOf(p)
	for {
		if err := m.end(ctx, t.config.StartTimeout); err != nil {
			return "", err
		}
		owner, err := f.Owner()
		if err != nil {
			return "", err
		}
		if owner != p.Failover {
			return f.Clear(existed)
		}
		lock, err := tryLock(p.Dir) // nobody starts it again while its files go
		if errors.Is(err, errHeld) {
			if err := pause(ctx, look); err != nil {
				return "", err
			}
			continue
		}
		if err != nil {
			return "", errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "lock the folder")
		}
		defer lock.Close()
		return f.Clear(existed)
	}
}
