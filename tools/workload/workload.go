// Package workload is a guest whose every write can be told from its number.
//
// Write n of a workload (disk, place, length, content, or zeros) follows from
// the seed and n alone, and the guest makes its writes strictly one after the
// other over all disks. So the state of the machine at any instant is the
// initial content and the writes 1..n for one n, on every disk: a recovered
// copy is right if, and only if, one n explains each byte of all its disks.
// Data blocks carry their number, so n is read from the copy; what the guest
// recorded then says which n the cut may have.
package workload

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Block is the unit of writes, in bytes.
const Block = 4096

// magic marks a block that the workload wrote.
const magic = 0x4c46574b4c4f4144

// maxBlocks is the longest write, in blocks.
const maxBlocks = 16

// Guest describes a machine's disks and its seed.
type Guest struct {
	Seed  uint64
	Disks []Disk
}

// Disk is one disk of the guest.
type Disk struct {
	ID   string
	Size int64 // bytes, a multiple of Block
}

// Write is one write of the guest.
type Write struct {
	N      uint64 // from 1
	Disk   int    // index into Guest.Disks
	Off    int64
	Blocks int
	Zero   bool // zeros, by trim or write-zeroes
}

// Write tells write n. Six of ten writes go to a hot set, the first twentieth of a disk; one of sixteen zeroes a range.
func (g Guest) Write(n uint64) Write {
	r := rand.New(rand.NewPCG(g.Seed, n))
	w := Write{N: n, Disk: r.IntN(len(g.Disks)), Blocks: 1 + r.IntN(maxBlocks)}
	blocks := g.Disks[w.Disk].Size / Block
	span := blocks
	if r.IntN(10) < 6 {
		span = max(blocks/20, maxBlocks+1) // hot set: the first twentieth
	}
	w.Off = r.Int64N(max(span-int64(w.Blocks), 1)) * Block
	w.Zero = r.IntN(16) == 0
	return w
}

// Fill writes the content of w, all blocks, into p. Each block begins with magic, seed and number.
func (g Guest) Fill(w Write, p []byte) {
	if w.Zero {
		clear(p)
		return
	}
	r := rand.New(rand.NewPCG(g.Seed^0x9e3779b97f4a7c15, w.N))
	text := r.IntN(2) == 0 // half of the writes compress well
	for b := range w.Blocks {
		block := p[b*Block : (b+1)*Block]
		word := r.Uint64()
		for i := 0; i < Block; i += 8 {
			if !text || i%64 == 0 {
				word = r.Uint64()
			}
			binary.LittleEndian.PutUint64(block[i:], word)
		}
		binary.BigEndian.PutUint64(block, magic)
		binary.BigEndian.PutUint64(block[8:], g.Seed)
		binary.BigEndian.PutUint64(block[16:], w.N)
	}
}

// number reads the number of a block that this guest wrote; 0 for any other block.
func (g Guest) number(block []byte) uint64 {
	if binary.BigEndian.Uint64(block) != magic || binary.BigEndian.Uint64(block[8:]) != g.Seed {
		return 0
	}
	return binary.BigEndian.Uint64(block[16:])
}

// Target is where the guest writes: one connection per disk.
type Target interface {
	WriteAt(p []byte, off int64) (int, error)
	WriteZeroes(off, length int64) error
	Flush() error
	Close() error
}

// Record is what the guest remembers of itself: how far it had come when.
type Record struct {
	mu     sync.Mutex
	marks  []mark
	issued uint64
	acked  uint64
	bytes  int64
	last   string
}

// mark says that at that time all writes up to acked were acknowledged and those up to issued were under way.
type mark struct {
	at            time.Time
	issued, acked uint64
}

// maxMarks bounds the record: the oldest half is thinned out when it is full.
const maxMarks = 1 << 16

func (r *Record) note(issued, acked uint64, n int, sum string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.issued, r.acked, r.last = issued, acked, sum
	r.bytes += int64(n)
	r.marks = append(r.marks, mark{time.Now(), issued, acked})
	if len(r.marks) > maxMarks {
		kept := r.marks[:0]
		for i, m := range r.marks {
			if i >= maxMarks/2 || i%2 == 0 {
				kept = append(kept, m)
			}
		}
		r.marks = kept
	}
}

// Acked is the number of the newest acknowledged write, and the bytes written so far.
func (r *Record) Acked() (n uint64, bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.acked, r.bytes
}

// Bounds says which writes a cut that began after from and ended before to may have as its newest.
func (r *Record) Bounds(from, to time.Time) (low, high uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	high = r.issued
	for _, m := range r.marks {
		if !m.at.After(from) {
			low = max(low, m.acked)
		}
		if m.at.After(to) {
			high = min(high, m.issued)
		}
	}
	return low, high
}

// Options tune a run.
type Options struct {
	// Pause between writes; zero writes as fast as it goes.
	Pause time.Duration
	// FlushEvery flushes all disks after so many writes; zero never flushes.
	FlushEvery uint64
	// First is the number of the first write; 0 means 1.
	First uint64
	// Limit ends the run after write Limit; 0 means none.
	Limit uint64
	// OnWrite, when set, hears of every acknowledged write: disk id, offset, SHA-256 of the data, number.
	OnWrite func(disk string, off int64, sum string, n uint64)
}

// Run writes until ctx ends or the limit is reached. dial opens a disk; a broken connection is opened again and the
// write that was under way is repeated: it is the same bytes. Errors are those of dial, once ctx is over nil.
func (g Guest) Run(ctx context.Context, rec *Record, dial func(ctx context.Context, disk int) (Target, error), o Options) error {
	conns := make([]Target, len(g.Disks))
	defer func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	}()
	buf := make([]byte, maxBlocks*Block)
	for n := max(o.First, 1); ctx.Err() == nil && (o.Limit == 0 || n <= o.Limit); n++ {
		w := g.Write(n)
		p := buf[:w.Blocks*Block]
		g.Fill(w, p)
		rec.note(n, n-1, 0, "")
		err := g.persist(ctx, conns, w.Disk, dial, func(t Target) error {
			if w.Zero {
				return t.WriteZeroes(w.Off, int64(len(p)))
			}
			_, err := t.WriteAt(p, w.Off)
			return err
		})
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("write %d: %w", n, err)
		}
		sum := sha256.Sum256(p)
		rec.note(n, n, len(p), hex.EncodeToString(sum[:]))
		if o.OnWrite != nil {
			o.OnWrite(g.Disks[w.Disk].ID, w.Off, hex.EncodeToString(sum[:]), n)
		}
		if o.FlushEvery > 0 && n%o.FlushEvery == 0 {
			for d := range conns {
				if err := g.persist(ctx, conns, d, dial, Target.Flush); err != nil && ctx.Err() == nil {
					return fmt.Errorf("flush after write %d: %w", n, err)
				}
			}
		}
		if o.Pause > 0 {
			t := time.NewTimer(o.Pause)
			select {
			case <-ctx.Done():
			case <-t.C:
			}
			t.Stop()
		}
	}
	return nil
}

// persist does one operation, over new connections if need be, until it succeeds or ctx ends.
func (g Guest) persist(ctx context.Context, conns []Target, disk int, dial func(context.Context, int) (Target, error), op func(Target) error) error {
	for {
		if conns[disk] == nil {
			c, err := dial(ctx, disk)
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				var fatal *FatalError
				if errors.As(err, &fatal) {
					return err
				}
				t := time.NewTimer(20 * time.Millisecond)
				select {
				case <-ctx.Done():
					t.Stop()
					return ctx.Err()
				case <-t.C:
				}
				continue
			}
			conns[disk] = c
		}
		err := op(conns[disk])
		if err == nil {
			return nil
		}
		var refused interface{ Refused() bool }
		if errors.As(err, &refused) && refused.Refused() {
			return err // the guest saw an error: that must never happen
		}
		_ = conns[disk].Close()
		conns[disk] = nil
	}
}

// FatalError, returned by dial, ends the run.
type FatalError struct{ Err error }

func (e *FatalError) Error() string { return e.Err.Error() }
func (e *FatalError) Unwrap() error { return e.Err }
