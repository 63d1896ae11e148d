package hrl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
)

// Block is one metadata block. It is valid until the iteration that yielded it goes on.
type Block struct {
	// Index counts the blocks in write order, from 0.
	Index int
	// Position is where the block begins in the file, in bytes.
	Position int64
	// PreviousMetadataLocation is how far before Position the previous block begins, 0 for the first.
	PreviousMetadataLocation uint64
	// ValidMetadataEntries is how many entries the block holds.
	ValidMetadataEntries uint32
	// Checksum is the stored checksum of the block's head.
	Checksum uint32
	// Entries are the entries in the order written. In the last block of a log that was not closed they may be
	// fewer than ValidMetadataEntries, if the data of the next one is not whole.
	Entries []Entry
}

// Tail says where the proof of an unclosed log ended.
type Tail struct {
	// Position is the end of the last data or block that is whole, in bytes.
	Position int64
	// Unproven is how many bytes follow in the file.
	Unproven int64
	// Reason says what was met there.
	Reason string
}

// Reader reads one log. It is for one goroutine at a time.
type Reader struct {
	r      io.ReaderAt
	size   int64
	header Header
	slots  int
	tail   Tail
}

// Open reads and checks the header of a log of size bytes. Errors: ErrTruncated, ErrNotLog, ErrVersion, a
// *CorruptError about the header, or one of r.
func Open(r io.ReaderAt, size int64) (*Reader, error) {
	if size < HeaderSize {
		return nil, fmt.Errorf("%w: %d bytes are no header", ErrTruncated, size)
	}
	p := make([]byte, HeaderSize)
	if err := readFull(r, p, 0); err != nil {
		return nil, fmt.Errorf("read log header: %w", err)
	}
	h, err := decodeHeader(p)
	if err != nil {
		return nil, err
	}
	rd := &Reader{r: r, size: size, header: h, slots: slotsOf(int(h.MetadataSize))}
	if h.EOLLocation == 0 {
		return rd, nil
	}
	switch first := uint64(HeaderSize) + uint64(h.MetadataSize); {
	case h.EOLLocation > math.MaxInt64 || int64(h.EOLLocation) > size:
		return nil, fmt.Errorf("%w: it ends at %d, the file at %d", ErrTruncated, h.EOLLocation, size)
	case h.EOLLocation < first:
		return nil, &CorruptError{Part: PartHeader, Block: -1, Entry: -1,
			Reason: fmt.Sprintf("end of log %d leaves no room for a block", h.EOLLocation)}
	}
	return rd, nil
}

// Header returns the log's header.
func (r *Reader) Header() Header { return r.header }

// Closed reports whether the log was closed properly. If not, nothing says that Blocks finds all of it.
func (r *Reader) Closed() bool { return r.header.EOLLocation != 0 }

// Tail says, after Blocks or Entries ran to its end over an unclosed log, where the proof ended. For a closed log
// it is the end of the log.
func (r *Reader) Tail() Tail { return r.tail }

// Blocks yields the metadata blocks in write order. It holds one block and, for a closed log, 8 bytes per block;
// never data.
//
// In a closed log, blocks are found backwards from the end ([MS-HRL] 2.5) and everything must agree: checksums,
// lengths, the total of entries. The data itself is not read; ReadData checks it. Anything wrong ends the
// iteration with a *CorruptError.
//
// In an unclosed log, blocks are looked for forwards. After the header or a block that ends at P, the next block
// is at the least M >= P whose head has the right checksum, names the distance from M to the block before (for the
// first block: zero) and as many entries as a block can hold; whose entries have right checksums; and whose data
// lengths add up to exactly M - P. Then the data of each entry is read and compared with its DataChecksum, where it
// has one. The walk ends, without an error, at the first thing that does not hold; Tail says what. What it yields
// is therefore always a prefix of what was appended. It reads each byte of the file at most three times. Its
// limits: an entry without DataChecksum is taken as whole once its block is, which holds if the process died but
// not if the power failed; the sum that serves as checksum does not see swapped bytes; and data that imitates a
// block with the exact distances would be taken for one, so a log that was not closed proves its writes only to
// those who trust the disk's content.
func (r *Reader) Blocks(ctx context.Context) iter.Seq2[*Block, error] {
	return func(yield func(*Block, error) bool) {
		var err error
		if r.Closed() {
			err = r.walkClosed(ctx, yield)
		} else {
			err = r.walkOpen(ctx, yield)
		}
		if err != nil && !errors.Is(err, errStopped) {
			yield(nil, err)
		}
	}
}

// Entries yields the entries of all blocks in write order, with the limits of Blocks.
func (r *Reader) Entries(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for b, err := range r.Blocks(ctx) {
			if err != nil {
				yield(Entry{}, err)
				return
			}
			for _, e := range b.Entries {
				if !yield(e, nil) {
					return
				}
			}
		}
	}
}

// ReadData reads the data of an entry into p, which must have its DataLength, and checks it where the entry has a
// DataChecksum. Errors: a *CorruptError about the data, or one of the file.
func (r *Reader) ReadData(e Entry, p []byte) error {
	if len(p) != int(e.DataLength) {
		return fmt.Errorf("hrl: buffer of %d bytes for %d of data", len(p), e.DataLength)
	}
	if err := readFull(r.r, p, e.FilePosition); err != nil {
		return fmt.Errorf("read log data: %w", err)
	}
	if e.DataChecksum != 0 {
		if sum := Checksum(p); sum != e.DataChecksum {
			return dataError(-1, -1, e, sum)
		}
	}
	return nil
}

// errStopped ends a walk whose consumer has seen enough.
var errStopped = errors.New("stopped")

// walkClosed is the two-pass traversal of [MS-HRL] 2.5.
func (r *Reader) walkClosed(ctx context.Context, yield func(*Block, error) bool) error {
	end := int64(r.header.EOLLocation)
	stack, err := r.blockPositions(ctx, end)
	if err != nil {
		return err
	}
	b := &Block{Entries: make([]Entry, 0, r.slots)}
	raw := make([]byte, r.header.MetadataSize)
	var total uint64
	dataStart := int64(HeaderSize)
	for i := range stack {
		if err := ctx.Err(); err != nil {
			return err
		}
		pos := stack[len(stack)-1-i]
		if err := readFull(r.r, raw, pos); err != nil {
			return fmt.Errorf("read block %d at %d: %w", i, pos, err)
		}
		if err := r.decodeBlock(b, raw, i, pos, dataStart); err != nil {
			return err
		}
		total += uint64(b.ValidMetadataEntries)
		dataStart = pos + int64(len(raw))
		if !yield(b, nil) {
			return errStopped
		}
	}
	if total != r.header.TotalMetadataEntries {
		return &CorruptError{Part: PartHeader, Block: -1, Entry: -1,
			Reason: fmt.Sprintf("it counts %d entries, the blocks hold %d", r.header.TotalMetadataEntries, total)}
	}
	r.tail = Tail{Position: end, Unproven: r.size - end}
	return nil
}

// blockPositions returns the positions of all blocks, the last one first.
func (r *Reader) blockPositions(ctx context.Context, end int64) ([]int64, error) {
	var stack []int64
	head := make([]byte, blockHeadSize)
	pos := end - int64(r.header.MetadataSize)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		bad := func(why string) ([]int64, error) {
			return nil, &CorruptError{Part: PartBlock, Position: pos, Block: r.indexOf(ctx, pos), Entry: -1,
				Reason: fmt.Sprintf("%s (number %d from the end of the log)", why, len(stack)+1)}
		}
		if err := readFull(r.r, head, pos); err != nil {
			return nil, fmt.Errorf("read block at %d: %w", pos, err)
		}
		h, why := decodeBlockHead(head, r.slots)
		if why != "" {
			return bad(why)
		}
		stack = append(stack, pos)
		if h.prev == 0 {
			return stack, nil
		}
		// The previous block must end at or before this one, and begin behind the header.
		if h.prev < uint64(r.header.MetadataSize) || h.prev > uint64(pos-HeaderSize) {
			stack = stack[:len(stack)-1]
			return bad(fmt.Sprintf("previous block is %d bytes before it", h.prev))
		}
		pos -= int64(h.prev)
	}
}

// decodeBlock fills b from a raw block at pos whose data begins at dataStart.
func (r *Reader) decodeBlock(b *Block, raw []byte, index int, pos, dataStart int64) error {
	bad := func(part Part, at int64, entry int, why string) error {
		return &CorruptError{Part: part, Position: at, Block: index, Entry: entry, Reason: why}
	}
	h, why := decodeBlockHead(raw, r.slots)
	if why != "" {
		return bad(PartBlock, pos, -1, why)
	}
	*b = Block{Index: index, Position: pos, PreviousMetadataLocation: h.prev, ValidMetadataEntries: h.valid,
		Checksum: h.checksum, Entries: b.Entries[:0]}
	at := dataStart
	for i := range int(h.valid) {
		slot := len(raw) - (i+1)*entrySize
		e, why := decodeEntry(raw[slot:])
		if why != "" {
			return bad(PartEntry, pos+int64(slot), i, why)
		}
		if int64(e.DataLength) > pos-at {
			return bad(PartEntry, pos+int64(slot), i, fmt.Sprintf("data of %d bytes at %d reaches into the block",
				e.DataLength, at))
		}
		e.FilePosition = at
		at += int64(e.DataLength)
		b.Entries = append(b.Entries, e)
	}
	if at != pos {
		return bad(PartBlock, pos, -1, fmt.Sprintf("its entries end at %d", at))
	}
	return nil
}

func dataError(block, entry int, e Entry, sum uint32) *CorruptError {
	return &CorruptError{Part: PartData, Position: e.FilePosition, Block: block, Entry: entry,
		Reason: fmt.Sprintf("%d bytes for disk offset %d: checksum is %d, the bytes give %d",
			e.DataLength, e.ByteOffset, e.DataChecksum, sum)}
}

// readFull fills p from off; a file that ends earlier is io.ErrUnexpectedEOF.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
