package dir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Suffixes of a blob's files. '@' and '+' occur in no blob name, so a folder of the name's path never
// meets a blob of the same name.
const (
	suffixBlock = "@b" // file: a block blob
	suffixPages = "@p" // folder: a page blob
	suffixLease = "@l" // file: the lease of a block blob
)

// encodeName maps a blob name to a relative path. Upper case becomes '+' and lower case, so that names
// differing in case stay apart on file systems that fold it.
func encodeName(name string) (string, error) {
	var b strings.Builder
	start := 0
	for i := range len(name) {
		c := name[i]
		switch {
		case c >= 'A' && c <= 'Z':
			b.WriteByte('+')
			b.WriteByte(c + 'a' - 'A')
		case c == '/':
			b.WriteByte(filepath.Separator)
			start = b.Len()
		default:
			b.WriteByte(c)
		}
		if b.Len()-start > 250 {
			return "", fmt.Errorf("%w: blob name %q: segment too long for a file name", blobstore.ErrInvalid, name)
		}
	}
	return b.String(), nil
}

// decodeSegment undoes encodeName for one path element; ok is false for what encodeName never makes.
func decodeSegment(enc string) (string, bool) {
	if !strings.ContainsRune(enc, '+') {
		return enc, true
	}
	var b strings.Builder
	for i := 0; i < len(enc); i++ {
		c := enc[i]
		if c == '+' {
			i++
			if i == len(enc) || enc[i] < 'a' || enc[i] > 'z' {
				return "", false
			}
			c = enc[i] - 'a' + 'A'
		}
		b.WriteByte(c)
	}
	return b.String(), true
}

// storageErr turns a full disk into blobstore.ErrFull and leaves other errors alone.
func storageErr(err error) error {
	if err != nil && isFull(err) && !errors.Is(err, blobstore.ErrFull) {
		return fmt.Errorf("%w: %w", blobstore.ErrFull, err)
	}
	return err
}

func (s *Store) syncFile(f *os.File) error {
	if s.opts.NoSync {
		return nil
	}
	return f.Sync()
}

func (s *Store) syncData(f *os.File) error {
	if s.opts.NoSync {
		return nil
	}
	return fdatasync(f)
}

// syncDir makes a folder's entries durable.
func (s *Store) syncDir(path string) error {
	if s.opts.NoSync {
		return nil
	}
	return syncDir(path)
}

// writeFile makes a small file durable under a name that nobody else uses.
func (s *Store) writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = s.syncFile(f)
	}
	return errors.Join(err, f.Close())
}

// maxPlace bounds the retries of place when another process keeps removing the folder as empty.
const maxPlace = 1000

// place runs put, which puts an entry into folder parent of the container, making parent as needed; and
// makes the entry durable. put may be called again after fs.ErrNotExist, which a concurrent Delete of the
// folder's last blob causes.
func (c *container) place(parent string, put func() error) error {
	var err error
	for range maxPlace {
		if err = put(); err == nil {
			return c.syncPath(parent)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, serr := os.Stat(c.path); serr != nil {
			return blobstore.ErrNoContainer
		}
		if merr := c.mkdirs(parent); merr != nil {
			return merr
		}
	}
	return err
}

// mkdirs makes the folders between the container and path, but never the container.
func (c *container) mkdirs(path string) error {
	if path == c.path {
		return nil
	}
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := c.mkdirs(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil // missing again: place tries again
}

// maxSynced bounds the memory of folders known to be durable.
const maxSynced = 4096

// syncPath makes path's entries durable, and path's own entry and its parents' up to the container, unless
// this process has done that for this very folder before.
func (c *container) syncPath(path string) error {
	if c.s.opts.NoSync {
		return nil
	}
	for {
		if err := syncDir(path); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				// Someone deleted the new entry and the folder with it: nothing is left to make durable.
				return nil
			}
			return err
		}
		if path == c.path {
			return nil
		}
		st, err := os.Stat(path)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		c.s.syncedMu.Lock()
		old, ok := c.s.synced[path]
		if !ok || !os.SameFile(old, st) {
			if len(c.s.synced) >= maxSynced {
				clear(c.s.synced)
			}
			ok = false
		}
		c.s.syncedMu.Unlock()
		if ok {
			return nil
		}
		defer func(path string) { // recorded only once all above is durable
			c.s.syncedMu.Lock()
			c.s.synced[path] = st
			c.s.syncedMu.Unlock()
		}(path)
		path = filepath.Dir(path)
	}
}

// prune removes empty folders from path up to the container. A folder that gets an entry meanwhile stays.
func (c *container) prune(path string) {
	for len(path) > len(c.path) && os.Remove(path) == nil {
		path = filepath.Dir(path)
	}
}
