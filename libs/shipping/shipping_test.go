package shipping_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
	"github.com/landfall-dr/landfall/libs/shipping"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	lineage  = replica.Lineage("0123456789abcdef0123456789abcdef")
	diskSize = 1 << 20
)

// shelf keeps the segments that packers put.
type shelf struct {
	mu     sync.Mutex
	bodies [][]byte
	fail   error
}

func (s *shelf) put(_ context.Context, key replica.SegmentKey, body []byte, _ [32]byte) (replica.Segment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return replica.Segment{}, s.fail
	}
	if key.K != len(s.bodies) {
		return replica.Segment{}, errors.New("segments are not counted in order")
	}
	s.bodies = append(s.bodies, bytes.Clone(body))
	return replica.Segment{Name: "seg", Bytes: int64(len(body))}, nil
}

// applyTo writes every segment over disk, which is whole.
func (s *shelf) applyTo(t require.TestingT, disk []byte) (extents int) {
	for _, body := range s.bodies {
		r, err := segment.Open(bytes.NewReader(body), int64(len(body)))
		require.NoError(t, err)
		require.NoError(t, r.Range(0, int64(len(disk)), func(off, n int64, data []byte) error {
			extents++
			if data == nil {
				clear(disk[off : off+n])
			} else {
				copy(disk[off:off+n], data)
			}
			return nil
		}))
	}
	return extents
}

func (s *shelf) packer(pool *shipping.Pool, skip bool) *shipping.Packer {
	return shipping.NewPacker(pool, shipping.PackOptions{
		Key:       replica.SegmentKey{Kind: replica.KindPartial, Ordinal: 1, Tx: "0123456789abcdef", DiskID: "os"},
		Header:    segment.Header{Lineage: lineage.Bytes(), DiskID: "os", Gen: 1, DiskSize: diskSize, Kind: segment.KindPass, Ordinal: 1, Task: 1},
		SkipZeros: skip, Put: s.put,
	})
}

// Whatever runs are packed, applying the segments gives their content: over anything when zeros are kept, over zeros
// when they are skipped.
func TestPackedRunsComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ctx, skip := context.Background(), rapid.Bool().Draw(t, "skip zeros")
		pool := shipping.NewPool(2, rapid.IntRange(1, 256<<10).Draw(t, "target"))
		var s shelf
		p := s.packer(pool, skip)
		want, got := make([]byte, diskSize), make([]byte, diskSize)
		if !skip {
			testkit.Fill(want, 99)
			copy(got, want)
		}
		changed := int64(0)
		for off := int64(0); ; {
			off += 512 * rapid.Int64Range(0, 100).Draw(t, "gap")
			n := 512 * rapid.Int64Range(1, 300).Draw(t, "length")
			if off+n > diskSize {
				break
			}
			run := shipping.Run{Range: extent.Range{Off: off, Len: n}}
			clear(want[off : off+n])
			if !rapid.Bool().Draw(t, "zero") {
				run.Data = make([]byte, n)
				testkit.Fill(run.Data, uint64(off))
				for range rapid.IntRange(0, 5).Draw(t, "holes") {
					at := 512 * rapid.Int64Range(0, n/512-1).Draw(t, "hole at")
					end := min(n, at+512*rapid.Int64Range(1, 100).Draw(t, "hole length"))
					clear(run.Data[at:end])
				}
				copy(want[off:], run.Data)
			}
			require.NoError(t, p.Add(ctx, run))
			changed += n
			off += n
		}
		out, err := p.Finish(ctx)
		require.NoError(t, err)
		require.Len(t, out.Segments, len(s.bodies))
		require.Equal(t, changed, out.Changed)
		require.Zero(t, pool.InUse())
		s.applyTo(t, got)
		require.True(t, bytes.Equal(want, got))
	})
}

func TestSkippedZerosCostNothing(t *testing.T) {
	ctx := context.Background()
	var s shelf
	pool := shipping.NewPool(1, 1<<20)
	p := s.packer(pool, true)
	data := make([]byte, 512<<10)
	testkit.Fill(data[:4096], 1)
	testkit.Fill(data[8192:16384], 2) // a short gap stays with its data
	testkit.Fill(data[256<<10:260<<10], 3)
	require.NoError(t, p.Add(ctx, shipping.Run{Range: extent.Range{Len: 512 << 10}, Data: data}))
	require.NoError(t, p.Add(ctx, shipping.Run{Range: extent.Range{Off: 512 << 10, Len: 512 << 10}}))
	out, err := p.Finish(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 20<<10, out.Data)
	require.Zero(t, out.Zero)
	require.Equal(t, 2, s.applyTo(t, make([]byte, diskSize)))
	p = s.packer(pool, true)
	require.NoError(t, p.Add(ctx, shipping.Run{Range: extent.Range{Len: 4096}, Data: make([]byte, 4096)}))
	out, err = p.Finish(ctx)
	require.NoError(t, err)
	require.Empty(t, out.Segments)
}

func TestBuffersComeBackAfterFailures(t *testing.T) {
	ctx := context.Background()
	pool := shipping.NewPool(2, 64<<10)
	s := shelf{fail: errors.New("storage is away")}
	p := s.packer(pool, false)
	data := make([]byte, 200<<10)
	testkit.Fill(data, 1)
	var err error
	for off := int64(0); err == nil && off < 1<<20-200<<10; off += 200 << 10 {
		err = p.Add(ctx, shipping.Run{Range: extent.Range{Off: off, Len: 200 << 10}, Data: data})
	}
	require.ErrorIs(t, err, s.fail)
	_, err = p.Finish(ctx)
	require.ErrorIs(t, err, s.fail)
	p.Abort()
	testkit.Eventually(t, time.Second, func() bool { return pool.InUse() == 0 })
	q := s.packer(pool, false)
	require.NoError(t, q.Add(ctx, shipping.Run{Range: extent.Range{Len: 4096}, Data: data[:4096]}))
	require.Equal(t, 1, pool.InUse())
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	other := s.packer(shipping.NewPool(1, 1), false)
	require.NoError(t, other.Add(ctx, shipping.Run{Range: extent.Range{Len: 512}}))
	other.Abort()
	r := s.packer(pool, false)
	require.NoError(t, r.Add(ctx, shipping.Run{Range: extent.Range{Len: 4096}, Data: data[:4096]}))
	third := s.packer(pool, false)
	require.ErrorIs(t, third.Add(short, shipping.Run{Range: extent.Range{Len: 512}}), context.DeadlineExceeded, "no buffer is free")
	q.Abort()
	r.Abort()
	require.Zero(t, pool.InUse())
}

func TestReasons(t *testing.T) {
	for err, want := range map[error]typesv1.ErrorReason{
		replica.ErrStaleEpoch:      typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH,
		replica.ErrOrdinalUsed:     typesv1.ErrorReason_ERROR_REASON_ORDINAL_USED,
		shipping.ErrStalled:        typesv1.ErrorReason_ERROR_REASON_HOST_UNREACHABLE,
		errors.New("disk on fire"): typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE,
		errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "over"): typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED,
	} {
		require.Equal(t, want, shipping.Reason(err))
		require.NotEmpty(t, shipping.Detail(err).GetAction())
	}
	require.True(t, shipping.Detail(errors.New("disk on fire")).GetRecoverable())
	require.False(t, shipping.Detail(replica.ErrStaleEpoch).GetRecoverable())
}

func TestFootersAreTheSameForEverybody(t *testing.T) {
	a, err := shipping.Footer(lineage, "os", 10<<20+512)
	require.NoError(t, err)
	b, err := shipping.Footer(lineage, "os", 10<<20+512)
	require.NoError(t, err)
	require.Equal(t, a, b)
	f, err := vdisk.ParseFooter(a)
	require.NoError(t, err)
	require.EqualValues(t, 11<<20, f.CurrentSize, "the blob is padded to whole MiB")
	_, err = shipping.Footer(lineage, "os", 100<<40)
	require.Error(t, err)
}

func TestMachineNames(t *testing.T) {
	m, err := shipping.ParseMachine("sites/lab/vms/vm-1")
	require.NoError(t, err)
	require.Equal(t, shipping.Machine{Site: "lab", VM: "vm-1"}, m)
	for _, bad := range []string{"", "vm-1", "sites/lab/hosts/h", "sites//vms/x", "sites/lab/vms/x/y"} {
		_, err := shipping.ParseMachine(bad)
		require.Error(t, err, bad)
	}
	require.Equal(t, "h", shipping.HostID("sites/lab/hosts/h"))
	require.Equal(t, "h", shipping.HostID("h"))
}
