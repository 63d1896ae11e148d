package server

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// contextID is the number of base:allocation on every connection.
const contextID = 1

// stateHoleZero are the flags of space that is not held.
const stateHoleZero = wire.StateHole | wire.StateZero

// Transmission flags of every export, and those of exports that can be written.
const (
	exportFlags   = wire.ExportHasFlags | wire.ExportMultiConn
	readOnlyFlags = wire.ExportReadOnly
	writableFlags = wire.ExportFlush | wire.ExportFUA | wire.ExportTrim | wire.ExportZeroes
)

// Bounds.
const (
	// SectorSize is the smallest block, in bytes: every request is whole sectors.
	SectorSize = 512
	// MaxRequest is the largest payload of a request, in bytes.
	MaxRequest = wire.MaxPayload
	// maxDiscard is the largest payload that is read only to be refused, in bytes; beyond it the client is cut off.
	maxDiscard = 2 * MaxRequest
	maxOption  = 8 << 10
	maxOptions = 128
	// maxNamed bounds the exports that a refusal lists.
	maxNamed = 16
	// maxExtents bounds the descriptors of one block status reply, and the chunks of one read.
	maxExtents = 1024
)

// errProtocol ends a connection whose peer does not speak the protocol.
var errProtocol = errors.New("nbd: protocol violation")

// request is one command of a client.
type request struct {
	flags  uint16
	kind   uint16
	cookie uint64
	off    uint64
	length uint32
}

func parseRequest(b *[wire.RequestSize]byte) (request, error) {
	if m := binary.BigEndian.Uint32(b[:]); m != wire.MagicRequest {
		return request{}, fmt.Errorf("%w: request magic %#08x", errProtocol, m)
	}
	return request{
		flags:  binary.BigEndian.Uint16(b[4:]),
		kind:   binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// check returns the error number to answer a request with that cannot be done on a disk of size bytes, or 0.
// status says that base:allocation was agreed on.
func (r request) check(size int64, writable, status bool) uint32 {
	var allowed uint16
	if !writable && (r.kind == wire.CmdWrite || r.kind == wire.CmdTrim || r.kind == wire.CmdWriteZeroes) {
		return wire.EPERM
	}
	switch r.kind {
	case wire.CmdRead:
		allowed = wire.CmdFlagDF // without structured replies every read is in one piece anyway
	case wire.CmdWrite, wire.CmdTrim:
		allowed = wire.CmdFlagFUA
	case wire.CmdWriteZeroes:
		allowed = wire.CmdFlagFUA | wire.CmdFlagNoHole | wire.CmdFlagFastZero
	case wire.CmdBlockStatus:
		allowed = wire.CmdFlagReqOne
		if !status { // base:allocation was not agreed on
			return wire.EINVAL
		}
	case wire.CmdFlush:
		if r.off != 0 || r.length != 0 {
			return wire.EINVAL
		}
		return 0
	default:
		return wire.EINVAL
	}
	// FUA is legal, and means nothing, on commands that do not write.
	if r.flags&^(allowed|wire.CmdFlagFUA) != 0 {
		return wire.EINVAL
	}
	if (r.kind == wire.CmdRead || r.kind == wire.CmdWrite) && r.length > MaxRequest {
		return wire.EOVERFLOW
	}
	if r.length == 0 || r.off%SectorSize != 0 || r.length%SectorSize != 0 {
		return wire.EINVAL
	}
	if r.off > uint64(size) || uint64(r.length) > uint64(size)-r.off {
		if r.kind == wire.CmdWrite || r.kind == wire.CmdWriteZeroes {
			return wire.ENOSPC
		}
		return wire.EINVAL
	}
	return 0
}

func simpleReply(errno uint32, cookie uint64) []byte {
	b := make([]byte, 16)
	binary.BigEndian.PutUint32(b, wire.MagicSimple)
	binary.BigEndian.PutUint32(b[4:], errno)
	binary.BigEndian.PutUint64(b[8:], cookie)
	return b
}

// chunkHead is the head of a structured reply with n bytes of payload, the last of its request if done.
func chunkHead(kind uint16, cookie uint64, n int, done bool) []byte {
	b := make([]byte, 20, 32)
	binary.BigEndian.PutUint32(b, wire.MagicChunk)
	if done {
		binary.BigEndian.PutUint16(b[4:], wire.ChunkDone)
	}
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], uint32(n))
	return b
}

// metaQuery is a parsed LIST_META_CONTEXT or SET_META_CONTEXT.
type metaQuery struct {
	export  string
	queries []string
}

func parseMeta(b []byte) (metaQuery, error) {
	var q metaQuery
	next := func() (string, bool) {
		if len(b) < 4 {
			return "", false
		}
		n := binary.BigEndian.Uint32(b)
		if uint64(n) > uint64(len(b)-4) {
			return "", false
		}
		s := string(b[4 : 4+n])
		b = b[4+n:]
		return s, true
	}
	var ok bool
	if q.export, ok = next(); !ok || len(b) < 4 {
		return q, fmt.Errorf("%w: short meta context option", errProtocol)
	}
	count := binary.BigEndian.Uint32(b)
	b = b[4:]
	for range count {
		s, ok := next()
		if !ok {
			return q, fmt.Errorf("%w: short meta context query", errProtocol)
		}
		q.queries = append(q.queries, s)
	}
	if len(b) != 0 {
		return q, fmt.Errorf("%w: trailing bytes in meta context option", errProtocol)
	}
	return q, nil
}

// parseInfo reads the payload of INFO and GO: the export's name. The information requests are hints.
func parseInfo(b []byte) (string, error) {
	if len(b) < 6 {
		return "", fmt.Errorf("%w: short info option", errProtocol)
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n)+6 > uint64(len(b)) {
		return "", fmt.Errorf("%w: name longer than its option", errProtocol)
	}
	rest := b[4+n:]
	if len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return "", fmt.Errorf("%w: info requests do not fill their option", errProtocol)
	}
	return string(b[4 : 4+n]), nil
}
