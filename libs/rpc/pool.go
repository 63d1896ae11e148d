package rpc

import (
	"sync"

	"google.golang.org/grpc/mem"
)

// poolSizes are the capacities that are kept: small control messages, an HTTP/2 frame (16 KiB), a bulk
// chunk or page of a list in one piece.
var poolSizes = [...]int{1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20}

// pool recycles the buffers of a connection's frames. Unlike gRPC's own it does not clear them: every
// frame is read over the whole length it asked for, and clearing costs an eighth of the CPU of a bulk
// stream. One pool per server or dialer, so that nothing is shared through a global.
type pool struct {
	sized [len(poolSizes)]sync.Pool
}

var _ mem.BufferPool = (*pool)(nil)

// Get implements mem.BufferPool. The content is undefined.
func (p *pool) Get(n int) *[]byte {
	for i, size := range poolSizes {
		if n > size {
			continue
		}
		if b, ok := p.sized[i].Get().(*[]byte); ok {
			*b = (*b)[:n]
			return b
		}
		b := make([]byte, n, size)
		return &b
	}
	b := make([]byte, n)
	return &b
}

// Put implements mem.BufferPool; buffers of other capacities are left to the garbage collector.
func (p *pool) Put(b *[]byte) {
	for i, size := range poolSizes {
		if cap(*b) == size {
			p.sized[i].Put(b)
			return
		}
	}
}
