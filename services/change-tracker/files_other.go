//go:build !linux

package changetracker

import (
	"io"
	"os"
	"path/filepath"
)

func datasync(f *os.File) error { return f.Sync() }

func reserve(*os.File, int64) error { return nil }

// syncDir does nothing: NTFS journals names, and Go cannot flush a folder there.
func syncDir(string) error { return nil }

// lockFile opens the file; images are opened without sharing for writing, which keeps a second tracker out.
func lockFile(path string) (io.Closer, error) { return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) }

// identity resolves symbolic links; hard links are not seen here.
func identity(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(real); err != nil {
		return "", err
	}
	return filepath.Abs(real)
}

// punchesHoles: zeroing a range may cost a write of zeros.
const punchesHoles = false
