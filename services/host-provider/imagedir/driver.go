package imagedir

import (
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

	mu       sync.Mutex
	machines map[string]*typesv1.Machine // by GUID, as attached; replaced as a whole
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
	return &Driver{root: abs, site: site, host: host, tracker: tracker, log: log, machines: map[string]*typesv1.Machine{}}, nil
}

// Name is "imagedir".
func (d *Driver) Name() string { return "imagedir" }

// Refresh reads every machine folder and hands the sound ones to the change-tracker, which exports their
// disks. A machine that does not pass is listed as a problem and left alone; one that was attached stays
// attached: a guest may be running on it.
func (d *Driver) Refresh(ctx context.Context) error {
	folders, err := d.folders()
	if err != nil {
		return err
	}
	found := map[string]*typesv1.Machine{}
	var problems []*hostproviderv1.Finding
	seen := newImages()
	for _, folder := range folders {
		findings, machine := inspect(folder, d.site, d.host, seen)
		if machine != nil {
			if other, twice := found[machine.Id]; twice {
				findings = append(findings, finding("machine-id", typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
					fmt.Sprintf("%s: id %s is already used by %s", folder, machine.Id, other.DisplayName), "give each machine its own GUID"))
			}
		}
		if failed(findings) {
			for _, f := range findings {
				if f.Severity == hostproviderv1.Severity_SEVERITY_ERROR {
					problems = append(problems, f)
				}
			}
			continue
		}
		attached, err := d.tracker.AttachMachine(ctx, &changetrackerv1.AttachMachineRequest{
			Vm: machine.Id, StateDir: filepath.Join(folder, stateFolder), Disks: machine.Disks,
		})
		if err != nil {
			problems = append(problems, finding("attach", errcat.Reason(err), fmt.Sprintf("%s: %v", folder, err), errcat.Detail(err, time.Time{}).Action))
			if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE) || ctx.Err() != nil {
				return fmt.Errorf("attach %s: %w", machine.DisplayName, err)
			}
			continue
		}
		machine.Disks = attached.Disks
		found[machine.Id] = machine
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.machines, d.problems = found, problems
	return nil
}

// Machines lists the attached machines by display name.
func (d *Driver) Machines(context.Context) ([]*typesv1.Machine, []*hostproviderv1.Finding, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*typesv1.Machine, 0, len(d.machines))
	for _, m := range d.machines {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *typesv1.Machine) int {
		return strings.Compare(a.DisplayName+a.Id, b.DisplayName+b.Id)
	})
	return out, slices.Clone(d.problems), nil
}

// Machine finds one by GUID or unique display name.
func (d *Driver) Machine(_ context.Context, vm string) (*typesv1.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m, ok := d.machines[strings.ToLower(vm)]; ok {
		return m, nil
	}
	var match *typesv1.Machine
	for _, m := range d.machines {
		if m.DisplayName == vm {
			if match != nil {
				return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "two machines on host %s are called %q: use the id", d.host, vm).With("vm", vm)
			}
			match = m
		}
	}
	if match != nil {
		return match, nil
	}
	return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "host %s has no machine %q", d.host, vm).With("vm", vm)
}

// Check looks at the machine's folder afresh.
func (d *Driver) Check(ctx context.Context, vm string) ([]*hostproviderv1.Finding, *typesv1.Machine, error) {
	folders, err := d.folders()
	if err != nil {
		return nil, nil, err
	}
	seen := newImages()
	for _, folder := range folders {
		findings, machine := inspect(folder, d.site, d.host, seen)
		if !names(folder, machine, vm) {
			continue
		}
		if machine != nil && !failed(findings) {
			if err := d.Refresh(ctx); err != nil {
				return nil, nil, err
			}
			if attached, err := d.Machine(ctx, machine.Id); err == nil {
				machine = attached
			}
			findings = append(findings, tracked(ctx, d.tracker, machine)...)
		}
		return findings, machine, nil
	}
	return nil, nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "host %s has no machine %q", d.host, vm).With("vm", vm)
}

// tracked warns of what the change-tracker says against the machine.
func tracked(ctx context.Context, tracker changetrackerv1.ChangeTrackerServiceClient, m *typesv1.Machine) []*hostproviderv1.Finding {
	_, err := tracker.GetTracking(ctx, &changetrackerv1.GetTrackingRequest{Vm: m.Id})
	if err == nil || errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED) {
		return nil
	}
	return []*hostproviderv1.Finding{finding("change-tracker", errcat.Reason(err), fmt.Sprintf("%s: %v", m.DisplayName, err), errcat.Detail(err, time.Time{}).Action)}
}

// names says whether a machine folder answers to vm, also when its definition cannot be read.
func names(folder string, m *typesv1.Machine, vm string) bool {
	if m != nil && (m.Id == strings.ToLower(vm) || m.DisplayName == vm) {
		return true
	}
	return m == nil && filepath.Base(folder) == vm
}

// Establish starts tracking.
func (d *Driver) Establish(ctx context.Context, vm, lineage string, epoch uint64) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.StartTracking(ctx, &changetrackerv1.StartTrackingRequest{Vm: vm, Lineage: lineage, Epoch: epoch})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// Dissolve ends tracking.
func (d *Driver) Dissolve(ctx context.Context, vm, lineage string, epoch uint64) error {
	_, err := d.tracker.StopTracking(ctx, &changetrackerv1.StopTrackingRequest{Vm: vm, Lineage: lineage, Epoch: epoch})
	return err
}

// Cut switches the logs of all disks at one instant. A folder of images has no guest agent: only crash consistency.
func (d *Driver) Cut(ctx context.Context, c hostprovider.Cut) (*typesv1.HostPoint, typesv1.Consistency, error) {
	if c.Consistency != typesv1.Consistency_CONSISTENCY_CRASH {
		return nil, 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "driver imagedir has no guest to freeze: only crash-consistent points")
	}
	r, err := d.tracker.SwitchLogs(ctx, &changetrackerv1.SwitchLogsRequest{Vm: c.VM, Lineage: c.Lineage, Point: c.Point, Epoch: c.Epoch})
	if err != nil {
		return nil, 0, err
	}
	return r.Point, typesv1.Consistency_CONSISTENCY_CRASH, nil
}

// Settle ends a point.
func (d *Driver) Settle(ctx context.Context, s hostprovider.Settle) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.SettleLogs(ctx, &changetrackerv1.SettleLogsRequest{Vm: s.VM, Lineage: s.Lineage, Point: s.Point, Epoch: s.Epoch, Outcome: s.Outcome})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// Points relays what the change-tracker holds.
func (d *Driver) Points(ctx context.Context, vm string) (*typesv1.TrackingStatus, error) {
	r, err := d.tracker.GetTracking(ctx, &changetrackerv1.GetTrackingRequest{Vm: vm})
	if err != nil {
		return nil, err
	}
	return r.Status, nil
}

// folders are the machine folders, by name.
func (d *Driver) folders() ([]string, error) {
	entries, err := os.ReadDir(d.root)
	if err != nil {
		return nil, fmt.Errorf("read image folder: %w", err)
	}
	var out []string
	for _, e := range entries {
		folder := filepath.Join(d.root, e.Name())
		if _, err := os.Stat(filepath.Join(folder, DefinitionFile)); errors.Is(err, os.ErrNotExist) || !e.IsDir() {
			continue
		}
		out = append(out, folder)
	}
	if len(out) > maxMachines {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, "%s holds %d machines, more than %d", d.root, len(out), maxMachines)
	}
	return out, nil
}
