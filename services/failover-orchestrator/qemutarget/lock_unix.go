//go:build linux || darwin || freebsd

package qemutarget

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// errHeld is the answer of tryLock while a process holds the folder's lock: a QEMU, one that is being started, or an
// orchestrator that starts one.
var errHeld = errors.New("the folder's lock is held")

// supported is nil: this system has detached processes and locks that they inherit.
func supported() error { return nil }

// tryLock takes the folder's lock, or answers errHeld. Who has the file may hand it to a process: the lock is held until
// all of them have ended or closed it.
func tryLock(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o640)
		if err != nil {
			return nil, err
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			_ = f.Close()
			if errors.Is(err, syscall.EWOULDBLOCK) {
				return nil, errHeld
			}
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
		if same(f, path) {
			return f, nil
		}
		_ = f.Close() // it was removed, and perhaps made again, in between
	}
}

func same(f *os.File, path string) bool {
	ours, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(path)
	return err == nil && os.SameFile(ours, named)
}

// held reports whether a process has the folder's lock. It makes nothing.
func held(dir string) (bool, error) {
	f, err := os.Open(filepath.Join(dir, lockFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) // shared: those who only look do not meet
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// detach makes a process that signals to our group do not reach and that keeps the lock.
func detach(cmd *exec.Cmd, lock *os.File) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.ExtraFiles = []*os.File{lock}
}
