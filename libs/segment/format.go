package segment

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Version of the format that this package writes, and the only one it reads.
const Version = 1

// Sizes of the format and its bounds.
const (
	// FrameSize is the size of a frame's raw data, in bytes; only the last frame is shorter.
	FrameSize = 64 << 10
	// MaxSize bounds a stored segment, in bytes.
	MaxSize = 64 << 20
	// DefaultTarget is the stored size at which a Writer says it is full, in bytes.
	DefaultTarget = 32 << 20
	// MaxTarget is the largest Options.Target: one more Data call still stays below MaxSize.
	MaxTarget = 56 << 20
	// MaxData is the longest p of one Data call, in bytes.
	MaxData = 4 << 20
	// MaxExtents bounds the index.
	MaxExtents = 1 << 16
	// Sector is the alignment of everything, in bytes.
	Sector = 512
	// zeroBlock is the unit in which zeros inside data are found.
	zeroBlock = 4 << 10
	// zeroGap: a run of zeros between data shorter than this stays data. An applier pays a request per cleared range
	// and per write; one longer write of compressed zeros is cheaper than three requests.
	zeroGap = 32 << 10

	headerSize = 192
	footerSize = 64
	maxDiskID  = 64
	// maxFrames follows from MaxSize only for raw data; compressed zeros pack tighter, so it is bounded by itself.
	maxFrames = 1 << 16
)

var (
	headMagic = [4]byte{'L', 'F', 'S', 'G'}
	footMagic = [4]byte{'L', 'F', 'S', 'E'}
	le        = binary.LittleEndian
	castag    = crc32.MakeTable(crc32.Castagnoli)
)

// Errors of this package.
var (
	// ErrCorrupt: the bytes are not a whole, intact segment of this version.
	ErrCorrupt = errors.New("segment is corrupt")
	// ErrInvalid: the caller broke a rule: order, alignment, bounds.
	ErrInvalid = errors.New("invalid segment request")
	// ErrDamaged: data is not what its source checksummed beside the disk. Read it again.
	ErrDamaged = errors.New("data does not have its source's checksum")
)

// Kind says what numbers a segment's ordinal.
type Kind uint8

// The kinds of segments.
const (
	KindPoint  Kind = 1 // changes of a point
	KindPass   Kind = 2 // ranges of a pass
	KindRewind Kind = 3 // content of an earlier point
)

// Header says whose changes a segment holds.
type Header struct {
	// Lineage is the UUID of the lineage.
	Lineage [16]byte
	// DiskID is 1 to 64 bytes.
	DiskID string
	// Gen is the disk's generation, from 1.
	Gen uint32
	// DiskSize is the virtual size in bytes.
	DiskSize int64
	Kind     Kind
	// Ordinal of the point or pass; for a rewind, its target.
	Ordinal uint64
	// Task is the number of the pass's task, from 1; 0 for other kinds.
	Task uint32
}

func (h *Header) validate() error {
	switch {
	case h.DiskID == "" || len(h.DiskID) > maxDiskID:
		return fmt.Errorf("disk id of %d bytes: %w", len(h.DiskID), ErrInvalid)
	case h.Gen == 0:
		return fmt.Errorf("generation 0: %w", ErrInvalid)
	case h.DiskSize <= 0 || h.DiskSize%Sector != 0:
		return fmt.Errorf("disk size %d: %w", h.DiskSize, ErrInvalid)
	case h.Kind < KindPoint || h.Kind > KindRewind || (h.Kind == KindPass) != (h.Task != 0):
		return fmt.Errorf("kind %d with task %d: %w", h.Kind, h.Task, ErrInvalid)
	}
	return nil
}

// encode: magic 0, version 4, size 6, lineage 8, disk size 24, ordinal 32, gen 40, task 44, kind 48, id length 49,
// id 52..116, zero to 188, CRC32C of the first 188 bytes at 188.
func (h *Header) encode() (b [headerSize]byte) {
	copy(b[0:], headMagic[:])
	le.PutUint16(b[4:], Version)
	le.PutUint16(b[6:], headerSize)
	copy(b[8:], h.Lineage[:])
	le.PutUint64(b[24:], uint64(h.DiskSize))
	le.PutUint64(b[32:], h.Ordinal)
	le.PutUint32(b[40:], h.Gen)
	le.PutUint32(b[44:], h.Task)
	b[48] = byte(h.Kind)
	b[49] = byte(len(h.DiskID))
	copy(b[52:], h.DiskID)
	le.PutUint32(b[188:], crc32.Checksum(b[:188], castag))
	return b
}

func decodeHeader(b []byte) (Header, error) {
	var h Header
	switch {
	case len(b) < headerSize || [4]byte(b[:4]) != headMagic:
		return h, fmt.Errorf("header: no magic: %w", ErrCorrupt)
	case le.Uint16(b[4:]) != Version:
		return h, fmt.Errorf("header: version %d: %w", le.Uint16(b[4:]), ErrCorrupt)
	case le.Uint16(b[6:]) != headerSize, le.Uint32(b[188:]) != crc32.Checksum(b[:188], castag):
		return h, fmt.Errorf("header: checksum: %w", ErrCorrupt)
	case b[49] > maxDiskID:
		return h, fmt.Errorf("header: disk id of %d bytes: %w", b[49], ErrCorrupt)
	}
	h = Header{Lineage: [16]byte(b[8:24]), DiskSize: int64(le.Uint64(b[24:])), Ordinal: le.Uint64(b[32:]),
		Gen: le.Uint32(b[40:]), Task: le.Uint32(b[44:]), Kind: Kind(b[48]), DiskID: string(b[52 : 52+int(b[49])])}
	if err := h.validate(); err != nil {
		return h, fmt.Errorf("header: %w: %w", ErrCorrupt, err)
	}
	if h.encode() != [headerSize]byte(b[:headerSize]) {
		return h, fmt.Errorf("header: bytes that should be zero: %w", ErrCorrupt)
	}
	return h, nil
}

// Codec is how a frame's data is stored.
type Codec uint8

// The codecs of a frame.
const (
	codecRaw  Codec = 0
	codecS2   Codec = 1
	codecZstd Codec = 2
)

// frame is one entry of the frame table: 8 bytes, stored length and codec, CRC32C of the raw data.
type frame struct {
	off    int64 // of the stored bytes in the object
	stored uint32
	crc    uint32
	codec  Codec
}

// Extent is one range of the disk. Pos is where its data begins in the segment's data stream (the concatenation
// of all data extents); it is meaningless for zeros.
type Extent struct {
	Off, Len int64
	Pos      int64
	Zero     bool
}

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }
