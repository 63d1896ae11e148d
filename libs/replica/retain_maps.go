package replica

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
)

// ExtentMapVersion is the version of the extent maps.
const ExtentMapVersion = 1

// Bounds of extent maps.
const (
	maxExtentMap = 64 << 20 // stored bytes
	// maxMapRanges bounds the ranges of one disk: a map that has more is made coarser, which only makes a rewind set back
	// more than it must.
	maxMapRanges = 64 << 10
	// mapChunk bounds the segments whose extents one new map holds, so that a long range is mapped in steps that last.
	mapChunk = 1024
)

// ExtentMap is idx/<from>-<to>.json in the replica container: everything that the manifests From to To say anything about.
// It is put create-only before they are retired, or their run is released, and never changed. A rewind over them sets
// back what it says instead of whole disks.
type ExtentMap struct {
	V       int             `json:"v"`
	Lineage Lineage         `json:"lineage"`
	From    Seq             `json:"from"`
	To      Seq             `json:"to"`
	Disks   []ExtentMapDisk `json:"disks,omitempty"`
}

// ExtentMapDisk is one generation of a disk in an extent map.
type ExtentMapDisk struct {
	ID  string `json:"id"`
	Gen uint32 `json:"gen"`
	// Extents is an encoded extent.Set: it has all that was said, and may have more.
	Extents []byte `json:"extents"`
}

// DecodeExtentMap reads a stored map strictly.
func DecodeExtentMap(b []byte) (*ExtentMap, error) {
	var m ExtentMap
	if err := decodeStrict(b, maxExtentMap, ExtentMapVersion, &m); err != nil {
		return nil, fmt.Errorf("decode extent map: %w", err)
	}
	bad := !isHex(string(m.Lineage), 32) || m.From == 0 || m.To < m.From || m.To > MaxSeq
	for _, d := range m.Disks {
		bad = bad || !validToken(d.ID, 64) || d.Gen == 0 || d.Gen > 9999
	}
	if bad {
		return nil, fmt.Errorf("decode extent map %d to %d: %w", m.From, m.To, ErrInvalid)
	}
	return &m, nil
}

func mapName(s SeqRange) string {
	return fmt.Sprintf("%s%012d-%012d%s", mapPrefix, uint64(s.From), uint64(s.To), jsonSuffix)
}

func rangeOfMap(name string) (s SeqRange, ok bool) {
	from, to, ok := strings.Cut(strings.TrimPrefix(name, mapPrefix), "-")
	if !ok {
		return s, false
	}
	var err error
	if s.From, err = ParseSeq(from); err != nil {
		return s, false
	}
	if s.To, err = ParseSeq(strings.TrimSuffix(to, jsonSuffix)); err != nil {
		return s, false
	}
	return s, s.From > 0 && s.From <= s.To && name == mapName(s)
}

type diskKey struct {
	id  string
	gen uint32
}

// saidSets is what a range says, by disk and generation.
type saidSets map[diskKey]*extent.Set

func (s saidSets) set(id string, gen uint32) *extent.Set {
	k := diskKey{id, gen}
	if s[k] == nil {
		s[k] = &extent.Set{}
	}
	return s[k]
}

// coarser bounds the ranges of every set.
func (s saidSets) coarser() {
	for k, set := range s {
		for unit := int64(64 << 10); set.Len() > maxMapRanges; unit *= 2 {
			var c extent.Set
			for r := range set.All() {
				c.Add(r.Align(unit))
			}
			s[k], set = &c, &c
		}
	}
}

// listMaps lists the extent maps, by From and then the longest first.
func (r *Replica) listMaps(ctx context.Context) ([]SeqRange, error) {
	var out []SeqRange
	for p, err := range r.replica.List(ctx, mapPrefix, "") {
		if err != nil {
			return nil, fmt.Errorf("list extent maps: %w", err)
		}
		if s, ok := rangeOfMap(p.Name); ok {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b SeqRange) int { return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(b.To, a.To)) })
	return out, nil
}

// mapAt picks the map that leads furthest from at, within [.., to] unless beyond.
func mapAt(maps []SeqRange, at, to Seq, beyond bool) (best SeqRange, ok bool) {
	for _, m := range maps {
		if m.has(at) && m.To > best.To && (beyond || m.To <= to) {
			best, ok = m, true
		}
	}
	return best, ok
}

// covering picks maps that hold the whole range between them; ok is false when there are none such.
func covering(maps []SeqRange, s SeqRange) (out []SeqRange, ok bool) {
	for at := s.From; at <= s.To; {
		m, ok := mapAt(maps, at, s.To, true)
		if !ok {
			return nil, false
		}
		out = append(out, m)
		at = m.To + 1
	}
	return out, true
}

// loadMap adds a stored map to sets.
func (r *Replica) loadMap(ctx context.Context, s SeqRange, sets saidSets) error {
	b, err := readAll(ctx, r.replica, mapName(s), maxExtentMap)
	if err != nil {
		return fmt.Errorf("read extent map: %w", err)
	}
	m, err := DecodeExtentMap(b)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if m.Lineage != r.lineage || m.From != s.From || m.To != s.To {
		return fmt.Errorf("extent map %d to %d is of %d to %d of lineage %s: %w", s.From, s.To, m.From, m.To, m.Lineage, ErrCorrupt)
	}
	for _, d := range m.Disks {
		var set extent.Set
		if err := set.UnmarshalBinary(d.Extents); err != nil {
			return fmt.Errorf("extent map %d to %d, disk %s: %w: %w", s.From, s.To, d.ID, ErrCorrupt, err)
		}
		sets.set(d.ID, d.Gen).AddSet(&set)
	}
	return nil
}

// storeMap puts a map create-only. One that exists says as much: it is of the same manifests.
func (r *Replica) storeMap(ctx context.Context, s SeqRange, sets saidSets) error {
	sets.coarser()
	m := ExtentMap{V: ExtentMapVersion, Lineage: r.lineage, From: s.From, To: s.To}
	for k, set := range sets {
		b, err := set.MarshalBinary()
		if err != nil {
			return err
		}
		m.Disks = append(m.Disks, ExtentMapDisk{ID: k.id, Gen: k.gen, Extents: b})
	}
	slices.SortFunc(m.Disks, func(a, b ExtentMapDisk) int { return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Gen, b.Gen)) })
	body, err := json.Marshal(&m)
	if err != nil {
		return fmt.Errorf("encode extent map: %w", err)
	}
	body = append(body, '\n')
	if len(body) > maxExtentMap {
		return fmt.Errorf("extent map %d to %d has %d bytes, at most %d: %w", s.From, s.To, len(body), maxExtentMap, ErrInvalid)
	}
	for range maxUnknown {
		_, err = r.replica.Put(ctx, mapName(s), bytes.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
		if err == nil || errors.Is(err, blobstore.ErrExists) {
			return nil
		}
		if definite(err) || ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("store extent map %d to %d: %w", s.From, s.To, err)
}

// mapper stores extent maps within the bounds of one step.
type mapper struct {
	r      *Replica
	p      *plan
	maps   []SeqRange // stored ones, as far as known
	reads  int        // segment indexes that may still be read
	stored int
	opens  int
}

// build makes sure that maps cover a range. done is false when the step's bound ended it: what was stored lasts. A range
// of which something is not known any more (a run that was released without a map, because nothing below it was left)
// gets none, and is done: a rewind over it sets whole disks back.
func (m *mapper) build(ctx context.Context, s SeqRange) (done bool, err error) {
	if b, ok := mapAt(m.maps, s.From, s.To, false); ok && b == s {
		return true, nil
	}
	from, reads, sets := s.From, 0, saidSets{}
	store := func(to Seq) error {
		if to < from {
			return nil
		}
		piece := SeqRange{from, to}
		if !slices.Contains(m.maps, piece) {
			if err := m.r.storeMap(ctx, piece, sets); err != nil {
				return err
			}
			m.stored++
			m.maps = append(m.maps, piece)
		}
		from, reads, sets = to+1, 0, saidSets{}
		return nil
	}
	for at := s.From; at <= s.To; {
		if m.reads <= 0 {
			return false, store(at - 1)
		}
		if b, ok := mapAt(m.maps, at, s.To, false); ok {
			if err := m.r.loadMap(ctx, b, sets); err != nil {
				return false, err
			}
			m.reads--
			at = b.To + 1
			continue
		}
		i, ok := m.p.index(at)
		if !ok || m.p.entries[i].Kind == KindPartial && m.p.ret.released(at) {
			return true, nil
		}
		if !m.p.entries[i].Kind.IsFence() {
			n, err := m.read(ctx, &m.p.entries[i], sets)
			if err != nil {
				return false, err
			}
			reads, m.reads = reads+n, m.reads-n
		}
		if reads >= mapChunk {
			if err := store(at); err != nil {
				return false, err
			}
		}
		at++
	}
	return true, store(s.To)
}

// read adds what one manifest says, from the indexes of its segments, and returns how many those are. The caller holds the
// turn.
func (m *mapper) read(ctx context.Context, e *Entry, sets saidSets) (int, error) {
	man, err := m.r.manifest(ctx, e.Seq)
	if err != nil {
		return 0, err
	}
	type one struct {
		d Disk
		s Segment
	}
	var list []one
	for _, d := range man.Disks {
		for _, s := range d.Segments {
			list = append(list, one{d, s})
		}
	}
	for rest := list; len(rest) > 0; {
		n := min(len(rest), max(m.opens, 1))
		opened := make([]*segData, n)
		if err := inParallel(ctx, n, func(ctx context.Context, i int) error {
			sd, err := m.r.openIndex(ctx, rest[i].s)
			if err == nil {
				err = sd.matches(m.r.lineage, man, DiskState{ID: rest[i].d.ID, Gen: rest[i].d.Gen, Size: rest[i].d.Size})
			}
			if err == nil {
				opened[i] = sd
				return nil
			}
			if errors.Is(err, ErrCorrupt) || errors.Is(err, segment.ErrCorrupt) || errors.Is(err, blobstore.ErrNotFound) {
				return nil // what it says is not known: all of the disk
			}
			return err
		}); err != nil {
			return 0, fmt.Errorf("manifest %d: %w", e.Seq, err)
		}
		for i, sd := range opened {
			set := sets.set(rest[i].d.ID, rest[i].d.Gen)
			if sd == nil {
				set.Add(extent.Range{Len: rest[i].d.Size})
				continue
			}
			for _, x := range sd.ix.Extents {
				set.Add(extent.Range{Off: x.Off, Len: x.Len})
			}
		}
		rest = rest[n:]
	}
	sets.coarser()
	return max(len(list), 1), nil
}

// addMapped adds what stored maps say about the disks to set back. ok is false when maps do not cover every range.
func (r *Replica) addMapped(ctx context.Context, ranges []SeqRange, backs []*back) (ok bool, err error) {
	if len(ranges) == 0 {
		return true, nil
	}
	for range 3 { // a longer map may take another's place between listing and reading
		sets, ok, err := r.mapped(ctx, ranges)
		if errors.Is(err, blobstore.ErrNotFound) {
			continue
		}
		if !ok || err != nil {
			return false, err
		}
		for _, b := range backs {
			if set := sets[diskKey{b.d.ID, b.d.Gen}]; set != nil {
				for x := range set.In(wholeDisk(b.d)) {
					b.changed.Add(x)
				}
			}
		}
		return true, nil
	}
	return false, nil
}

// mapped reads the maps that cover ranges. ok is false when there are none such, or one cannot be believed.
func (r *Replica) mapped(ctx context.Context, ranges []SeqRange) (sets saidSets, ok bool, err error) {
	maps, err := r.listMaps(ctx)
	if err != nil {
		return nil, false, err
	}
	var use []SeqRange
	for _, s := range ranges {
		c, ok := covering(maps, s)
		if !ok {
			return nil, false, nil
		}
		use = append(use, c...)
	}
	sets = saidSets{}
	for _, s := range slices.Compact(use) {
		if err := r.loadMap(ctx, s, sets); errors.Is(err, ErrCorrupt) {
			return nil, false, nil
		} else if err != nil {
			return nil, false, err
		}
	}
	return sets, true, nil
}
