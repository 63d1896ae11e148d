package image

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"unicode/utf16"
)

const sector = 512

// Types of partitions, as they stand on disk.
var (
	typeBIOSBoot = guid{0x48, 0x61, 0x68, 0x21, 0x49, 0x64, 0x6f, 0x6e, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49}
	typeEFI      = guid{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}
	typeLinux    = guid{0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}
)

type guid [16]byte

func newGUID() guid {
	var g guid
	_, _ = rand.Read(g[:]) // never fails
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

// partition is a range of bytes of a disk.
type partition struct {
	kind     guid
	name     string
	off, len int64
}

// Sizes of the partitions before the last.
const (
	biosBootAt  = 1 * mib
	biosBootLen = 1 * mib
	efiAt       = biosBootAt + biosBootLen
	efiLen      = 8 * mib
	rootAt      = efiAt + efiLen
	tailLen     = 1 * mib // holds the second copy of the table
)

func layout(size int64) []partition {
	return []partition{
		{typeBIOSBoot, "bios-boot", biosBootAt, biosBootLen},
		{typeEFI, "efi", efiAt, efiLen},
		{typeLinux, "root", rootAt, size - rootAt - tailLen},
	}
}

// Numbers of the GUID partition table.
const (
	gptEntries   = 128
	gptEntrySize = 128
	gptTable     = gptEntries * gptEntrySize / sector // sectors
	gptFirst     = 2 + gptTable                       // first sector for partitions
)

// writeGPT writes the protective boot record and both copies of the table.
func writeGPT(w io.WriterAt, size int64, parts []partition) error {
	last := size/sector - 1
	table := make([]byte, gptTable*sector)
	for i, p := range parts {
		e := table[i*gptEntrySize:]
		id := newGUID()
		copy(e, p.kind[:])
		copy(e[16:], id[:])
		binary.LittleEndian.PutUint64(e[32:], uint64(p.off/sector))
		binary.LittleEndian.PutUint64(e[40:], uint64((p.off+p.len)/sector-1))
		for j, c := range utf16.Encode([]rune(p.name)) {
			binary.LittleEndian.PutUint16(e[56+2*j:], c)
		}
	}
	disk := newGUID()
	header := func(at, other, tableAt int64) []byte {
		h := make([]byte, sector)
		copy(h, "EFI PART")
		binary.LittleEndian.PutUint32(h[8:], 0x00010000)
		binary.LittleEndian.PutUint32(h[12:], 92)
		binary.LittleEndian.PutUint64(h[24:], uint64(at))
		binary.LittleEndian.PutUint64(h[32:], uint64(other))
		binary.LittleEndian.PutUint64(h[40:], gptFirst)
		binary.LittleEndian.PutUint64(h[48:], uint64(last-gptTable-1))
		copy(h[56:], disk[:])
		binary.LittleEndian.PutUint64(h[72:], uint64(tableAt))
		binary.LittleEndian.PutUint32(h[80:], gptEntries)
		binary.LittleEndian.PutUint32(h[84:], gptEntrySize)
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(table))
		binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		return h
	}
	mbr := make([]byte, sector)
	entry := mbr[446:]
	entry[4] = 0xee
	copy(entry[1:4], []byte{0x00, 0x02, 0x00})
	copy(entry[5:8], []byte{0xff, 0xff, 0xff})
	binary.LittleEndian.PutUint32(entry[8:], 1)
	binary.LittleEndian.PutUint32(entry[12:], uint32(min(last, 0xffffffff)))
	mbr[510], mbr[511] = 0x55, 0xaa
	for _, x := range []struct {
		at int64
		b  []byte
	}{
		{0, mbr}, {1, header(1, last, 2)}, {2, table}, {last - gptTable, table}, {last, header(last, 1, last-gptTable)},
	} {
		if _, err := w.WriteAt(x.b, x.at*sector); err != nil {
			return fmt.Errorf("partition table: %w", err)
		}
	}
	return nil
}

// Where GRUB's first and second stage keep the sector of what follows them.
const (
	bootImgKernelSector = 0x5c  // 8 bytes: the sector of core.img
	bootImgDriveCheck   = 0x66  // 2 bytes: a jump that trusts the BIOS's drive number; two NOPs force its check
	bootImgCode         = 440   // bytes before the disk's signature and the partition table
	coreImgBlocklist    = 0x1f4 // 8 bytes: the sector after core.img's first
)

// writeGRUB puts boot.img into the boot sector and core.img into the BIOS boot
// partition and ties them together, which grub-bios-setup does on a mounted system.
func writeGRUB(w io.WriterAt, boot, core []byte, p partition) error {
	if len(boot) < sector || int64(len(core)) > p.len || len(core) < sector {
		return fmt.Errorf("GRUB: boot.img of %d and core.img of %d bytes do not fit", len(boot), len(core))
	}
	boot, core = bytes.Clone(boot[:bootImgCode]), bytes.Clone(core)
	at := uint64(p.off / sector)
	binary.LittleEndian.PutUint64(boot[bootImgKernelSector:], at)
	boot[bootImgDriveCheck], boot[bootImgDriveCheck+1] = 0x90, 0x90
	binary.LittleEndian.PutUint64(core[coreImgBlocklist:], at+1)
	if _, err := w.WriteAt(boot, 0); err != nil {
		return fmt.Errorf("GRUB's boot sector: %w", err)
	}
	if _, err := w.WriteAt(core, p.off); err != nil {
		return fmt.Errorf("GRUB's core: %w", err)
	}
	return nil
}

// copySparse writes a file's content at an offset and leaves out what is zero.
func copySparse(w io.WriterAt, at int64, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(f, buf)
		if n > 0 && !bytes.Equal(buf[:n], zero[:n]) {
			if _, err := w.WriteAt(buf[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
