// Package vhdtarget is recovery target "vhd": a folder with one fixed VHD per
// disk and vm.json, ready for any hypervisor that reads VHD.
//
// A marker file names the failover that owns the folder and every file that it
// makes. Nothing is written before the marker is durable, and nothing is
// removed that it does not name.
package vhdtarget

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// MarkerFile names the owner of a folder (docs/formats/vhd-target.md).
const MarkerFile = ".landfall-failover.json"

// MachineFile describes the machine.
const MachineFile = "vm.json"

const markerVersion = 1

// marker is MarkerFile.
type marker struct {
	V             int      `json:"v"`
	Failover      string   `json:"failover"`
	CreatedFolder bool     `json:"created_folder"`
	Files         []string `json:"files"`
}

// Folder is a target folder of one failover.
type Folder struct {
	dir, failover string
}

// New returns the folder; nothing is touched.
func New(dir, failover string) (*Folder, error) {
	if !filepath.IsAbs(dir) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "target folder %q is not an absolute path", dir)
	}
	return &Folder{dir: filepath.Clean(dir), failover: failover}, nil
}

// Path is the folder.
func (f *Folder) Path() string { return f.dir }

// Check says whether the folder can be used: absent (its parent is there and writable), empty, or ours.
// It reports whether the folder exists.
func (f *Folder) Check() (exists bool, err error) {
	entries, err := os.ReadDir(f.dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		parent := filepath.Dir(f.dir)
		info, err := os.Stat(parent)
		if err != nil || !info.IsDir() {
			return false, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, "the folder above the target, %s, does not exist", parent)
		}
		return false, writable(parent)
	case err != nil:
		return false, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read target folder")
	}
	if m, err := f.marker(); err == nil && m.Failover == f.failover {
		return true, nil
	}
	for _, e := range entries {
		if e.Name() != f.temporaryMarker() {
			return true, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "target folder %s is not empty: it holds %s", f.dir, e.Name()).With("folder", f.dir)
		}
	}
	return true, writable(f.dir)
}

// writable tries to make a file.
func writable(dir string) error {
	t, err := os.CreateTemp(dir, ".landfall-probe-*")
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "write to %s", dir)
	}
	_ = t.Close()
	return os.Remove(t.Name())
}

func (f *Folder) temporaryMarker() string { return MarkerFile + "." + f.failover }

// Claim makes the folder this failover's, durably, and names the files that it will hold. existed is what Check said
// before the folder was made. Repeating it is harmless.
func (f *Folder) Claim(existed bool, files []string) error {
	if _, err := f.Check(); err != nil {
		return err
	}
	if m, err := f.marker(); err == nil && m.Failover == f.failover {
		return nil
	}
	if err := os.Mkdir(f.dir, 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "make target folder")
	}
	raw, err := json.MarshalIndent(marker{V: markerVersion, Failover: f.failover, CreatedFolder: !existed, Files: files}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode marker: %w", err)
	}
	if err := f.write(MarkerFile, f.temporaryMarker(), raw); err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "claim target folder")
	}
	return syncFolder(filepath.Dir(f.dir))
}

// WriteMachine writes vm.json.
func (f *Folder) WriteMachine(raw []byte) error {
	if err := f.write(MachineFile, partial(MachineFile), raw); err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "write %s", MachineFile)
	}
	return nil
}

// write makes a file appear whole or not at all.
func (f *Folder) write(name, temporary string, raw []byte) error {
	temp := filepath.Join(f.dir, temporary)
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	_, err = file.Write(raw)
	err = errors.Join(err, file.Sync(), file.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(temp, filepath.Join(f.dir, name)); err != nil {
		return err
	}
	return syncFolder(f.dir)
}

func (f *Folder) marker() (marker, error) {
	var m marker
	raw, err := os.ReadFile(filepath.Join(f.dir, MarkerFile))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("marker: %w", err)
	}
	if m.V != markerVersion {
		return m, fmt.Errorf("marker has version %d, this program reads %d", m.V, markerVersion)
	}
	return m, nil
}

// Remove removes what the marker names, then the marker, then the folder if this failover made it and it is empty.
// A folder that is gone, or was never claimed, is success; one that another failover claimed is refused. Files of
// others are left, and named in kept.
func (f *Folder) Remove() (kept []string, err error) {
	entries, err := os.ReadDir(f.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read target folder")
	}
	m, err := f.marker()
	switch {
	case errors.Is(err, os.ErrNotExist): // never claimed, or removed already
		_ = os.Remove(filepath.Join(f.dir, f.temporaryMarker()))
		return nil, nil
	case err != nil:
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read who owns %s", f.dir)
	case m.Failover != f.failover:
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "folder %s belongs to failover %s: it is left alone", f.dir, m.Failover)
	}
	ours := []string{MarkerFile, f.temporaryMarker(), partial(MachineFile)}
	for _, name := range m.Files {
		if name != filepath.Base(name) || strings.HasPrefix(name, "..") {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INTERNAL, "marker of %s names %q, which is not a plain file name", f.dir, name)
		}
		ours = append(ours, name, partial(name))
	}
	var problems []error
	for _, e := range entries {
		name := e.Name()
		if !slices.Contains(ours, name) {
			kept = append(kept, name)
			continue
		}
		if name == MarkerFile {
			continue // last
		}
		if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			problems = append(problems, err)
		}
	}
	if err := errors.Join(problems...); err != nil {
		return kept, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the test failover's files")
	}
	if err := os.Remove(filepath.Join(f.dir, MarkerFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return kept, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the marker")
	}
	if m.CreatedFolder && len(kept) == 0 {
		if err := os.Remove(f.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return kept, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the folder")
		}
	}
	return kept, nil
}

func partial(name string) string { return "." + name + ".partial" }
