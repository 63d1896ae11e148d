package vdisk

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// Sizes, in bytes.
const (
	// SectorSize is the unit of every image.
	SectorSize = 512
	// FooterSize is the size of a VHD footer, which follows the last byte of the disk.
	FooterSize = 512
	// Alignment is what Azure wants the virtual size to be a multiple of.
	Alignment = 1 << 20
	// MaxVHDSize is the largest virtual size of a VHD (2,040 GiB), a limit of Hyper-V, QEMU and the format's tools.
	MaxVHDSize = 2040 << 30
)

// DiskType is the kind of a VHD.
type DiskType uint32

// The kinds of VHD. Only fixed ones are supported.
const (
	TypeFixed        DiskType = 2
	TypeDynamic      DiskType = 3
	TypeDifferencing DiskType = 4
)

// String names the type.
func (t DiskType) String() string {
	switch t {
	case TypeFixed:
		return "fixed"
	case TypeDynamic:
		return "dynamic"
	case TypeDifferencing:
		return "differencing"
	default:
		return fmt.Sprintf("type %d", uint32(t))
	}
}

// Geometry is the cylinders, heads and sectors that the format wants for old BIOSes. Its product may be smaller than
// the disk.
type Geometry struct {
	Cylinders uint16
	Heads     uint8
	Sectors   uint8 // per track
}

// Footer is what Landfall uses of a VHD footer.
type Footer struct {
	// Type is the kind of disk.
	Type DiskType
	// OriginalSize and CurrentSize are the virtual size in bytes, when the disk was made and now.
	OriginalSize, CurrentSize int64
	// Geometry follows from CurrentSize.
	Geometry Geometry
	// UniqueID identifies the disk.
	UniqueID uuid.UUID
	// Created is when the disk was made, in whole seconds, UTC.
	Created time.Time
	// Creator is the application that wrote the footer. QEMU believes CurrentSize only of some creators, "win " (as
	// Hyper-V writes) among them, so that is what we write.
	Creator [4]byte
}

const (
	footerCookie     = "conectix"
	footerFeatures   = 2 // reserved bit, always set
	footerVersion    = 0x00010000
	fixedDataOffset  = ^uint64(0)
	footerChecksumAt = 64
	creatorVersion   = 0x000A0000
	creatorHost      = "Wi2k"
)

var footerEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// NewFooter makes the footer of a fixed VHD of size bytes. Errors: ErrSectorSize, ErrTooLarge. It does not ask for
// Alignment; Create does.
func NewFooter(size int64, id uuid.UUID, created time.Time) (Footer, error) {
	if err := checkVHDSize(size); err != nil {
		return Footer{}, err
	}
	return Footer{
		Type:         TypeFixed,
		OriginalSize: size,
		CurrentSize:  size,
		Geometry:     GeometryOf(size),
		UniqueID:     id,
		Created:      created.UTC().Truncate(time.Second),
		Creator:      [4]byte{'w', 'i', 'n', ' '},
	}, nil
}

// Bytes returns the footer as it lies on disk, with its checksum.
func (f Footer) Bytes() [FooterSize]byte {
	var p [FooterSize]byte
	be := binary.BigEndian
	copy(p[:], footerCookie)
	be.PutUint32(p[8:], footerFeatures)
	be.PutUint32(p[12:], footerVersion)
	be.PutUint64(p[16:], fixedDataOffset)
	be.PutUint32(p[24:], uint32(max(f.Created.Unix()-footerEpoch.Unix(), 0)))
	copy(p[28:32], f.Creator[:])
	be.PutUint32(p[32:], creatorVersion)
	copy(p[36:40], creatorHost)
	be.PutUint64(p[40:], uint64(f.OriginalSize))
	be.PutUint64(p[48:], uint64(f.CurrentSize))
	be.PutUint16(p[56:], f.Geometry.Cylinders)
	p[58], p[59] = f.Geometry.Heads, f.Geometry.Sectors
	be.PutUint32(p[60:], uint32(f.Type))
	copy(p[68:84], f.UniqueID[:])
	be.PutUint32(p[footerChecksumAt:], footerChecksum(p[:]))
	return p
}

// ParseFooter reads a footer of FooterSize bytes. Errors: ErrTruncated if p is shorter or has no cookie (a file that
// was cut does not end in a footer), ErrBadFooter, ErrSectorSize, ErrTooLarge. A type other than fixed is returned
// without error; Open refuses it.
func ParseFooter(p []byte) (Footer, error) {
	if len(p) < FooterSize {
		return Footer{}, fmt.Errorf("%w: %d bytes are no footer", ErrTruncated, len(p))
	}
	p = p[:FooterSize]
	if string(p[:len(footerCookie)]) != footerCookie {
		return Footer{}, fmt.Errorf("%w: no VHD footer at its end", ErrTruncated)
	}
	be := binary.BigEndian
	if have, want := be.Uint32(p[footerChecksumAt:]), footerChecksum(p); have != want {
		return Footer{}, fmt.Errorf("%w: checksum is %#08x, its bytes give %#08x", ErrBadFooter, have, want)
	}
	if v := be.Uint32(p[12:]); v>>16 != footerVersion>>16 {
		return Footer{}, fmt.Errorf("%w: version %#08x", ErrBadFooter, v)
	}
	f := Footer{
		Type:         DiskType(be.Uint32(p[60:])),
		OriginalSize: int64(be.Uint64(p[40:])),
		CurrentSize:  int64(be.Uint64(p[48:])),
		Geometry:     Geometry{Cylinders: be.Uint16(p[56:]), Heads: p[58], Sectors: p[59]},
		UniqueID:     uuid.UUID(p[68:84]),
		Created:      footerEpoch.Add(time.Duration(be.Uint32(p[24:])) * time.Second),
		Creator:      [4]byte(p[28:32]),
	}
	if f.Type != TypeFixed {
		return f, nil
	}
	if off := be.Uint64(p[16:]); off != fixedDataOffset {
		return Footer{}, fmt.Errorf("%w: fixed disk with data offset %#x", ErrBadFooter, off)
	}
	if err := checkVHDSize(f.CurrentSize); err != nil {
		return Footer{}, err
	}
	return f, nil
}

// footerChecksum is the one's complement of the sum of the bytes without the checksum itself.
func footerChecksum(p []byte) uint32 {
	var sum uint32
	for i, b := range p {
		if i < footerChecksumAt || i >= footerChecksumAt+4 {
			sum += uint32(b)
		}
	}
	return ^sum
}

func checkVHDSize(size int64) error {
	switch {
	case size <= 0 || size > MaxVHDSize:
		return fmt.Errorf("%w: %d bytes in a VHD (at most %d)", ErrTooLarge, size, int64(MaxVHDSize))
	case size%SectorSize != 0:
		return fmt.Errorf("%w: %d", ErrSectorSize, size)
	}
	return nil
}

// GeometryOf computes the geometry of a disk of size bytes by the rule in the appendix of the VHD specification.
func GeometryOf(size int64) Geometry {
	sectors := min(size/SectorSize, 65535*16*255)
	var perTrack, heads, tracks int64 // tracks = cylinders * heads
	if sectors >= 65535*16*63 {
		perTrack, heads = 255, 16
		tracks = sectors / perTrack
	} else {
		perTrack = 17
		tracks = sectors / perTrack
		heads = max((tracks+1023)/1024, 4)
		if tracks >= heads*1024 || heads > 16 {
			perTrack, heads = 31, 16
			tracks = sectors / perTrack
		}
		if tracks >= heads*1024 {
			perTrack, heads = 63, 16
			tracks = sectors / perTrack
		}
	}
	return Geometry{Cylinders: uint16(tracks / heads), Heads: uint8(heads), Sectors: uint8(perTrack)}
}

// Pad returns size rounded up to Alignment, and how many bytes that adds.
func Pad(size int64) (padded, padding int64) {
	padding = (Alignment - size%Alignment) % Alignment
	return size + padding, padding
}
