package vdisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/extent"
)

// Disk is a virtual disk: what consumers of this package ask for. *Image is one. Offsets and sizes are in bytes; any
// alignment is allowed. Methods are safe for concurrent use; overlapping writes are not ordered.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	// Zero makes the range read as zeros, giving its space back where possible.
	Zero(r extent.Range) error
	// Sync makes every write that returned before durable.
	Sync() error
	// Size is the virtual size in bytes.
	Size() int64
	// Extents yields, ascending, the parts of r that may hold data; the rest reads as zeros.
	Extents(ctx context.Context, r extent.Range) iter.Seq2[extent.Range, error]
	// Close releases the disk without syncing it.
	Close() error
}

// Format is the format of an image file.
type Format string

// The formats. FormatAuto is for Open only.
const (
	// FormatAuto takes a name that ends in .vhd, or a file that ends in a valid footer of a matching size, for VHD, a name
	// that ends in .raw for raw whatever it contains, and everything else for raw. A guest can write what looks like a
	// footer into the last sector of its raw disk; whoever knows the format should say so.
	FormatAuto Format = "auto"
	// FormatRaw is the disk's bytes and nothing else.
	FormatRaw Format = "raw"
	// FormatVHD is a fixed VHD.
	FormatVHD Format = "vhd"
)

// Image is an open image file. It is a Disk.
type Image struct {
	f        *os.File
	path     string
	format   Format
	size     int64
	readOnly bool
	footer   Footer
	padding  int64
	noPunch  atomic.Bool // the file system cannot punch holes
}

var _ Disk = (*Image)(nil)

// Open opens the image at path, checks it whole, and, unless readOnly, locks it. Errors: ErrNotFound, ErrTruncated,
// ErrBadFooter, ErrUnsupported, ErrSectorSize, ErrTooLarge, ErrLocked, or one of the system.
func Open(path string, format Format, readOnly bool) (*Image, error) {
	img, err := open(path, format, readOnly)
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", path, err)
	}
	return img, nil
}

func open(path string, format Format, readOnly bool) (*Image, error) {
	// Looked at by name first: opening a pipe would block.
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%w: not a regular file", ErrUnsupported)
	}
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	} else if err != nil {
		return nil, err
	}
	img := &Image{f: f, path: path, readOnly: readOnly}
	if !readOnly { // before looking at what another owner may be changing
		err = lock(f)
	}
	if err == nil {
		err = img.identify(format)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return img, nil
}

// identify finds out format and size, and checks the footer.
func (d *Image) identify(format Format) error {
	st, err := d.f.Stat()
	if err != nil {
		return err
	}
	fileSize := st.Size()
	if fileSize == 0 {
		return fmt.Errorf("%w: the file is empty", ErrTruncated)
	}
	head := make([]byte, FooterSize)
	n, err := d.f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	head = head[:n]
	footer, footerErr := d.readFooter(fileSize, head)
	if footerErr != nil && !isImageError(footerErr) {
		return footerErr
	}
	switch format {
	case FormatRaw, FormatVHD:
	case FormatAuto:
		switch ext := strings.ToLower(filepath.Ext(d.path)); {
		case ext == ".vhd":
			format = FormatVHD
		case ext == ".vhdx", strings.HasPrefix(string(head), "vhdxfile"):
			return fmt.Errorf("%w: VHDX", ErrUnsupported)
		case ext == ".raw":
			format = FormatRaw
		case ext == ".qcow2", strings.HasPrefix(string(head), "QFI\xfb"):
			return fmt.Errorf("%w: qcow2", ErrUnsupported)
		case footerErr == nil, errors.Is(footerErr, ErrUnsupported):
			format = FormatVHD
		default:
			format = FormatRaw
		}
	default:
		return fmt.Errorf("%w: format %q", ErrUnsupported, format)
	}
	d.format = format
	if format == FormatVHD {
		d.footer, d.size = footer, footer.CurrentSize
		return footerErr
	}
	if fileSize%SectorSize != 0 {
		return fmt.Errorf("%w: %d", ErrSectorSize, fileSize)
	}
	d.size = fileSize
	return nil
}

// readFooter reads and checks the footer of a file taken for a VHD; head is the start of the file.
func (d *Image) readFooter(fileSize int64, head []byte) (Footer, error) {
	if fileSize < FooterSize {
		return Footer{}, fmt.Errorf("%w: %d bytes are no VHD", ErrTruncated, fileSize)
	}
	p := make([]byte, FooterSize)
	if _, err := d.f.ReadAt(p, fileSize-FooterSize); err != nil {
		return Footer{}, err
	}
	footer, err := ParseFooter(p)
	if err != nil {
		// A dynamic disk has a copy of its footer in front: its type is a better reason than a missing tail.
		if front, frontErr := ParseFooter(head); frontErr == nil && front.Type != TypeFixed {
			return Footer{}, fmt.Errorf("%w: %v VHD", ErrUnsupported, front.Type)
		}
		return Footer{}, err
	}
	switch want := footer.CurrentSize + FooterSize; {
	case footer.Type != TypeFixed:
		return Footer{}, fmt.Errorf("%w: %v VHD", ErrUnsupported, footer.Type)
	case fileSize < want:
		return Footer{}, fmt.Errorf("%w: %d bytes, its footer asks for %d", ErrTruncated, fileSize, want)
	case fileSize > want:
		return Footer{}, fmt.Errorf("%w: it asks for a file of %d bytes, which has %d", ErrBadFooter, want, fileSize)
	}
	return footer, nil
}

// isImageError reports whether err is a verdict about the image, not trouble reading it.
func isImageError(err error) bool {
	for _, target := range []error{ErrTruncated, ErrBadFooter, ErrUnsupported, ErrSectorSize, ErrTooLarge} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// CreateVHD is Create for FormatVHD.
func CreateVHD(path string, size int64) (*Image, error) { return Create(path, FormatVHD, size) }

// Create makes an empty image of size bytes, all absent space, opens it for writing and locks it. The size of a VHD is
// rounded up to Alignment: Size is then larger than asked for, by Padding. Nothing is left behind on error. Errors:
// ErrExists, ErrSectorSize, ErrTooLarge, ErrUnsupported for other formats. The image is durable after Sync; its name
// in the folder is the caller's to sync.
func Create(path string, format Format, size int64) (*Image, error) {
	img, err := create(path, format, size)
	if err != nil {
		return nil, fmt.Errorf("create image %s: %w", path, err)
	}
	return img, nil
}

func create(path string, format Format, size int64) (*Image, error) {
	switch {
	case format != FormatRaw && format != FormatVHD:
		return nil, fmt.Errorf("%w: format %q", ErrUnsupported, format)
	case size <= 0:
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	case size%SectorSize != 0:
		return nil, fmt.Errorf("%w: %d", ErrSectorSize, size)
	}
	d := &Image{path: path, format: format, size: size}
	fileSize := size
	if format == FormatVHD {
		if err := checkVHDSize(size); err != nil { // before padding, which could overflow
			return nil, err
		}
		d.size, d.padding = Pad(size)
		var err error
		if d.footer, err = NewFooter(d.size, uuid.New(), time.Now()); err != nil {
			return nil, err
		}
		fileSize = d.size + FooterSize
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: %w", ErrExists, err)
	} else if err != nil {
		return nil, err
	}
	d.f = f
	if err = lock(f); err == nil {
		err = makeSparse(f)
	}
	if err == nil {
		err = f.Truncate(fileSize)
	}
	if err == nil && format == FormatVHD {
		footer := d.footer.Bytes()
		_, err = f.WriteAt(footer[:], d.size)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return d, nil
}

// Padding returns how many bytes Create added to the size asked for.
func (d *Image) Padding() int64 { return d.padding }

// Format returns FormatRaw or FormatVHD.
func (d *Image) Format() Format { return d.format }

// Path returns the path the image was opened by.
func (d *Image) Path() string { return d.path }

// Footer returns the footer of a VHD, and whether the image is one.
func (d *Image) Footer() (Footer, bool) { return d.footer, d.format == FormatVHD }

// Size returns the virtual size in bytes.
func (d *Image) Size() int64 { return d.size }

// ReadAt reads from the virtual disk. Reading over its end gives what there is and io.EOF.
func (d *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at %d: %w", d.path, off, ErrRange)
	}
	short := false
	if rest := max(d.size-off, 0); int64(len(p)) > rest {
		p, short = p[:rest], true
	}
	n, err := d.f.ReadAt(p, off)
	if err != nil {
		return n, fmt.Errorf("read %s at %d: %w", d.path, off, eofIsTruncated(err))
	}
	if short {
		return n, io.EOF
	}
	return n, nil
}

// eofIsTruncated turns the end of the file, met inside the disk, into what it means: somebody cut the image.
func eofIsTruncated(err error) error {
	if errors.Is(err, io.EOF) {
		return ErrTruncated
	}
	return err
}

// WriteAt writes to the virtual disk. Errors: ErrReadOnly, ErrRange (nothing is written), or one of the system.
func (d *Image) WriteAt(p []byte, off int64) (int, error) {
	if err := d.mayWrite(off, int64(len(p))); err != nil {
		return 0, fmt.Errorf("write %s at %d: %w", d.path, off, err)
	}
	n, err := d.f.WriteAt(p, off)
	if err != nil {
		return n, fmt.Errorf("write %s at %d: %w", d.path, off, err)
	}
	return n, nil
}

// Zero makes r read as zeros. Where the file system can, its space becomes absent; elsewhere zeros are written to the
// parts that may hold data. Errors as of WriteAt.
func (d *Image) Zero(r extent.Range) error {
	if err := d.mayWrite(r.Off, r.Len); err != nil {
		return fmt.Errorf("zero %s %v: %w", d.path, r, err)
	}
	if r.Empty() {
		return nil
	}
	if !d.noPunch.Load() {
		switch err := punch(d.f, r); {
		case err == nil:
			return nil
		case !errors.Is(err, errors.ErrUnsupported):
			return fmt.Errorf("zero %s %v: %w", d.path, r, err)
		}
		d.noPunch.Store(true)
	}
	return d.writeZeros(r)
}

// zeroChunk is how much is written at a time where space cannot be given back, in bytes.
const zeroChunk = 1 << 20

func (d *Image) writeZeros(r extent.Range) error {
	buf := make([]byte, min(zeroChunk, r.Len))
	for have, err := range d.Extents(context.Background(), r) { // local and bounded by r
		if err != nil {
			return err
		}
		for off := have.Off; off < have.End(); off += int64(len(buf)) {
			if _, err := d.WriteAt(buf[:min(int64(len(buf)), have.End()-off)], off); err != nil {
				return err
			}
		}
	}
	return nil
}

// Sync makes every write that returned before durable.
func (d *Image) Sync() error {
	if d.readOnly {
		return nil
	}
	if err := datasync(d.f); err != nil {
		return fmt.Errorf("sync %s: %w", d.path, err)
	}
	return nil
}

// Extents yields, ascending, the parts of r that may hold data, as the file system knows them (on systems that cannot
// tell, all of r). The parts of r between them read as zeros. r is clipped to the disk. What is written meanwhile may
// or may not be seen.
func (d *Image) Extents(ctx context.Context, r extent.Range) iter.Seq2[extent.Range, error] {
	r = r.Intersect(extent.Range{Len: d.size})
	return func(yield func(extent.Range, error) bool) {
		for at := r.Off; at < r.End(); {
			if err := ctx.Err(); err != nil {
				yield(extent.Range{}, err)
				return
			}
			have, err := nextData(d.f, at, r.End())
			if err != nil {
				yield(extent.Range{}, fmt.Errorf("map %s at %d: %w", d.path, at, err))
				return
			}
			if have.Empty() || !yield(have, nil) {
				return
			}
			at = have.End()
		}
	}
}

// Close releases the image and its lock. It does not sync.
func (d *Image) Close() error {
	if err := d.f.Close(); err != nil {
		return fmt.Errorf("close %s: %w", d.path, err)
	}
	return nil
}

func (d *Image) mayWrite(off, n int64) error {
	switch {
	case d.readOnly:
		return ErrReadOnly
	case off < 0 || n < 0 || off > d.size || n > d.size-off:
		return ErrRange
	}
	return nil
}
