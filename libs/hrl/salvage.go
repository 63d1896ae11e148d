package hrl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// walkOpen yields what can be proved of a log that was not closed; Blocks says how.
func (r *Reader) walkOpen(ctx context.Context, yield func(*Block, error) bool) error {
	return newSalvage(r).walk(ctx, yield)
}

// Bounds of the search for blocks.
const (
	// windowSize is the size of each of the two buffers, in bytes.
	windowSize = 256 << 10
	// maxImitations is how many places may look like the head of the next block and not be it. By chance there is
	// none; the limit keeps crafted files from costing more than this many reads of a block.
	maxImitations = 4096
)

// salvage is one walk over an unclosed log.
type salvage struct {
	*Reader
	window     []byte // part of the file, for looking for blocks
	windowAt   int64
	windowLen  int
	data       []byte // for checking data
	imitations int
}

func newSalvage(r *Reader) *salvage {
	n := min(windowSize, r.size)
	return &salvage{Reader: r, window: make([]byte, n), data: make([]byte, n)}
}

func (r *salvage) walk(ctx context.Context, yield func(*Block, error) bool) error {
	b := &Block{Entries: make([]Entry, 0, r.slots)}
	raw := make([]byte, r.header.MetadataSize)
	dataStart, prev := int64(HeaderSize), int64(-1)
	for index := 0; ; index++ {
		pos, err := r.findBlock(ctx, b, raw, index, dataStart, prev)
		if err != nil {
			return err
		}
		if pos < 0 {
			why := "no further metadata block"
			if r.imitations >= maxImitations {
				why = "too many places that imitate a metadata block"
			}
			r.stopAt(dataStart, why)
			return nil
		}
		whole, why, err := r.wholeEntries(ctx, b.Entries)
		if err != nil {
			return err
		}
		if whole < len(b.Entries) {
			r.stopAt(b.Entries[whole].FilePosition, why)
			b.Entries = b.Entries[:whole]
			if !yield(b, nil) {
				return errStopped
			}
			return nil
		}
		if !yield(b, nil) {
			return errStopped
		}
		dataStart, prev = pos+int64(len(raw)), pos
	}
}

func (r *Reader) stopAt(pos int64, reason string) {
	r.tail = Tail{Position: pos, Unproven: max(r.size-pos, 0), Reason: reason}
}

// findBlock looks for the block behind the one at prev (-1: for the first block), at or after dataStart. It
// returns its position and leaves it in b, or returns -1 if there is none.
func (r *salvage) findBlock(
	ctx context.Context, b *Block, raw []byte, index int, dataStart, prev int64,
) (int64, error) {
	last := r.size - int64(len(raw)) // last position a block could have
	for at := dataStart; at <= last; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		chunk, err := r.look(at)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return -1, nil // the file is shorter than we were told
		} else if err != nil {
			return 0, fmt.Errorf("look for a block at %d: %w", at, err)
		}
		// Heads that begin in the last 31 bytes of the chunk are looked at with the next one.
		for i := range len(chunk) - blockHeadSize + 1 {
			pos := at + int64(i)
			var distance uint64
			if prev >= 0 {
				distance = uint64(pos - prev)
			}
			if binary.LittleEndian.Uint64(chunk[i:]) != distance || !plausibleHead(chunk[i:i+blockHeadSize], r.slots) {
				continue
			}
			switch err := readFull(r.r, raw, pos); {
			case errors.Is(err, io.ErrUnexpectedEOF):
				return -1, nil
			case err != nil:
				return 0, fmt.Errorf("read block at %d: %w", pos, err)
			}
			if r.decodeBlock(b, raw, index, pos, dataStart) == nil {
				return pos, nil
			}
			if r.imitations++; r.imitations >= maxImitations {
				return -1, nil
			}
		}
		at += int64(len(chunk) - blockHeadSize + 1)
	}
	return -1, nil
}

// look returns at least blockHeadSize bytes of the file from at on, reading only what the window does not hold.
func (r *salvage) look(at int64) ([]byte, error) {
	if in := at - r.windowAt; in >= 0 && in+blockHeadSize <= int64(r.windowLen) {
		return r.window[in:r.windowLen], nil
	}
	p := r.window[:min(int64(len(r.window)), r.size-at)]
	r.windowAt, r.windowLen = at, 0
	if err := readFull(r.r, p, at); err != nil {
		return nil, err
	}
	r.windowLen = len(p)
	return p, nil
}

// plausibleHead is the cheap part of decodeBlockHead, run at every position that passed the distance test. Unlike
// in a closed log the reserved bytes must be zero: here they are evidence.
func plausibleHead(p []byte, slots int) bool {
	le := binary.LittleEndian
	if le.Uint64(p[16:])|le.Uint64(p[24:]) != 0 || uint64(le.Uint32(p[8:])) > uint64(slots) {
		return false
	}
	return ^byteSum(p[:blockChecksumAt]) == le.Uint32(p[blockChecksumAt:])
}

// wholeEntries returns how many entries from the first on have the data that their checksum promises.
func (r *salvage) wholeEntries(ctx context.Context, entries []Entry) (n int, why string, err error) {
	for i, e := range entries {
		if e.DataChecksum == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return 0, "", err
		}
		var sum uint32
		for done := int64(0); done < int64(e.DataLength); {
			p := r.data[:min(int64(len(r.data)), int64(e.DataLength)-done)]
			if err := readFull(r.r, p, e.FilePosition+done); err != nil {
				return 0, "", fmt.Errorf("read log data at %d: %w", e.FilePosition+done, err)
			}
			sum += byteSum(p)
			done += int64(len(p))
		}
		if ^sum != e.DataChecksum {
			return i, dataError(-1, -1, e, ^sum).Reason, nil
		}
	}
	return len(entries), "", nil
}

// indexOf returns the index of the damaged block at pos of a closed log, or -1 if it cannot be known. It counts the
// blocks from the start of the log and is sure only if the damaged one still says, by its distance or by its
// entries, that it follows the last one found; otherwise a block between them may be damaged too.
func (r *Reader) indexOf(ctx context.Context, pos int64) int {
	before := *r
	before.size = pos
	s := newSalvage(&before)
	b := &Block{Entries: make([]Entry, 0, r.slots)}
	raw := make([]byte, r.header.MetadataSize)
	dataStart, prev := int64(HeaderSize), int64(-1)
	index := 0
	for ; ; index++ {
		at, err := s.findBlock(ctx, b, raw, index, dataStart, prev)
		if err != nil {
			return -1
		}
		if at < 0 {
			break
		}
		dataStart, prev = at+int64(len(raw)), at
	}
	if err := readFull(r.r, raw, pos); err != nil {
		return -1
	}
	if prev >= 0 && binary.LittleEndian.Uint64(raw) == uint64(pos-prev) {
		return index
	}
	at := dataStart
	for i := range r.slots {
		e, why := decodeEntry(raw[len(raw)-(i+1)*entrySize:])
		if why != "" || at > pos {
			break
		}
		at += int64(e.DataLength)
	}
	if at != pos {
		return -1
	}
	return index
}
