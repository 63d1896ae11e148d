package hrl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Options of a new log. UniqueID is required.
type Options struct {
	// UniqueID identifies this log.
	UniqueID uuid.UUID
	// PreviousUniqueID is the UniqueID of the log before it, or zero for the first of a disk.
	PreviousUniqueID uuid.UUID
	// OriginalSize is stored as the header's OriginalSize, in bytes. The published example has 0.
	OriginalSize uint64
	// CurrentSize is stored as the header's CurrentSize while the log is open; Close stores the file's real size.
	CurrentSize uint64
	// MetadataSize is the size of a metadata block in bytes, a multiple of 512. Zero means DefaultMetadataSize.
	MetadataSize int
	// DataWriteGUID is stored as Vhd2DataWriteGuid: it changes when somebody writes the disk without tracking.
	DataWriteGUID uuid.UUID
	// Now is the clock of the time stamps. Nil means time.Now.
	Now func() time.Time
}

// allocateAhead is how much space is reserved at a time, in bytes: small enough for a hundred open logs on a tight
// volume, large enough that reserving costs nothing.
const allocateAhead = 4 << 20

// file is what the writer needs of an *os.File; tests give one with a limit.
type file interface {
	WriteAt(p []byte, off int64) (int, error)
	Truncate(size int64) error
	Sync() error
	Close() error
	datasync() error
	allocate(off, n int64) error
	syncDir() error
}

type osFile struct {
	*os.File
	dir string
}

func (f osFile) datasync() error             { return datasync(f.File) }
func (f osFile) allocate(off, n int64) error { return allocate(f.File, off, n) }
func (f osFile) syncDir() error              { return syncDir(f.dir) }

// Writer appends to one log file. Its methods are safe for concurrent callers.
type Writer struct {
	id    uuid.UUID
	now   func() time.Time
	slots int

	mu        sync.Mutex
	f         file
	header    Header
	block     []byte // the block being filled, with room for its head
	pending   int    // entries in block
	lastBlock int64  // position of the newest block in the file
	pos       int64  // where the next data, or block, goes
	reserved  int64  // space is known to exist up to here
	cannotRes bool   // the file system cannot reserve
	entries   uint64 // all appended
	dataBytes int64
	dirSynced bool
	closed    bool
	broken    error // a sync failed: nothing written is known to be durable, so the log may not be sealed
}

// Create makes a new log at path, which must not exist, with its header and, as the published example has it, an
// empty first metadata block. Nothing is left behind on error. The log and its name become durable with the first
// Flush or with Close.
func Create(path string, opt Options) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	w, err := newWriter(osFile{f, filepath.Dir(path)}, opt)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create log %s: %w", path, err), f.Close(), os.Remove(path))
	}
	return w, nil
}

func newWriter(f file, opt Options) (*Writer, error) {
	if opt.UniqueID == uuid.Nil {
		return nil, errors.New("log needs a unique id")
	}
	if opt.MetadataSize == 0 {
		opt.MetadataSize = DefaultMetadataSize
	}
	if opt.MetadataSize < 0 || opt.MetadataSize > MaxMetadataSize {
		return nil, fmt.Errorf("metadata size %d is out of bounds", opt.MetadataSize)
	}
	if err := checkMetadataSize(uint32(opt.MetadataSize)); err != nil {
		return nil, err
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	w := &Writer{
		id:    opt.UniqueID,
		now:   opt.Now,
		slots: slotsOf(opt.MetadataSize),
		f:     f,
		block: make([]byte, opt.MetadataSize),
		header: Header{
			LogFormatVersion:      Version2,
			TimeStamp:             Stamp(opt.Now()),
			CreatorApplication:    [4]byte{'c', 't'},
			CreatorVersion:        0x000A0000,
			OriginalSize:          opt.OriginalSize,
			CurrentSize:           opt.CurrentSize,
			MetadataSize:          uint32(opt.MetadataSize),
			UniqueID:              opt.UniqueID,
			PreviousUniqueID:      opt.PreviousUniqueID,
			LastModifiedTimeStamp: Stamp(opt.Now()),
			Vhd2DataWriteGUID:     opt.DataWriteGUID,
		},
	}
	first := make([]byte, HeaderSize+opt.MetadataSize)
	w.header.encode(first[:HeaderSize])
	blockHead{}.encode(first[HeaderSize:])
	if _, err := f.WriteAt(first, 0); err != nil {
		return nil, fullOr(err, "write header")
	}
	w.lastBlock, w.pos = HeaderSize, int64(len(first))
	w.reserved = w.pos
	return w, nil
}

// Append logs one write: p was written at byte off of the disk. It returns the position of the data in the log
// file, which rises with the order of the appends. The data is in the file when Append returns, not yet durable,
// and provable once Flush or Close returned or its metadata block filled up.
//
// An empty p or one over MaxEntry is ErrTooLarge. ErrFull leaves everything as it was before the call, also for
// any other error of the write itself. p is not kept.
func (w *Writer) Append(off uint64, p []byte) (dataPos int64, err error) {
	if len(p) == 0 || len(p) > MaxEntry {
		return 0, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(p))
	}
	sum := Checksum(p) // before taking the lock
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return 0, err
	}
	if w.pending == w.slots { // left over from a block that could not be written
		if err := w.writeBlock(); err != nil {
			return 0, err
		}
	}
	if err := w.reserve(int64(len(p))); err != nil {
		return 0, err
	}
	dataPos = w.pos
	if _, err := w.f.WriteAt(p, dataPos); err != nil {
		return 0, fullOr(err, "append to log")
	}
	e := Entry{
		ByteOffset:    off,
		DataLength:    uint32(len(p)),
		TimeStamp:     Stamp(w.now()),
		MetaOperation: OpWrite,
		DataChecksum:  sum,
	}
	w.pending++
	e.encode(w.block[len(w.block)-w.pending*entrySize:])
	w.entries++
	w.dataBytes += int64(len(p))
	w.pos += int64(len(p))
	if w.pending == w.slots {
		// The entry is in the log whether or not this works; a failure is met again, and reported, by whoever
		// needs the block next.
		_ = w.writeBlock()
	}
	return dataPos, nil
}

// Flush completes the metadata block, so that everything appended before the call can be proved, and makes the log
// durable. Appends go on meanwhile. After a failed flush to disk the log is refused for good: the operating system
// may have dropped what it could not write.
func (w *Writer) Flush() error {
	w.mu.Lock()
	err := w.usable()
	if err == nil && w.pending > 0 {
		err = w.writeBlock()
	}
	f, syncDirToo := w.f, !w.dirSynced
	w.mu.Unlock()
	if err != nil {
		return err
	}
	err = f.datasync()
	if err == nil && syncDirToo {
		err = f.syncDir()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err != nil && w.closed: // closed meanwhile; Close answers for durability
		return ErrClosed
	case err != nil:
		w.broken = fmt.Errorf("flush log: %w", err)
		return w.broken
	}
	w.dirSynced = true
	return nil
}

// Close seals the log: the last block, then durably the end and totals in the header, then the file's name in its
// folder. On error the log stays unclosed in the file and is to be read as such; the writer is closed either way.
// A second Close returns ErrClosed.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return ErrClosed
	}
	err := w.seal()
	w.closed = true
	if closeErr := w.f.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("close log: %w", closeErr)
	}
	return err
}

func (w *Writer) seal() error {
	if w.broken != nil {
		return w.broken
	}
	if w.pending > 0 {
		if err := w.writeBlock(); err != nil {
			return err
		}
	}
	// Nothing may lie behind the end: neither reserved space nor what is left of a failed append.
	if err := w.f.Truncate(w.pos); err != nil {
		return fmt.Errorf("seal log: %w", err)
	}
	// Everything must be durable before a header that vouches for it can be.
	if err := w.f.datasync(); err != nil {
		return fmt.Errorf("seal log: flush data: %w", err)
	}
	h := w.header
	h.EOLLocation, h.CurrentSize = uint64(w.pos), uint64(w.pos)
	h.TotalMetadataEntries = w.entries
	h.LastModifiedTimeStamp = Stamp(w.now())
	buf := make([]byte, HeaderSize)
	h.encode(buf)
	if _, err := w.f.WriteAt(buf, 0); err != nil {
		return fmt.Errorf("seal log: write header: %w", err)
	}
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("seal log: flush header: %w", err)
	}
	if err := w.f.syncDir(); err != nil {
		return fmt.Errorf("seal log: flush folder: %w", err)
	}
	w.header = h
	return nil
}

// Abort closes the file without sealing the log, which stays as it is; remove it by its name if it is of no use.
// After Close it does nothing.
func (w *Writer) Abort() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	return w.f.Close()
}

// Position returns where in the file the next data would go, which is the size of the log so far, in bytes.
func (w *Writer) Position() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pos
}

// Entries returns how many entries were appended.
func (w *Writer) Entries() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.entries
}

// DataBytes returns how many bytes of data were appended, repeated writes counted each time.
func (w *Writer) DataBytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dataBytes
}

// UniqueID returns the id of the log.
func (w *Writer) UniqueID() uuid.UUID { return w.id }

func (w *Writer) usable() error {
	if w.closed {
		return ErrClosed
	}
	return w.broken
}

// writeBlock puts the pending entries' block behind their data and begins the next block.
func (w *Writer) writeBlock() error {
	blockHead{prev: uint64(w.pos - w.lastBlock), valid: uint32(w.pending)}.encode(w.block)
	if _, err := w.f.WriteAt(w.block, w.pos); err != nil {
		return fullOr(err, "write metadata block")
	}
	w.lastBlock = w.pos
	w.pos += int64(len(w.block))
	w.pending = 0
	clear(w.block)
	return nil
}

// reserve makes sure that n bytes of data and the block behind them have space, so that data accepted can always be
// described.
func (w *Writer) reserve(n int64) error {
	need := w.pos + n + int64(len(w.block))
	if w.cannotRes || need <= w.reserved {
		return nil
	}
	want := max(need, w.pos+allocateAhead)
	err := w.f.allocate(w.reserved, want-w.reserved)
	if isFull(err) && want > need {
		want = need
		err = w.f.allocate(w.reserved, want-w.reserved)
	}
	switch {
	case err == nil:
		w.reserved = want
	case errors.Is(err, errors.ErrUnsupported):
		w.cannotRes = true
	default:
		return fullOr(err, "reserve log space")
	}
	return nil
}

// fullOr wraps err with the operation, and with ErrFull if that is what it means.
func fullOr(err error, op string) error {
	if isFull(err) {
		return fmt.Errorf("%s: %w: %w", op, ErrFull, err)
	}
	return fmt.Errorf("%s: %w", op, err)
}
