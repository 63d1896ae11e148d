// Package ledger is a two-disk record of steps that shows whether a copy of
// both disks is of one instant.
//
// Step n is written on the intent side (OS disk), made durable, then written
// on the commit side (data disk), made durable, and then acknowledged. So at
// every instant commit <= intent <= commit+1, and a copy whose disks are of
// different instants breaks that soon.
//
// A side is a ring of Slots records of RecordSize bytes; step n stands in
// slot n modulo Slots. The guest keeps it in a preallocated file on ext4 that
// is written in place with O_DIRECT and O_DSYNC. A file rather than a raw
// partition, because a frozen file system must hold the ledger too; direct
// and in place, because then a record is one write to the disk followed by a
// flush, and no journal has a part in its durability or order.
//
// The ring also shows order within one disk: when n is the newest record, the
// Slots-1 before it must all be there. Only the slot of n+1 may be torn.
package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
)

const (
	// RecordSize is the size of a record in bytes: one direct write.
	RecordSize = 4096
	// Slots is how many records a side keeps.
	Slots = 256
	// Size is the size of a side in bytes.
	Size = RecordSize * Slots
)

// Side says which of the two disks a record belongs to.
type Side uint32

// The sides.
const (
	Intent Side = 1 // on the OS disk, written first
	Commit Side = 2 // on the data disk, written second
)

// String names the side.
func (s Side) String() string {
	switch s {
	case Intent:
		return "intent"
	case Commit:
		return "commit"
	}
	return fmt.Sprintf("side %d", uint32(s))
}

// ID names a ledger; both sides carry it.
type ID [16]byte

// String is the id in hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Seed is the number from which everything random of a ledger's files follows.
func (id ID) Seed() uint64 { return binary.LittleEndian.Uint64(id[:]) }

var magic = [8]byte{'L', 'F', 'L', 'E', 'D', 'G', 'E', 'R'}

// layout: magic 8, side 4, zero 4, id 16, n 8, filler, SHA-256 of all before 32.
const sumAt = RecordSize - sha256.Size

// Encode writes the record of step n into b, which has RecordSize bytes.
// The filler follows from n, so that each record differs in each of its sectors.
func Encode(b []byte, side Side, id ID, n uint64) {
	copy(b, magic[:])
	binary.LittleEndian.PutUint32(b[8:], uint32(side))
	binary.LittleEndian.PutUint32(b[12:], 0)
	copy(b[16:], id[:])
	binary.LittleEndian.PutUint64(b[32:], n)
	for at := 40; at < sumAt; at += 8 {
		binary.LittleEndian.PutUint64(b[at:], n^uint64(at)<<48)
	}
	sum := sha256.Sum256(b[:sumAt])
	copy(b[sumAt:], sum[:])
}

// decode reads a record; false when it is not a whole one of that side.
func decode(b []byte, side Side) (ID, uint64, bool) {
	if [8]byte(b[:8]) != magic || binary.LittleEndian.Uint32(b[8:]) != uint32(side) {
		return ID{}, 0, false
	}
	if sum := sha256.Sum256(b[:sumAt]); !bytes.Equal(sum[:], b[sumAt:RecordSize]) {
		return ID{}, 0, false
	}
	return ID(b[16:32]), binary.LittleEndian.Uint64(b[32:]), true
}

// Format makes an empty side: each slot holds a record of step 0. The caller makes it durable before it is used.
func Format(w io.WriterAt, buf []byte, side Side, id ID) error {
	Encode(buf, side, id, 0)
	for i := range int64(Slots) {
		if _, err := w.WriteAt(buf[:RecordSize], i*RecordSize); err != nil {
			return fmt.Errorf("format the %s side: %w", side, err)
		}
	}
	return nil
}

// Put writes step n by one write; w makes it durable before it returns (O_DSYNC).
// buf is a scratch buffer of RecordSize bytes, aligned as w needs it.
func Put(w io.WriterAt, buf []byte, side Side, id ID, n uint64) error {
	Encode(buf, side, id, n)
	if _, err := w.WriteAt(buf[:RecordSize], int64(n%Slots)*RecordSize); err != nil {
		return fmt.Errorf("write %s %d: %w", side, n, err)
	}
	return nil
}

// State is what one side holds.
type State struct {
	Side Side
	ID   ID
	Top  uint64 // the newest step, 0 when there is none
	Bad  []string
}

// Read reads and checks a side. Problems are in State.Bad; the error is of reading.
func Read(r io.ReaderAt, side Side) (State, error) {
	s := State{Side: side}
	buf := make([]byte, Size)
	if n, err := r.ReadAt(buf, 0); err != nil && (err != io.EOF || n != Size) {
		if err == io.EOF {
			s.Bad = append(s.Bad, fmt.Sprintf("%s side has %d bytes, not %d", side, n, Size))
			return s, nil
		}
		return s, fmt.Errorf("read the %s side: %w", side, err)
	}
	type slot struct {
		n  uint64
		ok bool
	}
	slots := make([]slot, Slots)
	seen := false
	for i := range slots {
		id, n, ok := decode(buf[i*RecordSize:(i+1)*RecordSize], side)
		slots[i] = slot{n, ok}
		if !ok {
			continue
		}
		if seen && id != s.ID {
			s.Bad = append(s.Bad, fmt.Sprintf("%s slot %d is of ledger %s, others of %s", side, i, id, s.ID))
		}
		s.ID, seen = id, true
		s.Top = max(s.Top, n)
	}
	if !seen {
		s.Bad = append(s.Bad, fmt.Sprintf("%s side has no whole record", side))
		return s, nil
	}
	for i, have := range slots {
		want := expected(s.Top, uint64(i))
		next := uint64(i) == (s.Top+1)%Slots
		switch {
		case have.ok && have.n == want:
		case next && !have.ok: // step Top+1 was being written
		case !have.ok:
			s.Bad = append(s.Bad, fmt.Sprintf("%s slot %d is damaged, step %d was there", side, i, want))
		default:
			s.Bad = append(s.Bad, fmt.Sprintf("%s slot %d holds step %d, not %d, though step %d is there", side, i, have.n, want, s.Top))
		}
	}
	return s, nil
}

// expected is the step that slot i holds when top is the newest one; 0 when none came there yet.
func expected(top, i uint64) uint64 {
	back := (top%Slots + Slots - i) % Slots
	if back >= top {
		return 0
	}
	return top - back
}

// Compare tells what contradicts that both sides are of one instant.
func Compare(intent, commit State) []string {
	var bad []string
	if intent.ID != commit.ID {
		bad = append(bad, fmt.Sprintf("the disks are of different ledgers: %s and %s", intent.ID, commit.ID))
	}
	if commit.Top > intent.Top {
		bad = append(bad, fmt.Sprintf("commit %d is on the data disk, but the OS disk ends at intent %d: the OS disk is older", commit.Top, intent.Top))
	}
	if intent.Top > commit.Top+1 {
		bad = append(bad, fmt.Sprintf("intent %d is on the OS disk, but the data disk ends at commit %d: the data disk is older", intent.Top, commit.Top))
	}
	return bad
}
