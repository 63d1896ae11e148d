package dir

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"runtime"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// The state file of a page blob: two slots, written in turn so that one is always whole, and the volatile
// words behind them. docs/formats/dir-store.md has the table.
const (
	stateBytes = 4096
	slotBytes  = 512
	slotMagic  = "LFPS"
	slotV      = 1

	// Volatile words, changed in place, never fsynced for their own sake.
	wordStarted  = 1024 // page writes begun
	wordFinished = 1032 // page writes done; unequal to started without a holder of the locks: a writer died
	wordModified = 1040 // storage time of the last page write, in Unix nanoseconds
	wordDeleted  = 1048 // 1: the blob is being deleted or is deleted
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// pageState is the durable state of a page blob.
type pageState struct {
	version  uint64 // of the slot; the higher valid one counts
	gen      uint64 // of the ETag; changes with all but lease calls
	sequence int64
	// dirty: pages may have been written since the last SetSequence, under boot.
	dirty    bool
	boot     [16]byte
	lease    blobstore.LeaseID
	leaseEnd int64 // Unix nanoseconds of storage time
	leaseDur int64 // nanoseconds
	lastSnap int64 // id of the newest snapshot ever
	modified int64 // storage time of the last change of the slot, in Unix nanoseconds
}

func (p pageState) encode() []byte {
	b := make([]byte, 0, slotBytes)
	b = append(b, slotMagic...)
	b = binary.LittleEndian.AppendUint32(b, slotV)
	b = binary.LittleEndian.AppendUint64(b, p.version)
	b = binary.LittleEndian.AppendUint64(b, p.gen)
	b = binary.LittleEndian.AppendUint64(b, uint64(p.sequence))
	var dirty uint64
	if p.dirty {
		dirty = 1
	}
	b = binary.LittleEndian.AppendUint64(b, dirty)
	b = append(b, p.boot[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(p.leaseEnd))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.leaseDur))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.lastSnap))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.modified))
	var lease [40]byte
	copy(lease[:], p.lease)
	b = append(b, lease[:]...)
	b = append(b, make([]byte, slotBytes-4-len(b))...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeSlot(b []byte) (p pageState, ok bool) {
	body := b[:slotBytes-4]
	if string(b[:4]) != slotMagic || binary.LittleEndian.Uint32(b[4:]) != slotV ||
		crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[slotBytes-4:]) {
		return pageState{}, false
	}
	u := func(at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	p = pageState{
		version: u(8), gen: u(16), sequence: int64(u(24)), dirty: u(32) == 1,
		leaseEnd: int64(u(56)), leaseDur: int64(u(64)), lastSnap: int64(u(72)), modified: int64(u(80)),
		lease: blobstore.LeaseID(bytes.TrimRight(b[88:128], "\x00")),
	}
	copy(p.boot[:], b[40:56])
	return p, true
}

// errDamaged means that neither slot of a state file is whole.
var errDamaged = errors.New("state file is damaged")

// readState returns the newest whole slot. It needs no lock: a slot being written is not yet the newest.
func (c *counters) readState() (pageState, error) {
	var buf [2 * slotBytes]byte
	for range 100 {
		if err := c.slots(&buf); err != nil {
			return pageState{}, err
		}
		a, okA := decodeSlot(buf[:slotBytes])
		b, okB := decodeSlot(buf[slotBytes:])
		switch {
		case okA && (!okB || a.version > b.version):
			return a, nil
		case okB:
			return b, nil
		}
		runtime.Gosched() // both torn: two writers passed while we read
	}
	return pageState{}, errDamaged
}

// writeState puts the next version into the slot that is not in use. The caller holds lockState exclusively.
func (s *Store) writeState(f *os.File, p *pageState, sync bool) error {
	p.version++
	if _, err := f.WriteAt(p.encode(), int64(p.version%2)*slotBytes); err != nil {
		return err
	}
	if !sync {
		return nil
	}
	return s.syncData(f)
}

// newState makes the state file of a new page blob.
func (s *Store) newState(path string, now time.Time) error {
	buf := make([]byte, stateBytes)
	copy(buf, pageState{gen: 1, modified: now.UnixNano()}.encode())
	return s.writeFile(path, buf)
}

// etag names one version of a page blob.
func etag(incarnation string, gen, started, finished uint64) blobstore.ETag {
	return blobstore.ETag(fmt.Sprintf("%s-%x-%x-%x", incarnation, gen, started, finished))
}

func hashBoot(raw []byte) (id [16]byte) {
	h := sha256.Sum256(raw)
	copy(id[:], h[:])
	return id
}

// randomBoot stands for a boot id where there is none: every process then trusts only itself.
func randomBoot() (id [16]byte) {
	_, _ = rand.Read(id[:])
	return id
}
