package nbd

import (
	"encoding/binary"
	"fmt"
	"strings"
	"sync"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// call is one request and its answer.
type call struct {
	cmd     uint16
	at      extent.Range
	context uint32 // of a block status
	done    chan struct{}

	mu  sync.Mutex
	buf []byte // of a read; nil when its caller left

	// The receiver owns these until done is closed.
	err     error
	got     extent.Set // parts of a read that came
	chunks  int64
	seen    []uint32 // contexts that a block status answered
	extents []Extent
}

// leave gives the buffer back to a caller that does not wait any more.
func (k *call) leave() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.buf = nil
}

// put copies p to the bytes at off of the disk, if somebody still waits for them.
func (k *call) put(p []byte, off int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.buf != nil {
		copy(k.buf[off-k.at.Off:], p)
	}
}

func (k *call) putZeroes(at extent.Range) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.buf != nil {
		clear(k.buf[at.Off-k.at.Off:][:at.Len])
	}
}

// cover notes that a part of a read came.
func (k *call) cover(at extent.Range) error {
	if at.Len <= 0 || at.Off < k.at.Off || at.Off >= k.at.End() || at.Len > k.at.End()-at.Off {
		return protocol("[%d, +%d) in the answer to a read of [%d, +%d)", at.Off, at.Len, k.at.Off, k.at.Len)
	}
	if k.got.Overlaps(at) {
		return protocol("[%d, +%d) twice in the answer to a read", at.Off, at.Len)
	}
	if k.got.Add(at); k.got.Len() > maxPieces {
		return protocol("a read answered in more than %d pieces", maxPieces)
	}
	return nil
}

// complete judges an answer that is at its end.
func (k *call) complete() error {
	switch {
	case k.err != nil:
		return nil
	case k.cmd == wire.CmdRead && k.got.Bytes() != k.at.Len:
		return protocol("%d of %d bytes in the answer to a read", k.got.Bytes(), k.at.Len)
	case k.cmd == wire.CmdBlockStatus && len(k.extents) == 0:
		return protocol("the answer to a block status lacks the context")
	}
	return nil
}

// receive reads replies until the connection ends, and returns why it did.
func (c *Client) receive() error {
	for {
		var magic [4]byte
		if err := c.fill(magic[:]); err != nil {
			return err
		}
		var err error
		switch m := binary.BigEndian.Uint32(magic[:]); m {
		case wire.MagicSimple:
			err = c.simple()
		case wire.MagicChunk:
			err = c.chunk()
		default:
			err = protocol("reply magic %#08x", m)
		}
		if err != nil {
			return err
		}
	}
}

func (c *Client) call(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.calls[cookie]
	if k == nil {
		return nil, protocol("a reply to nothing: %d", cookie)
	}
	return k, nil
}

// finish ends a call that is answered.
func (c *Client) finish(cookie uint64, k *call) error {
	if err := k.complete(); err != nil {
		return err
	}
	c.mu.Lock()
	delete(c.calls, cookie)
	c.mu.Unlock()
	close(k.done)
	<-c.slots
	return nil
}

func (c *Client) simple() error {
	var head [12]byte
	if err := c.fill(head[:]); err != nil {
		return err
	}
	errno, cookie := binary.BigEndian.Uint32(head[:]), binary.BigEndian.Uint64(head[4:])
	k, err := c.call(cookie)
	if err != nil {
		return err
	}
	switch {
	case k.chunks > 0:
		return protocol("a simple reply after chunks")
	case errno != 0:
		k.err = &Error{Errno: errno}
	case k.cmd == wire.CmdBlockStatus, k.cmd == wire.CmdRead && c.structured:
		return protocol("a simple reply to a request that asks for chunks")
	case k.cmd == wire.CmdRead:
		if err := c.data(k, k.at); err != nil {
			return err
		}
	}
	return c.finish(cookie, k)
}

// chunk reads one chunk of a structured reply.
func (c *Client) chunk() error {
	var head [16]byte
	if err := c.fill(head[:]); err != nil {
		return err
	}
	flags, kind := binary.BigEndian.Uint16(head[:]), binary.BigEndian.Uint16(head[2:])
	cookie, n := binary.BigEndian.Uint64(head[4:]), int64(binary.BigEndian.Uint32(head[12:]))
	if !c.structured {
		return protocol("a structured reply that was not agreed on")
	}
	k, err := c.call(cookie)
	if err != nil {
		return err
	}
	// A chunk for every sector and some: beyond it the server only keeps us busy.
	if k.chunks++; k.chunks > k.at.Len/512+maxPieces {
		return protocol("an answer of more than %d chunks", k.chunks-1)
	}
	switch {
	case kind&wire.ChunkIsError != 0:
		// Errors that we do not know are errors all the same.
		err = c.failure(k, kind, n)
	case kind == wire.ChunkNone:
		if n != 0 || flags&wire.ChunkDone == 0 {
			return protocol("an empty chunk that is not the last, or not empty")
		}
	case kind == wire.ChunkData && k.cmd == wire.CmdRead:
		err = c.dataChunk(k, n)
	case kind == wire.ChunkHole && k.cmd == wire.CmdRead:
		err = c.holeChunk(k, n)
	case kind == wire.ChunkBlockStatus && k.cmd == wire.CmdBlockStatus:
		err = c.statusChunk(k, n)
	default:
		// Its meaning is not known, so neither is what it would change.
		return protocol("a chunk of type %d in the answer to a %s", kind, commandNames[k.cmd])
	}
	if err != nil {
		return err
	}
	if flags&wire.ChunkDone != 0 {
		return c.finish(cookie, k)
	}
	return nil
}

func (c *Client) dataChunk(k *call, n int64) error {
	var head [8]byte
	if n <= int64(len(head)) {
		return protocol("a data chunk of %d bytes", n)
	}
	if err := c.fill(head[:]); err != nil {
		return err
	}
	off := binary.BigEndian.Uint64(head[:])
	if off > maxSize {
		return protocol("a data chunk at %d", off)
	}
	return c.data(k, extent.Range{Off: int64(off), Len: n - int64(len(head))})
}

// data takes the bytes of a part of a read from the stream.
func (c *Client) data(k *call, at extent.Range) error {
	if err := k.cover(at); err != nil {
		return err
	}
	for at.Len > 0 {
		if c.in.Buffered() == 0 {
			if _, err := c.in.Peek(1); err != nil {
				return fmt.Errorf("%w: %w", ErrLost, err)
			}
		}
		part, _ := c.in.Peek(int(min(at.Len, int64(c.in.Buffered())))) // it is there
		k.put(part, at.Off)
		n, _ := c.in.Discard(len(part)) // likewise
		at.Off, at.Len = at.Off+int64(n), at.Len-int64(n)
	}
	return nil
}

func (c *Client) holeChunk(k *call, n int64) error {
	var body [12]byte
	if n != int64(len(body)) {
		return protocol("a hole chunk of %d bytes", n)
	}
	if err := c.fill(body[:]); err != nil {
		return err
	}
	off := binary.BigEndian.Uint64(body[:])
	if off > maxSize {
		return protocol("a hole chunk at %d", off)
	}
	at := extent.Range{Off: int64(off), Len: int64(binary.BigEndian.Uint32(body[8:]))}
	if err := k.cover(at); err != nil {
		return err
	}
	k.putZeroes(at)
	return nil
}

// failure reads an error chunk: number, text, and for some the offset.
func (c *Client) failure(k *call, kind uint16, n int64) error {
	if n < 4 || n > maxErrorReply {
		return protocol("an error chunk of %d bytes", n)
	}
	body := make([]byte, n)
	if err := c.fill(body); err != nil {
		return err
	}
	e := &Error{Errno: binary.BigEndian.Uint32(body)}
	if e.Errno == 0 {
		return protocol("an error chunk without an error")
	}
	if kind == wire.ChunkError || kind == wire.ChunkErrorOffset {
		if n < 6 || int64(binary.BigEndian.Uint16(body[4:])) > n-6 {
			return protocol("the text of an error is longer than its chunk")
		}
		text := body[6:][:binary.BigEndian.Uint16(body[4:])]
		e.Text = strings.ToValidUTF8(string(text[:min(len(text), wire.MaxName)]), "?")
	}
	if k.err == nil {
		k.err = e
	}
	return nil
}

// statusChunk reads the extents of one context.
func (c *Client) statusChunk(k *call, n int64) error {
	if n < 12 || (n-4)%8 != 0 || n > maxStatusReply {
		return protocol("a block status chunk of %d bytes", n)
	}
	var item [8]byte
	if err := c.fill(item[:4]); err != nil {
		return err
	}
	id := binary.BigEndian.Uint32(item[:])
	known := false
	for _, agreed := range c.contexts {
		known = known || agreed == id
	}
	if !known {
		return protocol("block status of context %d, which was not agreed on", id)
	}
	for _, before := range k.seen {
		if before == id {
			return protocol("block status of context %d twice", id)
		}
	}
	k.seen = append(k.seen, id)
	off := k.at.Off
	for range (n - 4) / 8 {
		if err := c.fill(item[:]); err != nil {
			return err
		}
		length, flags := int64(binary.BigEndian.Uint32(item[:])), binary.BigEndian.Uint32(item[4:])
		if length == 0 {
			return protocol("an extent of no bytes")
		}
		// The last one may pass the end; what is too much to hold is asked for again.
		e := Extent{Range: extent.Range{Off: off, Len: min(length, k.at.End()-off)}, Flags: flags}
		if id != k.context || e.Len <= 0 {
			continue
		}
		if last := len(k.extents) - 1; last >= 0 && k.extents[last].Flags == flags && k.extents[last].End() == off {
			k.extents[last].Len += e.Len
		} else if len(k.extents) < maxExtents {
			k.extents = append(k.extents, e)
		}
		off += e.Len
	}
	return nil
}
