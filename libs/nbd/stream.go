package nbd

import (
	"context"
	"fmt"
	"iter"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// What one Stream has in flight: measured with QEMU, where more gained little. Small pieces have small buffers, so that a
// scattered list of changes is read with many requests in flight.
const (
	// StreamPiece is the most that one call of emit gets, in bytes. Pieces end at multiples of it.
	StreamPiece = 1 << 20
	// StreamMemory is the most that the pieces take that are read and not yet emitted, in bytes.
	StreamMemory = 4 << 20
	// streamDepth is the most pieces of them.
	streamDepth = maxInFlight
	smallPiece  = 64 << 10
)

// Run is a part of a plan of reading.
type Run struct {
	extent.Range
	// Zero: it is known to read as zeros, and is not read.
	Zero bool
}

// Plan yields what to read, ascending; an error is the last thing it yields. Its requests are to use the context that it
// gets, which ends with the stream.
type Plan func(context.Context) iter.Seq2[Run, error]

var (
	streamPool = sync.Pool{New: func() any { b := make([]byte, StreamPiece); return &b }}
	smallPool  = sync.Pool{New: func() any { b := make([]byte, smallPiece); return &b }}
)

func poolFor(n int64) (*sync.Pool, int64) {
	if n <= smallPiece {
		return &smallPool, smallPiece
	}
	return &streamPool, StreamPiece
}

// piece is a part of a plan on its way through Stream.
type piece struct {
	run Run
	buf *[]byte
	k   *call // nil for zeros
	err error // of the plan, or of sending
}

// Stream reads the runs of an ascending plan, several at once, and emits them in the order of the plan: data in parts of
// at most StreamPiece bytes, valid during the call; nil for runs that are Zero. The plan is drawn from another
// goroutine than emit is called in; both have ended when Stream returns. It holds at most
// StreamMemory, and gives the server a minute for each piece, however much time ctx leaves.
func (c *Client) Stream(ctx context.Context, plan Plan, emit func(at extent.Range, data []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	queue := make(chan piece, streamDepth)
	room := semaphore.NewWeighted(StreamMemory)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(queue)
		c.feed(ctx, plan, queue, room)
	})
	defer func() {
		cancel()
		for p := range queue {
			p.drop()
		}
		wg.Wait()
	}()
	for p := range queue {
		if p.err != nil {
			p.drop()
			return p.err
		}
		var data []byte
		if p.k != nil {
			err := c.waitAtMost(ctx, p.k, true)
			if tooLong(err) {
				err = c.again(ctx, p.run.Range, p.k.buf)
			}
			if err != nil {
				p.drop()
				return fmt.Errorf("read of [%d, +%d): %w", p.run.Off, p.run.Len, err)
			}
			data = p.k.buf
		}
		err := emit(p.run.Range, data)
		p.drop()
		if p.k != nil {
			_, n := poolFor(p.run.Len)
			room.Release(n)
		}
		if err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// feed starts the reads of a plan until it ends, fails, or ctx ends.
func (c *Client) feed(ctx context.Context, plan Plan, queue chan<- piece, room *semaphore.Weighted) {
	send := func(p piece) bool {
		select {
		case queue <- p:
			return p.err == nil
		case <-ctx.Done():
			p.drop()
			return false
		}
	}
	step := min(StreamPiece, c.readStep())
	for run, err := range plan(ctx) {
		if err != nil {
			send(piece{err: err})
			return
		}
		if err := c.within(run.Range); err != nil {
			send(piece{err: err})
			return
		}
		if run.Zero {
			if !run.Empty() && !send(piece{run: run}) {
				return
			}
			continue
		}
		for at := run.Off; at < run.End(); {
			part := Run{Range: extent.Span(at, min(run.End(), (at/step+1)*step))}
			pool, n := poolFor(part.Len)
			if room.Acquire(ctx, n) != nil {
				return // the consumer sees the end of ctx
			}
			p := piece{run: part, buf: pool.Get().(*[]byte)}
			p.k = &call{cmd: wire.CmdRead, at: part.Range, buf: (*p.buf)[:part.Len]}
			if err := c.start(ctx, p.k, c.readFlags(), nil); err != nil {
				p.err = fmt.Errorf("read of [%d, +%d): %w", part.Off, part.Len, err)
			}
			if !send(p) {
				return
			}
			at = part.End()
		}
	}
}

// drop gives the piece's buffer back.
func (p *piece) drop() {
	if p.k != nil {
		p.k.leave()
		pool, _ := poolFor(p.run.Len)
		pool.Put(p.buf)
		p.buf = nil
	}
}
