package changetracker

import (
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// machine is one attached VM. Its order of locks: ctl, gate, a disk's logMu, a table's own.
type machine struct {
	t     *Tracker
	id    string
	dir   string // of tracking.json and point records
	disks []*disk
	lock  io.Closer // keeps a second tracker out of dir

	// gate is held shared by every guest write and exclusively for the instant of a cut: all disks at once (I-12).
	gate sync.RWMutex
	// ctl serialises everything that changes rec or open.
	ctl  sync.Mutex
	rec  atomic.Pointer[record]
	open atomic.Pointer[openPoint]
	// broken is the first failure that costs the baseline, until setResync has recorded it.
	broken atomic.Pointer[error]
	wg     sync.WaitGroup // background work on files
	// ended: unloaded; a call that still waited for ctl must not touch what the record calls clean. Guarded by ctl.
	ended bool
}

// openPoint is an unsettled cut.
type openPoint struct {
	pointRecord
	logs map[string][]*logFile // by disk id, oldest first
}

func (m *machine) disk(id string) (*disk, error) {
	for _, d := range m.disks {
		if d.id == id {
			return d, nil
		}
	}
	return nil, fmt.Errorf("%w: %q of machine %s", ErrDiskNotFound, id, m.id)
}

func (m *machine) recordPath() string { return filepath.Join(m.dir, "tracking.json") }

func (m *machine) pointPath(ordinal uint64) string {
	return filepath.Join(m.dir, fmt.Sprintf("%s%d%s", pointPrefix, ordinal, pointSuffix))
}

const (
	pointPrefix = "point-"
	pointSuffix = ".json"
)

// save makes r the machine's record, durably. After an error either may be on disk; memory keeps the old one, and the
// caller's retry writes again. It needs ctl.
func (m *machine) save(r *record) error {
	r.V, r.Machine = stateVersion, m.id
	b, err := encodeState(r)
	if err != nil {
		return fmt.Errorf("encode tracking record: %w", err)
	}
	if err := m.t.files.Replace(m.recordPath(), b); err != nil {
		return fmt.Errorf("save tracking record: %w", spaceOr(err))
	}
	m.rec.Store(r)
	return nil
}

// admit refuses calls of another lineage or a lower epoch, and persists a higher one. It needs ctl.
func (m *machine) admit(lineage string, epoch uint64) error {
	r := m.rec.Load()
	switch {
	case m.ended:
		return fmt.Errorf("%w: machine %s", ErrUnavailable, m.id)
	case r.Lineage == "":
		return fmt.Errorf("%w: machine %s", ErrNotTracking, m.id)
	case r.Lineage != lineage:
		return fmt.Errorf("%w: %s, the call names %s", ErrLineage, r.Lineage, lineage)
	case epoch < r.Epoch:
		return fmt.Errorf("%w: %d, the highest seen is %d", ErrStaleEpoch, epoch, r.Epoch)
	case epoch > r.Epoch:
		c := r.clone()
		c.Epoch = epoch
		return m.save(c)
	}
	return nil
}

// hold drains the guest's writes on all disks and calls change while none runs. It returns how long writes were held.
func (m *machine) hold(change func()) time.Duration {
	start := time.Now() //nolint:forbidigo // a measurement, not a decision: the real clock
	m.gate.Lock()
	change()
	m.gate.Unlock()
	return time.Since(start) //nolint:forbidigo // as above
}

// fail notes that the baseline is lost. Safe in a guest write; the next control call records it.
func (m *machine) fail(err error) {
	if m.broken.CompareAndSwap(nil, &err) {
		m.t.logger.Error("tracking is broken, a resynchronisation is required", "vm", m.id, "err", err)
	}
}

// sidecarFailed handles a mark that cannot be made durable: the sidecar goes, which needs no space, so that a restart
// cannot believe it (I-10).
func (m *machine) sidecarFailed(d *disk, err error) {
	if m.broken.Load() == nil {
		if rmErr := m.t.files.Remove(d.sidecarPath()); rmErr != nil {
			m.t.logger.Error("remove unusable sidecar", "vm", m.id, "disk", d.id, "err", rmErr)
		}
	}
	m.fail(fmt.Errorf("disk %s: %w", d.id, err))
}

// settleBroken records a failure that a guest write met. It needs ctl.
func (m *machine) settleBroken() error {
	cause := m.broken.Load()
	if cause == nil {
		return nil
	}
	if err := m.setResync(TrackingBroken, (*cause).Error()); err != nil {
		return err
	}
	m.broken.CompareAndSwap(cause, nil)
	return nil
}

// setResync records that the baseline is not trusted and stops tracking until a FULL or COMPARE pass begins. It needs
// ctl.
func (m *machine) setResync(reason Reason, detail string) error {
	c := m.rec.Load().clone()
	c.lose(reason, detail)
	if err := m.save(c); err != nil {
		return err
	}
	m.turnOff()
	return nil
}

// turnOff stops tracking in memory: no chain, no marks. What the files still say is ignored, because the record says
// that no baseline is trusted.
func (m *machine) turnOff() {
	m.hold(func() {
		for _, d := range m.disks {
			d.logMu.Lock()
			d.mode.Store(int32(off))
			for _, l := range d.takeChain() {
				m.dropLater(l)
			}
			d.coolGen = d.gen
			d.logMu.Unlock()
			if t := d.table.Load(); t != nil {
				t.Move(sidecar.Hot|sidecar.Dirty|sidecar.Pass, 0)
			}
		}
	})
	for _, d := range m.disks {
		if t := d.table.Load(); t != nil {
			if err := t.Commit(); err != nil {
				m.t.logger.Warn("clear sidecar", "vm", m.id, "disk", d.id, "err", err)
			}
		}
	}
}

// dropLater removes a log's files in the background: a large file takes long to remove.
func (m *machine) dropLater(l *logFile) {
	m.wg.Go(func() {
		if err := l.drop(m.t.files); err != nil {
			m.t.logger.Warn("remove log; the next attach will", "vm", m.id, "log", l.rec.File, "err", err)
		}
	})
}

// coolLater flushes the images and cools their extents in the background.
func (m *machine) coolLater() {
	m.wg.Go(func() {
		for _, d := range m.disks {
			if err := d.cool(); err != nil {
				m.t.logger.Warn("cool extents", "vm", m.id, "disk", d.id, "err", err)
			}
		}
	})
}

func (d *disk) sidecarPath() string { return filepath.Join(d.dir, d.prefix+"lfx") }

// DiskStatus is the tracker's state of one disk. All sizes are in bytes.
type DiskStatus struct {
	ID       string
	Size     int64
	LogBytes int64 // data in logs, sealed and unsealed
	Dirty    int64 // must be copied by a pass before the next cut
	Hot      int64
}

// Status is everything the host knows of one machine's tracking.
type Status struct {
	Lineage      string // empty: not tracked
	Fence        string // failover that closed the exports; empty for none
	Epoch        uint64
	Base         uint64
	Highest      uint64
	Points       []Point // the last few outcomes, then the open one; ascending
	Disks        []DiskStatus
	Reason       Reason
	Detail       string
	PassRequired bool
}

// statusOutcomes bounds the settled points in a Status.
const statusOutcomes = 32

func (m *machine) status() (s Status) {
	r := m.rec.Load()
	s = Status{
		Fence: r.Fence, Lineage: r.Lineage, Epoch: r.Epoch, Base: r.Base, Highest: r.Highest, Reason: r.Reason, Detail: r.Detail,
	}
	if cause := m.broken.Load(); cause != nil && s.Reason == None {
		s.Reason, s.Detail = TrackingBroken, (*cause).Error()
	}
	s.Points = append(s.Points, r.Outcomes[max(0, len(r.Outcomes)-statusOutcomes):]...)
	defer func() { s.Points = sortedCopy(s.Points) }()
	if o := m.open.Load(); o != nil {
		s.Points = append(s.Points, o.Point)
		s.Highest = max(s.Highest, o.Point.Ordinal)
	}
	if r.Pass != nil && r.Pass.Phase == Open {
		s.Points = append(s.Points, *r.Pass)
		s.Highest = max(s.Highest, r.Pass.Ordinal)
	}
	for _, d := range m.disks {
		ds := DiskStatus{ID: d.id, Size: d.size}
		if t := d.table.Load(); t != nil {
			ds.Dirty, ds.Hot = t.Bytes(sidecar.Dirty), t.Bytes(sidecar.Hot)
		}
		d.logMu.Lock()
		ds.LogBytes = d.logBytes + d.transit
		d.logMu.Unlock()
		s.PassRequired = s.PassRequired || ds.Dirty > 0
		s.Disks = append(s.Disks, ds)
	}
	if r.Lineage != "" && s.Reason != None {
		s.PassRequired = true
	}
	return s
}
