package replica

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/segment"
)

// rotten is a store whose segments are damaged when they are read: a bit that flipped at rest, or on the way.
type rotten struct {
	blobstore.Store
	damage func(name string, off int64, p []byte)
}

func (s *rotten) Container(name string) blobstore.Container {
	return &rottenContainer{s.Store.Container(name), s}
}

type rottenContainer struct {
	blobstore.Container
	s *rotten
}

func (c *rottenContainer) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, blobstore.Properties, error) {
	rc, props, err := c.Container.Get(ctx, name, off, n)
	if err != nil || !strings.HasPrefix(name, "seg/") {
		return rc, props, err
	}
	defer rc.Close()
	p, err := io.ReadAll(rc)
	if err == nil && c.s.damage != nil {
		c.s.damage(name, off, p)
	}
	return io.NopCloser(bytes.NewReader(p)), props, err
}

// large ships a point of one segment that is too large to be read whole, and returns its content.
func (g *rig) large(o, base Ordinal) (Proposal, []byte) {
	const size = 8 << 20
	h := segment.Header{Lineage: testLineage.Bytes(), DiskID: "disk-a", Gen: 1, DiskSize: size, Kind: segment.KindPoint, Ordinal: uint64(o)}
	w, err := segment.NewWriter(h, nil, segment.Options{Compression: segment.None})
	require.NoError(g.t, err)
	data := make([]byte, 6<<20)
	for i := range data {
		data[i] = byte(i*i>>7 | 1)
	}
	for at := 0; at < len(data); at += 1 << 20 {
		require.NoError(g.t, w.Checked(int64(at), data[at:at+1<<20], segment.Sum(data[at:at+1<<20])))
	}
	body, sha, _, err := w.Finish()
	require.NoError(g.t, err)
	seg, err := g.r.PutSegment(g.t.Context(), SegmentKey{Kind: KindPoint, Ordinal: o, Tx: NewTx(), DiskID: "disk-a"}, body, sha)
	require.NoError(g.t, err)
	return Proposal{Kind: KindBase, Epoch: 1, Point: o, Base: base, CutTime: testTime, Consistency: ConsistencyCrash,
		Disks: []Disk{{ID: "disk-a", Gen: 1, Size: size, Segments: []Segment{seg}}}}, data
}

// wantSegmentError: the error says which object, and is that of a segment.
func wantSegmentError(t *testing.T, err error, name string) {
	t.Helper()
	require.ErrorIs(t, err, segment.ErrCorrupt)
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorContains(t, err, testLineage.JournalContainer()+"/"+name)
}

// A segment that is missing, cut short, replaced or damaged is named, and nothing of it reaches a disk: neither the
// replica's nor one that is materialised. When the object is back, work goes on.
func TestDamagedSegmentsAreNotApplied(t *testing.T) {
	ctx := t.Context()
	for _, c := range []struct {
		name   string
		damage func(body []byte) []byte // nil: it is gone
	}{
		{"missing", nil},
		{"a bit of the data", func(b []byte) []byte { b[300] ^= 4; return b }},
		{"a bit of the index", func(b []byte) []byte { b[len(b)-100] ^= 4; return b }},
		{"a bit of the footer", func(b []byte) []byte { b[len(b)-10] ^= 1; return b }},
		{"cut short", func(b []byte) []byte { return b[:len(b)/2] }},
		{"nearly nothing left", func(b []byte) []byte { return b[:10] }},
		{"another's", func([]byte) []byte {
			b, _ := build(KindPoint, 3, 0, "disk-b", content{5: 5})
			return b
		}},
	} {
		for _, big := range []bool{false, true} {
			t.Run(map[bool]string{false: "small ", true: "large "}[big]+c.name, func(t *testing.T) {
				g := newRig(t)
				p := g.point(KindBase, 1, 0, 1, 0, two(content{1: 1}, content{2: 2}))
				var data []byte
				if big {
					p, data = g.large(1, 0)
				}
				g.commit(p)
				victim := p.Disks[0].Segments[0]
				journal := g.store.Container(testLineage.JournalContainer())
				good, err := readAll(ctx, journal, victim.Name, 64<<20)
				require.NoError(t, err)
				require.NoError(t, journal.Delete(ctx, victim.Name, blobstore.Conditions{}))
				put := func(b []byte) {
					_, err := journal.Put(ctx, victim.Name, bytes.NewReader(b), int64(len(b)), blobstore.Conditions{})
					require.NoError(t, err)
				}
				if c.damage != nil {
					put(c.damage(bytes.Clone(good)))
				}
				r, _ := g.other(nil)
				_, err = g.applier(r).Advance(ctx, 0)
				wantSegmentError(t, err, victim.Name)
				if pages, err := g.pages(victim); err == nil { // the disk may not exist yet
					for at, b := range pages {
						if b != 0 && (!big || b != data[at]) {
							require.FailNow(t, "damage was applied", "byte %d of the disk is %x", at, b)
						}
					}
				}
				_, err = r.Materialise(ctx, 1, memSink{}, MaterialiseOptions{Parallel: 1})
				wantSegmentError(t, err, victim.Name)
				put(good)
				_, err = g.applier(r).Advance(ctx, 0)
				require.NoError(t, err)
				if big {
					pages, err := g.pages(victim)
					require.NoError(t, err)
					require.True(t, bytes.Equal(data, pages[:len(data)]))
				} else {
					g.wantDisks(two(content{1: 1}, content{2: 2}))
				}
			})
		}
	}
}

// pages is what the disk of a test's segment holds.
func (g *rig) pages(s Segment) ([]byte, error) {
	c := g.store.Container(testLineage.ReplicaContainer())
	p, err := c.Stat(g.t.Context(), DiskBlobName("disk-a", 1), "")
	if err != nil {
		return nil, err
	}
	size := p.Size - 512 // the footer
	out := make([]byte, size)
	return out, c.ReadPages(g.t.Context(), DiskBlobName("disk-a", 1), "", 0, out)
}

// A bit that flips while a segment is read is found too; the next read is good.
func TestDamageOnTheWayBack(t *testing.T) {
	ctx := t.Context()
	for _, big := range []bool{false, true} {
		g := newRig(t)
		p := g.point(KindBase, 1, 0, 1, 0, two(content{1: 1}, nil))
		if big {
			p, _ = g.large(1, 0)
		}
		g.commit(p)
		left := 1
		store := &rotten{g.store, func(_ string, off int64, b []byte) {
			if left > 0 && off < 192+4096 {
				left--
				b[max(192+17-off, 0)] ^= 0x40
			}
		}}
		r, err := Open(ctx, store, testLineage)
		require.NoError(t, err)
		_, err = g.applier(r).Advance(ctx, 0)
		wantSegmentError(t, err, p.Disks[0].Segments[0].Name)
		_, err = g.applier(r).Advance(ctx, 0)
		require.NoError(t, err)
		a, to := g.number("disk-a")
		require.Equal(t, []Seq{1, 1}, []Seq{a, to})
	}
}
