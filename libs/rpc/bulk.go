package rpc

import (
	"fmt"
	"io"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Sender is the sending half of a gRPC stream, of a client or a server.
type Sender interface{ SendMsg(m any) error }

// Receiver is the receiving half of a gRPC stream, of a client or a server.
type Receiver interface{ RecvMsg(m any) error }

// SendBulk sends one message whose bytes field dataField is payload, without copying the payload. The
// header is the generated message with every other field; its own dataField must be empty. On the wire
// this is the ordinary encoding of the message, so a receiver may use RecvBulk or the generated type.
//
// The payload belongs to gRPC from the call on, whatever SendBulk returns: do not write to it any more.
// release, if not nil, is called once when gRPC has written the payload to the connection, which may be
// after SendBulk returned, or when the message could not be sent. When a connection breaks, gRPC may
// drop queued messages without calling it: recycle memory in release, but never wait for it.
func SendBulk(stream Sender, header proto.Message, dataField protowire.Number, payload []byte, release func()) error {
	var slice mem.BufferSlice
	switch {
	case len(payload) == 0:
		if release != nil {
			release()
		}
	case release == nil:
		slice = mem.BufferSlice{mem.SliceBuffer(payload)}
	case mem.IsBelowBufferPoolingThreshold(cap(payload)):
		// gRPC does not count references of so small a buffer, so release would never be called.
		slice = mem.BufferSlice{mem.SliceBuffer(append([]byte(nil), payload...))}
		release()
	default:
		slice = mem.BufferSlice{mem.NewBuffer(&payload, releaser(release))}
	}
	return SendBulkSlice(stream, header, dataField, slice)
}

// SendBulkSlice is SendBulk for a payload in several buffers, as RecvBulk returns them: it takes over
// the caller's reference to each.
func SendBulkSlice(stream Sender, header proto.Message, dataField protowire.Number, payload mem.BufferSlice) error {
	f := &bulk{header: header, field: dataField, payload: payload}
	err := stream.SendMsg(f)
	if !f.passed {
		payload.Free()
	}
	return err
}

// RecvBulk receives one message: dataField as the buffers in which it arrived, by reference, and all
// other fields into header, which is reset first. The caller owns payload and frees it
// (payload.Free()) when it is done; payload is nil when the field is absent or empty, and on error.
// The error is io.EOF at the end of the stream, as RecvMsg's.
func RecvBulk(stream Receiver, header proto.Message, dataField protowire.Number) (payload mem.BufferSlice, err error) {
	f := &bulk{header: header, field: dataField}
	if err := stream.RecvMsg(f); err != nil {
		f.payload.Free()
		return nil, err
	}
	return f.payload, nil
}

// releaser is a buffer pool that only gives back.
type releaser func()

// Get implements mem.BufferPool; gRPC never asks a buffer's own pool for another.
func (releaser) Get(n int) *[]byte { b := make([]byte, n); return &b }

// Put implements mem.BufferPool.
func (r releaser) Put(*[]byte) { r() }

// bulk is a message of which one bytes field passes by reference.
type bulk struct {
	header  proto.Message
	field   protowire.Number
	payload mem.BufferSlice
	passed  bool // the payload's references were handed to gRPC
}

// maxLen is the longest payload: a length prefix of gRPC has 32 bits, and no message comes near.
const maxLen = 1 << 30

func (b *bulk) marshal() (mem.BufferSlice, error) {
	size := b.payload.Len()
	if size > maxLen {
		return nil, fmt.Errorf("bulk payload of %d bytes is too long", size)
	}
	opts := proto.MarshalOptions{}
	head := make([]byte, 0, opts.Size(b.header)+2*protowire.SizeVarint(1<<32))
	head, err := opts.MarshalAppend(head, b.header)
	if err != nil {
		return nil, err
	}
	if size > 0 {
		head = protowire.AppendTag(head, b.field, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(size))
	}
	out := make(mem.BufferSlice, 0, 1+len(b.payload))
	out = append(out, mem.SliceBuffer(head))
	b.passed = true
	return append(out, b.payload...), nil
}

// unmarshal reads the fields one by one: the data field is cut out of the buffers by reference (the
// last one wins, as proto has it), all others are gathered and decoded.
func (b *bulk) unmarshal(data mem.BufferSlice) error {
	b.payload.Free()
	b.payload = nil
	var scratch [128]byte
	head := scratch[:0]
	c := cursor{bufs: data}
	for !c.done() {
		tag, err := c.varint()
		if err != nil {
			return err
		}
		num, typ := protowire.DecodeTag(tag)
		if num < protowire.MinValidNumber {
			return errWire
		}
		if num == b.field && typ == protowire.BytesType {
			size, err := c.varint()
			if err != nil {
				return err
			}
			payload, err := c.slice(size)
			if err != nil {
				return err
			}
			b.payload.Free()
			b.payload = payload
			continue
		}
		head = protowire.AppendVarint(head, tag)
		if head, err = c.value(head, typ); err != nil {
			return err
		}
	}
	return proto.Unmarshal(head, b.header)
}

var errWire = fmt.Errorf("bulk message is not valid proto: %w", io.ErrUnexpectedEOF)

// cursor reads wire elements that may lie across buffers.
type cursor struct {
	bufs mem.BufferSlice
	off  int // in bufs[0]
}

// done drops buffers that were read and reports whether all were.
func (c *cursor) done() bool {
	for len(c.bufs) > 0 && c.off == c.bufs[0].Len() {
		c.bufs, c.off = c.bufs[1:], 0
	}
	return len(c.bufs) == 0
}

func (c *cursor) varint() (uint64, error) {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		if c.done() {
			return 0, errWire
		}
		x := c.bufs[0].ReadOnlyData()[c.off]
		c.off++
		if shift == 63 && x > 1 {
			return 0, errWire
		}
		v |= uint64(x&0x7f) << shift
		if x < 0x80 {
			return v, nil
		}
	}
	return 0, errWire
}

// value appends the value of a field, as it stands, to out.
func (c *cursor) value(out []byte, typ protowire.Type) ([]byte, error) {
	switch typ {
	case protowire.VarintType:
		v, err := c.varint()
		return protowire.AppendVarint(out, v), err
	case protowire.Fixed32Type:
		return c.bytes(out, 4)
	case protowire.Fixed64Type:
		return c.bytes(out, 8)
	case protowire.BytesType:
		n, err := c.varint()
		if err != nil {
			return nil, err
		}
		return c.bytes(protowire.AppendVarint(out, n), n)
	}
	return nil, errWire // groups: no contract here has them
}

// bytes appends the next n bytes to out.
func (c *cursor) bytes(out []byte, n uint64) ([]byte, error) {
	for n > 0 {
		if c.done() {
			return nil, errWire
		}
		rest := c.bufs[0].ReadOnlyData()[c.off:]
		k := min(n, uint64(len(rest)))
		out = append(out, rest[:k]...)
		c.off, n = c.off+int(k), n-k
	}
	return out, nil
}

// slice returns the next n bytes as references; nil if n is 0.
func (c *cursor) slice(n uint64) (mem.BufferSlice, error) {
	if n == 0 {
		return nil, nil
	}
	out := make(mem.BufferSlice, 0, min(n, 1<<20)>>14+2)
	for n > 0 {
		if c.done() {
			out.Free()
			return nil, errWire
		}
		k := min(n, uint64(c.bufs[0].Len()-c.off))
		out = append(out, c.bufs[0].Slice(c.off, c.off+int(k)))
		c.off, n = c.off+int(k), n-k
	}
	return out, nil
}
