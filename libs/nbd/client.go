package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"os"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

const (
	// requestTimeout bounds a request whose context has no deadline: no server may hang its client.
	requestTimeout = time.Minute
	// goodbye is how long Close tries to tell the server.
	goodbye = time.Second
	// readAhead is the buffer between the socket and the replies, in bytes.
	readAhead = 256 << 10
)

// BlockSizes are the units of an export, in bytes. Offsets and lengths are multiples of Min.
type BlockSizes struct {
	Min, Preferred, Max int64
}

// Info is what a server says of an export.
type Info struct {
	// Size in bytes.
	Size int64
	// Block sizes; Max is at most MaxPayload.
	Block BlockSizes

	flags uint16
}

// ReadOnly reports whether writes are refused.
func (i Info) ReadOnly() bool { return i.flags&wire.ExportReadOnly != 0 }

// MultiConn reports whether several connections see one consistent disk.
func (i Info) MultiConn() bool { return i.flags&wire.ExportMultiConn != 0 }

// CanFlush reports whether writes can be made durable.
func (i Info) CanFlush() bool { return i.flags&wire.ExportFlush != 0 }

// CanFUA reports whether a write can be asked to be durable.
func (i Info) CanFUA() bool { return i.flags&wire.ExportFUA != 0 }

// CanTrim reports whether ranges can be given up.
func (i Info) CanTrim() bool { return i.flags&wire.ExportTrim != 0 }

// CanZero reports whether ranges can be zeroed without sending zeros.
func (i Info) CanZero() bool { return i.flags&wire.ExportZeroes != 0 }

// Extent is a run of bytes with the flags that a context gives it.
type Extent struct {
	extent.Range
	// Flags are Dirty, or Hole and Zero, or what the context says.
	Flags uint32
}

// Client is a connection to one export. It is safe for concurrent use; requests are answered in any order. A context
// that ends gives up its request and leaves the others alone. Make it with Dial or New; Close it.
type Client struct {
	conn       net.Conn
	in         *bufio.Reader
	info       Info
	structured bool
	contexts   map[string]uint32
	readUnit   int64 // no read crosses a multiple of it; 0 is no limit

	sending chan struct{} // holds one value while somebody writes
	slots   chan struct{} // holds one value per request in flight
	done    chan struct{} // closed when no reply is read any more

	mu     sync.Mutex
	cookie uint64
	calls  map[uint64]*call // unanswered
	err    error            // why the connection ended
}

func newClient(conn net.Conn) *Client {
	return &Client{
		conn: conn, in: bufio.NewReaderSize(conn, readAhead), contexts: map[string]uint32{},
		sending: make(chan struct{}, 1), slots: make(chan struct{}, maxInFlight), done: make(chan struct{}),
		calls: map[uint64]*call{},
	}
}

// Info is what the server said of the export.
func (c *Client) Info() Info { return c.info }

// Size of the export in bytes.
func (c *Client) Size() int64 { return c.info.Size }

// Close says good-bye, ends the connection and fails the requests in flight with ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.err == nil {
		c.err = ErrClosed // before the server hangs up
	}
	c.mu.Unlock()
	select {
	case c.sending <- struct{}{}:
		_ = c.conn.SetWriteDeadline(time.Now().Add(goodbye))
		_, _ = c.conn.Write(request(wire.CmdDisconnect, 0, 0, 0, 0)) // a server that is gone needs no good-bye
		<-c.sending
	default: // a request is stuck in the socket
	}
	c.fail(ErrClosed)
	<-c.done
	return nil
}

// fail ends the connection; the first reason is the one that callers see.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	_ = c.conn.Close()
}

// run reads replies until the connection ends and fails what is then unanswered.
func (c *Client) run() {
	c.fail(c.receive())
	c.mu.Lock()
	err, calls := c.err, c.calls
	c.calls = nil
	c.mu.Unlock()
	for _, k := range calls {
		k.err = err
		close(k.done)
	}
	close(c.done)
}

func request(kind, flags uint16, cookie uint64, off, length int64) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 28), wire.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// start sends a request. After nil the call is answered, or failed with the connection.
func (c *Client) start(ctx context.Context, k *call, flags uint16, payload []byte) error {
	k.done = make(chan struct{})
	select {
	case c.slots <- struct{}{}:
	case <-c.done:
		return c.reason()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	release := func() { <-c.slots }
	select {
	case c.sending <- struct{}{}:
	case <-c.done:
		release()
		return c.reason()
	case <-ctx.Done():
		release()
		return context.Cause(ctx)
	}
	defer func() { <-c.sending }()

	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		release()
		return c.err
	}
	c.cookie++
	cookie := c.cookie
	c.calls[cookie] = k
	c.mu.Unlock()

	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(requestTimeout)
	}
	_ = c.conn.SetWriteDeadline(deadline)
	spoilt := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(spoilt)
	})
	buffers := net.Buffers{request(k.cmd, flags, cookie, k.at.Off, k.at.Len)}
	if len(payload) > 0 {
		buffers = append(buffers, payload)
	}
	n, err := buffers.WriteTo(c.conn)
	if !stop() {
		<-spoilt // or it would spoil the deadline of whoever writes next
	}
	if err != nil && n == 0 && errors.Is(err, os.ErrDeadlineExceeded) && c.forget(cookie) {
		release()
		return expired(ctx, err)
	}
	if err != nil {
		// Half a request may be out: nothing can follow it.
		if ctx.Err() != nil {
			err = fmt.Errorf("%w while a request was being sent: %w", context.Cause(ctx), err)
		}
		c.fail(fmt.Errorf("%w: %w", ErrLost, err))
	}
	return nil
}

// forget takes back a call that was not sent. False: it has ended with the connection.
func (c *Client) forget(cookie uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.calls[cookie]
	delete(c.calls, cookie)
	return ok
}

// expired is the error of a deadline: the context's, if that is what ended.
func expired(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
}

func (c *Client) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// wait returns how a started call ended, or gives it up when ctx ends: its buffer is not touched any more then.
func (c *Client) wait(ctx context.Context, k *call) error {
	_, ok := ctx.Deadline()
	return c.waitAtMost(ctx, k, !ok)
}

// waitAtMost is wait, within requestTimeout if bounded.
func (c *Client) waitAtMost(ctx context.Context, k *call, bounded bool) error {
	select {
	case <-k.done: // also when ctx has ended
		return k.err
	default:
	}
	var timeout <-chan time.Time
	if bounded {
		timer := time.NewTimer(requestTimeout)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
		k.leave()
		return context.Cause(ctx)
	case <-timeout:
		k.leave()
		return fmt.Errorf("no answer within %s: %w", requestTimeout, context.DeadlineExceeded)
	}
}

// do is start and wait.
func (c *Client) do(ctx context.Context, k *call, flags uint16, payload []byte) error {
	err := c.start(ctx, k, flags, payload)
	if err == nil {
		err = c.wait(ctx, k)
	}
	if err != nil {
		return fmt.Errorf("%s of [%d, +%d): %w", commandNames[k.cmd], k.at.Off, k.at.Len, err)
	}
	return nil
}

var commandNames = map[uint16]string{
	wire.CmdRead: "read", wire.CmdWrite: "write", wire.CmdFlush: "flush", wire.CmdTrim: "trim", wire.CmdWriteZeroes: "write of zeroes",
	wire.CmdBlockStatus: "block status",
}

var errBounds = errors.New("not within the export")

func (c *Client) within(at extent.Range) error {
	if at.Off < 0 || at.Len < 0 || at.Off > c.info.Size || at.Len > c.info.Size-at.Off {
		return fmt.Errorf("[%d, +%d): %w of %d bytes", at.Off, at.Len, errBounds, c.info.Size)
	}
	return nil
}

// pieces calls do for parts of at of at most step bytes that end at multiples of it, ascending.
func (c *Client) pieces(at extent.Range, step int64, do func(extent.Range) error) error {
	if err := c.within(at); err != nil {
		return err
	}
	for at.Len > 0 {
		part := extent.Range{Off: at.Off, Len: min(at.Len, step-at.Off%step)}
		if err := do(part); err != nil {
			return err
		}
		at.Off, at.Len = at.Off+part.Len, at.Len-part.Len
	}
	return nil
}

// LimitReads has no read cross a multiple of unit, a multiple of the export's smallest block: for exports that answer
// larger reads wrongly. Call it before the first read. 0 lifts the limit.
func (c *Client) LimitReads(unit int64) { c.readUnit = unit }

// readStep is the most that one request reads; requests end at multiples of it.
func (c *Client) readStep() int64 {
	if c.readUnit > 0 {
		return min(c.readUnit, c.info.Block.Max)
	}
	return c.info.Block.Max
}

// ReadAt fills p from off. After an error p may be filled in part, and is not written to any more.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	all := extent.Range{Off: off, Len: int64(len(p))}
	return c.pieces(all, c.readStep(), func(at extent.Range) error {
		buf := p[at.Off-off:][:at.Len]
		err := c.do(ctx, &call{cmd: wire.CmdRead, at: at, buf: buf}, c.readFlags(), nil)
		if tooLong(err) {
			err = c.again(ctx, at, buf)
		}
		return err
	})
}

// readFlags ask for answers in one piece where the export offers that: QEMU hangs up when reading fails within an answer in
// several, and its client cannot tell a broken disk from a broken connection.
func (c *Client) readFlags() uint16 {
	if c.structured && c.info.flags&wire.ExportDF != 0 {
		return wire.CmdFlagDF
	}
	return 0
}

// tooLong reports that a server cannot answer a read in one piece; again reads in several.
func tooLong(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Errno == EOVERFLOW
}

func (c *Client) again(ctx context.Context, at extent.Range, buf []byte) error {
	return c.do(ctx, &call{cmd: wire.CmdRead, at: at, buf: buf}, 0, nil)
}

// WriteAt writes p at off and returns when the server has it; with fua, when it is durable. p is not to be changed
// meanwhile.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	all := extent.Range{Off: off, Len: int64(len(p))}
	return c.pieces(all, c.info.Block.Max, func(at extent.Range) error {
		return c.do(ctx, &call{cmd: wire.CmdWrite, at: at}, fuaFlag(fua), p[at.Off-off:][:at.Len])
	})
}

func fuaFlag(fua bool) uint16 {
	if fua {
		return wire.CmdFlagFUA
	}
	return 0
}

// Flush makes every write that was answered before durable.
func (c *Client) Flush(ctx context.Context) error {
	return c.do(ctx, &call{cmd: wire.CmdFlush}, 0, nil)
}

// Trim says that a range is not needed; it may read as anything afterwards.
func (c *Client) Trim(ctx context.Context, at extent.Range) error {
	return c.pieces(at, discardStep, func(at extent.Range) error { return c.do(ctx, &call{cmd: wire.CmdTrim, at: at}, 0, nil) })
}

// WriteZeroes makes a range read as zeros; keep keeps its space allocated.
func (c *Client) WriteZeroes(ctx context.Context, at extent.Range, keep bool) error {
	flags := uint16(0)
	if keep {
		flags = wire.CmdFlagNoHole
	}
	return c.pieces(at, discardStep, func(at extent.Range) error {
		return c.do(ctx, &call{cmd: wire.CmdWriteZeroes, at: at}, flags, nil)
	})
}

// BlockStatus returns the extents of the beginning of at as one of the contexts agreed on sees them: ascending, without
// gaps, not beyond at. It may cover less than at, but never nothing of it.
func (c *Client) BlockStatus(ctx context.Context, name string, at extent.Range) ([]Extent, error) {
	id, ok := c.contexts[name]
	if !ok {
		return nil, fmt.Errorf("%w %q: it was not asked for", ErrNoContext, name)
	}
	if err := c.within(at); err != nil {
		return nil, err
	}
	if at.Empty() {
		return nil, nil
	}
	at.Len = min(at.Len, statusStep)
	k := &call{cmd: wire.CmdBlockStatus, at: at, context: id}
	if err := c.do(ctx, k, 0, nil); err != nil {
		return nil, err
	}
	return k.extents, nil
}

// Extents yields all extents of at, ascending, without gaps. It holds those of one reply at a time, and gives the server
// a minute for each. An error is the last thing it yields.
func (c *Client) Extents(ctx context.Context, name string, at extent.Range) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for at.Len > 0 {
			// Ask up to a multiple of the step, so that requests stay aligned whatever the replies cover.
			ask := extent.Span(at.Off, min(at.End(), (at.Off/statusStep+1)*statusStep))
			bounded, cancel := context.WithTimeout(ctx, requestTimeout)
			list, err := c.BlockStatus(bounded, name, ask)
			cancel()
			if err != nil {
				yield(Extent{}, err)
				return
			}
			for _, e := range list {
				if !yield(e, nil) {
					return
				}
			}
			at = extent.Span(list[len(list)-1].End(), at.End())
		}
	}
}
