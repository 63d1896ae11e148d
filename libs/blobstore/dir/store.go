package dir

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Names of the root's entries (docs/formats/dir-store.md).
const (
	formatFile    = "format.json"
	lockFile      = "lock"
	tmpDir        = "tmp"
	containersDir = "containers"

	formatName    = "landfall-dir-store"
	formatVersion = 1
)

// tick is the resolution of storage time: what NTFS keeps.
const tick = 100 * time.Nanosecond

// ErrClosed is returned by calls on a closed store.
var ErrClosed = errors.New("dir store is closed")

// Options tune a Store. The zero value is right for production.
type Options struct {
	// Clock is storage time; nil is time.Now. All processes on one root must agree on it.
	Clock func() time.Time
	// MaxOpen bounds the page blobs and snapshots kept open between calls; 0 is 128. Each costs two file handles.
	MaxOpen int
	// NoSync leaves out every fsync: for tests and throw-away folders. What survives a killed process
	// still does; what survives a power loss does not.
	NoSync bool
}

// Store is a blobstore.Store in a folder. It is safe for concurrent use.
type Store struct {
	root    string
	opts    Options
	boot    [16]byte
	handles *handleCache
	locks   chan *os.File // idle descriptions of the lock file
	closed  atomic.Bool

	session     string // this Store's temporary folder
	sessionLock *os.File
	tmpSeq      atomic.Uint64

	stampMu   sync.Mutex
	lastStamp time.Time

	syncedMu sync.Mutex
	synced   map[string]fs.FileInfo // folders whose way down from the container is known to be durable
}

var _ blobstore.Store = (*Store)(nil)

// Open opens the store in folder root, making it when it is missing or empty, and removes what dead
// processes left behind. A folder with other content, or of a newer format, is ErrInvalid.
func Open(root string, opts Options) (*Store, error) {
	if opts.Clock == nil {
		opts.Clock = time.Now
	}
	if opts.MaxOpen <= 0 {
		opts.MaxOpen = 128
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open dir store: %w", err)
	}
	s := &Store{
		root: root, opts: opts, boot: bootID(),
		locks:  make(chan *os.File, 64),
		synced: map[string]fs.FileInfo{},
	}
	s.handles = newHandleCache(opts.MaxOpen)
	if err := s.layout(); err != nil {
		return nil, fmt.Errorf("open dir store %s: %w", root, storageErr(err))
	}
	if err := s.openSession(); err != nil {
		return nil, fmt.Errorf("open dir store %s: %w", root, storageErr(err))
	}
	if err := s.probeTimes(); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("open dir store %s: %w", root, storageErr(err))
	}
	s.sweep()
	return s, nil
}

type format struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
}

// layout makes or checks the root.
func (s *Store) layout() error {
	if err := os.MkdirAll(s.root, 0o700); err != nil {
		return err
	}
	path := filepath.Join(s.root, formatFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.initRoot(path); err != nil {
			return err
		}
		raw, err = os.ReadFile(path)
	}
	if err != nil {
		return err
	}
	var f format
	if err := json.Unmarshal(raw, &f); err != nil || f.Format != formatName {
		return fmt.Errorf("%w: %s does not describe a dir store", blobstore.ErrInvalid, formatFile)
	}
	if f.Version != formatVersion {
		return fmt.Errorf("%w: format version %d, this program knows %d", blobstore.ErrInvalid, f.Version, formatVersion)
	}
	for _, d := range []string{tmpDir, containersDir} {
		if err := os.Mkdir(filepath.Join(s.root, d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return s.syncDir(s.root)
}

// initRoot puts format.json into an empty folder; another process may do the same.
func (s *Store) initRoot(path string) error {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if n := e.Name(); n != formatFile && !isFormatTemp(n) {
			return fmt.Errorf("%w: folder is neither empty nor a dir store (found %q)", blobstore.ErrInvalid, n)
		}
	}
	raw, err := json.Marshal(format{formatName, formatVersion})
	if err != nil {
		return err
	}
	tmp := filepath.Join(s.root, formatTempPrefix+rand.Text())
	if err := s.writeFile(tmp, append(raw, '\n')); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil { // the same bytes whoever wins
		return err
	}
	return s.syncDir(s.root)
}

const formatTempPrefix = ".format-"

func isFormatTemp(name string) bool {
	return len(name) > len(formatTempPrefix) && name[:len(formatTempPrefix)] == formatTempPrefix
}

// openSession makes the temporary folder of this Store and locks it for as long as the Store lives.
func (s *Store) openSession() error {
	for {
		var raw [8]byte
		_, _ = rand.Read(raw[:])
		id := binary.LittleEndian.Uint64(raw[:])
		f, err := s.openLockFile()
		if err != nil {
			return err
		}
		ok, err := tryLock(f, sessionOffset(id), 1, true)
		if err != nil || !ok {
			_ = f.Close()
			if err != nil {
				return err
			}
			continue
		}
		path := filepath.Join(s.root, tmpDir, fmt.Sprintf("%016x", id))
		if err := os.Mkdir(path, 0o700); err != nil {
			_ = f.Close()
			if errors.Is(err, fs.ErrExist) {
				continue
			}
			return err
		}
		s.session, s.sessionLock = path, f
		return nil
	}
}

// sweep removes the temporary folders of sessions whose process is gone. Errors leave work for the next Open.
func (s *Store) sweep() {
	entries, err := os.ReadDir(filepath.Join(s.root, tmpDir))
	if err != nil {
		return
	}
	f, err := s.openLockFile()
	if err != nil {
		return
	}
	defer f.Close()
	for _, e := range entries {
		var id uint64
		if n, err := fmt.Sscanf(e.Name(), "%016x", &id); n != 1 || err != nil {
			continue
		}
		if ok, err := tryLock(f, sessionOffset(id), 1, true); err != nil || !ok {
			continue
		}
		_ = os.RemoveAll(filepath.Join(s.root, tmpDir, e.Name()))
		_ = unlock(f, sessionOffset(id), 1)
	}
}

// probeTimes makes sure that the file system keeps modification times to one tick: they are the ETags of block blobs.
func (s *Store) probeTimes() error {
	path := s.tempPath()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	want := time.Date(2026, 1, 2, 3, 4, 5, 123456700, time.UTC)
	if err := os.Chtimes(path, want, want); err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.ModTime().Equal(want) {
		return fmt.Errorf("%w: the file system keeps modification times too coarsely (%s for %s)",
			blobstore.ErrInvalid, st.ModTime().UTC(), want)
	}
	return nil
}

// Close releases handles and the session. Calls in flight finish or fail.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	s.handles.close()
	_ = os.RemoveAll(s.session)
	err := s.sessionLock.Close()
	for {
		select {
		case f := <-s.locks:
			_ = f.Close()
		default:
			return err
		}
	}
}

// Now returns storage time: the machine's clock.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	if err := ctx.Err(); err != nil {
		return time.Time{}, err
	}
	return s.opts.Clock().UTC(), nil
}

// stamp returns storage time in ticks, never the same twice in this process and always after `after`.
func (s *Store) stamp(after time.Time) time.Time {
	s.stampMu.Lock()
	defer s.stampMu.Unlock()
	t := s.opts.Clock().UTC().Truncate(tick)
	for _, past := range []time.Time{after, s.lastStamp} {
		if !t.After(past) {
			t = past.UTC().Truncate(tick).Add(tick)
		}
	}
	s.lastStamp = t
	return t
}

// tempPath returns a fresh name in the session's folder.
func (s *Store) tempPath() string {
	return filepath.Join(s.session, fmt.Sprintf("%d", s.tmpSeq.Add(1)))
}

// CreateContainer makes a container; it is success when it exists.
func (s *Store) CreateContainer(ctx context.Context, name string) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	if err := blobstore.CheckContainerName(name); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(s.root, containersDir, name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create container %s: %w", name, storageErr(err))
	}
	if err := s.syncDir(filepath.Join(s.root, containersDir)); err != nil {
		return fmt.Errorf("create container %s: %w", name, storageErr(err))
	}
	return nil
}

// ListContainers yields container names in order.
func (s *Store) ListContainers(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := s.ready(ctx); err != nil {
			yield("", err)
			return
		}
		entries, err := os.ReadDir(filepath.Join(s.root, containersDir)) // sorted
		if err != nil {
			yield("", fmt.Errorf("list containers: %w", storageErr(err)))
			return
		}
		for _, e := range entries {
			n := e.Name()
			if len(n) < len(prefix) || n[:len(prefix)] != prefix || blobstore.CheckContainerName(n) != nil {
				continue
			}
			if !yield(n, nil) {
				return
			}
		}
	}
}

// Container returns a handle.
func (s *Store) Container(name string) blobstore.Container {
	return &container{s: s, name: name, path: filepath.Join(s.root, containersDir, name)}
}

func (s *Store) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return ErrClosed
	}
	return nil
}
