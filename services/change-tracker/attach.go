package changetracker

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// load reads what is stored of the machine and brings memory and files to a state in which guests may write
// (design.md, "Attach"). Every step can be repeated after a crash.
func (m *machine) load() error {
	err := m.loadTracked()
	if errors.Is(err, ErrSpace) {
		return m.serveUntracked(err)
	}
	return err
}

// serveUntracked gives guests their disks on a volume that has no room for the records of tracking (I-10): after a
// restart a machine must run before anything is protected. The record goes, which needs no space, and so do the logs
// and sidecars; whoever asks next finds a host that lost its state, and compares.
func (m *machine) serveUntracked(cause error) error {
	if r := m.rec.Load(); r != nil && r.Fence != "" {
		return cause // the record holds a fence: no disks are better than two writers
	}
	m.t.logger.Error("the volume is full: tracking is given up so that the guest has its disks; free space, then resynchronise",
		"vm", m.id, "err", cause)
	if err := m.t.files.Remove(m.recordPath()); err != nil {
		return errors.Join(cause, err)
	}
	for _, d := range m.disks {
		d.logMu.Lock()
		d.mode.Store(int32(off))
		d.takeChain() // sealed, and removed below
		d.logMu.Unlock()
		if t := d.table.Swap(nil); t != nil {
			if err := t.Close(); err != nil {
				m.t.logger.Warn("close sidecar", "vm", m.id, "disk", d.id, "err", err)
			}
		}
	}
	m.open.Store(nil)
	m.broken.Store(nil)
	m.rec.Store(&record{V: stateVersion, Machine: m.id})
	return m.clearUp()
}

func (m *machine) loadTracked() error {
	r, err := m.loadRecord()
	if err != nil {
		return err
	}
	m.rec.Store(r)
	if r.Lineage == "" {
		return m.clearUp()
	}
	if err := m.loadOpenPoint(); err != nil {
		m.fail(err)
	}
	damage := m.loadTables(r.Lineage)
	if r.Clean && damage == nil {
		damage = m.resume()
	} else if damage == nil {
		damage = m.recover()
	}
	if damage != nil {
		reason := TrackingBroken
		if errors.Is(damage, errChangedOffline) {
			reason = ChangedOffline
		}
		if err := m.setResync(reason, damage.Error()); err != nil {
			return err
		}
	}
	if err := m.settleBroken(); err != nil {
		return err
	}
	// From here on a crash is a crash.
	c := m.rec.Load().clone()
	c.Clean, c.Pending, c.Prints = false, nil, nil
	if err := m.save(c); err != nil {
		return err
	}
	if err := m.clearUp(); err != nil {
		return err
	}
	m.startLogs()
	return nil
}

var errChangedOffline = errors.New("disk changed while it was not tracked")

func (m *machine) loadRecord() (*record, error) {
	r := &record{V: stateVersion, Machine: m.id}
	b, err := m.t.files.ReadFile(m.recordPath())
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read tracking record: %w", err)
	}
	if err := decodeState(b, r, &r.V); err != nil {
		return nil, fmt.Errorf("%w: tracking record %s: %w", ErrBroken, m.recordPath(), err)
	}
	if r.Machine != m.id {
		return nil, fmt.Errorf("%w: %s is the state of machine %s", ErrInvalidState, m.recordPath(), r.Machine)
	}
	return r, nil
}

// loadOpenPoint finds the cut that no outcome ended, and checks its logs.
func (m *machine) loadOpenPoint() error {
	names, err := m.t.files.List(m.dir, pointPrefix)
	if err != nil {
		return fmt.Errorf("list point records: %w", err)
	}
	r := m.rec.Load()
	for _, name := range names {
		text, ok := strings.CutSuffix(strings.TrimPrefix(name, pointPrefix), pointSuffix)
		ordinal, err := strconv.ParseUint(text, 10, 64)
		if !ok || err != nil {
			continue
		}
		path := filepath.Join(m.dir, name)
		var pr pointRecord
		b, err := m.t.files.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(b, &pr)
		}
		_, settled := r.outcome(ordinal)
		if settled || ordinal <= r.Floor || (err == nil && pr.Lineage != r.Lineage) {
			if err := m.t.files.Remove(path); err != nil {
				return fmt.Errorf("remove settled point record: %w", err)
			}
			continue
		}
		if err == nil && (pr.V != stateVersion || pr.Point.Ordinal != ordinal) {
			err = fmt.Errorf("version %d, ordinal %d", pr.V, pr.Point.Ordinal)
		}
		if err != nil {
			// It can never be served: give the ordinal an outcome, or every attach would stumble here.
			c := r.clone()
			c.settle(Point{Ordinal: ordinal, Phase: Abandoned})
			m.rec.Store(c)
			return errors.Join(fmt.Errorf("%w: point record %s: %w", ErrBroken, name, err), m.t.files.Remove(path))
		}
		if m.open.Load() != nil {
			return fmt.Errorf("%w: two open points, %d and %d", ErrBroken, m.open.Load().Point.Ordinal, ordinal)
		}
		o := &openPoint{pointRecord: pr, logs: map[string][]*logFile{}}
		m.open.Store(o)
		for _, d := range m.disks {
			logs, err := d.loadLogs(pr.Logs[d.id])
			o.logs[d.id] = logs
			for _, l := range logs {
				d.transit += l.data
			}
			if err != nil {
				return fmt.Errorf("point %d, disk %s: %w", ordinal, d.id, err)
			}
		}
	}
	return nil
}

// loadLogs takes sealed logs of an earlier process over.
func (d *disk) loadLogs(records []logRecord) ([]*logFile, error) {
	var logs []*logFile
	var errs []error
	for _, rec := range records {
		d.gen++
		logs = append(logs, &logFile{
			rec: rec, path: filepath.Join(d.dir, rec.File), gen: d.gen, data: rec.Bytes, sealed: true,
		})
		r, err := openSealed(d.m.t.files, d.dir, rec)
		if err == nil {
			_, err = readZeros(d.m.t.files, d.dir, rec)
			_ = r.Close() // only read
		}
		errs = append(errs, err)
	}
	return logs, errors.Join(errs...)
}

func (m *machine) loadTables(lineage string) error {
	key, err := lineageKey(lineage)
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range m.disks {
		f, err := m.t.files.OpenFile(d.sidecarPath())
		if err != nil {
			errs = append(errs, fmt.Errorf("disk %s: open sidecar: %w", d.id, err))
			continue
		}
		t, damaged, err := sidecar.Open(f, d.size, key)
		if err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", d.id, errors.Join(err, f.Close())))
			continue
		}
		if damaged > 0 {
			m.t.logger.Warn("sidecar has damaged sectors; their extents count as dirty", "vm", m.id, "disk", d.id, "sectors", damaged)
			if m.rec.Load().Clean {
				// Without a crash nothing explains it, and the marks may have been Hot under a pending log.
				c := m.rec.Load().clone()
				c.Clean = false
				m.rec.Store(c)
			}
		}
		d.table.Store(t)
	}
	return errors.Join(errs...)
}

func lineageKey(lineage string) (key [16]byte, err error) {
	b, err := hex.DecodeString(lineage)
	if err != nil || len(b) != len(key) {
		return key, fmt.Errorf("%w: %q is not 32 hex digits", ErrLineage, lineage)
	}
	copy(key[:], b)
	return key, nil
}

func (d *disk) createTable(lineage string) (*sidecar.Table, error) {
	key, err := lineageKey(lineage)
	if err != nil {
		return nil, err
	}
	f, err := d.m.t.files.CreateFile(d.sidecarPath(), sidecar.FileSize(d.size))
	if err != nil {
		return nil, fmt.Errorf("create sidecar of %s: %w", d.id, spaceOr(err))
	}
	t, err := sidecar.Create(f, d.size, key)
	if err != nil {
		return nil, fmt.Errorf("create sidecar of %s: %w", d.id, errors.Join(spaceOr(err), f.Close()))
	}
	return t, nil
}

// tracked reports whether the record asks for changes to be kept.
func (r *record) tracked() bool {
	return r.Lineage != "" && (r.Reason == None || r.Pass != nil && r.Pass.Phase == Open)
}

// resume goes on after a clean detach.
func (m *machine) resume() error {
	r := m.rec.Load()
	for _, d := range m.disks {
		now, err := m.t.files.Print(d.path)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.id, err)
		}
		if was := r.Prints[d.id]; now.Bytes != was.Bytes || !now.MTime.Equal(was.MTime) {
			return fmt.Errorf("%w: disk %s had %d bytes of %s, has %d of %s", errChangedOffline, d.id,
				was.Bytes, was.MTime, now.Bytes, now.MTime)
		}
		logs, err := d.loadLogs(r.Pending[d.id])
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.id, err)
		}
		d.pending = logs
		for _, l := range logs {
			d.logBytes += l.data
		}
	}
	return m.finishOrUndo()
}

// recover goes on after a crash: hot extents are dirty, the chains are void.
func (m *machine) recover() error {
	for _, d := range m.disks {
		// The page cache of the process that died may be all that holds a write that was shipped.
		if err := d.sync(); err != nil {
			return fmt.Errorf("flush image of %s: %w", d.id, err)
		}
		if m.rec.Load().Reason == None || m.rec.Load().Pass != nil {
			d.table.Load().Move(sidecar.Hot, sidecar.Dirty)
		}
	}
	return m.finishOrUndo()
}

// finishOrUndo does what the record decided of a pass before the crash.
func (m *machine) finishOrUndo() error {
	r := m.rec.Load()
	switch {
	case r.Pass == nil:
		for _, d := range m.disks {
			d.table.Load().Move(sidecar.Pass, sidecar.Dirty)
		}
	case r.Pass.Phase == beginning:
		m.undoBegin()
	case r.Pass.Phase != Open:
		if err := m.finishPass(); err != nil {
			return err
		}
	}
	if !m.rec.Load().tracked() {
		m.turnOff()
	}
	for _, d := range m.disks {
		if err := d.table.Load().Commit(); err != nil {
			return fmt.Errorf("disk %s: %w", d.id, err)
		}
	}
	return nil
}

// clearUp removes the files of ours that nothing names.
func (m *machine) clearUp() error {
	r := m.rec.Load()
	for _, d := range m.disks {
		keep := map[string]bool{}
		var logs []*logFile
		if o := m.open.Load(); o != nil {
			logs = slices.Clone(o.logs[d.id])
		}
		for _, l := range append(logs, d.pending...) {
			keep[l.rec.File] = true
			keep[filepath.Base(zeroPath(l.path))] = true
		}
		keep[filepath.Base(d.sidecarPath())] = r.Lineage != ""
		names, err := m.t.files.List(d.dir, d.prefix)
		if err != nil {
			return fmt.Errorf("list logs of %s: %w", d.id, err)
		}
		for _, name := range names {
			middle := strings.TrimPrefix(name, d.prefix)
			number, isLog := strings.CutSuffix(middle, logSuffix)
			if !isLog {
				number, isLog = strings.CutSuffix(middle, zeroSuffix)
			}
			n, err := strconv.Atoi(number)
			if isLog = isLog && err == nil; isLog {
				d.number = max(d.number, n)
			}
			if keep[name] || !isLog && middle != "lfx" {
				continue
			}
			if err := m.t.files.Remove(filepath.Join(d.dir, name)); err != nil {
				return fmt.Errorf("remove stale log: %w", err)
			}
		}
	}
	if r.Lineage == "" {
		return m.removeRecords()
	}
	return nil
}

func (m *machine) removeRecords() error {
	names, err := m.t.files.List(m.dir, pointPrefix)
	if err != nil {
		return fmt.Errorf("list point records: %w", err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, pointSuffix) {
			continue
		}
		if err := m.t.files.Remove(filepath.Join(m.dir, name)); err != nil {
			return fmt.Errorf("remove point record: %w", err)
		}
	}
	return nil
}

// startLogs gives every tracked disk its next log. Nobody writes yet.
func (m *machine) startLogs() {
	if !m.rec.Load().tracked() {
		return
	}
	next := m.nextLogs(func(d *disk) uuid.UUID {
		if n := len(d.pending); n > 0 {
			return d.pending[n-1].rec.ID
		}
		// A disk that logged to its end has its last log pending. One without was degraded: there is a gap between an
		// open point's logs and this one.
		return uuid.Nil
	})
	for i, d := range m.disks {
		d.logMu.Lock()
		d.active = next[i]
		d.mode.Store(int32(logging))
		if next[i] == nil {
			d.degradeLocked("no log could be made")
		} else {
			// The marks that a clean detach left belong to the pending logs.
			d.table.Load().HoldAll(d.gen)
		}
		d.logMu.Unlock()
	}
}

// unload ends the machine in good order: the exports are closed, nobody writes.
func (m *machine) unload() error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	m.ended = true
	m.gate.Lock()
	defer m.gate.Unlock()
	m.wg.Wait()
	var errs []error
	c := m.rec.Load().clone()
	if c.Lineage != "" {
		if err := m.settleBrokenLocked(c); err != nil {
			errs = append(errs, err)
		} else if err := m.close(c); err != nil {
			// Not clean: the next attach treats it as a crash.
			errs = append(errs, err)
		}
	}
	for _, d := range m.disks {
		d.logMu.Lock()
		if d.active != nil && d.active.w != nil {
			errs = append(errs, d.active.w.Abort())
		}
		d.logMu.Unlock()
		if t := d.table.Load(); t != nil {
			errs = append(errs, t.Close())
		}
		errs = append(errs, d.img.Close())
	}
	return errors.Join(errs...)
}

// settleBrokenLocked puts a failure met by guest writes into c.
func (m *machine) settleBrokenLocked(c *record) error {
	cause := m.broken.Load()
	if cause == nil || c.Reason != None && c.Pass == nil {
		return nil
	}
	c.lose(TrackingBroken, (*cause).Error())
	return m.save(c.clone())
}

// close writes the record of a clean end. It needs ctl and the gate.
func (m *machine) close(c *record) error {
	c.Clean, c.Pending, c.Prints = true, map[string][]logRecord{}, map[string]print{}
	for _, d := range m.disks {
		if err := d.sync(); err != nil {
			return fmt.Errorf("flush image of %s: %w", d.id, err)
		}
		d.logMu.Lock()
		chain := d.takeChain()
		d.logMu.Unlock()
		for _, l := range chain {
			if err := l.seal(); err != nil {
				return err
			}
			c.Pending[d.id] = append(c.Pending[d.id], l.rec)
		}
		if t := d.table.Load(); t != nil {
			if err := t.Commit(); err != nil {
				return err
			}
		}
		p, err := m.t.files.Print(d.path)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.id, err)
		}
		c.Prints[d.id] = p
	}
	return m.save(c)
}
