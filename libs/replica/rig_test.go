package replica

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/segment"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testLineage Lineage = "00112233445566778899aabbccddeeff"
	blockSize           = 4 << 10
	testBlocks          = 12
	testSize            = testBlocks * blockSize
)

// content is a disk as block number to value; absent and 0 are zeros.
type content map[int64]uint64

func (c content) get(b int64) uint64 { return c[b] }

func (c content) equal(o content) bool {
	for b := range int64(testBlocks) {
		if c[b] != o[b] {
			return false
		}
	}
	return true
}

func (c content) String() string {
	var s strings.Builder
	for b := range int64(testBlocks) {
		fmt.Fprintf(&s, "%d ", c[b])
	}
	return s.String()
}

func fill(p []byte, v uint64) {
	binary.LittleEndian.PutUint64(p, v)
	for n := 8; n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

// contentOf parses blocks; a block that is not uniform has value ^0: no writer makes it.
func contentOf(p []byte) content {
	c := content{}
	for b := 0; b < len(p)/blockSize; b++ {
		blk := p[b*blockSize : (b+1)*blockSize]
		v := binary.LittleEndian.Uint64(blk)
		if !bytes.Equal(blk[8:], blk[:blockSize-8]) {
			v = ^uint64(0)
		}
		if v != 0 {
			c[int64(b)] = v
		}
	}
	return c
}

// build makes a segment of blocks.
func build(kind Kind, ordinal Ordinal, task uint32, disk string, blocks content) (body []byte, sha [32]byte) {
	h := segment.Header{Lineage: testLineage.Bytes(), DiskID: disk, Gen: 1, DiskSize: testSize, Kind: segment.KindPoint, Ordinal: uint64(ordinal)}
	if kind == KindPartial {
		h.Kind, h.Task = segment.KindPass, task
	}
	w, err := segment.NewWriter(h, nil, segment.Options{Compression: segment.None})
	if err != nil {
		panic(err)
	}
	var p [blockSize]byte
	for _, b := range slices.Sorted(maps.Keys(blocks)) {
		fill(p[:], blocks[b])
		if err := w.Data(b*blockSize, p[:]); err != nil {
			panic(err)
		}
	}
	body, sha, _, err = w.Finish()
	if err != nil {
		panic(err)
	}
	return body, sha
}

// parcel is what a task ships: blocks per disk.
type parcel map[string]content

// ship puts the segments of p and returns the disks of a manifest, in order of ids. Every disk of p is listed.
func ship(ctx context.Context, r *Replica, kind Kind, ordinal Ordinal, task uint32, tx Tx, p parcel) ([]Disk, error) {
	var out []Disk
	for _, id := range slices.Sorted(maps.Keys(p)) {
		d := Disk{ID: id, Gen: 1, Size: testSize}
		if len(p[id]) > 0 {
			body, sha := build(kind, ordinal, task, id, p[id])
			s, err := r.PutSegment(ctx, SegmentKey{Kind: kind, Ordinal: ordinal, Tx: tx, DiskID: id}, body, sha)
			if err != nil {
				return nil, err
			}
			d.Segments = []Segment{s}
		}
		out = append(out, d)
	}
	return out, nil
}

var testTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// rig is a lineage in memory for direct tests.
type rig struct {
	t     *testing.T
	store *blobstoretest.Memory
	r     *Replica
}

func newRig(t *testing.T) *rig {
	g := &rig{t: t, store: blobstoretest.NewMemory()}
	r, err := Create(t.Context(), g.store, testLineage)
	require.NoError(t, err)
	g.r = r
	return g
}

// other opens the lineage as another process, over an optional script of faults.
func (g *rig) other(hook blobstoretest.Hook) (*Replica, *blobstoretest.Faulty) {
	f := blobstoretest.NewFaulty(g.store, nil)
	r, err := Open(g.t.Context(), f, testLineage)
	require.NoError(g.t, err)
	f.SetHook(hook)
	return r, f
}

func (g *rig) point(kind Kind, o, base Ordinal, epoch Epoch, open Seq, p parcel) Proposal {
	g.t.Helper()
	d, err := ship(g.t.Context(), g.r, kind, o, 0, NewTx(), p)
	require.NoError(g.t, err)
	return Proposal{Kind: kind, Epoch: epoch, Open: open, Point: o, Base: base, CutTime: testTime, Consistency: ConsistencyCrash, Disks: d}
}

func (g *rig) partial(o Ordinal, i, k uint32, base Ordinal, epoch Epoch, open Seq, p parcel) Proposal {
	g.t.Helper()
	d, err := ship(g.t.Context(), g.r, KindPartial, o, i, NewTx(), p)
	require.NoError(g.t, err)
	return Proposal{Kind: KindPartial, Epoch: epoch, Open: open, Pass: &Pass{o, i, k}, Base: base, Disks: d}
}

func (g *rig) commit(p Proposal) Result {
	g.t.Helper()
	res, err := g.r.Commit(g.t.Context(), p)
	require.NoError(g.t, err)
	return res
}

// two is a parcel of both disks.
func two(a, b content) parcel { return parcel{"disk-a": a, "disk-b": b} }

func testFooter(id string, size int64) []byte {
	f := make([]byte, 512)
	copy(f, fmt.Sprintf("conectix %s %d", id, size))
	return f
}

func (g *rig) applier(r *Replica) *Applier {
	a, err := NewApplier(r, ApplierOptions{Footer: testFooter, Parallel: 1, Takeover: true})
	require.NoError(g.t, err)
	return a
}

// disk reads a page blob or snapshot.
func readDisk(ctx context.Context, store blobstore.Store, id string, snap blobstore.SnapshotID) (content, error) {
	p := make([]byte, testSize)
	c := store.Container(testLineage.ReplicaContainer())
	if err := c.ReadPages(ctx, DiskBlobName(id, 1), snap, 0, p); err != nil {
		return nil, err
	}
	return contentOf(p), nil
}

func (g *rig) number(id string) (a, t Seq) {
	g.t.Helper()
	p, err := g.store.Container(testLineage.ReplicaContainer()).Stat(g.t.Context(), DiskBlobName(id, 1), "")
	require.NoError(g.t, err)
	return splitNumber(p.Sequence)
}

func (g *rig) wantDisks(want parcel) {
	g.t.Helper()
	for id, w := range want {
		have, err := readDisk(g.t.Context(), g.store, id, "")
		require.NoError(g.t, err)
		require.True(g.t, w.equal(have), "disk %s\nwant %v\nhave %v", id, w, have)
	}
}

// memSink collects materialised disks.
type memSink map[string][]byte

func (s memSink) Disk(_ context.Context, d DiskState) (DiskSink, error) {
	s[d.ID] = make([]byte, d.Size)
	return memDisk(s[d.ID]), nil
}

type memDisk []byte

func (d memDisk) WriteAt(_ context.Context, p []byte, off int64) error {
	copy(d[off:], p)
	return nil
}
func (memDisk) Finish(context.Context) error { return nil }

func (g *rig) wantPoint(r *Replica, o Ordinal, want parcel) {
	g.t.Helper()
	s := memSink{}
	m, err := r.Materialise(g.t.Context(), o, s, MaterialiseOptions{Parallel: 1})
	require.NoError(g.t, err)
	require.Len(g.t, m.Disks, len(want))
	for id, w := range want {
		require.True(g.t, w.equal(contentOf(s[id])), "point %d, disk %s\nwant %v\nhave %v", o, id, w, contentOf(s[id]))
	}
}
