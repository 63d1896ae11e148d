package hrl

import (
	"errors"
	"fmt"
)

// Sentinel errors. Test with errors.Is.
var (
	// ErrNotLog means that the file does not begin with the cookie of a log.
	ErrNotLog = errors.New("hrl: not a replica log")
	// ErrVersion means that the log has a format version other than 2.
	ErrVersion = errors.New("hrl: unsupported log format version")
	// ErrTruncated means that the file is shorter than its header, or than the end that its header gives.
	ErrTruncated = errors.New("hrl: log is cut short")
	// ErrCorrupt is matched by every *CorruptError.
	ErrCorrupt = errors.New("hrl: log is corrupt")
	// ErrFull means that the volume has no space for the entry. Nothing of it is in the log, entries appended
	// before are untouched, and the log can still be flushed and closed.
	ErrFull = errors.New("hrl: volume is full")
	// ErrClosed means that the writer was closed or aborted before.
	ErrClosed = errors.New("hrl: writer is closed")
	// ErrTooLarge means that an entry is empty or larger than MaxEntry.
	ErrTooLarge = errors.New("hrl: entry size out of bounds")
)

// Part names the structure of a log that a CorruptError is about.
type Part string

// The parts of a log.
const (
	PartHeader Part = "header"
	PartBlock  Part = "block"
	PartEntry  Part = "entry"
	PartData   Part = "data"
)

// CorruptError says which structure of a log is damaged, where it lies in the file, and how.
type CorruptError struct {
	// Part is the kind of structure.
	Part Part
	// Position is the file position of the structure, in bytes.
	Position int64
	// Block is the index of the metadata block in write order, or -1 if none is meant or it cannot be known, which
	// is so when several blocks of a closed log are damaged.
	Block int
	// Entry is the index of the entry in its block in write order, or -1 if no single entry is meant.
	Entry int
	// Reason says what is wrong, in a few words.
	Reason string
}

// Error names part, index and position.
func (e *CorruptError) Error() string {
	switch {
	case e.Entry >= 0:
		return fmt.Sprintf("hrl: corrupt %s at position %d (block %d, entry %d): %s",
			e.Part, e.Position, e.Block, e.Entry, e.Reason)
	case e.Part == PartBlock && e.Block >= 0:
		return fmt.Sprintf("hrl: corrupt block %d at position %d: %s", e.Block, e.Position, e.Reason)
	default:
		return fmt.Sprintf("hrl: corrupt %s at position %d: %s", e.Part, e.Position, e.Reason)
	}
}

// Is makes every CorruptError match ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }
