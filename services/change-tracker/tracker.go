package changetracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// MachineSpec names a machine's images.
type MachineSpec struct {
	V  int    `json:"v"`
	ID string `json:"machine"`
	// Dir is the folder of the machine's records.
	Dir string `json:"state_dir"`
	// Disks in order.
	Disks []DiskSpec `json:"disks"`
}

// DiskSpec names one image.
type DiskSpec struct {
	ID     string `json:"id"`
	Path   string `json:"path"`
	Format Format `json:"format"`
}

// AttachedDisk is a disk as it is exported. Size is in bytes.
type AttachedDisk struct {
	DiskSpec
	Size   int64
	Export string // "<machine>/<disk>"
}

// Tracker holds the machines of one host. It is the domain of this service: no gRPC, no telemetry.
type Tracker struct {
	files      files
	logger     *slog.Logger
	now        func() time.Time
	dir        string // attachments
	maxEntries int64
	limitLogs  bool
	metrics    *metrics

	mu       sync.Mutex
	machines map[string]*machine
	busy     map[string]bool // being attached or detached
	sources  map[string]*bitmapSource
	closed   bool // by Close: nothing is attached any more

	// held is called while the writes of a machine are held. Tests only.
	held func(*machine)
	// bugs are planted by tests to see that they are caught.
	bugs struct{ coolOnSeal, keepChainAcrossGap, clearPassEarly bool }
}

func newTracker(f files, dir string, logger *slog.Logger, now func() time.Time, m *metrics) *Tracker {
	return &Tracker{
		files: f, logger: logger, now: now, dir: dir, maxEntries: 1 << 20, limitLogs: true, metrics: m,
		machines: map[string]*machine{}, busy: map[string]bool{}, sources: map[string]*bitmapSource{},
	}
}

const attachPrefix = "machine-"

func (t *Tracker) attachPath(id string) string { return filepath.Join(t.dir, attachPrefix+id+".json") }

// Restore attaches every machine that was attached when the process ended. A machine that cannot be attached is
// reported and left for AttachMachine; the others are served.
func (t *Tracker) Restore() error {
	names, err := t.files.List(t.dir, attachPrefix)
	if err != nil {
		return fmt.Errorf("list attachments: %w", err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, ".json") {
			continue
		}
		var spec MachineSpec
		b, err := t.files.ReadFile(filepath.Join(t.dir, name))
		if err == nil {
			err = decodeState(b, &spec, &spec.V)
		}
		if err == nil {
			_, err = t.attach(spec, false)
		}
		if err != nil {
			t.logger.Error("attach a machine again; its disks are not exported", "file", name, "err", err)
		}
	}
	return t.restoreSources()
}

// Attach takes over a machine's images. It is idempotent for the same disks.
func (t *Tracker) Attach(spec MachineSpec) ([]AttachedDisk, error) { return t.attach(spec, true) }

func (t *Tracker) attach(spec MachineSpec, persist bool) ([]AttachedDisk, error) {
	spec.V = stateVersion
	if err := spec.check(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil, fmt.Errorf("%w: it is stopping", ErrUnavailable)
	}
	if m := t.machines[spec.ID]; m != nil {
		defer t.mu.Unlock()
		if !m.is(spec) {
			return nil, fmt.Errorf("%w: machine %s is attached with other disks", ErrInvalidState, spec.ID)
		}
		return m.attached(), nil
	}
	if t.busy[spec.ID] {
		t.mu.Unlock()
		return nil, fmt.Errorf("%w: machine %s is being attached or detached", ErrInvalidState, spec.ID)
	}
	if err := t.checkImages(spec); err != nil {
		t.mu.Unlock()
		return nil, err
	}
	t.busy[spec.ID] = true
	t.mu.Unlock()

	m, err := t.openMachine(spec)
	if err == nil && persist {
		var b []byte
		if b, err = encodeState(spec); err == nil {
			err = t.files.Replace(t.attachPath(spec.ID), b)
		}
		if err != nil {
			err = errors.Join(fmt.Errorf("save attachment: %w", spaceOr(err)), m.end())
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.busy, spec.ID)
	if err == nil && t.closed { // meanwhile
		err = errors.Join(ErrUnavailable, m.end())
	}
	if err != nil {
		return nil, fmt.Errorf("attach machine %s: %w", spec.ID, err)
	}
	t.machines[spec.ID] = m
	return m.attached(), nil
}

func (s MachineSpec) check() error {
	if s.ID == "" || strings.ContainsAny(s.ID, `/\`) || s.Dir == "" || len(s.Disks) == 0 {
		return fmt.Errorf("%w: machine %q needs an id, a state folder and disks", ErrInvalidState, s.ID)
	}
	seen := map[string]bool{}
	for _, d := range s.Disks {
		if d.ID == "" || strings.ContainsAny(d.ID, `/\`) || seen[d.ID] {
			return fmt.Errorf("%w: disk id %q of machine %s", ErrDiskDuplicate, d.ID, s.ID)
		}
		seen[d.ID] = true
		if d.Format != Raw && d.Format != VHD {
			return fmt.Errorf("%w: %q of %s", ErrFormat, d.Format, d.Path)
		}
	}
	return nil
}

// checkImages refuses an image that is named twice, by whatever path. It needs t.mu.
func (t *Tracker) checkImages(spec MachineSpec) error {
	taken := map[string]string{}
	for _, m := range t.machines {
		for _, d := range m.disks {
			taken[d.identity] = m.id + "/" + d.id
		}
	}
	for _, d := range spec.Disks {
		id, err := t.files.Identity(d.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %s", ErrDiskMissing, d.Path)
		}
		if err != nil {
			return fmt.Errorf("look at image %s: %w", d.Path, err)
		}
		if other, ok := taken[id]; ok {
			return fmt.Errorf("%w: %s is disk %s", ErrDiskDuplicate, d.Path, other)
		}
		taken[id] = spec.ID + "/" + d.ID
	}
	return nil
}

func (t *Tracker) openMachine(spec MachineSpec) (*machine, error) {
	m := &machine{t: t, id: spec.ID, dir: spec.Dir}
	var err error
	if m.lock, err = t.files.Lock(filepath.Join(spec.Dir, ".change-tracker.lock")); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDiskInUse, err)
	}
	if err = m.openDisks(spec); err == nil {
		err = m.load()
	}
	if err != nil {
		return nil, errors.Join(err, m.abort())
	}
	return m, nil
}

func (m *machine) openDisks(spec MachineSpec) error {
	for _, s := range spec.Disks {
		d := &disk{
			m: m, id: s.ID, path: s.Path, dir: filepath.Dir(s.Path),
			prefix: fmt.Sprintf("%s.%s.", filepath.Base(s.Path), s.ID), format: s.Format,
		}
		var err error
		if d.identity, err = m.t.files.Identity(s.Path); err != nil {
			return err
		}
		if d.img, err = m.t.files.OpenImage(s.Path, s.Format); err != nil {
			return fmt.Errorf("open image of %s: %w", s.ID, err)
		}
		d.size = d.img.Size()
		m.disks = append(m.disks, d)
	}
	return nil
}

func (m *machine) is(spec MachineSpec) bool {
	return m.dir == spec.Dir && slices.EqualFunc(m.disks, spec.Disks, func(d *disk, s DiskSpec) bool {
		return d.id == s.ID && d.path == s.Path && d.format == s.Format
	})
}

func (m *machine) attached() []AttachedDisk {
	var out []AttachedDisk
	for _, d := range m.disks {
		out = append(out, AttachedDisk{
			DiskSpec: DiskSpec{ID: d.id, Path: d.path, Format: d.format}, Size: d.size, Export: m.id + "/" + d.id,
		})
	}
	return out
}

// abort closes what a failed attach opened.
func (m *machine) abort() error {
	m.wg.Wait()
	var errs []error
	for _, d := range m.disks {
		if d.active != nil && d.active.w != nil {
			errs = append(errs, d.active.w.Abort())
		}
		if t := d.table.Load(); t != nil {
			errs = append(errs, t.Close())
		}
		errs = append(errs, d.img.Close())
	}
	return errors.Join(append(errs, m.lock.Close())...)
}

// end is unload and the release of the lock.
func (m *machine) end() error { return errors.Join(m.unload(), m.lock.Close()) }

// Detach gives the images of a machine back. drain is called first and ends its exports: after it nobody writes.
// Refused while tracking runs; idempotent.
func (t *Tracker) Detach(id string, drain func()) error {
	t.mu.Lock()
	m := t.machines[id]
	switch {
	case t.busy[id]:
		t.mu.Unlock()
		return fmt.Errorf("%w: machine %s is being attached or detached", ErrInvalidState, id)
	case m != nil && m.rec.Load().Lineage != "":
		t.mu.Unlock()
		return fmt.Errorf("%w: machine %s is tracked for lineage %s", ErrInvalidState, id, m.rec.Load().Lineage)
	}
	delete(t.machines, id)
	t.busy[id] = true
	t.mu.Unlock()
	drain()
	var err error
	if m != nil {
		err = m.end()
	}
	err = errors.Join(err, t.files.Remove(t.attachPath(id)))
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.busy, id)
	return err
}

// Close ends all machines in good order; they are attached again by Restore. The exports are closed before.
func (t *Tracker) Close() error {
	t.mu.Lock()
	machines := t.machines
	t.machines, t.closed = map[string]*machine{}, true
	t.mu.Unlock()
	t.closeSources()
	var errs []error
	for _, m := range machines {
		if err := m.end(); err != nil {
			errs = append(errs, fmt.Errorf("end machine %s: %w", m.id, err))
		}
	}
	return errors.Join(errs...)
}

func (t *Tracker) machine(id string) (*machine, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m := t.machines[id]; m != nil {
		return m, nil
	}
	// Calls still come while the program stops. "Not here" would be taken for the machine's end, and stop its
	// replication for good.
	if t.closed || t.busy[id] {
		return nil, fmt.Errorf("%w: machine %s is being attached or detached", ErrUnavailable, id)
	}
	return nil, fmt.Errorf("%w: %s", ErrMachineNotFound, id)
}

// Exports returns the names of all exports, sorted.
func (t *Tracker) Exports() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var names []string
	for _, m := range t.machines {
		for _, d := range m.disks {
			names = append(names, m.id+"/"+d.id)
		}
	}
	slices.Sort(names)
	return names
}

// disk finds an export by its name, "<machine>/<disk>".
func (t *Tracker) disk(name string) (*disk, error) {
	vm, id, _ := strings.Cut(name, "/")
	m, err := t.machine(vm)
	if err != nil {
		return nil, err
	}
	return m.disk(id)
}

// Start begins tracking for a lineage. Idempotent for the same lineage. Nothing has to be kept until the first FULL
// pass begins.
func (t *Tracker) Start(id, lineage string, epoch uint64) (Status, error) {
	m, err := t.machine(id)
	if err != nil {
		return Status{}, err
	}
	if _, err := lineageKey(lineage); err != nil {
		return Status{}, err
	}
	m.ctl.Lock()
	defer m.ctl.Unlock()
	r := m.rec.Load()
	if r.Lineage != "" || m.ended {
		err := m.admit(lineage, epoch)
		return m.status(), err
	}
	for _, d := range m.disks {
		tab, err := d.createTable(lineage)
		if err != nil {
			return Status{}, err
		}
		var old *sidecar.Table
		m.hold(func() { old = d.table.Swap(tab) })
		if old != nil {
			_ = old.Close() // of a lineage that ended
		}
	}
	err = m.save(&record{Lineage: lineage, Epoch: epoch, Reason: InitialReplication, Detail: "no pass has copied the disks yet", Fence: r.Fence})
	return m.status(), err
}

// Stop ends tracking and removes logs, sidecars and records. Idempotent.
func (t *Tracker) Stop(id, lineage string, epoch uint64) error {
	m, err := t.machine(id)
	if err != nil {
		return err
	}
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if m.rec.Load().Lineage == "" && !m.ended {
		return nil
	}
	if err := m.admit(lineage, epoch); err != nil {
		return err
	}
	if err := m.save(&record{Fence: m.rec.Load().Fence}); err != nil {
		return err
	}
	m.open.Store(nil)
	m.broken.Store(nil)
	m.turnOff()
	m.wg.Wait()
	for _, d := range m.disks {
		d.logMu.Lock()
		d.transit = 0
		d.logMu.Unlock()
	}
	return m.clearUp()
}

// Cut fixes one instant across all disks of a machine.
func (t *Tracker) Cut(id, lineage string, point, epoch uint64) (Point, error) {
	m, err := t.machine(id)
	if err != nil {
		return Point{}, err
	}
	return m.cut(lineage, point, epoch)
}

// Settle ends a point; outcome is Committed or Abandoned.
func (t *Tracker) Settle(id, lineage string, point, epoch uint64, outcome Phase) (Status, error) {
	m, err := t.machine(id)
	if err != nil {
		return Status{}, err
	}
	err = m.settle(lineage, point, epoch, outcome)
	return m.status(), err
}

// BeginPass fixes the ranges of a pass.
func (t *Tracker) BeginPass(id, lineage string, pass, epoch uint64, scope Scope) (Point, error) {
	m, err := t.machine(id)
	if err != nil {
		return Point{}, err
	}
	return m.beginPass(lineage, pass, epoch, scope)
}

// SettlePass ends a pass; outcome is Committed or Abandoned.
func (t *Tracker) SettlePass(id, lineage string, pass, epoch uint64, outcome Phase) (Status, error) {
	m, err := t.machine(id)
	if err != nil {
		return Status{}, err
	}
	err = m.settlePass(lineage, pass, epoch, outcome)
	return m.status(), err
}

// Status says what the host holds of a machine.
func (t *Tracker) Status(id string) (Status, error) {
	m, err := t.machine(id)
	if err != nil {
		return Status{}, err
	}
	return m.status(), nil
}

// ReadChanges emits what a disk of an open point changed, ascending from offset from.
func (t *Tracker) ReadChanges(ctx context.Context, id, lineage string, point uint64, disk string, from int64, emit func(Chunk) error) error {
	src, err := t.source(id)
	if err != nil {
		return err
	}
	return src.readChanges(ctx, lineage, point, disk, from, emit)
}

// ReadRanges emits live data: the open pass's ranges within window, or the ranges named. An empty window is the whole
// disk.
func (t *Tracker) ReadRanges(ctx context.Context, id, lineage string, pass uint64, disk string, window extent.Range,
	ranges []extent.Range, emit func(Chunk) error,
) error {
	src, err := t.source(id)
	if err != nil {
		return err
	}
	return src.readRanges(ctx, lineage, pass, disk, clip(window), ranges, emit)
}

// HashRanges emits digests of live data. An empty window is the whole disk.
func (t *Tracker) HashRanges(ctx context.Context, id, lineage, disk string, window extent.Range, step int64, emit func(Hashes) error) error {
	src, err := t.source(id)
	if err != nil {
		return err
	}
	return src.hashRanges(ctx, lineage, disk, clip(window), step, emit)
}

// spaceOr adds ErrSpace to an error that means a full volume.
func spaceOr(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: %w", ErrSpace, err)
	}
	return err
}
