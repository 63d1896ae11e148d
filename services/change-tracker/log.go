package changetracker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

const (
	logSuffix  = ".hrl"
	zeroSuffix = ".lfz"
	zeroMagic  = "LFZEROES"
	zeroSize   = 32 // bytes of the head and of each zero record
	maxAppend  = 8 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// logFile is one log of a disk with its zero records. The disk's logMu guards it until it is sealed; a sealed log
// does not change.
type logFile struct {
	rec  logRecord
	path string
	gen  uint64 // order of the logs of a disk within this process
	w    logWriter
	zero sidecar.File // nil until the first zero record
	// touched are the extents it holds writes of; nil for a log of an earlier process, see extents.
	touched sidecar.Bits
	data    int64 // bytes of data
	sealed  bool
}

func zeroPath(logPath string) string { return strings.TrimSuffix(logPath, logSuffix) + zeroSuffix }

func (d *disk) newLog(previous uuid.UUID) (*logFile, error) {
	d.logMu.Lock()
	d.gen++
	gen := d.gen
	d.number++
	name := fmt.Sprintf("%s%08d%s", d.prefix, d.number, logSuffix)
	d.logMu.Unlock()
	l := &logFile{
		rec:  logRecord{File: name, ID: uuid.New(), Previous: previous},
		path: filepath.Join(d.dir, name), gen: gen, touched: sidecar.NewBits(sidecar.Extents(d.size)),
	}
	if err := d.m.t.files.Remove(l.path); err != nil {
		return nil, err
	}
	w, err := d.m.t.files.CreateLog(l.path, d.size, l.rec.ID, previous)
	if err != nil {
		return nil, err
	}
	l.w = w
	return l, nil
}

// append logs p written at off.
func (l *logFile) append(off int64, p []byte) error {
	l.touched.Add(extent.Range{Off: off, Len: int64(len(p))})
	for len(p) > 0 {
		n := min(len(p), maxAppend)
		if _, err := l.w.Append(uint64(off), p[:n]); err != nil {
			return err
		}
		l.rec.Entries++
		l.data += int64(n)
		off, p = off+int64(n), p[n:]
	}
	return nil
}

// appendZero logs that r became zero after the entries so far.
func (l *logFile) appendZero(files files, r extent.Range) error {
	l.touched.Add(r)
	if l.zero == nil {
		f, err := files.CreateFile(zeroPath(l.path), 0)
		if err != nil {
			return err
		}
		l.zero = f
		if _, err := f.WriteAt(zeroHead(l.rec.ID), 0); err != nil {
			return err
		}
	}
	b := make([]byte, zeroSize)
	binary.LittleEndian.PutUint64(b, uint64(l.rec.Entries))
	binary.LittleEndian.PutUint64(b[8:], uint64(r.Off))
	binary.LittleEndian.PutUint64(b[16:], uint64(r.Len))
	binary.LittleEndian.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
	if _, err := l.zero.WriteAt(b, zeroSize*(1+l.rec.Zeros)); err != nil {
		return err
	}
	l.rec.Zeros++
	return nil
}

func zeroHead(id uuid.UUID) []byte {
	b := make([]byte, zeroSize)
	copy(b, zeroMagic)
	binary.LittleEndian.PutUint32(b[8:], stateVersion)
	copy(b[16:], id[:])
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b[16:], castagnoli))
	return b
}

// seal makes the log and its zero records durable and closes them. A log that could not be sealed never can be.
func (l *logFile) seal() error {
	if l.sealed {
		return nil
	}
	if l.w == nil {
		return fmt.Errorf("log %s was lost", l.rec.File)
	}
	l.rec.Bytes = l.w.Position()
	err := l.w.Close()
	if l.zero != nil {
		if syncErr := l.zero.Sync(); err == nil {
			err = syncErr
		}
		if closeErr := l.zero.Close(); err == nil {
			err = closeErr
		}
	}
	l.w, l.zero = nil, nil
	l.sealed = err == nil
	if err != nil {
		return fmt.Errorf("seal log %s: %w", l.rec.File, err)
	}
	return nil
}

// drop closes the log, sealed or not, and removes its files.
func (l *logFile) drop(files files) error {
	var errs []error
	if l.w != nil {
		errs = append(errs, l.w.Abort())
	}
	if l.zero != nil {
		errs = append(errs, l.zero.Close())
	}
	l.w, l.zero = nil, nil
	errs = append(errs, files.Remove(l.path), files.Remove(zeroPath(l.path)))
	return errors.Join(errs...)
}

// change is one logged change of a disk: data at pos of the log, or zero.
type change struct {
	r    extent.Range
	pos  int64
	zero bool
}

// openSealed opens a sealed log and checks that it is the one that the record names.
func openSealed(files files, dir string, rec logRecord) (logReader, error) {
	r, err := files.OpenLog(filepath.Join(dir, rec.File))
	if err != nil {
		return nil, fmt.Errorf("%w: log %s: %w", ErrBroken, rec.File, err)
	}
	if r.UniqueID() != rec.ID {
		return nil, errors.Join(fmt.Errorf("%w: log %s is %s, not %s", ErrBroken, rec.File, r.UniqueID(), rec.ID), r.Close())
	}
	return r, nil
}

// changes calls visit for every change of a sealed log in the order it happened.
func changes(files files, dir string, rec logRecord, r logReader, size int64, visit func(change)) error {
	zeros, err := readZeros(files, dir, rec)
	if err != nil {
		return err
	}
	entries, z := int64(0), 0
	emit := func() error {
		for ; z < len(zeros) && zeros[z].pos == entries; z++ {
			if zeros[z].r.End() > size {
				return fmt.Errorf("%w: zero record beyond the disk in %s", ErrBroken, rec.File)
			}
			visit(zeros[z])
		}
		return nil
	}
	err = r.Entries(func(e extent.Range, pos int64) error {
		if err := emit(); err != nil {
			return err
		}
		if !e.Valid() || e.End() > size {
			return fmt.Errorf("%w: entry beyond the disk in %s", ErrBroken, rec.File)
		}
		visit(change{r: e, pos: pos})
		entries++
		return nil
	})
	if err == nil {
		err = emit()
	}
	if err == nil && (entries != rec.Entries || z != len(zeros)) {
		err = fmt.Errorf("%d entries and %d zero records of %d and %d", entries, z, rec.Entries, rec.Zeros)
	}
	if err != nil && !errors.Is(err, ErrBroken) {
		err = fmt.Errorf("%w: log %s: %w", ErrBroken, rec.File, err)
	}
	return err
}

// readZeros returns the zero records of a log; pos is the number of entries before each.
func readZeros(files files, dir string, rec logRecord) ([]change, error) {
	if rec.Zeros == 0 {
		return nil, nil
	}
	broken := func(why string) error { return fmt.Errorf("%w: zero records of %s: %s", ErrBroken, rec.File, why) }
	b, err := files.ReadFile(zeroPath(filepath.Join(dir, rec.File)))
	if err != nil {
		return nil, broken(err.Error())
	}
	if int64(len(b)) < zeroSize*(1+rec.Zeros) {
		return nil, broken("file is short")
	}
	if string(b[:zeroSize]) != string(zeroHead(rec.ID)) {
		return nil, broken("head does not match")
	}
	list := make([]change, rec.Zeros)
	for i := range list {
		p := b[zeroSize*(1+i):][:zeroSize]
		c := change{
			r: extent.Range{
				Off: int64(binary.LittleEndian.Uint64(p[8:])), Len: int64(binary.LittleEndian.Uint64(p[16:])),
			},
			pos: int64(binary.LittleEndian.Uint64(p)), zero: true,
		}
		if binary.LittleEndian.Uint32(p[28:]) != crc32.Checksum(p[:28], castagnoli) || !c.r.Valid() || c.r.Empty() {
			return nil, broken("bad checksum")
		}
		list[i] = c
	}
	return list, nil
}

// extents returns the extents that a sealed log touches.
func (l *logFile) extents(d *disk) (sidecar.Bits, error) {
	if l.touched != nil {
		return l.touched, nil
	}
	r, err := openSealed(d.m.t.files, d.dir, l.rec)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	bits := sidecar.NewBits(sidecar.Extents(d.size))
	if err := changes(d.m.t.files, d.dir, l.rec, r, d.size, func(c change) { bits.Add(c.r) }); err != nil {
		return nil, err
	}
	return bits, nil
}
