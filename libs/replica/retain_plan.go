package replica

import (
	"cmp"
	"slices"
	"time"
)

// Bounds of a plan.
const (
	// maxRanges bounds the retired ranges of a record: hourly and daily points for some years.
	maxRanges = 2048
	// maxAnchors bounds the encoded size of their anchors, in bytes: half a record.
	maxAnchors = maxRetention / 2
)

// reach is how a manifest is reached: from its checkpoints and the manifests in (low, seq].
type reach struct {
	i         int // index of the entry
	low, from Seq // from: the lowest of low and the checkpoints
	uses      []Seq
	ok        bool
}

// reaches says how the wanted entries are reached, by the same rule as SourceAt: every disk from its nearest checkpoint.
func reaches(ret *Retention, entries []Entry, ckpts []*CheckpointRecord, want func(*Entry) bool) []reach {
	type disk struct {
		id  string
		gen uint32
	}
	floor := Seq(0)
	if ret != nil {
		floor = ret.Floor
	}
	nearest := map[disk]Seq{}
	given := make([]int, len(entries)+1) // partials before the index whose segments are gone
	var out []reach
	for i := range entries {
		e := &entries[i]
		given[i+1] = given[i]
		if e.Kind == KindPartial && ret.released(e.Seq) {
			given[i+1]++
		}
		for len(ckpts) > 0 && ckpts[0].Seq <= e.Seq {
			for _, d := range ckpts[0].Disks {
				nearest[disk{d.ID, d.Gen}] = ckpts[0].Seq
			}
			ckpts = ckpts[1:]
		}
		if !want(e) {
			continue
		}
		h := reach{i: i, low: e.Seq, from: e.Seq, ok: true}
		for _, d := range e.disks {
			c, ok := nearest[disk{d.ID, d.Gen}]
			if ok {
				h.from = min(h.from, c)
				if !slices.Contains(h.uses, c) {
					h.uses = append(h.uses, c)
				}
			} else if floor >= d.First {
				h.ok = false
			}
			h.low = min(h.low, max(c, d.First-1))
		}
		h.from = min(h.from, h.low)
		if n := int(e.Seq - h.low); n > 0 && h.ok {
			h.ok = n <= i+1 && entries[i-n+1].Seq == h.low+1 && given[i+1] == given[i-n+1]
		}
		out = append(out, h)
	}
	return out
}

// normal fills in the defaults.
func (k Keep) normal() Keep {
	if k.All <= 0 {
		k.All = 4 * time.Hour
	}
	if k.Hourly <= 0 {
		k.Hourly = 48 * time.Hour
	}
	if k.Limit <= 0 {
		k.Limit = 24 * time.Hour
	}
	return k
}

func (k Keep) record() *KeepRecord {
	return &KeepRecord{All: int64(k.All / time.Second), Hourly: int64(k.Hourly / time.Second), Limit: int64(k.Limit / time.Second)}
}

func (k *KeepRecord) keep() Keep {
	if k == nil {
		return Keep{}.normal()
	}
	return Keep{All: time.Duration(k.All) * time.Second, Hourly: time.Duration(k.Hourly) * time.Second,
		Limit: time.Duration(k.Limit) * time.Second}.normal()
}

// tiers says for each entry that is a point why it stays; entries that are no points have TierNone. Of an hour's or a
// day's points the application-consistent ones are preferred, then those with a checkpoint, then the oldest: that choice
// stays the same from one run to the next once the whole hour or day has aged.
func (k Keep) tiers(st *State, entries []Entry, ckpts []*CheckpointRecord, now time.Time) []Tier {
	type bucket struct {
		tier Tier
		at   time.Time
	}
	out := make([]Tier, len(entries))
	best := map[bucket]int{}
	newest, app := -1, -1
	marked := make(map[Seq]bool, len(ckpts))
	for _, c := range ckpts {
		marked[c.Seq] = true
	}
	rank := func(e *Entry) int {
		n := 0
		if e.Consistency == ConsistencyApp {
			n += 2
		}
		if marked[e.Seq] {
			n++
		}
		return n
	}
	for i := range entries {
		e := &entries[i]
		if !e.Kind.IsPoint() {
			continue
		}
		newest = i
		if e.Consistency == ConsistencyApp {
			app = i
		}
		age := now.Sub(e.Stored)
		var b bucket
		switch {
		case age > k.Limit:
			continue
		case age <= k.All:
			out[i] = TierAll
			continue
		case age <= k.Hourly:
			b = bucket{TierHourly, e.Stored.UTC().Truncate(time.Hour)}
		default:
			b = bucket{TierDaily, e.Stored.UTC().Truncate(24 * time.Hour)}
		}
		if j, ok := best[b]; !ok || rank(e) > rank(&entries[j]) {
			best[b] = i
		}
	}
	for b, i := range best {
		out[i] = b.tier
	}
	keep := func(i int) {
		if i >= 0 && out[i] == TierNone {
			out[i] = TierNewest
		}
	}
	keep(newest)
	keep(app)
	if e := st.Newest; e != 0 {
		i, ok := slices.BinarySearchFunc(entries, e, func(e Entry, s Seq) int { return cmp.Compare(e.Seq, s) })
		if ok {
			keep(i)
		}
	}
	return out
}

// plan is what one step of retention wants, a function of what was read.
type plan struct {
	now     time.Time
	ret     *Retention // as read, never changed; nil when there is none
	st      *State
	entries []Entry
	ckpts   []*CheckpointRecord // not void, not given up
	top     Seq                 // newest checkpoint: nothing above it is touched
	tiers   []Tier              // by entry; pinned ones included
	next    *Retention
	gaps    []gap
	dropped []Pin
}

// gap is a range to retire: entries and ranges that are retired already, ending where an anchor can stand.
type gap struct {
	SeqRange
	anchor  Anchor
	bare    bool // the record says already that a checkpoint at its end carries nothing
	entries int  // of the chain that it takes
}

// newPlan decides which points stay and finds what can go. Nothing is retired of a lineage whose head is a close.
func newPlan(l Lineage, ret *Retention, st *State, entries []Entry, ckpts []*CheckpointRecord, k Keep, now time.Time, ended bool) *plan {
	p := &plan{now: now, ret: ret, st: st, entries: entries, ckpts: ckpts, next: ret.clone(l)}
	p.next.Keep = k.record()
	p.next.Pins = slices.DeleteFunc(p.next.Pins, func(q Pin) bool {
		gone := !q.Until.IsZero() && q.Until.Before(now)
		if gone {
			p.dropped = append(p.dropped, q)
		}
		return gone
	})
	if len(ckpts) > 0 {
		p.top = ckpts[len(ckpts)-1].Seq
	}
	p.tiers = k.tiers(st, entries, ckpts, now)
	if st.Closed() && !ended {
		p.top = 0
	}
	for _, q := range p.next.Pins {
		if i, ok := p.index(q.Seq); ok && entries[i].Kind.IsPoint() && p.tiers[i] == TierNone {
			p.tiers[i] = TierPinned
		}
	}
	if p.top != 0 {
		p.findGaps()
	}
	return p
}

// index finds an entry.
func (p *plan) index(s Seq) (int, bool) {
	return slices.BinarySearchFunc(p.entries, s, func(e Entry, s Seq) int { return cmp.Compare(e.Seq, s) })
}

// after is the index of the first entry above s.
func (p *plan) after(s Seq) int {
	i, _ := p.index(s + 1)
	return i
}

// needs marks the entries that the wanted ones and the pins need, and the checkpoints that they are reached from.
func (p *plan) needs(want func(*Entry) bool) (need []bool, uses map[Seq]bool) {
	step := make([]int, len(p.entries)+1)
	uses = map[Seq]bool{}
	mark := func(low Seq, last int) {
		step[p.after(low)]++
		step[last+1]--
	}
	for _, h := range reaches(p.next, p.entries, p.ckpts, want) {
		mark(min(h.low, p.entries[h.i].Seq-1), h.i)
		for _, c := range h.uses {
			uses[c] = true
		}
	}
	for _, q := range p.next.Pins {
		i := p.after(q.Seq) - 1
		if i < 0 {
			continue
		}
		mark(min(q.From, q.Seq-1), i)
		for _, c := range p.ckpts {
			if c.Seq >= q.From && c.Seq <= q.Seq {
				uses[c.Seq] = true
			}
		}
	}
	need = make([]bool, len(p.entries))
	depth := 0
	for i := range need {
		depth += step[i]
		need[i] = depth > 0
	}
	return need, uses
}

// findGaps groups what nothing kept needs. A group below everything that is needed raises the floor; others are ranges.
func (p *plan) findGaps() {
	need, _ := p.needs(func(e *Entry) bool {
		i, _ := p.index(e.Seq)
		return p.tiers[i] != TierNone
	})
	var g gap
	low := true // nothing that is needed lies below g
	flush := func() {
		switch {
		case g.To == 0:
		case low:
			a := g.anchor // g is emptied below
			p.next.Floor, p.next.Anchor, p.next.NoCheckpoint = g.To, &a, g.bare
		case g.entries > 0:
			p.gaps = append(p.gaps, g)
		}
		g = gap{}
	}
	taken := 0 // entries of g, those after its end too
	ranges := p.next.Retired
	for i := 0; i < len(p.entries) || len(ranges) > 0; {
		if len(ranges) > 0 && (i == len(p.entries) || ranges[0].From < p.entries[i].Seq) {
			if g.From == 0 {
				g.From = ranges[0].From
			}
			g.To, g.anchor, g.bare, g.entries = ranges[0].To, ranges[0].Anchor, ranges[0].NoCheckpoint, taken
			ranges = ranges[1:]
			continue
		}
		e := &p.entries[i]
		i++
		if need[i-1] || e.Seq >= p.top {
			flush()
			low, taken = false, 0
			continue
		}
		taken++
		if g.From == 0 {
			g.From = e.Seq
		}
		if e.Kind.IsPoint() || e.Kind == KindRewind {
			g.To, g.anchor, g.bare, g.entries = e.Seq, *e.anchor(), false, taken
		}
	}
	flush()
	if f := p.next.Floor; f > 0 {
		p.next.Retired = slices.DeleteFunc(p.next.Retired, func(r RetiredRange) bool { return r.To <= f })
		p.next.Released = slices.DeleteFunc(p.next.Released, func(r SeqRange) bool { return r.To <= f })
		for i := range p.next.Released {
			p.next.Released[i].From = max(p.next.Released[i].From, f+1)
		}
	}
	// The bound, should it ever matter: the ranges that take most go first.
	slices.SortStableFunc(p.gaps, func(a, b gap) int { return cmp.Compare(b.entries, a.entries) })
	room, size := maxRanges-len(p.next.Retired), 0
	for i, g := range p.gaps {
		if size += anchorSize(&g.anchor); i >= room || size > maxAnchors/2 {
			p.gaps = p.gaps[:i]
			break
		}
	}
	slices.SortFunc(p.gaps, func(a, b gap) int { return cmp.Compare(a.From, b.From) })
}

// anchorSize is about what an anchor takes in the record.
func anchorSize(a *Anchor) int { return 400 + 128*len(a.Disks) + 200*len(a.Fences) }

// retire takes a gap into the next record.
func (p *plan) retire(g gap) {
	at, _ := slices.BinarySearchFunc(p.next.Retired, g.From, func(r RetiredRange, s Seq) int { return cmp.Compare(r.From, s) })
	last := at
	for last < len(p.next.Retired) && p.next.Retired[last].To <= g.To {
		last++
	}
	p.next.Retired = slices.Replace(p.next.Retired, at, last, RetiredRange{From: g.From, To: g.To, Anchor: g.anchor, NoCheckpoint: g.bare})
	p.next.Released = slices.DeleteFunc(p.next.Released, func(r SeqRange) bool { return r.From >= g.From && r.To <= g.To })
}

// finish looks at the chain as the next record leaves it: which ends carry a checkpoint that something needs, and which runs
// of partials nothing is reached through any more. runs are those whose segments can go, if their maps are stored.
func (p *plan) finish() (runs []SeqRange) {
	need, uses := p.needs(func(e *Entry) bool { return e.Kind.IsPoint() && !p.next.Retires(e.Seq) || e.Seq == p.top })
	if p.top == 0 {
		return nil
	}
	p.next.NoCheckpoint = p.next.Floor > 0 && (p.next.NoCheckpoint || !uses[p.next.Floor])
	for i := range p.next.Retired {
		g := &p.next.Retired[i]
		g.NoCheckpoint = g.NoCheckpoint || !uses[g.To]
	}
	var run SeqRange
	clean := true
	for i := range p.entries {
		e := &p.entries[i]
		switch {
		case e.Seq > p.top || p.next.Retires(e.Seq):
			run = SeqRange{}
		case e.Kind == KindPartial:
			if run.From == 0 {
				run.From, clean = e.Seq, true
			}
			run.To = e.Seq
			clean = clean && !need[i] && !p.next.released(e.Seq)
		case e.Kind.IsFence():
		default:
			if run.From != 0 && clean {
				runs = append(runs, run)
			}
			run = SeqRange{}
		}
	}
	return runs
}

// release takes a run into the next record.
func (p *plan) release(run SeqRange) {
	at, _ := slices.BinarySearchFunc(p.next.Released, run.From, func(r SeqRange, s Seq) int { return cmp.Compare(r.From, s) })
	p.next.Released = slices.Insert(p.next.Released, at, run)
}

// pointBelow reports whether a point of the chain, as the next record leaves it, lies below s: then a rewind can lead there.
func (p *plan) pointBelow(s Seq) bool {
	for i := range p.entries {
		e := &p.entries[i]
		if e.Seq >= s {
			break
		}
		if e.Kind.IsPoint() && !p.next.Retires(e.Seq) {
			return true
		}
	}
	return false
}
