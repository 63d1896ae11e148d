package hrl

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/google/uuid"
)

// Sizes of the format, in bytes ([MS-HRL] 2.2 to 2.4).
const (
	// HeaderSize is the size of the log file header.
	HeaderSize = 4096
	// DefaultMetadataSize is the size of a metadata block unless the creator chooses another.
	DefaultMetadataSize = 4096
	// MaxMetadataSize bounds what this package writes and reads; the specification names no bound.
	MaxMetadataSize = 1 << 20
	// MaxEntry is the largest data of one entry. Below it a DataChecksum cannot be zero, so zero can mean "none".
	MaxEntry = 16 << 20

	blockHeadSize = 32
	entrySize     = 32
	metadataUnit  = 512
)

// Version2 is the LogFormatVersion that this package writes and reads.
const Version2 = 0x00020000

// OpWrite is the only MetaOperation of the format: data was written.
const OpWrite = 1

// epoch is the zero of the format's 32-bit time stamps.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// Stamp converts a time to seconds since 2000-01-01 UTC, clamped to what 32 bits hold.
func Stamp(t time.Time) uint32 {
	return uint32(min(max(t.Unix()-epoch.Unix(), 0), math.MaxUint32))
}

// StampTime is the inverse of Stamp, in UTC.
func StampTime(s uint32) time.Time { return epoch.Add(time.Duration(s) * time.Second) }

// Header is the log file header (_CTLOG_HEADER_PACKED). Fields have the specification's names.
type Header struct {
	LogFormatVersion      uint32
	TimeStamp             uint32 // creation, see Stamp
	CreatorApplication    [4]byte
	CreatorVersion        uint32
	OriginalSize          uint64 // bytes
	CurrentSize           uint64 // bytes
	Checksum              uint32
	EOLLocation           uint64 // end of the log in the file, 0 while open
	ErrorCode             int32
	MetadataSize          uint32 // bytes of each metadata block
	UniqueID              uuid.UUID
	PreviousUniqueID      uuid.UUID
	LastModifiedTimeStamp uint32
	TotalMetadataEntries  uint64
	FileType              uint32
	Flags                 [2]byte
	Vhd2DataWriteGUID     uuid.UUID
}

const headerChecksumAt = 40

var cookie = [8]byte{'m', 's', 'c', 't', 'l', 'o', 'g'}

// encode writes the header with its checksum into p, which has HeaderSize bytes, and keeps the checksum.
func (h *Header) encode(p []byte) {
	clear(p)
	copy(p, cookie[:])
	le := binary.LittleEndian
	le.PutUint32(p[8:], h.LogFormatVersion)
	le.PutUint32(p[12:], h.TimeStamp)
	copy(p[16:], h.CreatorApplication[:])
	le.PutUint32(p[20:], h.CreatorVersion)
	le.PutUint64(p[24:], h.OriginalSize)
	le.PutUint64(p[32:], h.CurrentSize)
	le.PutUint64(p[44:], h.EOLLocation)
	le.PutUint32(p[52:], uint32(h.ErrorCode))
	le.PutUint32(p[56:], h.MetadataSize)
	putGUID(p[60:], h.UniqueID)
	putGUID(p[76:], h.PreviousUniqueID)
	le.PutUint32(p[92:], h.LastModifiedTimeStamp)
	le.PutUint64(p[96:], h.TotalMetadataEntries)
	le.PutUint32(p[104:], h.FileType)
	copy(p[108:], h.Flags[:])
	putGUID(p[110:], h.Vhd2DataWriteGUID)
	h.Checksum = checksumSkipping(p[:HeaderSize], headerChecksumAt)
	le.PutUint32(p[headerChecksumAt:], h.Checksum)
}

// decodeHeader reads and checks a header of HeaderSize bytes. Errors are ErrNotLog, ErrVersion or *CorruptError.
func decodeHeader(p []byte) (Header, error) {
	le := binary.LittleEndian
	// The published example prints the cookie padded with a blank; the text says seven characters in eight bytes.
	if [7]byte(p[:7]) != [7]byte(cookie[:7]) || (p[7] != 0 && p[7] != ' ') {
		return Header{}, ErrNotLog
	}
	h := Header{
		LogFormatVersion:      le.Uint32(p[8:]),
		TimeStamp:             le.Uint32(p[12:]),
		CreatorApplication:    [4]byte(p[16:20]),
		CreatorVersion:        le.Uint32(p[20:]),
		OriginalSize:          le.Uint64(p[24:]),
		CurrentSize:           le.Uint64(p[32:]),
		Checksum:              le.Uint32(p[headerChecksumAt:]),
		EOLLocation:           le.Uint64(p[44:]),
		ErrorCode:             int32(le.Uint32(p[52:])),
		MetadataSize:          le.Uint32(p[56:]),
		UniqueID:              getGUID(p[60:]),
		PreviousUniqueID:      getGUID(p[76:]),
		LastModifiedTimeStamp: le.Uint32(p[92:]),
		TotalMetadataEntries:  le.Uint64(p[96:]),
		FileType:              le.Uint32(p[104:]),
		Flags:                 [2]byte(p[108:110]),
		Vhd2DataWriteGUID:     getGUID(p[110:]),
	}
	bad := func(format string, args ...any) (Header, error) {
		return h, &CorruptError{Part: PartHeader, Block: -1, Entry: -1, Reason: fmt.Sprintf(format, args...)}
	}
	if want := checksumSkipping(p[:HeaderSize], headerChecksumAt); want != h.Checksum {
		return bad("checksum is %d, its bytes give %d", h.Checksum, want)
	}
	if h.LogFormatVersion != Version2 {
		return h, fmt.Errorf("%w: %#08x", ErrVersion, h.LogFormatVersion)
	}
	if h.FileType != 0 {
		return bad("file type is %d, not 0", h.FileType)
	}
	if err := checkMetadataSize(h.MetadataSize); err != nil {
		return bad("%v", err)
	}
	return h, nil
}

func checkMetadataSize(n uint32) error {
	if n == 0 || n%metadataUnit != 0 || n > MaxMetadataSize {
		return fmt.Errorf("metadata size %d is not a multiple of %d up to %d", n, metadataUnit, MaxMetadataSize)
	}
	return nil
}

// blockHead is a metadata header (_CTLOG_METADATA_HEADER_PACKED).
type blockHead struct {
	prev     uint64
	valid    uint32
	checksum uint32
}

const blockChecksumAt = 12

func (b blockHead) encode(p []byte) {
	clear(p[:blockHeadSize])
	binary.LittleEndian.PutUint64(p, b.prev)
	binary.LittleEndian.PutUint32(p[8:], b.valid)
	binary.LittleEndian.PutUint32(p[blockChecksumAt:], checksumSkipping(p[:blockHeadSize], blockChecksumAt))
}

// decodeBlockHead reads the head of a block; why is not empty if it cannot be one.
func decodeBlockHead(p []byte, slots int) (b blockHead, why string) {
	b = blockHead{
		prev:     binary.LittleEndian.Uint64(p),
		valid:    binary.LittleEndian.Uint32(p[8:]),
		checksum: binary.LittleEndian.Uint32(p[blockChecksumAt:]),
	}
	if want := checksumSkipping(p[:blockHeadSize], blockChecksumAt); want != b.checksum {
		return b, fmt.Sprintf("checksum is %d, its bytes give %d", b.checksum, want)
	}
	if uint64(b.valid) > uint64(slots) {
		return b, fmt.Sprintf("%d valid entries in a block of %d", b.valid, slots)
	}
	return b, ""
}

// Entry is one write of data (_CTLOG_METADATA_ENTRY_PACKED) and the place of its data in the log file.
type Entry struct {
	// ByteOffset is where on the virtual disk the data was written, in bytes.
	ByteOffset uint64
	// Checksum is the stored checksum of the entry's own 32 bytes.
	Checksum uint32
	// DataLength is the length of the data, in bytes.
	DataLength uint32
	// TimeStamp is the time of the write, see StampTime.
	TimeStamp uint32
	// MetaOperation is OpWrite.
	MetaOperation uint8
	// DataChecksum is the Checksum of the data, or 0 if the writer did not compute one (as Hyper-V does not).
	DataChecksum uint32
	// Location is 0.
	Location uint8
	// FilePosition is where in the log file the data begins, in bytes. It follows from the order of the entries
	// and is not stored.
	FilePosition int64
}

const entryChecksumAt = 8

// encode writes the entry with its checksum into p, which has entrySize bytes.
func (e *Entry) encode(p []byte) {
	le := binary.LittleEndian
	clear(p[:entrySize])
	le.PutUint64(p, e.ByteOffset)
	le.PutUint32(p[12:], e.DataLength)
	le.PutUint32(p[16:], e.TimeStamp)
	p[20] = e.MetaOperation
	le.PutUint32(p[21:], e.DataChecksum)
	p[25] = e.Location
	e.Checksum = checksumSkipping(p[:entrySize], entryChecksumAt)
	le.PutUint32(p[entryChecksumAt:], e.Checksum)
}

// decodeEntry reads an entry; why is not empty if it is not valid.
func decodeEntry(p []byte) (e Entry, why string) {
	le := binary.LittleEndian
	e = Entry{
		ByteOffset:    le.Uint64(p),
		Checksum:      le.Uint32(p[entryChecksumAt:]),
		DataLength:    le.Uint32(p[12:]),
		TimeStamp:     le.Uint32(p[16:]),
		MetaOperation: p[20],
		DataChecksum:  le.Uint32(p[21:]),
		Location:      p[25],
	}
	switch want := checksumSkipping(p[:entrySize], entryChecksumAt); {
	case want != e.Checksum:
		return e, fmt.Sprintf("checksum is %d, its bytes give %d", e.Checksum, want)
	case e.MetaOperation != OpWrite:
		return e, fmt.Sprintf("meta operation is %d, not %d", e.MetaOperation, OpWrite)
	case e.DataLength == 0:
		return e, "data length is 0"
	case e.ByteOffset > math.MaxInt64-uint64(e.DataLength):
		return e, fmt.Sprintf("byte offset %d is beyond any disk", e.ByteOffset)
	}
	return e, ""
}

// slotsOf returns how many entries fit in a metadata block.
func slotsOf(metadataSize int) int { return (metadataSize - blockHeadSize) / entrySize }

// putGUID stores an id as Windows does: the first three fields little-endian, the last eight bytes as printed.
func putGUID(p []byte, id uuid.UUID) {
	p[0], p[1], p[2], p[3] = id[3], id[2], id[1], id[0]
	p[4], p[5] = id[5], id[4]
	p[6], p[7] = id[7], id[6]
	copy(p[8:16], id[8:])
}

// getGUID is the inverse of putGUID.
func getGUID(p []byte) (id uuid.UUID) {
	putGUID(id[:], uuid.UUID(p[:16]))
	return id
}
