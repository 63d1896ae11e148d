package vhdtarget

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// Target is recovery target "vhd". It has no settings; the zero value is ready.
type Target struct{}

var _ target.Target = Target{}

// Kind implements target.Target.
func (Target) Kind() failoverv1.TargetKind { return failoverv1.TargetKind_TARGET_KIND_VHD }

// Boots implements target.Target: a folder does not boot.
func (Target) Boots() bool { return false }

// Check implements target.Target.
func (Target) Check(ctx context.Context, p target.Plan) (existed bool, err error) {
	f, err := New(p.Dir, p.Failover)
	if err != nil {
		return false, err
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	return f.Check()
}

// Files are the names of what the copy consists of: the disks, then vm.json.
func Files(m *typesv1.Machine) (names []string) {
	for _, d := range m.GetDisks() {
		names = append(names, DiskFile(d.GetId()))
	}
	return append(names, MachineFile)
}

// Claim implements target.Target.
func (Target) Claim(ctx context.Context, p target.Plan, existed bool) ([]string, error) {
	f, err := New(p.Dir, p.Failover)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return f.Take(existed, Files(p.Machine))
}

// Sink implements target.Target.
func (Target) Sink(ctx context.Context, p target.Plan) (target.Sink, error) {
	f, err := New(p.Dir, p.Failover)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(ctx.Err(), f.Require()); err != nil {
		return nil, err
	}
	return f.Sink(), nil
}

// DiskFile implements target.Target.
func (Target) DiskFile(disk string) string { return DiskFile(disk) }

// Describe implements target.Target.
func (Target) Describe(ctx context.Context, p target.Plan, vm []byte) error {
	f, err := New(p.Dir, p.Failover)
	if err != nil {
		return err
	}
	if err := errors.Join(ctx.Err(), f.Require()); err != nil {
		return err
	}
	return f.WriteMachine(vm)
}

// Boot implements target.Target: nothing boots.
func (Target) Boot(context.Context, target.Plan, func(string)) (*typesv1.BootEvidence, error) {
	return nil, nil
}

// Running implements target.Target: nothing runs.
func (Target) Running(context.Context, target.Plan) (bool, error) { return false, nil }

// Shutdown implements target.Target: nothing runs.
func (Target) Shutdown(context.Context, target.Plan) error { return nil }

// Remove implements target.Target.
func (Target) Remove(ctx context.Context, p target.Plan, existed bool) (detail string, err error) {
	f, err := New(p.Dir, p.Failover)
	if err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return f.Clear(existed)
}

// Owner implements target.Target.
func (Target) Owner(p target.Plan) (string, error) {
	f, err := New(p.Dir, p.Failover)
	if err != nil {
		return "", err
	}
	return f.Owner()
}

// Take claims the folder and answers the names in its marker: those of the first claim, when this is a repeat.
func (f *Folder) Take(existed bool, files []string) ([]string, error) {
	if err := f.Claim(existed, files); err != nil {
		return nil, err
	}
	m, err := f.marker()
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read the marker of %s", f.dir)
	}
	return m.Files, nil
}

// Clear removes what this failover made and says in one line what was removed, or left, or not found. existed is false
// where the failover made the folder: then it goes too when it is empty, with a marker or without.
func (f *Folder) Clear(existed bool) (detail string, err error) {
	owner, err := f.Owner()
	if err != nil {
		return "", err
	}
	if owner != "" && owner != f.failover {
		// A marker is never replaced, so ours was removed before the other failover could claim the folder.
		return fmt.Sprintf("%s belongs to failover %s now; nothing of this one is in it", f.dir, owner), nil
	}
	kept, err := f.Remove()
	if err != nil {
		return "", err
	}
	if owner == "" { // never claimed, removed before, taken away by hand, or on another machine: say what is seen
		if detail = f.unclaimed(); detail != "" {
			return detail, nil
		}
	}
	if len(kept) > 0 {
		return "left what others put there: " + strings.Join(kept, " "), nil
	}
	if !existed { // a process may have died between the marker's removal and the folder's
		if err := f.Drop(); err != nil {
			return "", err
		}
	}
	return f.dir + " is as it was", nil
}

// unclaimed describes a folder without a marker from which nothing was removed; "" when it is there and empty.
func (f *Folder) unclaimed() string {
	entries, err := os.ReadDir(f.dir)
	if errors.Is(err, os.ErrNotExist) {
		host, _ := os.Hostname() // only for people
		return fmt.Sprintf("nothing to remove: there is no folder %s on %s", f.dir, host)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("removed nothing: %s has no marker of this failover; it holds %s", f.dir, strings.Join(names, " "))
}
