package imagedir

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

// maxMachines bounds one host's folder.
const maxMachines = 1000

// stateFolder is the machine-level folder of the change-tracker's records, inside the machine's folder.
const stateFolder = ".landfall"

// Driver is the imagedir driver. Create it with [New].
type Driver struct {
	root, site, host string
	tracker          changetrackerv1.ChangeTrackerServiceClient
	log              *slog.Logger

	refreshing sync.Mutex // one look at the folders at a time, so that an older one cannot overwrite a newer

	mu       sync.Mutex
	ready    bool                        // looked once: only then "not here" means something
	machines map[string]*typesv1.Machine // by GUID, as attached; replaced as a whole
	attached map[string]*typesv1.Machine // the same by folder
	broken   []*found                    // folders with an error that hold no attached machine
	problems []*hostproviderv1.Finding
}

var _ hostprovider.Driver = (*Driver)(nil)

// New returns a driver for the machine folders directly below root. tracker is this host's change-tracker.
func New(root, site, host string, tracker changetrackerv1.ChangeTrackerServiceClient, log *slog.Logger) (*Driver, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("resolve image folder: %w", err)
	}
	info, err := os.Stat(abs)
	if err != nil {
		return nil, fmt.Errorf("image folder: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("image folder %s is not a folder", abs)
	}
	return &Driver{root: abs, site: site, host: host, tracker: tracker, log: log, attached: map[string]*typesv1.Machine{}}, nil
}

// Name is "imagedir".
func (d *Driver) Name() string { return "imagedir" }

// Refresh reads every machine folder and hands the sound ones to the change-tracker, which exports their
// disks. A machine that does not pass is listed as a problem and left alone; one that was attached stays
// in the inventory: a guest may be running on it, and its points go on.
func (d *Driver) Refresh(ctx context.Context) error {
	d.refreshing.Lock()
	defer d.refreshing.Unlock()
	folders, err := d.folders()
	if err != nil {
		return err
	}
	return d.attach(ctx, inspectAll(folders, d.site, d.host))
}

// attach hands what is sound to the change-tracker and makes it the inventory. What it refuses is added to the
// findings. The caller holds refreshing.
func (d *Driver) attach(ctx context.Context, all []*found) error {
	d.mu.Lock()
	before := d.attached
	d.mu.Unlock()
	machines, attached := map[string]*typesv1.Machine{}, map[string]*typesv1.Machine{}
	keep := func(folder string, m *typesv1.Machine) { machines[m.Id], attached[folder] = m, m }
	for _, f := range all {
		if len(f.errors()) > 0 {
			continue
		}
		r, err := d.tracker.AttachMachine(ctx, &changetrackerv1.AttachMachineRequest{
			Vm: f.machine.Id, StateDir: filepath.Join(f.folder, stateFolder), Disks: f.machine.Disks,
		})
		if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE) || ctx.Err() != nil {
			return fmt.Errorf("attach %s: %w", f.name, errors.Join(err, ctx.Err()))
		}
		if err != nil {
			f.add(refusal("attach", f, err))
			continue
		}
		f.machine.Disks = r.Disks
		keep(f.folder, f.machine)
	}
	var broken []*found
	var problems []*hostproviderv1.Finding
	for _, f := range all {
		errs := f.errors()
		if len(errs) == 0 {
			continue
		}
		problems = append(problems, errs...)
		if m := before[f.folder]; m != nil && machines[m.Id] == nil {
			keep(f.folder, m)
			continue
		}
		broken = append(broken, f)
	}
	d.mu.Lock()
	d.ready, d.machines, d.attached, d.broken, d.problems = true, machines, attached, broken, problems
	d.mu.Unlock()
	for folder, m := range attached {
		if before[folder] == nil {
			d.log.InfoContext(ctx, "machine found", "vm", m.Id, "name", m.DisplayName, "folder", folder)
		}
	}
	for folder, m := range before {
		if attached[folder] == nil {
			d.log.WarnContext(ctx, "machine is gone", "vm", m.Id, "name", m.DisplayName, "folder", folder)
		}
	}
	return nil
}

// refusal is what the change-tracker has against a machine.
func refusal(check string, f *found, err error) *hostproviderv1.Finding {
	return finding(check, errcat.Reason(err), fmt.Sprintf("%s: %v", f.label(), err), errcat.Detail(err, time.Time{}).Action)
}

// Machines lists the attached machines by display name, then id.
func (d *Driver) Machines(context.Context) ([]*typesv1.Machine, []*hostproviderv1.Finding, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.looked(); err != nil {
		return nil, nil, err
	}
	out := make([]*typesv1.Machine, 0, len(d.machines))
	for _, m := range d.machines {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *typesv1.Machine) int {
		return cmp.Or(strings.Compare(a.DisplayName, b.DisplayName), strings.Compare(a.Id, b.Id))
	})
	return out, slices.Clone(d.problems), nil
}

// looked is an error until the folders were looked at once: a host that is starting has not lost its machines.
func (d *Driver) looked() error {
	if d.ready {
		return nil
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "host %s is still looking for its machines", d.host)
}

// Machine finds one by GUID or unique display name. One that is here and cannot be used is refused with the reason
// that all its errors share, or VM_DEFINITION_INVALID, and what is wrong.
func (d *Driver) Machine(_ context.Context, vm string) (*typesv1.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.looked(); err != nil {
		return nil, err
	}
	if m, ok := d.machines[strings.ToLower(vm)]; ok {
		return m, nil
	}
	var match *typesv1.Machine
	for _, m := range d.machines {
		if m.DisplayName == vm {
			if match != nil {
				return nil, d.ambiguous(vm)
			}
			match = m
		}
	}
	if match != nil {
		return match, nil
	}
	for _, f := range d.broken {
		if byID, byName := f.answers(vm); byID || byName {
			var what []string
			reason := typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED
			for _, x := range f.errors() {
				what = append(what, x.What)
				if reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
					reason = x.Reason
				} else if x.Reason != reason {
					reason = typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID
				}
			}
			if reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
				reason = typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID
			}
			return nil, errcat.New(reason, "%s", strings.Join(what, "; ")).With("vm", vm)
		}
	}
	return nil, d.unknown(vm)
}

func (d *Driver) ambiguous(vm string) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "more than one machine on host %s is called %q: use the id", d.host, vm).With("vm", vm)
}

func (d *Driver) unknown(vm string) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "host %s has no machine %q", d.host, vm).With("vm", vm)
}

// Check looks at the folders afresh, since machines may contradict each other. Of a sound machine it also asks the
// change-tracker.
func (d *Driver) Check(ctx context.Context, vm string) ([]*hostproviderv1.Finding, *typesv1.Machine, error) {
	d.refreshing.Lock()
	defer d.refreshing.Unlock()
	folders, err := d.folders()
	if err != nil {
		return nil, nil, err
	}
	all := inspectAll(folders, d.site, d.host)
	d.mu.Lock()
	for _, f := range all { // one that is attached is known by its names, also when vm.yaml has lost them
		if m := d.attached[f.folder]; m != nil && f.id == "" {
			f.id, f.name = m.Id, cmp.Or(f.name, m.DisplayName)
		}
	}
	d.mu.Unlock()
	f, err := d.pick(all, vm)
	if err != nil {
		return nil, nil, err
	}
	if len(f.errors()) > 0 {
		return f.findings, f.machine, nil
	}
	if err := d.attach(ctx, all); err != nil {
		return nil, nil, err
	}
	if len(f.errors()) > 0 {
		return f.findings, f.machine, nil
	}
	_, err = d.tracker.GetTracking(ctx, &changetrackerv1.GetTrackingRequest{Vm: f.machine.Id})
	switch {
	case err == nil, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED):
	case errcat.Recoverable(err), ctx.Err() != nil:
		return nil, nil, err
	default:
		f.add(refusal("change-tracker", f, err))
	}
	return f.findings, f.machine, nil
}

// pick finds the folder that vm means. Folders that share an id each say so in their findings: any of them will do.
func (d *Driver) pick(all []*found, vm string) (*found, error) {
	var named []*found
	for _, f := range all {
		byID, byName := f.answers(vm)
		if byID {
			return f, nil
		}
		if byName {
			named = append(named, f)
		}
	}
	switch len(named) {
	case 0:
		return nil, d.unknown(vm)
	case 1:
		return named[0], nil
	}
	return nil, d.ambiguous(vm)
}

// Establish starts tracking.
func (d *Driver) Establish(ctx context.Context, vm, lineage string, epoch uint64) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.StartTracking(ctx, &changetrackerv1.StartTrackingRequest{Vm: strings.ToLower(vm), Lineage: lineage, Epoch: epoch})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// Dissolve ends tracking.
func (d *Driver) Dissolve(ctx context.Context, vm, lineage string, epoch uint64) error {
	_, err := d.tracker.StopTracking(ctx, &changetrackerv1.StopTrackingRequest{Vm: strings.ToLower(vm), Lineage: lineage, Epoch: epoch})
	return err
}

// Cut switches the logs of all disks at one instant. A folder of images has no guest agent: only crash consistency.
func (d *Driver) Cut(ctx context.Context, c hostprovider.Cut) (hostprovider.CutResult, error) {
	if c.Consistency != typesv1.Consistency_CONSISTENCY_CRASH {
		return hostprovider.CutResult{}, errcat.New(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "driver imagedir has no guest to freeze: only crash-consistent points")
	}
	r, err := d.tracker.SwitchLogs(ctx, &changetrackerv1.SwitchLogsRequest{Vm: strings.ToLower(c.VM), Lineage: c.Lineage, Point: c.Point, Epoch: c.Epoch})
	if err != nil {
		return hostprovider.CutResult{}, err
	}
	return hostprovider.CutResult{Point: r.Point, Consistency: typesv1.Consistency_CONSISTENCY_CRASH}, nil
}

// BeginPass fixes the start of a pass.
func (d *Driver) BeginPass(ctx context.Context, p hostprovider.Pass) (*typesv1.HostPoint, error) {
	r, err := d.tracker.BeginPass(ctx, &changetrackerv1.BeginPassRequest{Vm: strings.ToLower(p.VM), Lineage: p.Lineage, Pass: p.Pass, Epoch: p.Epoch, Scope: p.Scope})
	if err != nil {
		return nil, err
	}
	return r.Pass, nil
}

// SettlePass ends a pass.
func (d *Driver) SettlePass(ctx context.Context, s hostprovider.Settle) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.SettlePass(ctx, &changetrackerv1.SettlePassRequest{Vm: strings.ToLower(s.VM), Lineage: s.Lineage, Pass: s.Point, Epoch: s.Epoch, Outcome: s.Outcome})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// Stop fences the machine: its exports are closed, so that no guest can write. A folder of images has no guest to power
// down.
func (d *Driver) Stop(ctx context.Context, f hostprovider.Fence) (typesv1.PowerState, error) {
	_, err := d.tracker.FenceMachine(ctx, &changetrackerv1.FenceMachineRequest{Vm: strings.ToLower(f.VM), Lineage: f.Lineage, Epoch: f.Epoch, Failover: f.Failover})
	if err != nil {
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED, err
	}
	return typesv1.PowerState_POWER_STATE_OFF, nil
}

// Release has nothing to end.
func (d *Driver) Release(ctx context.Context, f hostprovider.Fence) error {
	_, err := d.Stop(ctx, f)
	return err
}

// Start opens the exports again. Whatever wants to run the machine finds its disks.
func (d *Driver) Start(ctx context.Context, f hostprovider.Fence) (typesv1.PowerState, error) {
	if f.Failover == "" {
		return typesv1.PowerState_POWER_STATE_UNSPECIFIED, nil
	}
	_, err := d.tracker.UnfenceMachine(ctx, &changetrackerv1.UnfenceMachineRequest{Vm: strings.ToLower(f.VM), Lineage: f.Lineage, Epoch: f.Epoch, Failover: f.Failover})
	return typesv1.PowerState_POWER_STATE_UNSPECIFIED, err
}

// Settle ends a point.
func (d *Driver) Settle(ctx context.Context, s hostprovider.Settle) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.SettleLogs(ctx, &changetrackerv1.SettleLogsRequest{Vm: strings.ToLower(s.VM), Lineage: s.Lineage, Point: s.Point, Epoch: s.Epoch, Outcome: s.Outcome})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// Points relays what the change-tracker holds.
func (d *Driver) Points(ctx context.Context, vm string) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.GetTracking(ctx, &changetrackerv1.GetTrackingRequest{Vm: strings.ToLower(vm)})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// folders are the machine folders, by name: those that hold vm.yaml, or a file that was meant to be it. A link to a
// folder counts as a folder.
func (d *Driver) folders() ([]string, error) {
	entries, err := os.ReadDir(d.root)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "read image folder")
	}
	var out []string
	for _, e := range entries {
		folder := filepath.Join(d.root, e.Name())
		if info, err := os.Stat(folder); err != nil || !info.IsDir() {
			continue
		}
		_, err := os.Stat(filepath.Join(folder, DefinitionFile))
		if errors.Is(err, os.ErrNotExist) {
			_, err = os.Stat(filepath.Join(folder, misnamedFile))
		}
		if !errors.Is(err, os.ErrNotExist) {
			out = append(out, folder)
		}
	}
	if len(out) > maxMachines {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, "%s holds %d machines, more than %d", d.root, len(out), maxMachines)
	}
	return out, nil
}
