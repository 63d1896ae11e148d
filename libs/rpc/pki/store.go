package pki

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	tmpPrefix = ".tmp-"
	// tmpAge is when a temporary file counts as left over by a killed process. Writing one takes
	// milliseconds.
	tmpAge = time.Hour
)

// writeTemp writes data to a new synced file of the folder and returns its path.
func writeTemp(dir string, data []byte, mode fs.FileMode) (path string, err error) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	path = filepath.Join(dir, tmpPrefix+hex.EncodeToString(b[:]))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", errors.Join(err, os.Remove(path))
	}
	return path, nil
}

// createOnly writes the file unless it exists; it returns what the file holds then.
func createOnly(path string, mode fs.FileMode, make func() ([]byte, error)) ([]byte, error) {
	if have, err := os.ReadFile(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return have, err
	}
	data, err := make()
	if err != nil {
		return nil, err
	}
	tmp, err := writeTemp(filepath.Dir(path), data, mode)
	if err != nil {
		return nil, err
	}
	err = os.Link(tmp, path)
	if rerr := os.Remove(tmp); rerr != nil && err == nil {
		err = rerr
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// replace writes the file, whole or not at all.
func replace(path string, mode fs.FileMode, data []byte) error {
	tmp, err := writeTemp(filepath.Dir(path), data, mode)
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

// makeDir creates the folder, closed to other users, and removes what killed processes left in it.
func makeDir(dir string, now time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > tmpAge {
			_ = os.Remove(filepath.Join(dir, e.Name())) // another process may be as quick
		}
	}
	return nil
}
