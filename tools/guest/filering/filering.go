// Package filering is a bounded set of checksummed files whose whole history
// follows from a seed.
//
// Operation m (from 1) of a ring replaces or deletes the file of slot m modulo
// Files. What it does follows from the seed, the disk and m alone, so what a
// folder must hold after m operations is known: a damaged, lost, stale or
// resurrected file is found. A file is written under a temporary name, made
// durable, renamed, and its folder made durable: at any instant the file of a
// slot is the old one or the new one, whole.
package filering

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	// Files is how many files a ring has at most.
	Files = 48
	// MaxSize is the largest content of a ring's file, in bytes.
	MaxSize = 64 << 10
	// tmpPrefix marks files that were being written when the machine stopped.
	tmpPrefix = ".tmp-"

	headerSize = 64
)

var magic = [8]byte{'L', 'F', 'F', 'I', 'L', 'E', '0', '1'}

// Ring is the history of one folder.
type Ring struct {
	Seed uint64
	Disk uint64 // tells the folders of one seed apart
}

// Op is one operation of a ring.
type Op struct {
	M      uint64
	Slot   uint64
	Delete bool
	Size   int64 // content bytes; 0 for a deletion
	seed   uint64
}

// Op tells operation m. One of eight deletes; sizes are 1 byte to MaxSize.
func (r Ring) Op(m uint64) Op {
	x := mix(r.Seed ^ mix(r.Disk<<56^m))
	op := Op{M: m, Slot: m % Files, seed: x}
	if x%8 == 0 {
		op.Delete = true
		return op
	}
	op.Size = 1 + int64((x>>8)%MaxSize)
	return op
}

// Name is the file name of a slot.
func Name(slot uint64) string { return fmt.Sprintf("file-%02d", slot) }

// Apply does operation m in dir and makes it durable. Doing it twice is the same as once.
func (r Ring) Apply(dir string, m uint64) error {
	op := r.Op(m)
	path := filepath.Join(dir, Name(op.Slot))
	if op.Delete {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("delete file of operation %d: %w", m, err)
		}
		return syncDir(dir)
	}
	_, err := Write(path, m, op.seed, op.Size)
	return err
}

// Write replaces a file by size bytes that follow from the seed, durably, and returns their SHA-256.
// The header holds m, the size and the hash, and is written last.
func Write(path string, m, seed uint64, size int64) ([sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	dir, name := filepath.Split(path)
	tmp := filepath.Join(dir, tmpPrefix+name)
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return sum, fmt.Errorf("write %s: %w", name, err)
	}
	defer f.Close()
	h := sha256.New()
	if err := fill(f, h, seed, size); err != nil {
		return sum, fmt.Errorf("write %s: %w", name, err)
	}
	var head [headerSize]byte
	copy(head[:], magic[:])
	binary.LittleEndian.PutUint64(head[8:], m)
	binary.LittleEndian.PutUint64(head[16:], uint64(size))
	copy(head[24:], h.Sum(sum[:0]))
	if _, err := f.WriteAt(head[:], 0); err != nil {
		return sum, fmt.Errorf("write %s: %w", name, err)
	}
	if err := f.Sync(); err != nil {
		return sum, fmt.Errorf("sync %s: %w", name, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return sum, fmt.Errorf("write %s: %w", name, err)
	}
	return sum, syncDir(dir)
}

// fill writes the content behind the room for the header.
func fill(f *os.File, h hash.Hash, seed uint64, size int64) error {
	buf := make([]byte, min(1<<20, (size+7)&^7))
	x := mix(seed) | 1
	for at := int64(0); at < size; {
		for i := 0; i+8 <= len(buf); i += 8 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			binary.LittleEndian.PutUint64(buf[i:], x)
		}
		part := buf[:min(int64(len(buf)), size-at)]
		h.Write(part)
		if _, err := f.WriteAt(part, headerSize+at); err != nil {
			return err
		}
		at += int64(len(part))
	}
	return nil
}

// ErrDamaged says that a file is not what its header says.
var ErrDamaged = errors.New("damaged file")

// Check reads a file written by Write and returns its m. ErrDamaged when header, length or hash do not agree.
func Check(path string) (m uint64, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var head [headerSize]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, 0, fmt.Errorf("%w: shorter than a header", ErrDamaged)
		}
		return 0, 0, err
	}
	if [8]byte(head[:8]) != magic {
		return 0, 0, fmt.Errorf("%w: no header", ErrDamaged)
	}
	m, size = binary.LittleEndian.Uint64(head[8:]), int64(binary.LittleEndian.Uint64(head[16:]))
	h := sha256.New()
	n, err := io.Copy(h, bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return m, size, err
	}
	if n != size {
		return m, size, fmt.Errorf("%w: %d bytes, header says %d", ErrDamaged, n, size)
	}
	if [sha256.Size]byte(h.Sum(nil)) != [sha256.Size]byte(head[24:24+sha256.Size]) {
		return m, size, fmt.Errorf("%w: SHA-256 differs", ErrDamaged)
	}
	return m, size, nil
}

// Verify checks a folder against the state after done operations. When
// inFlight, operation done+1 may have happened too. It returns how many files
// were checked and what is wrong.
func (r Ring) Verify(dir string, done uint64, inFlight bool) (files int, bad []string, err error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return 0, nil, fmt.Errorf("verify files: %w", err)
	}
	present := map[string]bool{}
	for _, e := range names {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			present[e.Name()] = true
		}
	}
	for slot := range uint64(Files) {
		name := Name(slot)
		was := present[name]
		delete(present, name)
		allowed := []Op{r.last(done, slot)}
		if inFlight && (done+1)%Files == slot {
			allowed = append(allowed, r.Op(done+1))
		}
		if !was {
			if !absentAllowed(allowed) {
				bad = append(bad, fmt.Sprintf("%s is missing, operation %d wrote it", name, allowed[0].M))
			}
			continue
		}
		files++
		m, size, err := Check(filepath.Join(dir, name))
		switch {
		case errors.Is(err, ErrDamaged):
			bad = append(bad, fmt.Sprintf("%s: %v", name, err))
		case err != nil:
			return files, bad, fmt.Errorf("verify %s: %w", name, err)
		case !writtenBy(allowed, m, size):
			bad = append(bad, fmt.Sprintf("%s is of operation %d, after %d operations it must be of %d", name, m, done, allowed[0].M))
		}
	}
	for name := range present {
		bad = append(bad, "unknown file "+name)
	}
	return files, bad, nil
}

// last is the newest operation up to done on a slot; M is 0 when there was none.
func (r Ring) last(done, slot uint64) Op {
	back := (done%Files + Files - slot) % Files
	if back >= done {
		return Op{Slot: slot, Delete: true}
	}
	return r.Op(done - back)
}

func absentAllowed(ops []Op) bool {
	for _, op := range ops {
		if op.Delete {
			return true
		}
	}
	return false
}

func writtenBy(ops []Op, m uint64, size int64) bool {
	for _, op := range ops {
		if !op.Delete && op.M == m && op.Size == size {
			return true
		}
	}
	return false
}

// VerifyLoose checks every file of a folder by its own header only.
func VerifyLoose(dir string) (files int, bad []string, err error) {
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, fmt.Errorf("verify files: %w", err)
	}
	for _, e := range names {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		files++
		_, _, err := Check(filepath.Join(dir, e.Name()))
		if errors.Is(err, ErrDamaged) {
			bad = append(bad, fmt.Sprintf("%s: %v", e.Name(), err))
		} else if err != nil {
			return files, bad, fmt.Errorf("verify %s: %w", e.Name(), err)
		}
	}
	return files, bad, nil
}

// RemoveTemporary deletes what writes left behind when the machine stopped.
func RemoveTemporary(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, tmpPrefix+"*"))
	if err != nil {
		return err
	}
	for _, p := range left {
		if err := os.Remove(p); err != nil {
			return fmt.Errorf("remove a half-written file: %w", err)
		}
	}
	return nil
}

// mix spreads the bits of x (the finaliser of splitmix64).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
