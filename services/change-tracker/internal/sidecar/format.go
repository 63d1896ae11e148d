package sidecar

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Sizes of the format, in bytes. docs/formats/sidecar.md is their specification.
const (
	// ExtentSize is the size of one extent of the disk.
	ExtentSize = 1 << 20
	headerSize = 4096
	sectorSize = 512
	perSector  = 504 // extents described by one sector
	version    = 1
)

// magic begins every sidecar.
const magic = "LFTRKEXT"

// Flag is a set of marks of one extent.
type Flag uint8

// The marks. The rest of the byte is zero.
const (
	// Hot: written since the last flush, or held by a log that no open point names.
	Hot Flag = 1 << iota
	// Dirty: changed, and no log has the data. A pass must read it.
	Dirty
	// Pass: belongs to the open pass of the VM record, and counts as Dirty if there is none.
	Pass
)

var (
	// ErrCorrupt: the header is not that of a sidecar of this disk. Damaged sectors are no error: they read as Dirty.
	ErrCorrupt = errors.New("sidecar is corrupt")
	// ErrVersion: the sidecar was written by a newer program.
	ErrVersion = errors.New("sidecar has an unknown version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Extents returns how many extents a disk of size bytes has.
func Extents(size int64) int { return int((size + ExtentSize - 1) / ExtentSize) }

func sectors(extents int) int { return (extents + perSector - 1) / perSector }

// FileSize is the size of the sidecar of a disk of size bytes, in bytes. It never changes.
func FileSize(size int64) int64 {
	return headerSize + int64(sectors(Extents(size)))*sectorSize
}

func encodeHeader(size int64, lineage [16]byte) []byte {
	b := make([]byte, headerSize)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], ExtentSize)
	binary.LittleEndian.PutUint64(b[16:], uint64(size))
	copy(b[24:40], lineage[:])
	binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], castagnoli))
	return b
}

func decodeHeader(b []byte, size int64, lineage [16]byte) error {
	if len(b) < headerSize || string(b[:8]) != magic {
		return fmt.Errorf("%w: no magic", ErrCorrupt)
	}
	if binary.LittleEndian.Uint32(b[508:]) != crc32.Checksum(b[:508], castagnoli) {
		return fmt.Errorf("%w: header checksum", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != version {
		return fmt.Errorf("%w: %d", ErrVersion, v)
	}
	if e := binary.LittleEndian.Uint32(b[12:]); e != ExtentSize {
		return fmt.Errorf("%w: extents of %d bytes", ErrVersion, e)
	}
	if s := int64(binary.LittleEndian.Uint64(b[16:])); s != size {
		return fmt.Errorf("%w: made for a disk of %d bytes, not %d", ErrCorrupt, s, size)
	}
	if [16]byte(b[24:40]) != lineage {
		return fmt.Errorf("%w: made for another lineage", ErrCorrupt)
	}
	return nil
}

// encodeSector writes sector i with the marks of its extents into b, of sectorSize bytes.
func encodeSector(b []byte, i int, marks []Flag) {
	clear(b[:sectorSize])
	for j, m := range marks {
		b[j] = byte(m)
	}
	binary.LittleEndian.PutUint32(b[504:], uint32(i))
	binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], castagnoli))
}

// decodeSector reads sector i into marks. A damaged sector marks all of its extents Dirty and reports false.
func decodeSector(b []byte, i int, marks []Flag) bool {
	ok := binary.LittleEndian.Uint32(b[504:]) == uint32(i) &&
		binary.LittleEndian.Uint32(b[508:]) == crc32.Checksum(b[:508], castagnoli)
	for j := range marks {
		if f := Flag(b[j]); ok && f&^(Hot|Dirty|Pass) == 0 {
			marks[j] = f
		} else {
			marks[j] = Dirty
		}
	}
	return ok
}
