package extent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Errors of Set.UnmarshalBinary.
var (
	// ErrFormat means that the bytes are not an encoded Set of a known version, or break its rules.
	ErrFormat = errors.New("extent: not a valid encoded set")
	// ErrChecksum means that the bytes were a Set once and have changed since.
	ErrChecksum = errors.New("extent: checksum mismatch")
)

// The encoding of a Set, version 1:
//
//	"LFXS"  magic
//	u8      version, 1
//	uvarint number of ranges n
//	n times uvarint gap since the end of the previous range (0 at first), uvarint length
//	u32     CRC-32C of everything before, little-endian
//
// Gaps after the first and all lengths are at least 1, so each set has exactly one encoding.
const (
	setMagic   = "LFXS"
	setVersion = 1
	crcSize    = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// AppendBinary appends the encoded set to b. The error is always nil; it is there for encoding.BinaryAppender.
func (s *Set) AppendBinary(b []byte) ([]byte, error) {
	start := len(b)
	b = append(b, setMagic...)
	b = append(b, setVersion)
	b = binary.AppendUvarint(b, uint64(s.Len()))
	var at int64
	for r := range s.All() {
		b = binary.AppendUvarint(b, uint64(r.Off-at))
		b = binary.AppendUvarint(b, uint64(r.Len))
		at = r.End()
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli)), nil
}

// MarshalBinary returns the encoded set, about 4 to 8 bytes per range. The error is always nil.
func (s *Set) MarshalBinary() ([]byte, error) { return s.AppendBinary(nil) }

// UnmarshalBinary replaces the set by the encoded one. The set is unchanged on error, which is ErrChecksum or
// ErrFormat. Memory is bounded by the length of data.
func (s *Set) UnmarshalBinary(data []byte) error {
	const head = len(setMagic) + 1
	if len(data) < head+1+crcSize || string(data[:len(setMagic)]) != setMagic {
		return fmt.Errorf("%w: no magic in %d bytes", ErrFormat, len(data))
	}
	body, sum := data[:len(data)-crcSize], binary.LittleEndian.Uint32(data[len(data)-crcSize:])
	if crc32.Checksum(body, castagnoli) != sum {
		return ErrChecksum
	}
	if v := body[len(setMagic)]; v != setVersion {
		return fmt.Errorf("%w: version %d", ErrFormat, v)
	}
	body = body[head:]
	count, body, ok := cutUvarint(body)
	if !ok || count > uint64(len(body)/2) {
		return fmt.Errorf("%w: bad count", ErrFormat)
	}
	var out Set
	var at int64
	for i := range count {
		var gap, length uint64
		if gap, body, ok = cutUvarint(body); !ok {
			return fmt.Errorf("%w: range %d cut short", ErrFormat, i)
		}
		if length, body, ok = cutUvarint(body); !ok {
			return fmt.Errorf("%w: range %d cut short", ErrFormat, i)
		}
		r := Range{Off: at + int64(gap), Len: int64(length)}
		if int64(gap) < 0 || r.Off < at || !r.Valid() || r.Empty() || (gap == 0 && i > 0) {
			return fmt.Errorf("%w: range %d is {gap %d, length %d}", ErrFormat, i, gap, length)
		}
		out.m.Load(r.Off, r.End())
		out.bytes += r.Len
		at = r.End()
	}
	if len(body) != 0 {
		return fmt.Errorf("%w: %d bytes left over", ErrFormat, len(body))
	}
	*s = out
	return nil
}

func cutUvarint(b []byte) (uint64, []byte, bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, b, false
	}
	return v, b[n:], true
}
