package changetracker

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// Format is the container format of an image.
type Format string

// The formats of images.
const (
	Raw Format = "raw"
	VHD Format = "vhd"
)

// image is one disk as the guest sees it. ReadAt and WriteAt stay within Size.
type image interface {
	io.ReaderAt
	io.WriterAt
	// Zero makes r read as zero, giving its space back where the file system can.
	Zero(r extent.Range) error
	// Sync makes every write that returned before durable.
	Sync() error
	Size() int64
	// Allocated returns the parts of r that may hold something other than zero.
	Allocated(r extent.Range) (*extent.Set, error)
	Close() error
}

// logWriter is an hrl.Writer.
type logWriter interface {
	Append(off uint64, p []byte) (dataPos int64, err error)
	Position() int64
	Close() error
	Abort() error
}

// logReader reads a sealed log.
type logReader interface {
	io.ReaderAt
	// UniqueID identifies the log, PreviousUniqueID the one before it.
	UniqueID() uuid.UUID
	// Entries calls visit for every write in order: its range on the disk and the position of its data in the log.
	Entries(visit func(r extent.Range, pos int64) error) error
	Close() error
}

// print is what tells that an image was changed by others.
type print struct {
	Bytes int64     `json:"bytes"`
	MTime time.Time `json:"mtime"`
}

// files is the storage that the tracker stands on. A test replaces it to fail and to lose what power loses.
type files interface {
	OpenImage(path string, format Format) (image, error)
	// Identity is equal for two paths, also by links, of one file.
	Identity(path string) (string, error)
	// Lock takes the exclusive lock of a file until it is closed.
	Lock(path string) (io.Closer, error)
	// Print describes an image that nobody writes.
	Print(path string) (print, error)
	// OpenFile opens an existing file for reading and writing.
	OpenFile(path string) (sidecar.File, error)
	// CreateFile makes a new file, replacing one of that name, with space for size bytes, and makes its name durable.
	CreateFile(path string, size int64) (sidecar.File, error)
	CreateLog(path string, size int64, id, previous uuid.UUID) (logWriter, error)
	// OpenLog opens a log and checks that it was sealed.
	OpenLog(path string) (logReader, error)
	ReadFile(path string) ([]byte, error)
	// Replace writes a whole file so that after any crash the old or the new content is there, and is durable when
	// it returns.
	Replace(path string, content []byte) error
	// Remove removes a file, durably: a sidecar that is not to be trusted must not come back. One that is absent is no
	// error.
	Remove(path string) error
	// List returns the names in dir that begin with prefix.
	List(dir, prefix string) ([]string, error)
}

// osFiles is files on the operating system.
type osFiles struct{ now func() time.Time }

func (osFiles) Identity(path string) (string, error) { return identity(path) }

func (osFiles) Lock(path string) (io.Closer, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return lockFile(path)
}

func (osFiles) Print(path string) (print, error) {
	st, err := os.Stat(path)
	if err != nil {
		return print{}, err
	}
	return print{Bytes: st.Size(), MTime: st.ModTime().UTC()}, nil
}

func (osFiles) OpenFile(path string) (sidecar.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return syncFile{f}, nil
}

func (osFiles) CreateFile(path string, size int64) (sidecar.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := reserve(f, size); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return syncFile{f}, nil
}

// syncFile makes data durable without the inode's times.
type syncFile struct{ *os.File }

func (f syncFile) Sync() error { return datasync(f.File) }

func (osFiles) ReadFile(path string) ([]byte, error) { return os.ReadFile(path) }

func (osFiles) Replace(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // absent once renamed
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func (osFiles) Remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func (osFiles) List(dir, prefix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
