package changetracker

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// Names of the failpoints of this service.
var (
	fpBeforeCut    = failpoint.Register("change-tracker/before-cut")
	fpAfterCut     = failpoint.Register("change-tracker/after-cut")
	fpBeforeSeal   = failpoint.Register("change-tracker/before-seal")
	fpAfterSeal    = failpoint.Register("change-tracker/after-seal")
	fpBeforeRename = failpoint.Register("change-tracker/before-rename")
	fpAfterRename  = failpoint.Register("change-tracker/after-rename")
	fpBeforeSettle = failpoint.Register("change-tracker/before-settle")
	fpAfterSettle  = failpoint.Register("change-tracker/after-settle")
	fpBeforeBegin  = failpoint.Register("change-tracker/before-begin")
	fpAfterBegin   = failpoint.Register("change-tracker/after-begin")
	_              = failpoint.Register("change-tracker/before-hot")
	_              = failpoint.Register("change-tracker/after-hot")
)

// known answers a cut or a begin of an ordinal that the machine has met before. It needs ctl.
func (m *machine) known(ordinal uint64) error {
	r := m.rec.Load()
	if p, ok := r.outcome(ordinal); ok {
		return fmt.Errorf("%w: %d is %s", ErrSettled, ordinal, p.Phase)
	}
	if ordinal <= r.Floor || ordinal <= r.Base {
		return fmt.Errorf("%w: %d is not above the base %d", ErrSettled, ordinal, max(r.Base, r.Floor))
	}
	return nil
}

// cut fixes one instant across all disks as point ordinal (design.md, "Switch").
func (m *machine) cut(lineage string, ordinal, epoch uint64) (Point, error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if err := m.admit(lineage, epoch); err != nil {
		return Point{}, err
	}
	if err := m.settleBroken(); err != nil {
		return Point{}, err
	}
	r := m.rec.Load()
	if o := m.open.Load(); o != nil {
		if o.Point.Ordinal == ordinal {
			return o.Point, nil
		}
		return Point{}, fmt.Errorf("%w: point %d", ErrOpen, o.Point.Ordinal)
	}
	if err := m.known(ordinal); err != nil {
		return Point{}, err
	}
	if r.Pass != nil {
		return Point{}, fmt.Errorf("%w: pass %d", ErrOpen, r.Pass.Ordinal)
	}
	if r.Reason == InitialReplication {
		return Point{}, fmt.Errorf("%w: %s", ErrPassRequired, r.Detail)
	}
	if r.Reason != None {
		return Point{}, fmt.Errorf("%w: %s: %s", ErrResyncRequired, r.Reason, r.Detail)
	}
	if err := m.clear(); err != nil {
		return Point{}, err
	}
	if err := failpoint.Hit(fpBeforeCut); err != nil {
		return Point{}, err
	}
	next := m.nextLogs(func(d *disk) uuid.UUID {
		d.logMu.Lock()
		defer d.logMu.Unlock()
		if d.active == nil {
			return uuid.Nil
		}
		return d.active.rec.ID
	})
	o := &openPoint{
		pointRecord: pointRecord{
			V: stateVersion, Machine: m.id, Lineage: lineage,
			Point: Point{Ordinal: ordinal, Phase: Open, Base: r.Base, Epoch: epoch},
			Logs:  map[string][]logRecord{},
		},
		logs: map[string][]*logFile{},
	}
	var refused error
	o.Point.Pause = m.hold(func() {
		// A disk may have degraded, or its sidecar failed, while the logs were made.
		if refused = m.clear(); refused != nil {
			return
		}
		o.Point.CutTime = m.t.now().UTC()
		for i, d := range m.disks {
			o.logs[d.id] = d.swap(next[i])
		}
		if m.t.held != nil {
			m.t.held(m)
		}
	})
	if refused != nil {
		for _, l := range next {
			if l != nil {
				m.dropLater(l)
			}
		}
		return Point{}, refused
	}
	m.t.metrics.pause(o.Point.Pause)
	if err := m.commitCut(o); err != nil {
		m.takeBack(o)
		return Point{}, err
	}
	m.open.Store(o)
	for _, d := range m.disks {
		d.opened(o.logs[d.id])
	}
	m.coolLater()
	return o.Point, failpoint.Hit(fpAfterRename)
}

// clear returns an error if any disk has changes that no log holds.
func (m *machine) clear() error {
	if cause := m.broken.Load(); cause != nil {
		return fmt.Errorf("%w: %w", ErrResyncRequired, *cause)
	}
	for _, d := range m.disks {
		t := d.table.Load()
		if t == nil || d.getMode() == off {
			return fmt.Errorf("%w: disk %s is not tracked", ErrResyncRequired, d.id)
		}
		if n := t.Bytes(sidecar.Dirty); n > 0 {
			return fmt.Errorf("%w: %d bytes of disk %s are dirty without data", ErrPassRequired, n, d.id)
		}
	}
	return nil
}

// nextLogs makes a log for every disk; nil where the volume refuses, and the disk will be degraded.
func (m *machine) nextLogs(previous func(*disk) uuid.UUID) []*logFile {
	next := make([]*logFile, len(m.disks))
	for i, d := range m.disks {
		l, err := d.newLog(previous(d))
		if err != nil {
			m.t.logger.Warn("make the next log; changes will be kept as dirty extents", "vm", m.id, "disk", d.id, "err", err)
			continue
		}
		next[i] = l
	}
	return next
}

// swap makes next the active log and returns the chain before it. It needs the gate, exclusively.
func (d *disk) swap(next *logFile) []*logFile {
	d.logMu.Lock()
	defer d.logMu.Unlock()
	if next != nil && d.getMode() != logging {
		// It was made when the chain may still have had a head.
		next.rec.Previous = uuid.Nil
	}
	d.transit += d.logBytes
	d.limbo = true // until opened or takeBack
	chain := d.takeChain()
	d.active = next
	if next == nil {
		d.mode.Store(int32(degraded))
	} else {
		d.mode.Store(int32(logging))
	}
	return chain
}

// opened releases the extents that only logs up to the open point held hot.
func (d *disk) opened(logs []*logFile) {
	d.logMu.Lock()
	defer d.logMu.Unlock()
	for _, l := range logs {
		d.coolGen = max(d.coolGen, l.gen)
	}
	d.warned, d.limbo = 0, false
}

// commitCut seals the logs and writes the point's record: then the cut has happened.
func (m *machine) commitCut(o *openPoint) error {
	if err := failpoint.Hit(fpAfterCut); err != nil {
		return err
	}
	if err := failpoint.Hit(fpBeforeSeal); err != nil {
		return err
	}
	var group errgroup.Group
	for _, d := range m.disks {
		group.Go(func() error {
			for _, l := range o.logs[d.id] {
				if err := l.seal(); err != nil {
					return fmt.Errorf("disk %s: %w", d.id, spaceOr(err))
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := failpoint.Hit(fpAfterSeal); err != nil {
		return err
	}
	for _, d := range m.disks {
		c := Change{Disk: d.id, Size: d.size}
		records := []logRecord{}
		for _, l := range o.logs[d.id] {
			records = append(records, l.rec)
			c.Bytes += l.data
		}
		o.Logs[d.id] = records
		o.Point.Disks = append(o.Point.Disks, c)
	}
	b, err := encodeState(o.pointRecord)
	if err != nil {
		return err
	}
	if err := failpoint.Hit(fpBeforeRename); err != nil {
		return err
	}
	if err := m.t.files.Replace(m.pointPath(o.Point.Ordinal), b); err != nil {
		return fmt.Errorf("write point record: %w", spaceOr(err))
	}
	return nil
}

// takeBack undoes a cut that was not committed: its logs return to the chain, or become dirty if one could not be
// sealed. The point's record may be there after an unclear rename, so the ordinal gets an outcome.
func (m *machine) takeBack(o *openPoint) {
	for _, d := range m.disks {
		logs := o.logs[d.id]
		d.logMu.Lock()
		for _, l := range logs {
			d.logBytes += l.data
			d.transit -= l.data
		}
		back := len(logs) > 0
		for _, l := range logs {
			back = back && l.seal() == nil
		}
		if back && d.continues(logs[len(logs)-1].rec) {
			d.pending = append(slices.Clone(logs), d.pending...)
		} else if len(logs) > 0 {
			d.giveUp(logs)
		}
		d.limbo = false
		d.logMu.Unlock()
	}
	c := m.rec.Load().clone()
	p := o.Point
	p.Phase = Abandoned
	c.settle(p)
	err := m.save(c)
	if err != nil {
		m.rec.Store(c) // at least the next save has it
	}
	if err := errors.Join(err, m.t.files.Remove(m.pointPath(p.Ordinal))); err != nil {
		m.t.logger.Error("undo a cut", "vm", m.id, "point", p.Ordinal, "err", err)
	}
}

// giveUp makes logs that no longer follow into the chain dirty, and the chain with them. It needs logMu.
func (d *disk) giveUp(logs []*logFile) {
	if d.getMode() == off {
		for _, l := range logs {
			d.m.dropLater(l)
		}
		return
	}
	table := d.table.Load()
	for _, l := range logs {
		bits, err := l.extents(d)
		if err != nil {
			d.m.fail(fmt.Errorf("disk %s: %w", d.id, err))
			continue
		}
		table.MarkBits(bits, sidecar.Dirty)
		d.m.dropLater(l)
	}
	d.degradeLocked("a log was lost")
}

// settle ends point ordinal (design.md, "Settle point").
func (m *machine) settle(lineage string, ordinal, epoch uint64, outcome Phase) error {
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
		return fmt.Errorf("%w: point %d is %s", ErrSettled, ordinal, p.Phase)
	}
	if ordinal <= r.Floor {
		return fmt.Errorf("%w: %d is too old", ErrSettled, ordinal)
	}
	if r.Pass != nil && r.Pass.Ordinal == ordinal {
		return fmt.Errorf("%w: %d is a pass", ErrInvalidState, ordinal)
	}
	o := m.open.Load()
	if o == nil || o.Point.Ordinal != ordinal {
		c := r.clone()
		c.settle(Point{Ordinal: ordinal, Phase: Abandoned, Epoch: epoch})
		if err := m.save(c); err != nil {
			return err
		}
		if outcome == Committed {
			return fmt.Errorf("%w: %d; it cannot be cut any more", ErrNotCut, ordinal)
		}
		return nil
	}
	if err := failpoint.Hit(fpBeforeSettle); err != nil {
		return err
	}
	var err error
	if outcome == Committed {
		err = m.settleCommitted(o)
	} else {
		err = m.settleAbandoned(o)
	}
	if err != nil {
		return err
	}
	return failpoint.Hit(fpAfterSettle)
}

func (m *machine) settleCommitted(o *openPoint) error {
	c := m.rec.Load().clone()
	p := o.Point
	p.Phase = Committed
	c.settle(p)
	c.Base = p.Ordinal
	if err := m.save(c); err != nil {
		return err
	}
	m.open.Store(nil)
	m.forget(o)
	for _, d := range m.disks {
		d.logMu.Lock()
		d.transit = 0
		d.logMu.Unlock()
		for _, l := range o.logs[d.id] {
			m.dropLater(l)
		}
	}
	return nil
}

func (m *machine) settleAbandoned(o *openPoint) error {
	for _, d := range m.disks {
		if err := d.keep(o.logs[d.id]); err != nil {
			m.fail(fmt.Errorf("disk %s: %w", d.id, err))
		}
	}
	c := m.rec.Load().clone()
	p := o.Point
	p.Phase = Abandoned
	c.settle(p)
	if err := m.save(c); err != nil {
		return err
	}
	m.open.Store(nil)
	for _, d := range m.disks {
		d.rejoin(o.logs[d.id])
	}
	m.forget(o)
	return m.settleBroken()
}

// keep makes the marks durable under which logs may stop being an open point's.
func (d *disk) keep(logs []*logFile) error {
	table := d.table.Load()
	if len(logs) == 0 || table == nil || d.getMode() == off {
		return nil
	}
	d.logMu.Lock()
	joins, gen := d.mayJoin(logs), d.gen
	d.limbo = true // until rejoin
	d.logMu.Unlock()
	for _, l := range logs {
		bits, err := l.extents(d)
		if err != nil {
			return err
		}
		if joins {
			table.Hold(bits, gen)
		} else {
			table.MarkBits(bits, sidecar.Dirty)
		}
	}
	return table.Commit()
}

func (d *disk) mayJoin(logs []*logFile) bool {
	return d.continues(logs[len(logs)-1].rec) || d.m.t.bugs.keepChainAcrossGap && d.active != nil
}

// rejoin puts an abandoned point's logs before the chain, or makes them dirty if there is a gap between.
func (d *disk) rejoin(logs []*logFile) {
	d.logMu.Lock()
	defer d.logMu.Unlock()
	d.transit = 0
	d.limbo = false
	if len(logs) == 0 {
		return
	}
	if d.getMode() != off && d.mayJoin(logs) {
		d.pending = append(slices.Clone(logs), d.pending...)
		for _, l := range logs {
			d.logBytes += l.data
		}
		return
	}
	if d.getMode() != off {
		table := d.table.Load()
		for _, l := range logs {
			if bits, err := l.extents(d); err == nil {
				table.MarkBits(bits, sidecar.Dirty)
			} else {
				d.m.fail(fmt.Errorf("disk %s: %w", d.id, err))
			}
		}
	}
	for _, l := range logs {
		d.m.dropLater(l)
	}
}

// forget removes the record of a settled point. A crash before leaves it for the next attach.
func (m *machine) forget(o *openPoint) {
	if err := m.t.files.Remove(m.pointPath(o.Point.Ordinal)); err != nil {
		m.t.logger.Warn("remove point record; the next attach will", "vm", m.id, "point", o.Point.Ordinal, "err", err)
	}
}
