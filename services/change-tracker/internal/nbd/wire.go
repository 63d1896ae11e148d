package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Numbers of the protocol (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
const (
	magicServer  = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption  = 0x49484156454f5054 // "IHAVEOPT"
	magicReply   = 0x0003e889045565a9
	magicRequest = 0x25609513
	magicSimple  = 0x67446698
	magicChunk   = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10

	repAck     = 1
	repServer  = 2
	repInfo    = 3
	repMeta    = 4
	repErr     = 1 << 31
	errUnsup   = repErr + 1
	errPolicy  = repErr + 2
	errInvalid = repErr + 3
	errUnknown = repErr + 6
	errTooBig  = repErr + 9

	infoExport    = 0
	infoBlockSize = 3

	// transmission flags of every export: has-flags, flush, FUA, trim, write-zeroes, multi-conn
	exportFlags  = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8
	flagDF       = 1 << 7  // only with structured replies
	flagFastZero = 1 << 11 // only for a disk that is a FastZeroer

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4

	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1

	stateHoleZero = 1<<0 | 1<<1

	errIO       = 5
	errInval    = 22
	errNoSpace  = 28
	errOverflow = 75
	errNotSup   = 95
	errShutdown = 108

	requestSize = 28
	contextID   = 1
	contextName = "base:allocation"
)

// Bounds.
const (
	// SectorSize is the smallest block, in bytes: every request is whole sectors.
	SectorSize = 512
	// MaxRequest is the largest payload of a request, in bytes.
	MaxRequest = 32 << 20
	// maxDiscard is the largest payload that is read only to be refused, in bytes; beyond it the client is cut off.
	maxDiscard = 2 * MaxRequest
	maxName    = 4096 // of an export, as the protocol has it
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

func parseRequest(b *[requestSize]byte) (request, error) {
	if m := binary.BigEndian.Uint32(b[:]); m != magicRequest {
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
func (r request) check(size int64, status bool) uint32 {
	var allowed uint16
	switch r.kind {
	case cmdRead:
		allowed = cmdFlagDF // without structured replies every read is in one piece anyway
	case cmdWrite, cmdTrim:
		allowed = cmdFlagFUA
	case cmdWriteZeroes:
		allowed = cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		allowed = cmdFlagReqOne
		if !status { // base:allocation was not agreed on
			return errInval
		}
	case cmdFlush:
		if r.off != 0 || r.length != 0 {
			return errInval
		}
		return 0
	default:
		return errInval
	}
	// FUA is legal, and means nothing, on commands that do not write.
	if r.flags&^(allowed|cmdFlagFUA) != 0 {
		return errInval
	}
	if (r.kind == cmdRead || r.kind == cmdWrite) && r.length > MaxRequest {
		return errOverflow
	}
	if r.length == 0 || r.off%SectorSize != 0 || r.length%SectorSize != 0 {
		return errInval
	}
	if r.off > uint64(size) || uint64(r.length) > uint64(size)-r.off {
		if r.kind == cmdWrite || r.kind == cmdWriteZeroes {
			return errNoSpace
		}
		return errInval
	}
	return 0
}

func simpleReply(errno uint32, cookie uint64) []byte {
	b := make([]byte, 16)
	binary.BigEndian.PutUint32(b, magicSimple)
	binary.BigEndian.PutUint32(b[4:], errno)
	binary.BigEndian.PutUint64(b[8:], cookie)
	return b
}

// chunkHead is the head of a structured reply with n bytes of payload, the last of its request if done.
func chunkHead(kind uint16, cookie uint64, n int, done bool) []byte {
	b := make([]byte, 20, 32)
	binary.BigEndian.PutUint32(b, magicChunk)
	if done {
		binary.BigEndian.PutUint16(b[4:], chunkDone)
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
