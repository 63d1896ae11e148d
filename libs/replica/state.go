package replica

import (
	"fmt"
	"maps"
	"slices"
)

// State is what the chain up to Head says: a pure function of its manifests (or of the anchor at the retention
// floor and the manifests above it). The zero State is the empty chain. Treat it as immutable.
type State struct {
	// Head is the number of the newest manifest; 0 for an empty chain.
	Head Seq
	// HeadHash is the SHA-256 of its bytes, hex; empty for an empty chain.
	HeadHash string
	// Epoch is the head's epoch; 0 for an empty chain. Next tasks carry at least this one.
	Epoch Epoch
	// Open is the newest open manifest; 0 when there is none. Tasks name it.
	Open Seq
	// Fence is the newest close or open; its zero value when there is none.
	Fence Fence
	// StateOrdinal is the ordinal of the newest base, point or completed pass, or the target of a newer rewind.
	StateOrdinal Ordinal
	// Highest is the highest ordinal ever used. The next is max(this, the host's, the record's) + 1.
	Highest Ordinal
	// Base is the newest base manifest's number; 0 when initial replication has not ended.
	Base Seq
	// Newest is the newest base or point above which no rewind stands; 0 when there is none.
	Newest Seq
	// Running reports an unfinished run: a partial newer than the newest base, point and rewind.
	Running bool
	// Floor is the retention floor: manifests at or below it are gone.
	Floor Seq

	disks  map[string]DiskState
	points map[Ordinal]Seq
	passes map[Ordinal]*passState
	fences map[string]fenceSeqs
}

// Fence is a close or an open.
type Fence struct {
	Kind     Kind // KindClose, KindOpen, or "" when there is none
	Seq      Seq
	Failover string
}

// DiskState is a disk as the chain knows it at its head.
type DiskState struct {
	ID   string `json:"id"`
	Gen  uint32 `json:"gen"`
	Size int64  `json:"size"`
	// First is the manifest that named this generation first; earlier ones hold nothing of it.
	First Seq `json:"first"`
}

type fenceSeqs struct{ closed, rewound, opened Seq }

type passState struct {
	k     uint32
	base  Ordinal
	open  Seq
	have  []Seq // by task-1; 0 is not there
	count uint32
	last  Seq
	bytes int64 // stored bytes of its segments
	void  bool  // a rewind stands above some of its partials
}

func (p *passState) seqOf(i uint32) Seq {
	if int(i) > len(p.have) {
		return 0
	}
	return p.have[i-1]
}

func (p *passState) set(i uint32, seq Seq) {
	for len(p.have) < int(i) {
		p.have = append(p.have, 0)
	}
	if p.have[i-1] == 0 {
		p.count++
	}
	p.have[i-1] = seq
}

func (p *passState) complete() bool { return !p.void && p.count == p.k }

// PassProgress says which tasks of a pass are in the chain.
type PassProgress struct {
	Ordinal Ordinal
	K       uint32
	Done    uint32
	// Complete: all K are in the chain above the newest rewind. Only then may the pass be settled or be a base.
	Complete bool
	// Missing lists the tasks not in the chain, ascending, 1-based.
	Missing []uint32
	// Last is the newest manifest of the pass.
	Last Seq
	// Bytes is what the segments of its tasks in the chain take in storage.
	Bytes int64
}

// Closed reports whether a close stands above everything: the lineage is fenced.
func (s *State) Closed() bool { return s.Fence.Kind == KindClose }

// Disks lists the disks at the head, by id: those of the newest base or point, and those that partials added since.
func (s *State) Disks() []DiskState {
	ids := slices.Sorted(maps.Keys(s.disks))
	out := make([]DiskState, len(ids))
	for i, id := range ids {
		out[i] = s.disks[id]
	}
	return out
}

// PointSeq returns the manifest of a base or point.
func (s *State) PointSeq(o Ordinal) (Seq, bool) {
	seq, ok := s.points[o]
	return seq, ok
}

// FenceSeqs returns the numbers of a failover's close and open manifests, 0 for those that are not in the chain.
func (s *State) FenceSeqs(failover string) (closed, opened Seq) {
	f := s.fences[failover]
	return f.closed, f.opened
}

// Pass returns the progress of a pass; ok is false when no task of it is in the chain.
func (s *State) Pass(o Ordinal) (PassProgress, bool) {
	p, ok := s.passes[o]
	if !ok {
		return PassProgress{}, false
	}
	out := PassProgress{Ordinal: o, K: p.k, Done: p.count, Complete: p.complete(), Last: p.last, Bytes: p.bytes}
	for i := uint32(1); i <= p.k; i++ {
		if p.seqOf(i) == 0 {
			out.Missing = append(out.Missing, i)
		}
	}
	return out, true
}

// admit decides whether m may follow the head (rules 5, 6, 10, 16, 17). dup is the manifest that already holds
// what m says; then nothing must be written. m's Seq and Prev are not looked at.
func (s *State) admit(m *Manifest, b *bugs) (dup Seq, err error) {
	if dup, err = s.duplicate(m); dup != 0 || err != nil {
		if !(b.StaleTask && m.Kind.IsPoint()) && !(b.NoPassOrdinal && m.Kind == KindPartial) {
			return dup, err
		}
	}
	switch m.Kind {
	case KindClose:
		if s.Closed() {
			return 0, fmt.Errorf("close by failover %s: failover %s holds the fence: %w", m.Failover, s.Fence.Failover, ErrClosed)
		}
		return 0, nil
	case KindOpen, KindRewind:
		if (s.Fence.Kind != KindClose || s.Fence.Failover != m.Failover) && !b.AnyFence {
			return 0, fmt.Errorf("%s by failover %s: newest fence is %q of %q: %w",
				m.Kind, m.Failover, s.Fence.Kind, s.Fence.Failover, ErrNotFenced)
		}
		if m.Kind == KindRewind {
			if _, ok := s.points[m.Base]; !ok {
				return 0, fmt.Errorf("rewind to point %d: %w", m.Base, ErrNotFound)
			}
		}
		return 0, nil
	}
	o := m.Ordinal()
	switch {
	case m.Epoch < s.Epoch && !b.NoEpoch && !b.SelfRaisedEpoch:
		return 0, fmt.Errorf("ordinal %d: epoch %d, chain has %d: %w", o, m.Epoch, s.Epoch, ErrStaleEpoch)
	case s.Closed():
		return 0, fmt.Errorf("ordinal %d: close %d of failover %s: %w", o, s.Fence.Seq, s.Fence.Failover, ErrClosed)
	case m.Open != s.Open && !b.NoOpen:
		return 0, fmt.Errorf("ordinal %d: names open %d, newest is %d: %w", o, m.Open, s.Open, ErrStaleOpen)
	}
	for _, d := range m.Disks {
		if have, ok := s.disks[d.ID]; ok && (d.Gen < have.Gen || d.Gen == have.Gen && d.Size != have.Size) {
			return 0, fmt.Errorf("ordinal %d: disk %s generation %d of %d bytes, chain has %d of %d: %w",
				o, d.ID, d.Gen, d.Size, have.Gen, have.Size, ErrInvalid)
		}
	}
	if m.Kind == KindPartial {
		return 0, s.admitPartial(m, b)
	}
	switch {
	case o <= s.Highest && !b.StaleTask:
		return 0, fmt.Errorf("point %d: highest in the chain is %d: %w", o, s.Highest, ErrOrdinalUsed)
	case m.Base > s.StateOrdinal && !b.NoBaseRule:
		return 0, fmt.Errorf("point %d: base %d, chain's state is %d: %w", o, m.Base, s.StateOrdinal, ErrBaseAhead)
	case m.Kind == KindPoint && s.Base == 0:
		return 0, fmt.Errorf("point %d: %w", o, ErrNoBase)
	}
	return 0, nil
}

func (s *State) admitPartial(m *Manifest, b *bugs) error {
	p := m.Pass
	if b.NoPassOrdinal {
		return nil
	}
	if have, ok := s.passes[p.Ordinal]; ok && p.Ordinal == s.Highest {
		switch {
		case have.void:
			return fmt.Errorf("pass %d: a rewind stands above it: %w", p.Ordinal, ErrPassOrder)
		case have.k != p.K, have.base != m.Base, have.open != m.Open:
			return fmt.Errorf("pass %d: tasks, base and open are %d, %d, %d in the chain, %d, %d, %d here: %w",
				p.Ordinal, have.k, have.base, have.open, p.K, m.Base, m.Open, ErrPassOrder)
		}
		return nil // base ≤ state ordinal held for its first task, and only this pass followed
	}
	if p.Ordinal <= s.Highest {
		return fmt.Errorf("pass %d: highest in the chain is %d: %w", p.Ordinal, s.Highest, ErrOrdinalUsed)
	}
	if m.Base > s.StateOrdinal && !b.NoBaseRule {
		return fmt.Errorf("pass %d: base %d, chain's state is %d: %w", p.Ordinal, m.Base, s.StateOrdinal, ErrBaseAhead)
	}
	return nil
}

// duplicate finds m's meaning in the chain: the same point, task of a pass, or fence of a failover.
func (s *State) duplicate(m *Manifest) (Seq, error) {
	switch m.Kind {
	case KindBase, KindPoint:
		if seq, ok := s.points[m.Point]; ok {
			return seq, nil
		}
		if _, ok := s.passes[m.Point]; ok {
			return 0, fmt.Errorf("point %d: the ordinal is a pass: %w", m.Point, ErrOrdinalUsed)
		}
	case KindPartial:
		if p, ok := s.passes[m.Pass.Ordinal]; ok && !p.void && p.k == m.Pass.K && p.seqOf(m.Pass.I) != 0 {
			return p.seqOf(m.Pass.I), nil
		}
		if _, ok := s.points[m.Pass.Ordinal]; ok {
			return 0, fmt.Errorf("pass %d: the ordinal is a point: %w", m.Pass.Ordinal, ErrOrdinalUsed)
		}
	case KindClose:
		return s.fences[m.Failover].closed, nil
	case KindOpen:
		return s.fences[m.Failover].opened, nil
	}
	return 0, nil
}

// next returns the state after m, whose stored bytes hash to hash. It checks only what every reader must: density,
// the hash link and epochs; whether m should have been admitted was its committer's duty.
func (s *State) next(m *Manifest, hash string, b *bugs) error {
	switch {
	case m.Seq != s.Head+1:
		return fmt.Errorf("manifest %d after %d: %w", m.Seq, s.Head, ErrCorrupt)
	case m.Prev != s.HeadHash:
		return fmt.Errorf("manifest %d: prev %s, manifest %d is %s: %w", m.Seq, m.Prev, s.Head, s.HeadHash, ErrCorrupt)
	case m.Epoch < s.Epoch && !b.NoEpoch:
		return fmt.Errorf("manifest %d: epoch %d after %d: %w", m.Seq, m.Epoch, s.Epoch, ErrCorrupt)
	}
	if s.disks == nil {
		s.disks, s.points = map[string]DiskState{}, map[Ordinal]Seq{}
		s.passes, s.fences = map[Ordinal]*passState{}, map[string]fenceSeqs{}
	}
	s.Head, s.HeadHash, s.Epoch = m.Seq, hash, max(s.Epoch, m.Epoch)
	s.Highest = max(s.Highest, m.Ordinal())
	switch m.Kind {
	case KindBase, KindPoint:
		s.points[m.Point] = m.Seq
		s.StateOrdinal, s.Newest, s.Running = m.Point, m.Seq, false
		if m.Kind == KindBase {
			s.Base = m.Seq
		}
	case KindPartial:
		s.nextPartial(m, b)
	case KindRewind:
		s.StateOrdinal, s.Running = m.Base, false
		s.Newest = s.points[m.Base]
		f := s.fences[m.Failover]
		f.rewound = m.Seq
		s.setFence(m.Failover, f)
		for _, p := range s.passes {
			p.void = true
		}
	case KindClose, KindOpen:
		s.Fence = Fence{Kind: m.Kind, Seq: m.Seq, Failover: m.Failover}
		f := s.fences[m.Failover]
		if m.Kind == KindOpen {
			s.Open = m.Seq
			f.opened = m.Seq
		} else {
			f.closed = m.Seq
		}
		s.setFence(m.Failover, f)
	}
	s.nextDisks(m)
	return nil
}

// setFence replaces the map: entries of the chain share it.
func (s *State) setFence(failover string, f fenceSeqs) {
	now := maps.Clone(s.fences)
	if now == nil {
		now = map[string]fenceSeqs{}
	}
	now[failover] = f
	s.fences = now
}

func (s *State) nextPartial(m *Manifest, b *bugs) {
	p := s.passes[m.Pass.Ordinal]
	if p == nil {
		p = &passState{k: m.Pass.K, base: m.Base, open: m.Open}
		s.passes[m.Pass.Ordinal] = p
	}
	p.set(m.Pass.I, m.Seq)
	p.last = m.Seq
	for _, d := range m.Disks {
		for _, segment := range d.Segments {
			p.bytes += segment.Bytes
		}
	}
	s.Running = true
	if b.HalfPass {
		p.count = p.k
	}
	if p.complete() {
		s.StateOrdinal = m.Pass.Ordinal
	}
}

// nextDisks: a base or point lists all disks; others add. The map is never changed in place: entries of the chain
// share it.
func (s *State) nextDisks(m *Manifest) {
	if m.Kind.IsFence() {
		return
	}
	now := make(map[string]DiskState, len(m.Disks))
	if !m.Kind.IsPoint() {
		maps.Copy(now, s.disks)
	}
	for _, d := range m.Disks {
		ds := DiskState{ID: d.ID, Gen: d.Gen, Size: d.Size, First: m.Seq}
		if was, ok := s.disks[d.ID]; ok && was.Gen == d.Gen {
			ds.First = was.First
		}
		now[d.ID] = ds
	}
	if !maps.Equal(now, s.disks) {
		s.disks = now
	}
}

// clone copies what next changes in place.
func (s *State) clone() *State {
	c := *s
	c.points, c.fences = maps.Clone(s.points), maps.Clone(s.fences)
	c.passes = make(map[Ordinal]*passState, len(s.passes))
	for o, p := range s.passes {
		q := *p
		q.have = slices.Clone(p.have)
		c.passes[o] = &q
	}
	return &c
}
