package dir

import (
	"errors"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sharedCounters says that page writes of several holders may count at the same time.
const sharedCounters = true

func lockCall(f *os.File, offset, n int64, kind int16) error {
	lk := unix.Flock_t{Type: kind, Whence: 0, Start: offset, Len: n}
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// tryLock locks n bytes for this file description, all or none, without waiting.
func tryLock(f *os.File, offset, n int64, exclusive bool) (bool, error) {
	kind := int16(unix.F_RDLCK)
	if exclusive {
		kind = unix.F_WRLCK
	}
	err := lockCall(f, offset, n, kind)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("lock", err)
	}
	return true, nil
}

func unlock(f *os.File, offset, n int64) error {
	return os.NewSyscallError("unlock", lockCall(f, offset, n, unix.F_UNLCK))
}

// unlockHeld drops all of a guard's locks; dropping one that is not held is no error here.
func unlockHeld(f *os.File, base int64, held *[lockBytes]bool) error {
	*held = [lockBytes]bool{}
	return unlock(f, base, lockBytes)
}

func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG)
}

func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// bootID changes with every start of the machine: what was not fsynced before is not trusted after.
func bootID() (id [16]byte) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return randomBoot()
	}
	return hashBoot(raw)
}

// counters is the shared mapping of a state file's volatile part.
type counters struct {
	mem []byte
}

func mapCounters(f *os.File) (*counters, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, stateBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return &counters{mem}, nil
}

// slots copies both slots; one that is being written comes out torn and fails its checksum.
func (c *counters) slots(buf *[2 * slotBytes]byte) error {
	copy(buf[:], c.mem)
	return nil
}

func (c *counters) word(at int) *uint64 { return (*uint64)(unsafe.Pointer(&c.mem[at])) }

func (c *counters) add(at int) error           { atomic.AddUint64(c.word(at), 1); return nil }
func (c *counters) set(at int, v uint64) error { atomic.StoreUint64(c.word(at), v); return nil }
func (c *counters) get(at int) (uint64, error) { return atomic.LoadUint64(c.word(at)), nil }
func (c *counters) close() error               { return unix.Munmap(c.mem) }

// cloneFile shares the whole content of src with dst; false where the file system cannot.
func cloneFile(dst, src *os.File) bool {
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil
}

// nextData returns the first range at or after offset, ending by end, that may hold written bytes; ok is
// false when there is none.
func nextData(f *os.File, offset, end int64) (from, to int64, ok bool, err error) {
	from, err = unix.Seek(int(f.Fd()), offset, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, false, nil
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
		return offset, end, offset < end, nil
	case err != nil:
		return 0, 0, false, os.NewSyscallError("seek data", err)
	case from >= end:
		return 0, 0, false, nil
	}
	to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, false, os.NewSyscallError("seek hole", err)
	}
	return from, min(to, end), true, nil
}

// punchHole zeroes a range and frees it; false where the file system cannot.
func punchHole(f *os.File, offset, length int64) (bool, error) {
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS):
			return false, nil
		default:
			return false, os.NewSyscallError("punch hole", err)
		}
	}
}

// copyRange copies bytes between files at the same offset; false where the kernel cannot.
func copyRange(dst, src *os.File, offset, length int64) (bool, error) {
	for length > 0 {
		from, to := offset, offset
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(length), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
			return false, nil
		case err != nil:
			return false, os.NewSyscallError("copy range", err)
		case n == 0:
			return false, nil
		}
		offset, length = offset+int64(n), length-int64(n)
	}
	return true, nil
}

// makeSparse is not needed here: every file can have holes.
func makeSparse(*os.File) error { return nil }

// gone reports whether the file has been unlinked.
func gone(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink == 0
}
