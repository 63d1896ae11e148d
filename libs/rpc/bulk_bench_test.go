package rpc

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/experimental"

	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
)

// The sizes of messages that the benchmarks move.
var benchSizes = []int{64 << 10, 256 << 10, 1 << 20}

func sizeName(n int) string { return fmt.Sprintf("%dK", n>>10) }

// perCPU reports MB per second of CPU of the whole process, both ends together: the figure that GRPC of
// the performance goals compares.
func perCPU(b *testing.B, bytes int64, run func()) {
	b.SetBytes(bytes)
	b.ReportAllocs()
	start := cpuTime()
	b.ResetTimer()
	run()
	b.StopTimer()
	if used := cpuTime() - start; used > 0 {
		b.ReportMetric(float64(bytes)*float64(b.N)/1e6/used.Seconds(), "MB/cpu-s")
	}
}

// BenchmarkBulkTCP is the floor: the same bytes over a plain, and over a TLS, loopback connection.
func BenchmarkBulkTCP(b *testing.B) {
	for _, secure := range []bool{false, true} {
		for _, size := range benchSizes {
			b.Run(fmt.Sprintf("tls=%v/%s", secure, sizeName(size)), func(b *testing.B) {
				lis, err := net.Listen("tcp", "127.0.0.1:0")
				require.NoError(b, err)
				defer func() { _ = lis.Close() }()
				l := newLab(b, true)
				data := random(size)
				go func() {
					c, err := lis.Accept()
					if err != nil {
						return
					}
					defer func() { _ = c.Close() }()
					if secure {
						c = tls.Server(c, l.identity(scheduler).Files.Server(nil))
					}
					for {
						if _, err := c.Write(data); err != nil {
							return
						}
					}
				}()
				c, err := net.Dial("tcp", lis.Addr().String())
				require.NoError(b, err)
				defer func() { _ = c.Close() }()
				if secure {
					c = tls.Client(c, l.identity(scheduler).Files.Client(nil))
				}
				buf := make([]byte, size)
				_, err = io.ReadFull(c, buf)
				require.NoError(b, err)
				perCPU(b, int64(size), func() {
					for range b.N {
						if _, err := io.ReadFull(c, buf); err != nil {
							b.Fatal(err)
						}
					}
				})
			})
		}
	}
}

// BenchmarkBulkGRPC moves the same bytes with SendBulk and RecvBulk, and with the generated type.
func BenchmarkBulkGRPC(b *testing.B) {
	for _, network := range []string{"tcp-plain", "tcp-tls", "mem"} {
		for _, way := range []string{"bulk", "proto"} {
			for _, size := range benchSizes {
				b.Run(fmt.Sprintf("%s/%s/%s", network, way, sizeName(size)), func(b *testing.B) {
					benchmarkBulk(b, network, way == "bulk", size)
				})
			}
		}
	}
}

func benchmarkBulk(b *testing.B, network string, bulk bool, size int) {
	data := random(size)
	l := newLab(b, network == "tcp-tls")
	h := &handlers{bulk: func(s grpc.ServerStream) error {
		for i := int64(0); ; i++ {
			header := &changetrackerv1.ReadChangesResponse{Offset: i, Length: int64(size), Crc32C: 7}
			var err error
			if bulk {
				err = SendBulk(s, header, dataField, data, nil)
			} else {
				header.Data = data
				err = s.SendMsg(header)
			}
			if err != nil {
				return err
			}
		}
	}}
	var conn grpc.ClientConnInterface
	if network == "tcp-plain" {
		conn = plainTCP(b, l, h)
	} else {
		conn = l.conn(scheduler, l.serve(h, nil))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s, err := openBulk(ctx, conn)
	require.NoError(b, err)
	receive := func() error {
		if !bulk {
			return s.RecvMsg(&changetrackerv1.ReadChangesResponse{})
		}
		payload, err := RecvBulk(s, &changetrackerv1.ReadChangesResponse{}, dataField)
		payload.Free()
		return err
	}
	require.NoError(b, receive())
	perCPU(b, int64(size), func() {
		for range b.N {
			if err := receive(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// plainConn is a real socket that the transport takes for an in-memory connection: it shows the codecs
// without the price of TLS. There is no way to have it outside of this benchmark.
type plainConn struct{ net.Conn }

func (plainConn) speaksFor() Peer { return scheduler }

type plainListener struct{ net.Listener }

func (l plainListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return plainConn{c}, err
}

func plainTCP(b *testing.B, l *lab, h *handlers) grpc.ClientConnInterface {
	srv, err := NewServer(ServerOptions{Name: "plain", StopTimeout: time.Second})
	require.NoError(b, err)
	srv.RegisterService(h.desc(), nil)
	lis, err := l.network.Listen(context.Background(), "127.0.0.1:0")
	require.NoError(b, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, plainListener{lis}) }()
	conn, err := grpc.NewClient("passthrough:///"+lis.Addr().String(),
		grpc.WithTransportCredentials(clientCredentials(Identity{}, nil)),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(newCodec())),
		grpc.WithReadBufferSize(bufferBytes),
		experimental.WithBufferPool(&pool{}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
			return plainConn{c}, err
		}))
	require.NoError(b, err)
	b.Cleanup(func() {
		_ = conn.Close()
		cancel()
		require.NoError(b, <-done)
	})
	return conn
}

// BenchmarkUnary is the price of one small call through all layers.
func BenchmarkUnary(b *testing.B) {
	for _, tcp := range []bool{false, true} {
		b.Run(fmt.Sprintf("tcp=%v", tcp), func(b *testing.B) {
			l := newLab(b, tcp)
			conn := l.conn(scheduler, l.serve(&handlers{unary: echo}, nil))
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := invoke(ctx, conn, "Read", "x"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
