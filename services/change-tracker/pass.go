package changetracker

import (
	"fmt"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// beginPass fixes the ranges of a pass (design.md, "Pass begin").
func (m *machine) beginPass(lineage string, ordinal, epoch uint64, scope Scope) (Point, error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if err := m.admit(lineage, epoch); err != nil {
		return Point{}, err
	}
	if err := m.settleBroken(); err != nil {
		return Point{}, err
	}
	r := m.rec.Load()
	if p := r.Pass; p != nil {
		if p.Ordinal == ordinal && p.Scope == scope {
			return *p, nil
		}
		return Point{}, fmt.Errorf("%w: pass %d", ErrOpen, p.Ordinal)
	}
	if o := m.open.Load(); o != nil {
		return Point{}, fmt.Errorf("%w: point %d", ErrOpen, o.Point.Ordinal)
	}
	if err := m.known(ordinal); err != nil {
		return Point{}, err
	}
	if scope == DirtyOnly && r.Reason == InitialReplication {
		return Point{}, fmt.Errorf("%w: a FULL one: %s", ErrPassRequired, r.Detail)
	}
	if scope == DirtyOnly && r.Reason != None {
		return Point{}, fmt.Errorf("%w: %s: a DIRTY pass has no baseline: %s", ErrResyncRequired, r.Reason, r.Detail)
	}
	if err := failpoint.Hit(fpBeforeBegin); err != nil {
		return Point{}, err
	}
	if err := m.renewTables(); err != nil {
		return Point{}, err
	}

	c := r.clone()
	c.Pass = &Point{Ordinal: ordinal, Phase: beginning, Scope: scope, Base: r.Base, Epoch: epoch}
	if err := m.save(c); err != nil {
		return Point{}, err
	}
	opened := false
	defer func() {
		if !opened {
			m.undoBegin()
		}
	}()

	sizes, err := m.allocated(scope)
	if err != nil {
		return Point{}, err
	}
	dropped, unflushed := m.beginMarks(scope)
	for _, d := range unflushed {
		// What was written before tracking began is not hot; it must not be able to fall back (I-1).
		if err := d.sync(); err != nil {
			return Point{}, fmt.Errorf("flush image of %s: %w", d.id, err)
		}
	}
	for _, l := range dropped {
		m.dropLater(l)
	}
	p := *c.Pass
	p.Phase = Open
	for i, d := range m.disks {
		t := d.table.Load()
		if err := t.Commit(); err != nil {
			m.fail(fmt.Errorf("disk %s: %w", d.id, err))
			return Point{}, fmt.Errorf("%w: %w", ErrBroken, err)
		}
		if scope != Full {
			// What the pass holds, not what was dirty before it: a disk may have degraded while it began.
			sizes[i] = t.Bytes(sidecar.Pass)
		}
		p.Disks = append(p.Disks, Change{Disk: d.id, Size: d.size, Bytes: min(sizes[i], d.size)})
	}
	c = m.rec.Load().clone()
	c.Pass = &p
	if err := m.save(c); err != nil {
		return Point{}, err
	}
	opened = true
	return p, failpoint.Hit(fpAfterBegin)
}

// renewTables makes sidecars where they are missing or unusable. It needs ctl, and mode off where it makes one.
func (m *machine) renewTables() error {
	for _, d := range m.disks {
		t := d.table.Load()
		if t != nil && t.Err() == nil {
			continue
		}
		if t != nil && d.getMode() != off {
			// It failed in the background. Its marks are all that is known, and are in no file.
			m.sidecarFailed(d, t.Err())
			if err := m.settleBroken(); err != nil {
				return err
			}
			return fmt.Errorf("%w: the sidecar of disk %s failed", ErrResyncRequired, d.id)
		}
		t, err := d.createTable(m.rec.Load().Lineage)
		if err != nil {
			return err
		}
		var old *sidecar.Table
		m.hold(func() { old = d.table.Swap(t) })
		if old != nil {
			_ = old.Close() // its file was given up
		}
	}
	return nil
}

// allocated returns what a FULL pass will have to read of each disk, for progress; zeros for the others.
func (m *machine) allocated(scope Scope) ([]int64, error) {
	sizes := make([]int64, len(m.disks))
	if scope != Full {
		return sizes, nil
	}
	for i, d := range m.disks {
		set, err := d.img.Allocated(extent.Range{Len: d.size})
		if err != nil {
			return nil, fmt.Errorf("map image of %s: %w", d.id, err)
		}
		sizes[i] = set.Bytes()
	}
	return sizes, nil
}

// beginMarks moves the marks with the writers drained and makes every disk log. FULL marks the whole disk: what is
// absent is seen when the pass reads, so nothing has to be scanned while writers wait. It returns the logs that the
// pass replaces and the disks that were off.
func (m *machine) beginMarks(scope Scope) (dropped []*logFile, wereOff []*disk) {
	next := make([]*logFile, len(m.disks))
	for i, d := range m.disks {
		if scope != Full && d.getMode() == logging {
			continue
		}
		l, err := d.newLog(uuid.Nil)
		if err != nil {
			m.t.logger.Warn("make a log; changes will be kept as dirty extents", "vm", m.id, "disk", d.id, "err", err)
			continue
		}
		next[i] = l
	}
	m.hold(func() {
		for i, d := range m.disks {
			t := d.table.Load()
			d.logMu.Lock()
			if d.getMode() == off {
				wereOff = append(wereOff, d)
				t.Move(sidecar.Hot|sidecar.Dirty|sidecar.Pass, 0)
			}
			t.Move(sidecar.Dirty, sidecar.Pass)
			if scope == Full {
				for _, l := range d.takeChain() {
					d.coolGen = max(d.coolGen, l.gen)
					dropped = append(dropped, l)
				}
				t.MarkAll(sidecar.Pass)
			}
			switch {
			case next[i] != nil && (scope == Full || d.getMode() != logging):
				d.active = next[i]
				d.mode.Store(int32(logging))
			case scope == Full || d.getMode() != logging:
				d.mode.Store(int32(degraded))
			}
			d.logMu.Unlock()
		}
	})
	return dropped, wereOff
}

// undoBegin gives up a pass whose begin failed: its extents are dirty again.
func (m *machine) undoBegin() {
	c := m.rec.Load().clone()
	if c.Pass == nil {
		return
	}
	c.Pass = nil
	for _, d := range m.disks {
		if t := d.table.Load(); t != nil {
			t.Move(sidecar.Pass, sidecar.Dirty)
		}
	}
	if c.Reason != None {
		m.turnOff()
	}
	if err := m.save(c); err != nil {
		// The file still says BEGINNING, which an attach undoes; so does the next begin.
		m.rec.Store(c)
		m.t.logger.Error("undo the begin of a pass", "vm", m.id, "err", err)
	}
}

// settlePass ends pass ordinal (design.md, "Pass settle").
func (m *machine) settlePass(lineage string, ordinal, epoch uint64, outcome Phase) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if err := m.admit(lineage, epoch); err != nil {
		return err
	}
	if err := m.settleBroken(); err != nil {
		return err
	}
	r := m.rec.Load()
	if p, ok := r.outcome(ordinal); ok {
		if p.Phase == outcome {
			return nil
		}
		return fmt.Errorf("%w: pass %d is %s", ErrSettled, ordinal, p.Phase)
	}
	if o := m.open.Load(); o != nil && o.Point.Ordinal == ordinal {
		return fmt.Errorf("%w: %d is a point", ErrInvalidState, ordinal)
	}
	if ordinal <= r.Floor {
		return fmt.Errorf("%w: %d is too old", ErrSettled, ordinal)
	}
	if r.Pass == nil || r.Pass.Ordinal != ordinal {
		c := r.clone()
		c.settle(Point{Ordinal: ordinal, Phase: Abandoned, Scope: DirtyOnly, Epoch: epoch})
		if err := m.save(c); err != nil {
			return err
		}
		if outcome == Committed {
			return fmt.Errorf("%w: %d was never begun", ErrPassNotOpen, ordinal)
		}
		return nil
	}
	if err := failpoint.Hit(fpBeforeSettle); err != nil {
		return err
	}
	if m.t.bugs.clearPassEarly && outcome == Committed {
		for _, d := range m.disks {
			d.table.Load().Move(sidecar.Pass, 0)
			_ = d.table.Load().Commit()
		}
	}
	c := r.clone()
	c.Pass.Phase = outcome
	c.settle(*c.Pass)
	if outcome == Committed {
		c.Base = ordinal
		if c.Pass.Scope != DirtyOnly {
			c.Reason, c.Detail = None, ""
		}
	}
	if err := m.save(c); err != nil {
		return err
	}
	if err := failpoint.Hit(fpAfterSettle); err != nil {
		m.t.logger.Info("injected", "err", err) // the outcome stands
	}
	return m.finishPass()
}

// finishPass moves the marks of a settled pass and forgets it. An attach does the same after a crash.
func (m *machine) finishPass() error {
	c := m.rec.Load().clone()
	to := sidecar.Dirty
	if c.Pass.Phase == Committed {
		to = 0
	}
	for _, d := range m.disks {
		t := d.table.Load()
		if t == nil {
			continue
		}
		t.Move(sidecar.Pass, to)
		if err := t.Commit(); err != nil {
			m.fail(fmt.Errorf("disk %s: %w", d.id, err))
		}
	}
	c.Pass = nil
	if err := m.save(c); err != nil {
		// The outcome is durable and the marks are moved: only the reminder stays, and is harmless.
		m.rec.Store(c)
		m.t.logger.Warn("forget a settled pass; the next attach will", "vm", m.id, "err", err)
	}
	if c.Reason != None {
		m.turnOff()
	}
	return nil
}
