package segment

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sort"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// tailGuess is read at once from the end: footer and, nearly always, the whole index.
const tailGuess = 64 << 10

// Index is a segment's header, extents and frame table in memory: at most about 4 MiB. It is immutable.
type Index struct {
	Header  Header
	Extents []Extent
	frames  []frame
	data    int64 // raw bytes
	bytes   int64 // memory used, roughly
}

// DataBytes is the number of raw bytes of the data extents.
func (ix *Index) DataBytes() int64 { return ix.data }

// MemoryBytes is roughly what the index occupies.
func (ix *Index) MemoryBytes() int64 { return ix.bytes }

// ReadIndex reads and verifies the index of a segment of size bytes, usually in one read of the tail. Any damage to
// index, footer or the structure they describe is ErrCorrupt; data is verified when it is read.
func ReadIndex(r io.ReaderAt, size int64) (*Index, error) {
	if size < 2*headerSize+footerSize || size > MaxSize {
		return nil, fmt.Errorf("segment of %d bytes: %w", size, ErrCorrupt)
	}
	tail := make([]byte, min(size, tailGuess))
	if err := readFull(r, tail, size-int64(len(tail))); err != nil {
		return nil, err
	}
	foot := tail[len(tail)-footerSize:]
	if [4]byte(foot[:4]) != footMagic || le.Uint16(foot[4:]) != Version || le.Uint32(foot[60:]) != crc32.Checksum(foot[:60], castag) {
		return nil, fmt.Errorf("segment footer: %w", ErrCorrupt)
	}
	off, n := le.Uint64(foot[8:]), int64(le.Uint32(foot[16:]))
	if off < headerSize || off > uint64(size) || int64(off)+n != size-footerSize || n < headerSize {
		return nil, fmt.Errorf("segment index at %d, %d bytes: %w", off, n, ErrCorrupt)
	}
	raw := tail[:len(tail)-footerSize]
	if n > int64(len(raw)) {
		raw = make([]byte, n)
		if err := readFull(r, raw, int64(off)); err != nil {
			return nil, err
		}
	} else {
		raw = raw[int64(len(raw))-n:]
	}
	if crc32.Checksum(raw, castag) != le.Uint32(foot[28:]) {
		return nil, fmt.Errorf("segment index checksum: %w", ErrCorrupt)
	}
	return parseIndex(raw, int64(off), le.Uint32(foot[20:]), le.Uint32(foot[24:]), le.Uint64(foot[32:]))
}

func parseIndex(raw []byte, indexOff int64, extents, frames uint32, data uint64) (*Index, error) {
	h, err := decodeHeader(raw)
	if err != nil {
		return nil, err
	}
	raw = raw[headerSize:]
	if extents == 0 || extents > MaxExtents || frames > maxFrames || int64(len(raw)) < int64(frames)*8+2*int64(extents) ||
		data > uint64(frames)*FrameSize || (data+FrameSize-1)/FrameSize != uint64(frames) {
		return nil, fmt.Errorf("segment index: %d extents, %d frames, %d bytes of data: %w", extents, frames, data, ErrCorrupt)
	}
	ix := &Index{Header: h, data: int64(data), frames: make([]frame, frames), Extents: make([]Extent, extents)}
	ix.bytes = int64(frames)*24 + int64(extents)*32 + 256
	at := int64(headerSize)
	for i := range ix.frames {
		word := le.Uint32(raw)
		f := frame{off: at, stored: word & 0xffffff, codec: Codec(word >> 24), crc: le.Uint32(raw[4:])}
		want := ix.rawLen(i)
		if f.codec > codecZstd || f.stored == 0 || int(f.stored) > want || f.codec == codecRaw && int(f.stored) != want {
			return nil, fmt.Errorf("segment frame %d: %d bytes, codec %d: %w", i, f.stored, f.codec, ErrCorrupt)
		}
		at += int64(f.stored)
		ix.frames[i] = f
		raw = raw[8:]
	}
	if at != indexOff {
		return nil, fmt.Errorf("segment frames end at %d, index begins at %d: %w", at, indexOff, ErrCorrupt)
	}
	return ix, ix.parseExtents(raw)
}

func (ix *Index) parseExtents(raw []byte) error {
	var end, pos int64
	next := func() (int64, error) {
		v, n := binary.Uvarint(raw)
		if n <= 0 || v > 1<<54 {
			return 0, fmt.Errorf("segment extents: bad number: %w", ErrCorrupt)
		}
		raw = raw[n:]
		return int64(v), nil
	}
	for i := range ix.Extents {
		gap, err := next()
		if err != nil {
			return err
		}
		word, err := next()
		if err != nil {
			return err
		}
		length := word >> 1
		if gap > ix.Header.DiskSize/Sector || length == 0 || length > ix.Header.DiskSize/Sector {
			return fmt.Errorf("segment extent %d: outside the disk: %w", i, ErrCorrupt)
		}
		e := Extent{Off: end + gap*Sector, Len: length * Sector, Zero: word&1 == 1}
		if !e.Zero {
			e.Pos = pos
			pos += e.Len
		}
		end = e.End()
		if end > ix.Header.DiskSize || pos > ix.data {
			return fmt.Errorf("segment extent %d: outside the disk or the data: %w", i, ErrCorrupt)
		}
		ix.Extents[i] = e
	}
	if len(raw) != 0 || pos != ix.data {
		return fmt.Errorf("segment extents: %d bytes left, %d of %d data bytes used: %w", len(raw), pos, ix.data, ErrCorrupt)
	}
	return nil
}

// rawLen is the raw length of frame i.
func (ix *Index) rawLen(i int) int {
	return int(min(FrameSize, ix.data-int64(i)*FrameSize))
}

// Frames says which stored bytes hold the n raw bytes at pos of the data stream: frames [first, last], stored at
// [off, off+length).
func (ix *Index) Frames(pos, n int64) (first, last int, off, length int64, err error) {
	if pos < 0 || n <= 0 || pos > ix.data-n {
		return 0, 0, 0, 0, fmt.Errorf("segment data %d+%d of %d: %w", pos, n, ix.data, ErrInvalid)
	}
	first, last = int(pos/FrameSize), int((pos+n-1)/FrameSize)
	off = ix.frames[first].off
	return first, last, off, ix.frames[last].off + int64(ix.frames[last].stored) - off, nil
}

// Decode decompresses frame i from its stored bytes into dst, which has room for FrameSize bytes, and verifies its
// checksum. It returns the raw data, which lies in dst or, for a raw frame, in stored.
func (ix *Index) Decode(i int, stored, dst []byte) ([]byte, error) {
	f, want := ix.frames[i], ix.rawLen(i)
	if len(stored) != int(f.stored) {
		return nil, fmt.Errorf("segment frame %d: %d bytes of %d: %w", i, len(stored), f.stored, ErrCorrupt)
	}
	raw, err := stored, error(nil)
	switch f.codec {
	case codecS2:
		if n, lerr := s2.DecodedLen(stored); lerr != nil || n != want {
			return nil, fmt.Errorf("segment frame %d: bad length: %w", i, ErrCorrupt)
		}
		raw, err = s2.Decode(dst[:want], stored)
	case codecZstd:
		raw, err = zstdDecoder().DecodeAll(stored, dst[:0])
	}
	if err != nil {
		return nil, fmt.Errorf("segment frame %d: %w: %w", i, ErrCorrupt, err)
	}
	if len(raw) != want || crc32.Checksum(raw, castag) != f.crc {
		return nil, fmt.Errorf("segment frame %d: checksum: %w", i, ErrCorrupt)
	}
	return raw, nil
}

// StoredLen is the stored length of frame i, in bytes.
func (ix *Index) StoredLen(i int) int { return int(ix.frames[i].stored) }

var zstdDecoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(4), zstd.WithDecoderMaxMemory(4*FrameSize), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
})

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read segment at %d: %d of %d bytes: %w", off, n, len(p), ErrCorrupt)
	}
	return fmt.Errorf("read segment at %d: %w", off, err)
}

// Reader reads ranges of one segment. It is safe for concurrent use if its source is.
type Reader struct {
	*Index
	r io.ReaderAt
}

// Open reads the index of a segment of size bytes.
func Open(r io.ReaderAt, size int64) (*Reader, error) {
	ix, err := ReadIndex(r, size)
	if err != nil {
		return nil, fmt.Errorf("open segment: %w", err)
	}
	return &Reader{Index: ix, r: r}, nil
}

// Range calls fn for each part of [off, off+length) that the segment says something about, ascending: data in
// pieces of at most FrameSize that are valid during the call, or nil for zeros.
func (s *Reader) Range(off, length int64, fn func(off, n int64, data []byte) error) error {
	i := sort.Search(len(s.Extents), func(i int) bool { return s.Extents[i].End() > off })
	stored, dst := make([]byte, FrameSize), make([]byte, FrameSize)
	var raw []byte
	have := -1
	for ; i < len(s.Extents) && s.Extents[i].Off < off+length; i++ {
		e := s.Extents[i]
		from, to := max(off, e.Off), min(off+length, e.End())
		if e.Zero {
			if err := fn(from, to-from, nil); err != nil {
				return err
			}
			continue
		}
		for from < to {
			pos := e.Pos + from - e.Off
			k := int(pos / FrameSize)
			if k != have {
				f := s.frames[k]
				if err := readFull(s.r, stored[:f.stored], f.off); err != nil {
					return err
				}
				var err error
				if raw, err = s.Decode(k, stored[:f.stored], dst); err != nil {
					return err
				}
				have = k
			}
			in := pos % FrameSize
			n := min(to-from, int64(len(raw))-in)
			if err := fn(from, n, raw[in:in+n]); err != nil {
				return err
			}
			from += n
		}
	}
	return nil
}

// StoredEnd is where the frames end in the object.
func (ix *Index) StoredEnd() int64 {
	if len(ix.frames) == 0 {
		return headerSize
	}
	f := ix.frames[len(ix.frames)-1]
	return f.off + int64(f.stored)
}
