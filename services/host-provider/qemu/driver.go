package qemu

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
	"github.com/landfall-dr/landfall/libs/qmp"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Deps is what the driver is given. Clock and Log have defaults: the system's clock, and none.
type Deps struct {
	Inventory Inventory
	// Pool of monitor connections, shared with the inventory. The driver does not close it.
	Pool    *qmp.Pool
	Tracker changetrackerv1.ChangeTrackerServiceClient
	Log     *slog.Logger
	Clock   func() time.Time
}

// Driver is the qemu driver. Create it with [New].
type Driver struct {
	cfg     Config
	inv     Inventory
	pool    *qmp.Pool
	tracker changetrackerv1.ChangeTrackerServiceClient
	log     *slog.Logger
	now     func() time.Time

	// step is called around every effect. Tests only.
	step func(name string) error

	refreshing sync.Mutex
	watchers   sync.WaitGroup
	closing    context.Context // ended by Close, for what outlives a call
	end        context.CancelFunc

	// power is of power.go: fences and power buttons.
	power power

	mu  sync.Mutex
	vms map[string]*vm
}

// New returns a driver. It makes its folders, reads no record and talks to no QEMU yet: the first Refresh does.
func New(c Config, d Deps) (*Driver, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("driver qemu: %w", err)
	}
	if d.Inventory == nil || d.Pool == nil || d.Tracker == nil {
		return nil, errors.New("driver qemu: Inventory, Pool and Tracker must be given")
	}
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	if d.Clock == nil {
		d.Clock = time.Now //nolint:forbidigo // the default
	}
	c = c.withDefaults()
	for _, dir := range []*string{&c.StateDir, &c.ScratchDir, &c.SocketDir} {
		abs, err := filepath.Abs(*dir) // QEMU has another working folder
		if err != nil {
			return nil, fmt.Errorf("driver qemu: %w", err)
		}
		if err := os.MkdirAll(abs, 0o700); err != nil {
			return nil, fmt.Errorf("driver qemu: %w", err)
		}
		*dir = abs
	}
	if err := c.Validate(); err != nil { // absolute paths are longer
		return nil, fmt.Errorf("driver qemu: %w", err)
	}
	closing, end := context.WithCancel(context.Background())
	return &Driver{
		closing: closing, end: end,
		cfg: c, inv: d.Inventory, pool: d.Pool, tracker: d.Tracker, log: d.Log, now: d.Clock, vms: map[string]*vm{},
	}, nil
}

// Name is "qemu".
func (d *Driver) Name() string { return "qemu" }

// Close ends the driver's watchers. Points stay as they are; a new driver goes on with them.
func (d *Driver) Close() {
	d.end()
	d.mu.Lock()
	var all []*vm
	for _, v := range d.vms {
		all = append(all, v)
	}
	d.mu.Unlock()
	for _, v := range all {
		v.lock <- struct{}{}
		if v.stopWatch != nil {
			v.stopWatch()
			v.stopWatch = nil
		}
		<-v.lock
	}
	d.watchers.Wait()
}

// perMachine bounds what Refresh does to one machine: one that hangs must not stop the look at the others.
const perMachine = 15 * time.Second

// Refresh looks for machines, then brings every QEMU to what its record says, thaws what was left frozen, and gives the
// change-tracker the source of every open point again. A machine that does not answer is logged and looked at next time.
func (d *Driver) Refresh(ctx context.Context) error {
	d.refreshing.Lock()
	defer d.refreshing.Unlock()
	if err := d.inv.Refresh(ctx); err != nil {
		return err
	}
	d.watchFences(ctx)
	ids, err := recorded(d.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("list records: %w", err)
	}
	var all sync.WaitGroup
	gate := make(chan struct{}, 8)
	for _, id := range ids {
		gate <- struct{}{}
		all.Go(func() {
			defer func() { <-gate }()
			ctx, cancel := context.WithTimeout(ctx, perMachine)
			defer cancel()
			if err := d.look(ctx, id); err != nil && ctx.Err() == nil && !errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE) {
				d.log.WarnContext(ctx, "machine is not as its record says; it will be tried again", "vm", id, "error", err)
			}
		})
	}
	for _, machine := range d.inv.All() {
		if slices.Contains(ids, machine.ID) {
			continue
		}
		gate <- struct{}{}
		all.Go(func() {
			defer func() { <-gate }()
			ctx, cancel := context.WithTimeout(ctx, perMachine)
			defer cancel()
			if err := d.lookForOrphans(ctx, machine.ID); err != nil && ctx.Err() == nil && !errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE) {
				d.log.WarnContext(ctx, "look for what a lost record left in a machine; it will be tried again", "vm", machine.ID, "error", err)
			}
		})
	}
	all.Wait()
	return ctx.Err()
}

// lookForOrphans frees a machine without a record from what burdens it: filters, exports and jobs of ours, left when the state
// folder was deleted. Bitmaps alone burden nobody; they go when the machine is protected again.
func (d *Driver) lookForOrphans(ctx context.Context, id string) error {
	h, err := d.hold(ctx, id)
	if err != nil {
		return err
	}
	defer h.release()
	if h.rec.Lineage != "" || h.machine.Problem != nil {
		return nil // it got one meanwhile, or cannot be talked to
	}
	m, err := h.monitor(ctx)
	if err != nil {
		return err
	}
	s, err := observe(ctx, m)
	if err != nil {
		return err
	}
	burden := len(s.jobs) > 0 || slices.ContainsFunc(s.exports, func(e exported) bool { return ours(e.ID) })
	for n := range s.nodes {
		burden = burden || ours(n)
	}
	if !burden {
		return nil
	}
	d.log.WarnContext(ctx, "a machine without a record has nodes or exports of a Landfall: they are removed", "vm", id)
	return h.follow(ctx, m)
}

// pointsTimeout bounds the look at one machine for a caller who asks often.
const pointsTimeout = 5 * time.Second

// look brings one machine in order.
func (d *Driver) look(ctx context.Context, id string) error {
	h, err := d.hold(ctx, id)
	if err != nil {
		return err
	}
	defer h.release()
	m, err := h.monitor(ctx)
	if err != nil {
		h.scratchWithoutQEMU(ctx)
		return err
	}
	if err := h.follow(ctx, m); err != nil {
		return err
	}
	return h.attach(ctx)
}

// Establish starts tracking for a lineage. Nothing is recorded by QEMU until the first pass begins.
func (d *Driver) Establish(ctx context.Context, id, lineage string, epoch uint64) (*typesv1.TrackingStatus, error) {
	h, err := d.hold(ctx, id)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.rec.Lineage != "" {
		if err := h.admit(lineage, epoch); err != nil {
			return nil, err
		}
		return h.status(), nil
	}
	if err := h.machine.Problem; err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.scratchDir(), 0o700); err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "make the scratch folder")
	}
	err = h.update(func(r *record) {
		// Generations go on: bitmaps of an earlier lineage may still be there.
		*r = record{
			V: recordVersion, VM: r.VM, Lineage: lineage, Epoch: epoch, Generation: r.Generation, Server: r.Server,
			Freezing: r.Freezing, Fence: r.Fence, Disks: r.Disks, Reason: initial, Detail: "nothing was copied yet",
		}
	})
	if err != nil {
		return nil, err
	}
	return h.status(), nil
}

// Dissolve ends tracking. What is left in a QEMU that does not answer now is removed when it does.
func (d *Driver) Dissolve(ctx context.Context, id, lineage string, epoch uint64) error {
	id = strings.ToLower(id)
	h, err := d.hold(ctx, id)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND) {
		h, err = d.holdRecord(ctx, id)
	}
	if err != nil {
		return err
	}
	defer h.release()
	if h.rec.Lineage != "" {
		if err := h.admit(lineage, epoch); err != nil {
			return err
		}
		err := h.update(func(r *record) {
			*r = record{V: recordVersion, VM: r.VM, Generation: r.Generation, Server: r.Server, Freezing: r.Freezing, Fence: r.Fence, Disks: r.Disks}
		})
		if err != nil {
			return err
		}
	}
	h.detach(ctx, lineage, 0)
	h.followSoon(ctx)
	return nil
}

// Points says what the record and QEMU hold. HYPERVISOR_UNREACHABLE when the machine is tracked and its QEMU does not answer:
// nothing is lost until a QEMU that answers does not have the bitmaps.
func (d *Driver) Points(ctx context.Context, id string) (*typesv1.TrackingStatus, error) {
	h, err := d.hold(ctx, id)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.rec.Lineage == "" || (h.rec.Active == 0 && h.rec.Open == nil) {
		return h.status(), nil // QEMU holds nothing for it
	}
	ctx, cancel := context.WithTimeout(ctx, pointsTimeout)
	defer cancel()
	m, err := h.monitor(ctx)
	if err != nil {
		return nil, err
	}
	if err := h.follow(ctx, m); err != nil {
		return nil, reasoned(err, "look at machine %s", h.id)
	}
	return h.status(), nil
}
