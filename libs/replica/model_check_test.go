package replica

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/segment"
)

// checker compares storage with the truth. It reads the store directly, with code of its own: manifests by DecodeManifest,
// segments by what their shippers recorded.
type checker struct {
	w      *world
	head   Seq
	folds  []image // folds[n]: the disks after manifest n
	points map[Ordinal]Seq
	// shipped tasks, by number.
	shipped   map[int]bool
	epoch     Epoch
	open      Seq
	closed    bool
	fence     string
	closes    int
	failovers []string // that closed, ever
	// rewound is the target of the newest fence's rewind, latest the newest point; forward[n]: at the open n the one was the
	// other, or there was no rewind.
	rewound, latest Ordinal
	forward         map[Seq]bool
	claims          []claim
	retentionCheck
}

// claim is what an orchestrator was told: that manifest seq is point target, or (target 0) that the open seq came after a
// rewind forward.
type claim struct {
	seq    Seq
	target Ordinal
}

// all runs the checks that what was touched calls for.
func (c *checker) all() {
	defer c.told()
	if c.w.failed != nil || len(c.w.touched) == 0 {
		return
	}
	touched := slices.Sorted(maps.Keys(c.w.touched))
	clear(c.w.touched)
	c.chain()
	for _, name := range touched {
		switch {
		case strings.HasPrefix(name, diskPrefix):
			c.disk(strings.Split(name, "/")[1])
		case strings.HasPrefix(name, ckptPrefix):
			c.checkpoint(name)
		case name == retentionName:
			c.record()
		}
	}
}

// committed: what a shipper is told to be in the chain is in it.
func (c *checker) committed(t *modelTask, res Result) {
	c.chain()
	if res.Outcome == AlreadyCommitted {
		c.w.hit("R7 already in the chain is success")
	}
	if c.w.failed != nil || c.w.bugs.StaleTask || c.w.bugs.NoPassOrdinal {
		return
	}
	if res.Seq == 0 || res.Seq > c.head {
		c.w.fail("S1: task %s was told manifest %d, head is %d", t.id, res.Seq, c.head)
		return
	}
	if m := c.manifests[res.Seq-1]; m.Ordinal() != t.ordinal() {
		c.w.fail("S1: task %s of ordinal %d was told manifest %d, which is a %s of ordinal %d", t.id, t.ordinal(), m.Seq, m.Kind, m.Ordinal())
	}
}

// told checks what orchestrators were told.
func (c *checker) told() {
	for _, t := range c.claims {
		if t.target == 0 && !c.forward[t.seq] {
			c.w.fail("S5: open %d was to come after a rewind forward", t.seq)
		}
		if t.target != 0 && c.folds[t.seq] != *c.w.host.cuts[t.target] {
			c.w.fail("S2: manifest %d was said to be point %d\nguest at its cut %v\nchain            %v", t.seq, t.target, c.w.host.cuts[t.target], &c.folds[t.seq])
		}
	}
	c.claims = nil
}

// blocks is what a segment says: as its shipper recorded it, or for a rewind as it is stored.
func (c *checker) blocks(in blobstore.Container, name string) content {
	if b, ok := c.w.segs[name]; ok {
		return b
	}
	body, err := readAll(context.Background(), in, name, 1<<20)
	if err != nil {
		return nil // said by the caller
	}
	s, err := segment.Open(memReader(body), int64(len(body)))
	if err != nil {
		c.w.fail("segment %s: %v", name, err)
		return nil
	}
	out := content{}
	err = s.Range(0, testSize, func(off, n int64, data []byte) error {
		if data == nil {
			data = make([]byte, n)
		}
		got := contentOf(data)
		for b := range n / blockSize {
			out[off/blockSize+b] = got[b]
		}
		return nil
	})
	if err != nil {
		c.w.fail("segment %s: %v", name, err)
	}
	c.w.segs[name] = out
	return out
}

// chain folds new manifests and checks S1 and S3 on each.
func (c *checker) chain() {
	ctx := context.Background()
	if c.folds == nil {
		c.folds = []image{{}}
		c.points, c.forward, c.shipped = map[Ordinal]Seq{}, map[Seq]bool{}, map[int]bool{}
		c.retentionCheck.begin()
	}
	journal, staging := c.w.mem.Container(testLineage.JournalContainer()), c.w.mem.Container(testLineage.StagingContainer())
	for c.w.failed == nil {
		body, err := readAll(ctx, journal, manifestName(c.head+1), MaxManifest)
		if err != nil {
			return
		}
		m, err := DecodeManifest(body)
		if err != nil {
			c.w.fail("manifest %d: %v", c.head+1, err)
			return
		}
		c.head++
		if modelTrace {
			fmt.Printf("   manifest %d %s %d base %d failover %s trace %s\n", m.Seq, m.Kind, m.Ordinal(), m.Base, m.Failover, m.Trace)
		}
		f := c.folds[c.head-1]
		for _, d := range m.Disks {
			for _, s := range d.Segments {
				in := journal
				if s.Container == Staging {
					in = staging
				}
				if _, err := in.Stat(ctx, s.Name, ""); err != nil {
					c.w.fail("S1: manifest %d (%s %d) names segment %s: %v", m.Seq, m.Kind, m.Ordinal(), s.Name, err)
				}
				for b, v := range c.blocks(in, s.Name) {
					f[slices.Index(modelDisks, d.ID)*testBlocks+int(b)] = v
				}
			}
		}
		c.folds = append(c.folds, f)
		c.saw(m, hashHex(body))
		c.history(m)
		if m.Kind.IsPoint() {
			c.w.hit("points")
			c.points[m.Point], c.latest = m.Seq, m.Point
			c.isCut("S1", m, m.Point)
		}
	}
}

// isCut compares the disks after m with the guest at a cut.
func (c *checker) isCut(what string, m *Manifest, o Ordinal) {
	if want := c.w.host.cuts[o]; want == nil || *want != c.folds[m.Seq] {
		c.w.fail("%s: %s at manifest %d is point %d\nguest at its cut %v\nchain            %v", what, m.Kind, m.Seq, o, want, &c.folds[m.Seq])
	}
}

// history is S3: nothing of a lower epoch, of another open, or above a close.
func (c *checker) history(m *Manifest) {
	w := c.w
	switch m.Kind {
	case KindClose:
		if c.closed {
			w.fail("S3: manifest %d closes again", m.Seq)
		}
		c.closed, c.fence, c.rewound = true, m.Failover, 0
		c.closes++
		c.failovers = append(c.failovers, m.Failover)
		w.hit("R16 closed")
		c.planned(m)
	case KindOpen:
		if !c.closed || m.Failover != c.fence {
			w.fail("S3: manifest %d opens failover %s, the fence is %s", m.Seq, m.Failover, c.fence)
		}
		c.closed, c.open, c.epoch = false, m.Seq, m.Epoch
		c.forward[m.Seq] = c.rewound == 0 || c.rewound == c.latest
	case KindRewind:
		if !c.closed || m.Failover != c.fence {
			w.fail("S3: manifest %d rewinds by failover %s, the fence is %s", m.Seq, m.Failover, c.fence)
		}
		c.isCut("S2", m, m.Base)
		if c.rewound != 0 {
			w.hit("R6 rewound back and forth")
		}
		c.rewound = m.Base
		w.hit("R6 rewound")
	default:
		n, _ := strconv.Atoi(strings.TrimPrefix(m.Trace, "task-"))
		t := w.tasks[n]
		c.shipped[n] = true
		switch {
		case c.closed:
			w.fail("S3: manifest %d (%s) above the close of %s", m.Seq, m.Kind, c.fence)
		case t.epoch < c.epoch:
			w.fail("S3: manifest %d: task of epoch %d after epoch %d", m.Seq, t.epoch, c.epoch)
		case t.open != c.open && !w.bugs.NoOpen: // with the rule off, what it protects must break
			w.fail("S3: manifest %d: task of open %d under open %d", m.Seq, t.open, c.open)
		}
		if t.pass != nil && t.pass.I > 1 && c.full.passes[t.pass.Ordinal] != nil {
			w.hit("R10 tasks of one pass follow each other")
		}
		if m.Kind.IsPoint() && w.host.given[m.Point] {
			w.hit("R3 a point that was given up commits")
		}
		c.epoch = max(c.epoch, m.Epoch)
	}
}

// planned: the lineage closed by a planned failover is the guest, who lost nothing.
func (c *checker) planned(m *Manifest) {
	p := c.w.planned
	if p == nil || m.Failover != p.failover || c.open > c.points[p.final] {
		return
	}
	if c.folds[m.Seq] != c.w.host.guest {
		c.w.fail("S1: planned failover %s closed at %d\nguest %v\nchain %v", p.failover, m.Seq, &c.w.host.guest, &c.folds[m.Seq])
	}
	c.w.hit("planned failover lost nothing")
}

// disk is S4: a page blob that says "at rest at n" holds the state at n.
func (c *checker) disk(id string) {
	p, err := c.w.mem.Container(testLineage.ReplicaContainer()).Stat(context.Background(), DiskBlobName(id, 1), "")
	if err != nil {
		return
	}
	a, t := splitNumber(p.Sequence)
	if was := c.going[id]; was.t > was.a && t >= was.t && a == was.a && p.Sequence != was.number {
		c.w.hit("R20 a batch redone up to a larger number")
	}
	c.going[id] = going{a, t, p.Sequence}
	if a != t {
		return
	}
	if a > c.head {
		c.w.fail("S4: disk %s is at rest at %d, head is %d", id, a, c.head)
		return
	}
	c.equal("S4", id, "", a)
}

type going struct {
	a, t   Seq
	number int64
}

func (c *checker) equal(what, id string, snap blobstore.SnapshotID, n Seq) {
	have, err := readDisk(context.Background(), c.w.mem, id, snap)
	if err != nil {
		c.w.fail("%s: disk %s at %d: %v", what, id, n, err)
		return
	}
	if !c.folds[n].is(slices.Index(modelDisks, id), have) {
		c.w.fail("%s: disk %s says it is manifest %d\nchain %v\ndisk  %v", what, id, n, &c.folds[n], have)
	}
}

// checkpoint is S7.
func (c *checker) checkpoint(name string) {
	b, err := readAll(context.Background(), c.w.mem.Container(testLineage.ReplicaContainer()), name, maxCheckpoint)
	if err != nil {
		return
	}
	rec, err := DecodeCheckpoint(b)
	if err != nil {
		c.w.fail("checkpoint %s: %v", name, err)
		return
	}
	if c.records[rec.Seq] != nil {
		return // seen: it never changes
	}
	c.records[rec.Seq] = rec
	if modelTrace {
		fmt.Printf("   checkpoint %d void %t\n", rec.Seq, rec.Void)
	}
	if rec.Void {
		c.w.hit("R23 void record")
		return
	}
	c.w.hit("R22 checkpoints")
	if rec.Seq > 1 && int(rec.Seq) <= len(c.manifests) && c.manifests[rec.Seq-2].Kind == KindPartial {
		c.w.hit("R15 checkpoint at the end of a run")
	}
	if c.reads(rec.Seq) {
		for _, d := range rec.Disks {
			c.equal("S7", d.ID, d.Snapshot, rec.Seq)
		}
	} else {
		c.w.hit("R24 a checkpoint of what is retired comes late")
	}
}

// read checks what Materialise gave for a point: S2 and S8.
func (c *checker) read(o Ordinal, s memSink) {
	for i, d := range modelDisks {
		if have := contentOf(s[d]); !c.w.host.cuts[o].is(i, have) || !bytes.Equal(s[d][testSize:], nil) {
			c.w.fail("S2: point %d, disk %s\nguest %v\nread  %v", o, d, c.w.host.cuts[o], have)
		}
	}
}

// atEnd is S2, S4 and S8 for everything, read by the real code.
func (c *checker) atEnd() {
	ctx := context.Background()
	r, err := open(ctx, c.w.mem, testLineage, c.w.bugs.bugs)
	if err != nil {
		c.w.fail("open at the end: %v", err)
		return
	}
	for _, d := range modelDisks {
		p, err := c.w.mem.Container(testLineage.ReplicaContainer()).Stat(ctx, DiskBlobName(d, 1), "")
		if a, t := splitNumber(p.Sequence); err != nil || a != t || a < c.points[c.w.host.base] {
			c.w.fail("S4: at the end disk %s is at %d going to %d, head %d: %v", d, a, t, c.head, err)
			return
		}
		c.disk(d)
	}
	for _, o := range slices.Sorted(maps.Keys(c.points)) {
		s := memSink{}
		_, err := r.Materialise(ctx, o, s, MaterialiseOptions{Parallel: 1})
		switch {
		case err == nil:
			c.read(o, s)
		case c.listed(c.points[o]), !taken(err):
			c.w.fail("S2: point %d: %v", o, err)
			return
		}
	}
}
