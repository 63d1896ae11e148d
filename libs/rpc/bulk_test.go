package rpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
)

const dataField = protowire.Number(5)

func contains(s string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func openBulk(ctx context.Context, conn grpc.ClientConnInterface) (grpc.ClientStream, error) {
	return conn.NewStream(ctx, &grpc.StreamDesc{StreamName: "Bulk", ServerStreams: true, ClientStreams: true}, path("Bulk"))
}

// rawOptions are those of a client that was not built by this package.
func rawOptions(l *lab, as Peer) []grpc.DialOption {
	id := l.identity(as)
	opts := []grpc.DialOption{grpc.WithTransportCredentials(clientCredentials(id, nil)), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes))}
	if !l.tcp {
		opts = append(opts, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return l.network.Dial(ctx, address, as)
		}))
	}
	return opts
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
	return b
}

// TestWireCompatibility: our frames and the generated type read each other, over any cut into buffers.
func TestWireCompatibility(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		header := &changetrackerv1.ReadChangesResponse{
			Offset: rapid.Int64().Draw(t, "offset"), Length: rapid.Int64().Draw(t, "length"),
			Zero: rapid.Bool().Draw(t, "zero"), Crc32C: rapid.Uint32().Draw(t, "crc"),
		}
		data := rapid.SliceOfN(rapid.Byte(), 0, 3000).Draw(t, "data")
		whole := proto.CloneOf(header)
		whole.Data = data

		cut := rapid.SliceOfN(rapid.IntRange(1, 1500), 1, 5).Draw(t, "cut")
		frame := &bulk{header: header, field: dataField, payload: chop(data, cut)}
		wire, err := frame.marshal()
		require.NoError(t, err)
		got := &changetrackerv1.ReadChangesResponse{}
		require.NoError(t, newCodec().Unmarshal(wire, got))
		require.Empty(t, cmp.Diff(whole, got, protocmp.Transform(), protocmp.IgnoreEmptyMessages()))

		plain, err := proto.Marshal(whole)
		require.NoError(t, err)
		back := &bulk{header: &changetrackerv1.ReadChangesResponse{Offset: 99}, field: dataField}
		require.NoError(t, back.unmarshal(chop(plain, cut)))
		require.Equal(t, string(data), string(back.payload.Materialize()))
		require.Empty(t, cmp.Diff(header, back.header, protocmp.Transform()))
	})
}

// chop cuts bytes into counted buffers.
func chop(b []byte, sizes []int) mem.BufferSlice {
	var out mem.BufferSlice
	for i := 0; len(b) > 0; i++ {
		n := min(len(b), sizes[i%len(sizes)])
		out = append(out, mem.Copy(b[:n], mem.DefaultBufferPool()))
		b = b[n:]
	}
	return out
}

func TestBulkKeepsUnknownFieldsAndTheLastData(t *testing.T) {
	wire, err := proto.Marshal(&changetrackerv1.ReadChangesResponse{Offset: 7, Data: []byte("first")})
	require.NoError(t, err)
	wire = protowire.AppendTag(wire, 99, protowire.Fixed64Type)
	wire = protowire.AppendFixed64(wire, 1)
	wire = protowire.AppendTag(wire, 98, protowire.Fixed32Type)
	wire = protowire.AppendFixed32(wire, 1)
	wire = protowire.AppendTag(wire, 97, protowire.BytesType)
	wire = protowire.AppendString(wire, "new field")
	wire = protowire.AppendTag(wire, dataField, protowire.BytesType)
	wire = protowire.AppendString(wire, "last")
	got := &bulk{header: &changetrackerv1.ReadChangesResponse{}, field: dataField}
	require.NoError(t, got.unmarshal(chop(wire, []int{3})))
	require.Equal(t, "last", string(got.payload.Materialize()))
	require.EqualValues(t, 7, got.header.(*changetrackerv1.ReadChangesResponse).GetOffset())
	require.NotEmpty(t, got.header.ProtoReflect().GetUnknown())
}

func FuzzBulk(f *testing.F) {
	seed, err := proto.Marshal(&changetrackerv1.ReadChangesResponse{Offset: 1, Crc32C: 5, Data: []byte("abc")})
	require.NoError(f, err)
	f.Add(seed, 2)
	f.Add([]byte{0x2a, 0xff, 0xff, 0xff, 0xff, 0x0f}, 1)
	f.Add([]byte{0x2a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, 3)
	f.Fuzz(func(t *testing.T, wire []byte, cut int) {
		frame := &bulk{header: &changetrackerv1.ReadChangesResponse{}, field: dataField}
		err := frame.unmarshal(chop(wire, []int{1 + max(0, cut%64)}))
		plain := &changetrackerv1.ReadChangesResponse{}
		perr := proto.Unmarshal(wire, plain)
		if err == nil {
			require.NoError(t, perr, "what we take, proto takes")
			require.Equal(t, string(plain.GetData()), string(frame.payload.Materialize()))
		}
	})
}

// TestBulkStream sends both ways over a connection, to our own client and to a foreign one.
func TestBulkStream(t *testing.T) {
	data := random(1 << 20)
	networks(t, func(t *testing.T, l *lab) {
		var released atomic.Int32
		address := l.serve(&handlers{bulk: func(s grpc.ServerStream) error {
			for i := int64(0); ; i++ {
				got := &changetrackerv1.ReadChangesResponse{}
				payload, err := RecvBulk(s, got, dataField)
				if err != nil {
					return noEOF(err)
				}
				if got.GetOffset() != i {
					return errors.New("wrong header")
				}
				back := payload.Materialize()
				payload.Free()
				if err := SendBulk(s, got, dataField, back, func() { released.Add(1) }); err != nil {
					return err
				}
			}
		}}, nil)
		sizes := []int{0, 1, 100, 1 << 10, 1<<10 + 1, 64 << 10, 1 << 20}
		s, err := openBulk(within(t), l.conn(scheduler, address))
		require.NoError(t, err)
		raw, err := grpc.NewClient("passthrough:///"+address, rawOptions(l, scheduler)...)
		require.NoError(t, err)
		defer func() { _ = raw.Close() }()
		foreign, err := openBulk(within(t), raw)
		require.NoError(t, err)
		for i, n := range sizes {
			require.NoError(t, SendBulk(s, &changetrackerv1.ReadChangesResponse{Offset: int64(i), Length: int64(n)}, dataField, data[:n], nil))
			header := &changetrackerv1.ReadChangesResponse{}
			payload, err := RecvBulk(s, header, dataField)
			require.NoError(t, err)
			require.EqualValues(t, n, header.GetLength())
			require.True(t, bytes.Equal(data[:n], payload.Materialize()))
			payload.Free()

			require.NoError(t, foreign.SendMsg(&changetrackerv1.ReadChangesResponse{Offset: int64(i), Data: data[:n]}))
			plain := &changetrackerv1.ReadChangesResponse{}
			require.NoError(t, foreign.RecvMsg(plain))
			require.EqualValues(t, i, plain.GetOffset())
			require.True(t, bytes.Equal(data[:n], plain.GetData()))
		}
		for _, c := range []grpc.ClientStream{s, foreign} {
			require.NoError(t, c.CloseSend())
			_, err = RecvBulk(c, &changetrackerv1.ReadChangesResponse{}, dataField)
			require.ErrorIs(t, err, io.EOF)
		}
		require.Eventually(t, func() bool { return released.Load() == int32(2*len(sizes)) }, 5*time.Second, time.Millisecond,
			"every payload is given back once: %d", released.Load())
	})
}

// TestBulkReleasesWhatCouldNotBeSent: a cancelled call gives back every payload. (A broken connection
// does not: gRPC forgets the messages that it had queued, which SendBulk's comment says.)
func TestBulkReleasesWhatCouldNotBeSent(t *testing.T) {
	networks(t, func(t *testing.T, l *lab) {
		var sent, released atomic.Int32
		done := make(chan error, 1)
		address := l.serve(&handlers{bulk: func(s grpc.ServerStream) (err error) {
			defer func() { done <- err }()
			for {
				sent.Add(1)
				if err := SendBulk(s, &changetrackerv1.ReadChangesResponse{}, dataField, make([]byte, 64<<10), func() { released.Add(1) }); err != nil {
					return err
				}
			}
		}}, nil)
		ctx, cancel := context.WithCancel(within(t))
		s, err := openBulk(ctx, l.conn(scheduler, address))
		require.NoError(t, err)
		payload, err := RecvBulk(s, &changetrackerv1.ReadChangesResponse{}, dataField)
		require.NoError(t, err)
		payload.Free()
		cancel()
		require.Error(t, <-done)
		require.Eventually(t, func() bool { return released.Load() == sent.Load() }, 5*time.Second, time.Millisecond,
			"%d sent, %d released", sent.Load(), released.Load())
	})
}
