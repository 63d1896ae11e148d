package changetracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/libs/extent"
)

// source is where the changes of a machine are read. There are two: machine, whose guest writes through us and is kept in
// write logs, and bitmapSource, whose hypervisor knows what changed.
type source interface {
	readChanges(ctx context.Context, lineage string, ordinal uint64, diskID string, from int64, emit func(Chunk) error) error
	readRanges(ctx context.Context, lineage string, pass uint64, diskID string, window extent.Range, ranges []extent.Range,
		emit func(Chunk) error) error
	hashRanges(ctx context.Context, lineage, diskID string, window extent.Range, step int64, emit func(Hashes) error) error
}

// SourceSpec is an open point or pass of a machine whose hypervisor keeps the changes.
type SourceSpec struct {
	ID      string // of the machine
	Lineage string
	Epoch   uint64
	Ordinal uint64
	// Scope of a pass; empty for a point.
	Scope Scope
	// Disks in order.
	Disks []SourceDisk
}

// SourceDisk is one NBD export of a source.
type SourceDisk struct {
	ID   string `json:"id"`
	Size int64  `json:"size"`
	URI  string `json:"uri"`
	// Context is the meta context of a point's changes.
	Context string `json:"change_context,omitempty"`
	// Allocation: base:allocation of the export tells zeros from data.
	Allocation bool `json:"allocation,omitempty"`
	// ReadUnit: no read may cross a multiple of it; 0 is no limit.
	ReadUnit int64 `json:"read_unit,omitempty"`
}

// sourceRecord is source-<vm>.json.
type sourceRecord struct {
	V       int    `json:"v"`
	Machine string `json:"machine"`
	Lineage string `json:"lineage,omitempty"`
	Epoch   uint64 `json:"epoch"`   // highest seen
	Ordinal uint64 `json:"ordinal"` // highest attached
	Scope   Scope  `json:"scope,omitempty"`
	// Disks is empty after the ordinal was detached.
	Disks []SourceDisk `json:"disks,omitempty"`
}

const sourcePrefix = "source-"

func (t *Tracker) sourcePath(id string) string { return filepath.Join(t.dir, sourcePrefix+id+".json") }

// source finds where a machine is read.
func (t *Tracker) source(id string) (source, error) {
	m, err := t.machine(id)
	if err == nil {
		return m, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.sources[id]; s != nil && !t.closed {
		return s, nil
	}
	return nil, err
}

// restoreSources reads what was attached when the process ended. No export is opened: a hypervisor that is gone is met
// by whoever reads.
func (t *Tracker) restoreSources() error {
	names, err := t.files.List(t.dir, sourcePrefix)
	if err != nil {
		return fmt.Errorf("list sources: %w", err)
	}
	for _, name := range names {
		id, ok := strings.CutSuffix(strings.TrimPrefix(name, sourcePrefix), ".json")
		if !ok {
			continue
		}
		var r sourceRecord
		b, err := t.files.ReadFile(filepath.Join(t.dir, name))
		if err == nil {
			err = decodeState(b, &r, &r.V)
		}
		if err == nil && r.Machine != id {
			err = fmt.Errorf("it is the source of machine %q", r.Machine)
		}
		if err != nil {
			t.logger.Error("read a source; its point or pass cannot be read until it is attached again", "file", name, "err", err)
			continue
		}
		s := &bitmapSource{t: t, id: id, rec: &r}
		if len(r.Disks) > 0 {
			s.open = newAttachment(&r)
		}
		t.sources[id] = s
	}
	return nil
}

// AttachSource says where an open point or pass is read. It returns the changed or allocated bytes of each disk as far
// as they could be counted. Idempotent; it replaces an older source of the machine.
func (t *Tracker) AttachSource(ctx context.Context, spec SourceSpec) ([]Change, error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	s := t.sources[spec.ID]
	switch {
	case t.closed:
		t.mu.Unlock()
		return nil, fmt.Errorf("%w: it is stopping", ErrUnavailable)
	case t.machines[spec.ID] != nil || t.busy[spec.ID]:
		t.mu.Unlock()
		return nil, fmt.Errorf("%w: the images of machine %s are attached", ErrInvalidState, spec.ID)
	case s == nil:
		s = &bitmapSource{t: t, id: spec.ID, rec: &sourceRecord{V: stateVersion, Machine: spec.ID}}
		t.sources[spec.ID] = s
	}
	t.mu.Unlock()
	return s.attach(ctx, spec)
}

// DetachSource forgets the source of ordinal, or with 0 everything of the machine, whatever its lineage. Its readers have
// ended when it returns. Idempotent.
func (t *Tracker) DetachSource(id, lineage string, ordinal uint64) error {
	t.mu.Lock()
	s := t.sources[id]
	closed := t.closed
	t.mu.Unlock()
	switch {
	case closed:
		return fmt.Errorf("%w: it is stopping", ErrUnavailable)
	case s == nil && ordinal == 0:
		return t.files.Remove(t.sourcePath(id)) // one that could not be read
	case s == nil:
		return nil
	}
	return s.detach(lineage, ordinal)
}

// closeSources ends all readers; the records stay.
func (t *Tracker) closeSources() {
	t.mu.Lock()
	var all []*bitmapSource
	for _, s := range t.sources {
		all = append(all, s)
	}
	t.mu.Unlock()
	for _, s := range all {
		s.end(fmt.Errorf("%w: it is stopping", ErrUnavailable))
	}
}

func (s SourceSpec) check() error {
	if s.ID == "" || strings.ContainsAny(s.ID, `/\`) || s.Ordinal == 0 || len(s.Disks) == 0 {
		return fmt.Errorf("%w: a source needs a machine, an ordinal and disks", ErrInvalidState)
	}
	if _, err := lineageKey(s.Lineage); err != nil {
		return err
	}
	if s.Scope != "" && s.Scope != Full && s.Scope != Compare {
		return fmt.Errorf("%w: a pass of scope %s is not read from a hypervisor", ErrInvalidState, s.Scope)
	}
	seen := map[string]bool{}
	for _, d := range s.Disks {
		if d.ID == "" || strings.ContainsAny(d.ID, `/\`) || seen[d.ID] {
			return fmt.Errorf("%w: disk id %q of machine %s", ErrDiskDuplicate, d.ID, s.ID)
		}
		seen[d.ID] = true
		if d.ReadUnit < 0 || d.ReadUnit%exportUnit != 0 {
			return fmt.Errorf("%w: disk %s: reads in units of %d bytes, not of multiples of %d", ErrExportInvalid, d.ID, d.ReadUnit, exportUnit)
		}
		if s.Scope == "" && d.Context == "" {
			return fmt.Errorf("%w: disk %s: a point needs the context of its changes", ErrExportInvalid, d.ID)
		}
	}
	return nil
}

// admit refuses calls of another lineage, a lower epoch or an older ordinal. It needs ctl.
func (s *bitmapSource) admit(spec SourceSpec) error {
	switch r := s.rec; {
	case r.Lineage != "" && r.Lineage != spec.Lineage:
		return fmt.Errorf("%w: %s, the call names %s", ErrLineage, r.Lineage, spec.Lineage)
	case spec.Epoch < r.Epoch:
		return fmt.Errorf("%w: %d, the highest seen is %d", ErrStaleEpoch, spec.Epoch, r.Epoch)
	case spec.Ordinal < r.Ordinal:
		return fmt.Errorf("%w: %d, the newest is %d", ErrSettled, spec.Ordinal, r.Ordinal)
	}
	return nil
}

// reads reports whether a reader of r reads what one of o does.
func (r *sourceRecord) reads(o *sourceRecord) bool {
	return r.Lineage == o.Lineage && r.Ordinal == o.Ordinal && r.Scope == o.Scope && slices.Equal(r.Disks, o.Disks)
}

// save makes r the record, durably. It needs ctl.
func (s *bitmapSource) save(r *sourceRecord) error {
	b, err := encodeState(r)
	if err == nil {
		err = s.t.files.Replace(s.t.sourcePath(s.id), b)
	}
	if err != nil {
		return fmt.Errorf("save source: %w", spaceOr(err))
	}
	s.rec = r
	return nil
}

func (s *bitmapSource) attach(ctx context.Context, spec SourceSpec) ([]Change, error) {
	s.ctl.Lock()
	defer s.ctl.Unlock()
	if err := s.admit(spec); err != nil {
		return nil, err
	}
	next := &sourceRecord{
		V: stateVersion, Machine: s.id, Lineage: spec.Lineage, Epoch: spec.Epoch, Ordinal: spec.Ordinal, Scope: spec.Scope,
		Disks: spec.Disks,
	}
	sizes, err := next.measure(ctx)
	if err != nil {
		if spec.Epoch > s.rec.Epoch {
			c := *s.rec
			c.Lineage, c.Epoch = spec.Lineage, spec.Epoch
			err = errors.Join(err, s.save(&c))
		}
		return nil, err
	}
	if err := s.save(next); err != nil {
		return nil, err
	}
	s.mu.Lock()
	before := s.open
	s.mu.Unlock()
	if before != nil && before.rec.reads(next) {
		return sizes, nil // its readers go on
	}
	why := fmt.Errorf("%w: ordinal %d took its place", errDetached, spec.Ordinal)
	if before != nil && before.rec.Ordinal == spec.Ordinal {
		why = fmt.Errorf("%w: it was attached anew", ErrSourceLost) // the exports moved: read again from there
	}
	s.replace(newAttachment(next), why)
	s.t.mu.Lock()
	closed := s.t.closed // meanwhile: nobody else would end it
	s.t.mu.Unlock()
	if closed {
		s.end(ErrUnavailable)
		return nil, fmt.Errorf("%w: it is stopping", ErrUnavailable)
	}
	return sizes, nil
}

func (s *bitmapSource) detach(lineage string, ordinal uint64) error {
	s.ctl.Lock()
	defer s.ctl.Unlock()
	r := s.rec
	switch {
	case ordinal == 0:
		if err := s.t.files.Remove(s.t.sourcePath(s.id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove source: %w", err)
		}
		s.rec = &sourceRecord{V: stateVersion, Machine: s.id}
	case r.Lineage != lineage || r.Ordinal != ordinal || len(r.Disks) == 0:
		return nil
	default:
		// The ordinal and the epoch are remembered, so that nothing older is attached.
		c := *r
		c.Disks = nil
		if err := s.save(&c); err != nil {
			return err
		}
	}
	s.end(errDetached)
	return nil
}
