package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"runtime/debug"
	"sync"
	"syscall"

	"golang.org/x/sync/semaphore"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// transmit serves requests until the client disconnects, the connection breaks, or stop was called. Requests in flight
// are finished and answered before it returns.
func (c *conn) transmit() (err error) {
	reads, gone := context.WithCancel(context.Background())
	defer gone()
	inFlight := semaphore.NewWeighted(maxInFlight)
	memory := semaphore.NewWeighted(maxInFlightBytes)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		if err != nil && !c.stopped() {
			gone() // nobody takes what is still read
		}
	}()
	ctx := context.Background() // both semaphores are released by requests, which always end
	var head [wire.RequestSize]byte
	for {
		if _, err = io.ReadFull(c.in, head[:]); err != nil {
			return err
		}
		r, err := parseRequest(&head)
		if err != nil {
			return err
		}
		if r.kind == wire.CmdDisconnect {
			return nil
		}
		errno := r.check(c.disk.Size(), c.writer != nil, c.structured && c.meta != "")
		if errno != 0 {
			// The payload of a refused write follows all the same.
			if r.kind == wire.CmdWrite {
				if r.length > maxDiscard {
					return fmt.Errorf("%w: write of %d bytes", errProtocol, r.length)
				}
				if _, err := io.CopyN(io.Discard, c.in, int64(r.length)); err != nil {
					return err
				}
			}
			if err := c.fail(r, errno); err != nil {
				return err
			}
			continue
		}
		_ = inFlight.Acquire(ctx, 1)
		need := int64(0)
		var buf []byte
		if r.kind == wire.CmdRead || r.kind == wire.CmdWrite {
			need = int64(r.length)
			_ = memory.Acquire(ctx, need)
			if c.server.memory != nil {
				_ = c.server.memory.Acquire(ctx, need)
			}
			buf = getBuffer(int(r.length))
		}
		free := func() {
			if buf != nil {
				putBuffer(buf)
				memory.Release(need)
				if c.server.memory != nil {
					c.server.memory.Release(need)
				}
			}
		}
		if r.kind == wire.CmdWrite {
			if _, err := io.ReadFull(c.in, buf); err != nil {
				free()
				return err
			}
		}
		wg.Go(func() {
			defer inFlight.Release(1)
			if err := c.serve(reads, r, buf); err != nil {
				_ = c.nc.Close() // the reader sees it
			}
			free()
		})
	}
}

// serve answers a request that passed check; a panic of the disk is an error of this request. An error means that the
// reply could not be sent.
func (c *conn) serve(ctx context.Context, r request, buf []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.server.logger.Error("NBD request panicked", "export", c.export(), "command", r.kind, "offset", r.off,
				"length", r.length, "panic", p, "stack", string(debug.Stack()))
			err = c.fail(r, wire.EIO)
		}
	}()
	return c.do(ctx, r, buf)
}

func (c *conn) do(ctx context.Context, r request, buf []byte) error {
	at := extent.Range{Off: int64(r.off), Len: int64(r.length)}
	fua := r.flags&wire.CmdFlagFUA != 0
	var err error
	switch r.kind {
	case wire.CmdRead:
		var reply net.Buffers
		if reply, err = c.read(ctx, r, at, buf); err == nil {
			return c.send(reply...)
		}
	case wire.CmdWrite:
		err = c.writer.WriteAt(buf, at.Off, fua)
	case wire.CmdFlush:
		if c.writer != nil {
			err = c.writer.Flush()
		}
	case wire.CmdTrim:
		err = c.writer.Zero(at, false, fua)
	case wire.CmdWriteZeroes:
		keep := r.flags&wire.CmdFlagNoHole != 0
		if r.flags&wire.CmdFlagFastZero != 0 && (keep || !fastZero(c.disk)) {
			return c.fail(r, wire.ENOTSUP) // it would be, or might become, a write of zeros
		}
		err = c.writer.Zero(at, keep, fua)
	case wire.CmdBlockStatus:
		var reply []byte
		if reply, err = c.status(ctx, r, at); err == nil {
			return c.send(reply)
		}
	}
	if err != nil {
		c.server.logger.Error("NBD request failed", "export", c.export(), "command", r.kind, "offset", r.off, "length", r.length, "err", err)
		return c.fail(r, errno(err))
	}
	return c.send(simpleReply(0, r.cookie))
}

func errno(err error) uint32 {
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return wire.ENOSPC
	case errors.Is(err, net.ErrClosed), errors.Is(err, ErrStopping):
		return wire.ESHUTDOWN
	default:
		return wire.EIO
	}
}

// read fills buf where the disk holds data and returns the reply. Nothing was sent if it fails.
func (c *conn) read(ctx context.Context, r request, at extent.Range, buf []byte) (net.Buffers, error) {
	if !c.structured {
		return net.Buffers{simpleReply(0, r.cookie), buf}, c.disk.ReadAt(ctx, buf, at.Off)
	}
	have := c.present(ctx, at, r.flags&wire.CmdFlagDF != 0)
	var reply net.Buffers
	hole := func(off, end int64) {
		if off < end {
			head := chunkHead(wire.ChunkHole, r.cookie, 12, end == at.End())
			head = binary.BigEndian.AppendUint64(head, uint64(off))
			reply = append(reply, binary.BigEndian.AppendUint32(head, uint32(end-off)))
		}
	}
	end := at.Off
	for run := range have.In(at) {
		hole(end, run.Off)
		data := buf[run.Off-at.Off : run.End()-at.Off]
		if err := c.disk.ReadAt(ctx, data, run.Off); err != nil {
			return nil, err
		}
		head := chunkHead(wire.ChunkData, r.cookie, 8+len(data), run.End() == at.End())
		reply = append(reply, binary.BigEndian.AppendUint64(head, uint64(run.Off)), data)
		end = run.End()
	}
	hole(end, at.End())
	return reply, nil
}

// present returns the parts of at that are to be read, whole sectors. A disk that cannot tell is read: its map only
// saves work. Many pieces, or any number of them where the client wants one chunk, become one.
func (c *conn) present(ctx context.Context, at extent.Range, single bool) *extent.Set {
	a, ok := c.disk.(Allocator)
	if !ok {
		return extent.NewSet(at)
	}
	set, err := a.Allocated(ctx, at)
	if err != nil {
		return extent.NewSet(at)
	}
	set = sectors(set, at)
	if limit := maxExtents / 2; set.Len() > limit || single && set.Len() > 0 {
		return extent.NewSet(at)
	}
	return set
}

// sectors returns the sectors of at that set touches.
func sectors(set *extent.Set, at extent.Range) *extent.Set {
	out := &extent.Set{}
	for run := range set.In(at) {
		out.Add(run.Align(SectorSize).Intersect(at))
	}
	return out
}

// fail answers with an error number: as a chunk where the client expects chunks.
func (c *conn) fail(r request, errno uint32) error {
	if !c.structured || r.kind != wire.CmdRead && r.kind != wire.CmdBlockStatus {
		return c.send(simpleReply(errno, r.cookie))
	}
	b := chunkHead(wire.ChunkError, r.cookie, 6, true)
	b = binary.BigEndian.AppendUint32(b, errno)
	return c.send(binary.BigEndian.AppendUint16(b, 0))
}

// status describes at, or its first part if it has too many pieces.
func (c *conn) status(ctx context.Context, r request, at extent.Range) ([]byte, error) {
	set, err := c.disk.(Allocator).Allocated(ctx, at) // the context is agreed on for those only
	if err != nil {
		return nil, err
	}
	set = sectors(set, at)
	b := binary.BigEndian.AppendUint32(nil, contextID)
	n := 0
	add := func(length int64, state uint32) bool {
		if length > 0 {
			b = binary.BigEndian.AppendUint32(b, uint32(length))
			b = binary.BigEndian.AppendUint32(b, state)
			n++
		}
		return n < maxExtents && (n == 0 || r.flags&wire.CmdFlagReqOne == 0)
	}
	end := at.Off
	more := true
	for run := range set.In(at) {
		if more = add(run.Off-end, stateHoleZero) && add(run.Len, 0); !more {
			break
		}
		end = run.End()
	}
	if more {
		add(at.End()-end, stateHoleZero)
	}
	return append(chunkHead(wire.ChunkBlockStatus, r.cookie, len(b), true), b...), nil
}

func (c *conn) send(parts ...[]byte) error {
	c.out.Lock()
	defer c.out.Unlock()
	c.armWrite(c.server.limits.reply)
	buffers := net.Buffers(parts)
	_, err := buffers.WriteTo(c.nc)
	return err
}

// Buffers come in powers of two from 4 KiB to MaxRequest.
const (
	minBufferBits = 12
	maxBufferBits = 25
)

var pools [maxBufferBits + 1]sync.Pool

func getBuffer(n int) []byte {
	class := max(minBufferBits, bits.Len(uint(n-1)))
	if b, ok := pools[class].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, 1<<class)
}

func putBuffer(b []byte) {
	b = b[:cap(b)]
	pools[bits.Len(uint(cap(b)-1))].Put(&b)
}
