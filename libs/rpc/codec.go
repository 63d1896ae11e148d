package rpc

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	// Registers the codec "proto" that ordinary messages are passed to.
	_ "google.golang.org/grpc/encoding/proto"
)

// frame is a message that makes and reads its own wire form, from buffers and into buffers.
type frame interface {
	marshal() (mem.BufferSlice, error)
	// unmarshal must take its own references of what it keeps.
	unmarshal(mem.BufferSlice) error
}

// codec is gRPC's own codec "proto", except for frames. It is set per server and connection, not
// registered, and announces itself as plain proto because that is what it puts on the wire.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(frame); ok {
		return f.marshal()
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(frame); ok {
		return f.unmarshal(data)
	}
	return c.CodecV2.Unmarshal(data, v)
}
