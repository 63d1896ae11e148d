package replica

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// retentionCheck is what the checker knows of everything that was ever stored, to say what may go (S8).
type retentionCheck struct {
	full      State // of all manifests, retired ones too
	manifests []*Manifest
	disks     []map[string]DiskState // at each manifest
	anchors   []*Anchor              // at each manifest; nil within a run
	rec       *Retention             // as it is stored now
	records   map[Seq]*CheckpointRecord
	gone      map[string]bool // objects and snapshots deleted
	promises  map[string]promise
	readers   int
	going     map[string]going
}

func (c *retentionCheck) begin() {
	c.records, c.gone, c.promises, c.going = map[Seq]*CheckpointRecord{}, map[string]bool{}, map[string]promise{}, map[string]going{}
}

// saw keeps a new manifest.
func (c *checker) saw(m *Manifest, hash string) {
	if c.rec.Retires(m.Seq) {
		c.w.fail("R24: manifest %d is retired before it was put", m.Seq)
	}
	c.manifests = append(c.manifests, m)
	if err := c.full.next(m, hash, &c.w.bugs.bugs); err != nil {
		c.w.fail("manifest %d: %v", m.Seq, err)
	}
	c.disks = append(c.disks, c.full.disks)
	a, err := c.full.clone().Anchor()
	if err != nil {
		a = nil
	}
	c.anchors = append(c.anchors, a)
}

// retired counts what the record retires.
func (c *checker) retired() Seq {
	if c.rec == nil {
		return 0
	}
	n := c.rec.Floor
	for _, r := range c.rec.Retired {
		n += r.To - r.From + 1
	}
	return n
}

// listed says whether a manifest is in the chain.
func (c *checker) listed(s Seq) bool { return !c.rec.Retires(s) }

// reads says whether a checkpoint of n is ever read: n is in the chain, or carries what lies above a retired range.
func (c *checker) reads(n Seq) bool { return !c.rec.givesUpCheckpoint(n) }

func (c *checker) knows(at Seq, disk string) bool {
	_, ok := c.disks[at-1][disk]
	return ok
}

func (c *checker) gapAbove(s Seq) bool {
	return slices.ContainsFunc(c.manifests[s:], func(m *Manifest) bool { return c.rec.Retires(m.Seq) })
}

// refilled: a put at a deleted number is nothing to the chain.
func (c *checker) refilled(s Seq) {
	if !c.rec.Retires(s) {
		c.w.fail("R8: manifest %d was put again", s)
	}
}

// stands says whether its owner can rely on a pin.
func (c *checker) stands(owner string) bool {
	p, ok := c.promises[owner]
	if !ok {
		return false
	}
	now, _ := c.w.mem.Now(context.Background())
	return p.until.IsZero() || now.Before(p.until)
}

// record checks a change of the retention record.
func (c *checker) record() {
	b, err := readAll(context.Background(), c.w.mem.Container(testLineage.ReplicaContainer()), retentionName, maxRetention)
	if err != nil {
		c.w.fail("R24: retention record: %v", err)
		return
	}
	rec, err := DecodeRetention(b)
	if err != nil {
		c.w.fail("R24: %v", err)
		return
	}
	was := c.rec
	c.rec = rec
	if modelTrace {
		fmt.Printf("   record %s\n", b)
	}
	if was != nil && rec.Floor > was.Floor || was == nil && rec.Floor > 0 {
		c.w.hit("R24 floor raised")
	}
	if len(rec.Retired) > 0 && (was == nil || len(rec.Retired) > len(was.Retired)) {
		c.w.hit("R24 range retired")
	}
	for s := Seq(1); s <= c.head; s++ {
		if was.Retires(s) && !rec.Retires(s) {
			c.w.fail("R24: manifest %d is back in the chain", s)
			return
		}
	}
	if seq := c.points[c.latest]; seq > 0 && rec.Retires(seq) {
		c.w.fail("R24: the newest point %d, manifest %d, is retired", c.latest, seq)
	}
	if rec.Floor > 0 {
		c.anchor(rec.Anchor)
	}
	for i := range rec.Retired {
		c.anchor(&rec.Retired[i].Anchor)
	}
	for owner, p := range c.promises {
		if !c.stands(owner) {
			continue
		}
		if !slices.ContainsFunc(rec.Pins, func(q Pin) bool { return q.Owner == owner && q.Seq == p.seq }) {
			c.w.fail("S8: the pin of %s at manifest %d is not in the record", owner, p.seq)
		}
	}
	c.reachable("after a change of the record")
}

// anchor must say what the chain said there.
func (c *checker) anchor(a *Anchor) {
	if a.Seq > c.head || c.anchors[a.Seq-1] == nil {
		c.w.fail("R24: an anchor at %d, head %d", a.Seq, c.head)
		return
	}
	must := *c.anchors[a.Seq-1]
	if a.Newest == 0 && !c.listed(must.Newest) {
		must.Newest = 0 // a reader that comes later does not know it
	}
	want, _ := json.Marshal(must)
	have, _ := json.Marshal(a)
	if string(want) != string(have) {
		c.w.fail("R24: anchor at %d\nchain  %s\nrecord %s", a.Seq, want, have)
	}
}

// deleted is rule 24's order: the record says first that a thing is gone.
func (c *checker) deleted(container, name string) {
	if container == testLineage.StagingContainer() || container == testLineage.JournalContainer() || container == testLineage.ReplicaContainer() {
		c.gone[name] = true
	}
	if s, ok := seqOfName(name, logPrefix); ok && container == testLineage.JournalContainer() && c.listed(s) {
		c.w.fail("R24: manifest %d was deleted and is in the chain", s)
		return
	}
	if s, ok := seqOfName(name, ckptPrefix); ok {
		if rec := c.records[s]; rec != nil && rec.Void && c.reads(s) {
			c.w.fail("R23: the void record of manifest %d was deleted", s)
		}
		delete(c.records, s)
	}
	if container == testLineage.JournalContainer() {
		for _, m := range c.manifests {
			if c.listed(m.Seq) && names(m, name) {
				c.w.fail("R24: segment %s of manifest %d was deleted, which is in the chain", name, m.Seq)
				return
			}
		}
	}
	c.reachable("after the delete of " + name)
}

func names(m *Manifest, segment string) bool {
	for _, d := range m.Disks {
		for _, s := range d.Segments {
			if s.Name == segment {
				return true
			}
		}
	}
	return false
}

func (c *checker) deletedSnapshot(name string, snap blobstore.SnapshotID, seq string) {
	c.gone[name+"@"+string(snap)] = true
	c.w.hit("deleted: a snapshot")
	n, err := strconv.ParseUint(seq, 10, 63)
	if rec := c.records[Seq(n)]; err == nil && rec == nil && c.reads(Seq(n)) {
		c.w.fail("R23: snapshot %s of manifest %d was deleted, and no record says that it has no checkpoint", snap, n)
	}
	c.reachable("after the delete of a snapshot")
}

// reachable is S8, by what is stored: every point in the chain, and every pinned one, can be read.
func (c *checker) reachable(when string) {
	if c.w.failed != nil {
		return
	}
	for _, seq := range c.points {
		if c.listed(seq) {
			c.reach(seq, when)
		}
	}
	for owner, p := range c.promises {
		if c.stands(owner) {
			if !c.listed(p.seq) {
				c.w.fail("S8: manifest %d, pinned by %s, is retired %s", p.seq, owner, when)
			}
			c.reach(p.seq, when)
		}
	}
}

// reach says whether a manifest's disks can be read: nearest checkpoint and all above it.
func (c *checker) reach(seq Seq, when string) {
	for id, d := range c.disks[seq-1] {
		low := d.First
		for n := seq; n >= d.First; n-- {
			rec := c.records[n]
			if rec == nil || rec.Void || !c.reads(n) {
				continue
			}
			i := slices.IndexFunc(rec.Disks, func(x CheckpointDisk) bool { return x.ID == id && x.Gen == d.Gen })
			if i < 0 {
				continue
			}
			if c.gone[DiskBlobName(id, d.Gen)+"@"+string(rec.Disks[i].Snapshot)] {
				c.w.fail("S8: manifest %d needs the checkpoint %d, whose snapshot of disk %s is gone %s", seq, n, id, when)
				return
			}
			low = n + 1
			break
		}
		for n := low; n <= seq; n++ {
			if !c.listed(n) || c.gone[manifestName(n)] {
				c.w.fail("S8: manifest %d needs manifest %d, which is gone %s", seq, n, when)
				return
			}
			for _, x := range c.manifests[n-1].Disks {
				for _, s := range x.Segments {
					if x.ID == id && c.gone[s.Name] {
						c.w.fail("S8: manifest %d needs segment %s of manifest %d, which is gone %s", seq, s.Name, n, when)
						return
					}
				}
			}
		}
	}
}
