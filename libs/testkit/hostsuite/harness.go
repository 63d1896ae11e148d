package hostsuite

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash/crc32"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	lineage      = "0123456789abcdef0123456789abcdef"
	otherLineage = "fedcba9876543210fedcba9876543210"
	window       = 6 << 20 // of a pass's tasks; no divisor of the disks
	chunk        = 64 << 10
	mib          = 1 << 20
	patience     = time.Minute
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// image is one disk in memory.
type image = []byte

// harness is a scheduler and its workers in one: it knows what the guest wrote and what a replica would hold.
type harness struct {
	Rig
	t       *testing.T
	epoch   uint64
	ordinal uint64           // newest used
	guest   map[string]image // what the guest wrote
	replica map[string]image // what was committed
}

func newHarness(t *testing.T, r Rig) *harness {
	h := &harness{Rig: r, t: t, epoch: 1, guest: map[string]image{}, replica: map[string]image{}}
	for _, d := range r.Disks() {
		h.guest[d.Id], h.replica[d.Id] = make(image, d.SizeBytes), make(image, d.SizeBytes)
	}
	require.GreaterOrEqual(t, len(r.Disks()), 2)
	return h
}

// call bounds one call.
func (h *harness) call() context.Context {
	ctx, cancel := context.WithTimeout(testkit.Context(h.t), time.Minute)
	h.t.Cleanup(cancel)
	return ctx
}

// write writes as the guest and remembers.
func (h *harness) write(disk string, off int64, seed uint64, n int64) {
	h.t.Helper()
	p := make([]byte, n)
	testkit.Fill(p, seed)
	require.NoError(h.t, h.Write(disk, off, p))
	copy(h.guest[disk][off:], p)
}

func (h *harness) zero(disk string, off, n int64) {
	h.t.Helper()
	require.NoError(h.t, h.Zero(disk, off, n))
	clear(h.guest[disk][off : off+n])
}

// snapshot is what the guest's disks hold now.
func (h *harness) snapshot() map[string]image {
	out := map[string]image{}
	for id, g := range h.guest {
		out[id] = bytes.Clone(g)
	}
	return out
}

// requireEqual compares images, saying where they differ first.
func requireEqual(t *testing.T, want, got map[string]image, what string) {
	t.Helper()
	for id, w := range want {
		g := got[id]
		require.Len(t, g, len(w), "%s: size of disk %s", what, id)
		for off := 0; off < len(w); off += 4096 {
			if end := min(off+4096, len(w)); !bytes.Equal(w[off:end], g[off:end]) {
				t.Fatalf("%s: disk %s differs first at byte %d: want %x, got %x", what, id, off, w[off:off+16], g[off:off+16])
			}
		}
	}
}

func (h *harness) protect() *typesv1.TrackingStatus {
	h.t.Helper()
	r, err := h.Host().CreateReplicationRelationship(h.call(), &hostproviderv1.CreateReplicationRelationshipRequest{Vm: h.VM(), Lineage: lineage, Epoch: h.epoch})
	require.NoError(h.t, err)
	require.True(h.t, r.Status.Tracking)
	return r.Status
}

func (h *harness) status() *typesv1.TrackingStatus {
	h.t.Helper()
	r, err := h.Host().ListPoints(h.call(), &hostproviderv1.ListPointsRequest{Vm: h.VM()})
	require.NoError(h.t, err)
	return r.Status
}

func (h *harness) next() uint64 {
	h.ordinal++
	return h.ordinal
}

func (h *harness) beginPass(ordinal uint64, scope typesv1.PassScope) (*typesv1.HostPoint, error) {
	r, err := h.Host().BeginPass(h.call(), &hostproviderv1.BeginPassRequest{Vm: h.VM(), Lineage: lineage, Pass: ordinal, Epoch: h.epoch, Scope: scope})
	return r.GetPass(), err
}

func (h *harness) settlePass(ordinal uint64, outcome typesv1.SettleOutcome) (*typesv1.TrackingStatus, error) {
	r, err := h.Host().SettlePass(h.call(), &hostproviderv1.SettlePassRequest{Vm: h.VM(), Lineage: lineage, Pass: ordinal, Epoch: h.epoch, Outcome: outcome})
	return r.GetStatus(), err
}

func (h *harness) cut(ordinal uint64) (*typesv1.HostPoint, error) {
	r, err := h.Host().CutPoint(h.call(), &hostproviderv1.CutPointRequest{
		Vm: h.VM(), Lineage: lineage, Point: ordinal, Epoch: h.epoch, Consistency: typesv1.Consistency_CONSISTENCY_CRASH,
	})
	return r.GetPoint(), err
}

func (h *harness) settle(ordinal uint64, outcome typesv1.SettleOutcome) (*typesv1.TrackingStatus, error) {
	r, err := h.Host().SettlePoint(h.call(), &hostproviderv1.SettlePointRequest{Vm: h.VM(), Lineage: lineage, Point: ordinal, Epoch: h.epoch, Outcome: outcome})
	return r.GetStatus(), err
}

const (
	committed = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
	givenUp   = typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
	full      = typesv1.PassScope_PASS_SCOPE_FULL
	dirty     = typesv1.PassScope_PASS_SCOPE_DIRTY
	compare   = typesv1.PassScope_PASS_SCOPE_COMPARE
)

// run is what both reading streams send.
type run[M any] interface {
	*M
	GetOffset() int64
	GetLength() int64
	GetZero() bool
	GetCrc32C() uint32
	GetData() []byte
}

// drain writes a stream into an image and holds it to the contract: ascending, within bounds, at most 1 MiB of data a
// message, checksummed. It returns how many bytes the runs covered. With most > 0 it stops after so many messages.
func drain[M any, P run[M]](t *testing.T, stream grpc.ServerStreamingClient[M], err error, into image, within [2]int64, most int) (covered, end int64) {
	t.Helper()
	require.NoError(t, err)
	end = within[0]
	for n := 0; most == 0 || n < most; n++ {
		received, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return covered, within[1]
		}
		require.NoError(t, err)
		m := P(received)
		off, length, data := m.GetOffset(), m.GetLength(), m.GetData()
		require.GreaterOrEqual(t, off, end, "runs ascend")
		require.Positive(t, length)
		require.LessOrEqual(t, off+length, within[1], "runs stay in the window")
		if m.GetZero() {
			require.Empty(t, data)
			clear(into[off : off+length])
		} else {
			require.Len(t, data, int(length))
			require.LessOrEqual(t, len(data), mib)
			require.Equal(t, crc32.Checksum(data, castagnoli), m.GetCrc32C())
			copy(into[off:], data)
		}
		covered, end = covered+length, off+length
	}
	return covered, end
}

// ship reads all tasks of a pass into the replica.
func (h *harness) ship(pass uint64, scope typesv1.PassScope) {
	h.t.Helper()
	for _, d := range h.Disks() {
		for off := int64(0); off < d.SizeBytes; off += window {
			h.shipWindow(pass, scope, d, off)
		}
	}
}

func (h *harness) shipWindow(pass uint64, scope typesv1.PassScope, d *typesv1.Disk, off int64) {
	h.t.Helper()
	n := min(window, d.SizeBytes-off)
	stream, err := h.Tracker().ReadRanges(h.call(), &changetrackerv1.ReadRangesRequest{
		Vm: h.VM(), Lineage: lineage, Disk: d.Id, Pass: pass, Window: &typesv1.ByteRange{Offset: off, Length: n},
	})
	covered, _ := drain(h.t, stream, err, h.replica[d.Id], [2]int64{off, off + n}, 0)
	if scope == full {
		require.Equal(h.t, n, covered, "a full pass says of every byte what it is: the target may hold something else")
	}
}

// changes reads a point's changes into images.
func (h *harness) changes(point uint64, into map[string]image) (covered int64) {
	h.t.Helper()
	for _, d := range h.Disks() {
		stream, err := h.Tracker().ReadChanges(h.call(), &changetrackerv1.ReadChangesRequest{Vm: h.VM(), Lineage: lineage, Point: point, Disk: d.Id})
		n, _ := drain(h.t, stream, err, into[d.Id], [2]int64{0, d.SizeBytes}, 0)
		covered += n
	}
	return covered
}

// copyAll runs a full pass and the point that ends it.
func (h *harness) copyAll() {
	h.t.Helper()
	pass := h.next()
	_, err := h.beginPass(pass, full)
	require.NoError(h.t, err)
	h.ship(pass, full)
	st, err := h.settlePass(pass, committed)
	require.NoError(h.t, err)
	require.Equal(h.t, pass, st.Base, "a committed pass is the base")
	h.point()
}

// cutNow cuts a point as a scheduler does: where the host asks for a pass first, it runs one.
func (h *harness) cutNow() (*typesv1.HostPoint, map[string]image) {
	h.t.Helper()
	for range 3 {
		want := h.snapshot()
		p, err := h.cut(h.next())
		if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED) {
			_, err := h.settle(h.ordinal, givenUp)
			require.NoError(h.t, err)
			pass := h.next()
			_, err = h.beginPass(pass, dirty)
			require.NoError(h.t, err)
			h.ship(pass, dirty)
			_, err = h.settlePass(pass, committed)
			require.NoError(h.t, err)
			continue
		}
		require.NoError(h.t, err)
		require.Equal(h.t, h.ordinal, p.Ordinal)
		require.NotNil(h.t, p.CutTime)
		return p, want
	}
	h.t.Fatal("the host asks for passes without end")
	return nil, nil
}

// point cuts, ships, compares and commits one.
func (h *harness) point() (covered int64) {
	h.t.Helper()
	p, want := h.cutNow()
	covered = h.changes(p.Ordinal, h.replica)
	requireEqual(h.t, want, h.replica, "point")
	st, err := h.settle(p.Ordinal, committed)
	require.NoError(h.t, err)
	require.Equal(h.t, p.Ordinal, st.Base)
	return covered
}

// hashes reads the digests of a disk and compares them with the guest's.
func (h *harness) requireHashes(d *typesv1.Disk) {
	h.t.Helper()
	stream, err := h.Tracker().HashRanges(h.call(), &changetrackerv1.HashRangesRequest{Vm: h.VM(), Lineage: lineage, Disk: d.Id, ChunkBytes: chunk})
	require.NoError(h.t, err)
	at := int64(0)
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(h.t, err)
		require.Equal(h.t, at, m.Offset, "digests are dense")
		for i := range m.Chunks {
			p := h.guest[d.Id][at:min(at+chunk, d.SizeBytes)]
			if m.Zero {
				require.True(h.t, bytes.Equal(p, make([]byte, len(p))), "chunk at %d is not zero", at)
			} else {
				sum := sha256.Sum256(p)
				require.Equal(h.t, sum[:], m.Digests[i*32:(i+1)*32], "chunk at %d", at)
			}
			at = min(at+chunk, d.SizeBytes)
		}
	}
	require.Equal(h.t, d.SizeBytes, at, "digests cover the disk")
}

// requireReason is an error with one of the reasons.
func (h *harness) requireReason(err error, reasons ...typesv1.ErrorReason) {
	h.t.Helper()
	require.Error(h.t, err)
	require.Contains(h.t, reasons, errcat.Reason(err), "%v", err)
}
