package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/landfall-dr/landfall/libs/extent"
)

// writeTimeout ends a connection whose client does not take its replies.
const writeTimeout = 2 * time.Minute

// transmit serves requests until the client disconnects, the connection breaks, or stop was called. Requests in flight
// are finished and answered before it returns.
func (c *conn) transmit() error {
	inFlight := semaphore.NewWeighted(maxInFlight)
	memory := semaphore.NewWeighted(maxInFlightBytes)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx := context.Background() // both semaphores are released by requests, which always end
	var head [requestSize]byte
	for {
		if _, err := io.ReadFull(c.in, head[:]); err != nil {
			return err
		}
		r, err := parseRequest(&head)
		if err != nil {
			return err
		}
		if r.kind == cmdDisconnect {
			return nil
		}
		errno := r.check(c.disk.Size(), c.structured && c.meta != "")
		if errno != 0 {
			// The payload of a refused write follows all the same.
			if r.kind == cmdWrite {
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
		if r.kind == cmdRead || r.kind == cmdWrite {
			need = int64(r.length)
			_ = memory.Acquire(ctx, need)
			buf = getBuffer(int(r.length))
		}
		if r.kind == cmdWrite {
			if _, err := io.ReadFull(c.in, buf); err != nil {
				putBuffer(buf)
				return err
			}
		}
		wg.Go(func() {
			defer inFlight.Release(1)
			if err := c.serve(r, buf); err != nil {
				_ = c.nc.Close() // the reader sees it
			}
			if buf != nil {
				putBuffer(buf)
				memory.Release(need)
			}
		})
	}
}

// serve does a request that passed check. An error means that the reply could not be sent.
func (c *conn) serve(r request, buf []byte) error {
	at := extent.Range{Off: int64(r.off), Len: int64(r.length)}
	fua := r.flags&cmdFlagFUA != 0
	var err error
	switch r.kind {
	case cmdRead:
		var n int
		if n, err = c.disk.ReadAt(buf, at.Off); n == len(buf) {
			return c.data(r, buf)
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
	case cmdWrite:
		err = c.disk.WriteAt(buf, at.Off, fua)
	case cmdFlush:
		err = c.disk.Flush()
	case cmdTrim:
		err = c.disk.Zero(at, false, fua)
	case cmdWriteZeroes:
		keep := r.flags&cmdFlagNoHole != 0
		if keep && r.flags&cmdFlagFastZero != 0 {
			return c.fail(r, errNotSup) // it would be a write of zeros
		}
		err = c.disk.Zero(at, keep, fua)
	case cmdBlockStatus:
		var reply []byte
		if reply, err = c.status(r, at); err == nil {
			return c.send(reply)
		}
	}
	if err != nil {
		c.server.logger.Error("guest request failed", "export", c.name, "command", r.kind, "offset", r.off, "length", r.length, "err", err)
		return c.fail(r, errno(err))
	}
	return c.send(simpleReply(0, r.cookie))
}

func errno(err error) uint32 {
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return errNoSpace
	case errors.Is(err, net.ErrClosed):
		return errShutdown
	default:
		return errIO
	}
}

func (c *conn) data(r request, buf []byte) error {
	if !c.structured {
		return c.send(simpleReply(0, r.cookie), buf)
	}
	head := chunkHead(chunkData, r.cookie, 8+len(buf))
	return c.send(binary.BigEndian.AppendUint64(head, r.off), buf)
}

// fail answers with an error number: as a chunk where the client expects chunks.
func (c *conn) fail(r request, errno uint32) error {
	if !c.structured || r.kind != cmdRead && r.kind != cmdBlockStatus {
		return c.send(simpleReply(errno, r.cookie))
	}
	b := chunkHead(chunkError, r.cookie, 6)
	b = binary.BigEndian.AppendUint32(b, errno)
	return c.send(binary.BigEndian.AppendUint16(b, 0))
}

// status describes at, or its first part if it has too many pieces.
func (c *conn) status(r request, at extent.Range) ([]byte, error) {
	set, err := c.disk.Allocated(at)
	if err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint32(nil, contextID)
	n := 0
	add := func(length int64, state uint32) bool {
		if length > 0 {
			b = binary.BigEndian.AppendUint32(b, uint32(length))
			b = binary.BigEndian.AppendUint32(b, state)
			n++
		}
		return n < maxExtents && (n == 0 || r.flags&cmdFlagReqOne == 0)
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
	return append(chunkHead(chunkBlockStatus, r.cookie, len(b)), b...), nil
}

func (c *conn) send(parts ...[]byte) error {
	c.out.Lock()
	defer c.out.Unlock()
	if err := c.nc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
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
