package hosttest_test

import (
	"crypto/sha256"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const lineage = "0123456789abcdef0123456789abcdef"

func serve(t *testing.T, h *hosttest.Host) changetrackerv1.ChangeTrackerServiceClient {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := grpc.NewServer()
	changetrackerv1.RegisterChangeTrackerServiceServer(srv, h)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, conn.Close())
		srv.Stop()
		require.NoError(t, <-done)
	})
	return changetrackerv1.NewChangeTrackerServiceClient(conn)
}

func TestChangesGiveTheDiskAtItsCut(t *testing.T) {
	h := hosttest.NewHost("vm-1", lineage)
	h.AddDisk("os", hosttest.NewImage(4<<20))
	client := serve(t, h)
	target := hosttest.NewImage(4 << 20)
	ordinal := uint64(0)
	ship := func() {
		ordinal++
		h.Cut(ordinal)
		h.Write("os", 0, []byte("after the cut"))
		stream, err := client.ReadChanges(testkit.Context(t), &changetrackerv1.ReadChangesRequest{
			Vm: "vm-1", Lineage: lineage, Point: ordinal, Disk: "os",
		})
		require.NoError(t, err)
		for last := int64(0); ; {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err)
			require.GreaterOrEqual(t, m.GetOffset(), last)
			last = m.GetOffset() + m.GetLength()
			if m.GetZero() {
				target.Zero(m.GetOffset(), m.GetLength())
				continue
			}
			require.Equal(t, m.GetCrc32C(), crc32.Checksum(m.GetData(), crc32.MakeTable(crc32.Castagnoli)))
			target.WriteAt(m.GetData(), m.GetOffset())
		}
		require.EqualValues(t, -1, h.At(ordinal, "os").FirstDifference(target))
	}
	p := make([]byte, 300<<10)
	testkit.Fill(p, 1)
	h.Write("os", 123*512, p)
	h.Write("os", 3<<20, p[:1000])
	ship()
	h.Zero("os", 100<<10, 200<<10)
	h.SettlePoint(1, typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED)
	ship()
	require.EqualValues(t, 0, h.Cut(2))
	h.SettlePoint(2, typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED)
	require.EqualValues(t, 2, h.Cut(3))
}

func TestHashesCoverTheWindow(t *testing.T) {
	h := hosttest.NewHost("vm-1", lineage)
	image := hosttest.NewGenerated(1<<20, 7, extent.Range{Off: 256 << 10, Len: 128 << 10})
	h.AddDisk("os", image)
	stream, err := serve(t, h).HashRanges(testkit.Context(t), &changetrackerv1.HashRangesRequest{
		Vm: "vm-1", Lineage: lineage, Disk: "os", ChunkBytes: 64 << 10,
		Window: &typesv1.ByteRange{Offset: 128 << 10, Length: 512 << 10},
	})
	require.NoError(t, err)
	next := int64(128 << 10)
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		require.Equal(t, next, m.GetOffset())
		for i := range m.GetChunks() {
			p := make([]byte, 64<<10)
			image.ReadInto(p, next+i<<16)
			if m.GetZero() {
				require.Equal(t, make([]byte, 64<<10), p)
				continue
			}
			sum := sha256.Sum256(p)
			require.Equal(t, sum[:], m.GetDigests()[32*i:32*i+32])
		}
		next += m.GetChunks() << 16
	}
	require.EqualValues(t, 640<<10, next)
}
