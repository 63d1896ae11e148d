package changetracker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

var errDead = errors.New("the process is dead")

// simFiles is a host's storage in memory that survives the trackers that run on it. It can stop at any operation, and
// then keeps all that was written (kill) or loses what was not synced, sector by sector (power).
type simFiles struct {
	mu    sync.Mutex
	rng   *rand.Rand
	files map[string]*simFile
	logs  map[string]*simLog
	whole map[string][]byte // written by Replace
	dead  bool
	left  int  // operations until death; negative for never
	full  bool // the volume is full

	noReplace bool              // Replace dies
	noMarks   bool              // writes to sidecars fail
	onReplace func(path string) // called before Replace
	onLog     func()            // called before CreateLog
}

const simSector = 512

// simFile is a file whose writes are durable only after Sync.
type simFile struct {
	fs     *simFiles
	path   string
	cur    []byte
	synced map[int64][][]byte // sector -> its versions since the last Sync, the durable one first
	clock  int64
}

type simLog struct {
	fs       *simFiles
	id, prev uuid.UUID
	entries  []extent.Range
	pos      []int64
	data     []byte
	sealed   bool
}

func newSimFiles(seed uint64) *simFiles {
	return &simFiles{
		rng: rand.New(rand.NewPCG(seed, 7)), files: map[string]*simFile{}, logs: map[string]*simLog{},
		whole: map[string][]byte{}, left: -1,
	}
}

// step counts an operation. It needs fs.mu. half reports that death comes in the middle of this very operation.
func (s *simFiles) step() (half bool, err error) {
	if s.dead {
		return false, errDead
	}
	if s.left == 0 {
		s.dead = true
		return s.rng.IntN(2) == 0, errDead
	}
	if s.left > 0 {
		s.left--
	}
	return false, nil
}

func (s *simFiles) isDead() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

// kill stops everything at once.
func (s *simFiles) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
}

// reboot makes the storage usable again after a death, or after a clean end. Power loses unsynced sectors.
func (s *simFiles) reboot(power bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path, l := range s.logs {
		if !l.sealed && s.rng.IntN(2) == 0 {
			delete(s.logs, path)
		}
	}
	if power {
		for _, f := range s.files {
			for sector, versions := range f.synced {
				copy(f.cur[sector*simSector:], versions[s.rng.IntN(len(versions))])
			}
			f.synced = map[int64][][]byte{}
		}
	}
	s.dead, s.left, s.full = false, -1, false
}

func (s *simFiles) image(path string, size int64) {
	s.files[path] = &simFile{fs: s, path: path, cur: make([]byte, size), synced: map[int64][][]byte{}}
}

func (f *simFile) ReadAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.dead {
		return 0, errDead
	}
	n := copy(p, f.cur[min(off, int64(len(f.cur))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *simFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.noMarks && strings.HasSuffix(f.path, "lfx") {
		return 0, syscall.EIO
	}
	half, err := f.fs.step()
	if err != nil && !half {
		return 0, err
	}
	if err != nil {
		p = p[:len(p)/simSector/2*simSector]
	}
	f.put(p, off)
	return len(p), err
}

func (f *simFile) put(p []byte, off int64) {
	if grow := off + int64(len(p)) - int64(len(f.cur)); grow > 0 {
		f.cur = append(f.cur, make([]byte, grow)...)
	}
	f.clock++
	first, last := off/simSector, (off+int64(len(p))+simSector-1)/simSector
	for s := first; s < last; s++ {
		if f.synced[s] == nil {
			f.synced[s] = [][]byte{bytes.Clone(f.sector(s))}
		}
	}
	copy(f.cur[off:], p)
	for s := first; s < last; s++ {
		f.synced[s] = append(f.synced[s], bytes.Clone(f.sector(s)))
	}
}

func (f *simFile) sector(s int64) []byte {
	return f.cur[s*simSector : min((s+1)*simSector, int64(len(f.cur)))]
}

func (f *simFile) Sync() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	half, err := f.fs.step()
	if err != nil {
		if half {
			for s := range f.synced {
				if f.fs.rng.IntN(2) == 0 {
					delete(f.synced, s)
				}
			}
		}
		return err
	}
	clear(f.synced)
	return nil
}

func (f *simFile) Close() error { return nil }
func (f *simFile) Size() int64  { return int64(len(f.cur)) }

func (f *simFile) Zero(r extent.Range) error {
	_, err := f.WriteAt(make([]byte, r.Len), r.Off)
	return err
}

// Allocated calls every 64 KiB that is zero absent.
func (f *simFile) Allocated(r extent.Range) (*extent.Set, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	set := &extent.Set{}
	for at := r.Off; at < r.End(); {
		end := min(r.End(), (at/65536+1)*65536)
		if !isZero(f.cur[at:end]) {
			set.Add(extent.Span(at, end))
		}
		at = end
	}
	return set, nil
}

func (l *simLog) Append(off uint64, p []byte) (int64, error) {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	if _, err := l.fs.step(); err != nil {
		return 0, err
	}
	if l.fs.full {
		return 0, syscall.ENOSPC
	}
	pos := int64(len(l.data))
	l.data = append(l.data, p...)
	l.entries = append(l.entries, extent.Range{Off: int64(off), Len: int64(len(p))})
	l.pos = append(l.pos, pos)
	return pos, nil
}

func (l *simLog) Position() int64 { return int64(len(l.data)) + 4096 }

func (l *simLog) Close() error {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	half, err := l.fs.step()
	if err == nil && l.fs.full && l.fs.rng.IntN(4) == 0 {
		return syscall.ENOSPC
	}
	if err == nil || half {
		l.sealed = true
	}
	return err
}

func (l *simLog) Abort() error { return nil }

type simLogReader struct{ *simLog }

func (l simLogReader) UniqueID() uuid.UUID { return l.id }
func (l simLogReader) Close() error        { return nil }
func (l simLogReader) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, l.data[off:]), nil
}

func (l simLogReader) Entries(visit func(extent.Range, int64) error) error {
	for i, e := range l.entries {
		if err := visit(e, l.pos[i]); err != nil {
			return err
		}
	}
	return nil
}

func (s *simFiles) OpenImage(path string, _ Format) (image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[path] == nil {
		return nil, fs.ErrNotExist
	}
	return s.files[path], nil
}

func (s *simFiles) Identity(path string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[path] == nil {
		return "", fs.ErrNotExist
	}
	return path, nil
}

func (s *simFiles) Lock(string) (io.Closer, error) { return io.NopCloser(nil), nil }

func (s *simFiles) Print(path string) (print, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[path]
	return print{Bytes: f.Size(), MTime: time.Unix(f.clock, 0).UTC()}, nil
}

func (s *simFiles) OpenFile(path string) (sidecar.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[path] == nil {
		return nil, fs.ErrNotExist
	}
	return s.files[path], nil
}

func (s *simFiles) CreateFile(path string, size int64) (sidecar.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.step(); err != nil {
		return nil, err
	}
	if s.full {
		return nil, syscall.ENOSPC
	}
	f := &simFile{fs: s, path: path, cur: make([]byte, size), synced: map[int64][][]byte{}}
	s.files[path] = f
	return f, nil
}

func (s *simFiles) CreateLog(path string, _ int64, id, prev uuid.UUID) (logWriter, error) {
	if f := s.onLog; f != nil {
		f()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.step(); err != nil {
		return nil, err
	}
	if s.full {
		return nil, syscall.ENOSPC
	}
	l := &simLog{fs: s, id: id, prev: prev}
	s.logs[path] = l
	return l, nil
}

func (s *simFiles) OpenLog(path string) (logReader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.logs[path]
	if l == nil {
		return nil, fs.ErrNotExist
	}
	if !l.sealed {
		return nil, errors.New("log was not closed")
	}
	return simLogReader{l}, nil
}

func (s *simFiles) ReadFile(path string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b, ok := s.whole[path]; ok {
		return bytes.Clone(b), nil
	}
	if f := s.files[path]; f != nil {
		return bytes.Clone(f.cur), nil
	}
	return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
}

func (s *simFiles) Replace(path string, content []byte) error {
	if f := s.onReplace; f != nil {
		f(path)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noReplace {
		s.dead = true
		return errDead
	}
	half, err := s.step()
	if err == nil && s.full && s.rng.IntN(2) == 0 {
		return syscall.ENOSPC
	}
	if err == nil || half {
		s.whole[path] = bytes.Clone(content)
	}
	return err
}

func (s *simFiles) Remove(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.step(); err != nil {
		return err
	}
	delete(s.files, path)
	delete(s.logs, path)
	delete(s.whole, path)
	return nil
}

func (s *simFiles) List(dir, prefix string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return nil, errDead
	}
	var names []string
	add := func(path string) {
		if filepath.Dir(path) == dir && strings.HasPrefix(filepath.Base(path), prefix) {
			names = append(names, filepath.Base(path))
		}
	}
	for p := range s.files {
		add(p)
	}
	for p := range s.logs {
		add(p)
	}
	for p := range s.whole {
		add(p)
	}
	return names, nil
}

// snapshot copies the image as the guest sees it.
func (s *simFiles) snapshot(path string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.files[path].cur)
}
