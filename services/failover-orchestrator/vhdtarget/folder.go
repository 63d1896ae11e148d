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
	switch owner, err := f.Owner(); {
	case err == nil && owner == f.failover:
		return true, nil
	case err == nil && owner != "":
		return true, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "target folder %s holds failover %s", f.dir, owner).With("folder", f.dir)
	}
	for _, e := range entries {
		if e.Name() != f.temporaryMarker() && !strings.HasPrefix(e.Name(), probePrefix) {
			return true, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "target folder %s is not empty: it holds %s", f.dir, e.Name()).With("folder", f.dir)
		}
	}
	return true, writable(f.dir)
}

// probePrefix begins the name of the empty file that Check makes and removes to see that it can.
const probePrefix = ".landfall-probe-"

// writable tries to make a file.
func writable(dir string) error {
	t, err := os.CreateTemp(dir, probePrefix+"*")
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "write to %s", dir)
	}
	if err := errors.Join(t.Close(), os.Remove(t.Name())); err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "write to %s", dir)
	}
	return nil
}

// Owner is the failover that claimed the folder; "" when none did or the folder is not there.
func (f *Folder) Owner() (string, error) {
	m, err := f.marker()
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read who owns %s", f.dir)
	}
	return m.Failover, nil
}

// Require is an error unless this failover owns the folder: it is asked before anything is written, because a folder
// that was removed, replaced or unmounted since it was claimed would never be cleaned up again.
func (f *Folder) Require() error {
	owner, err := f.Owner()
	if err != nil || owner == f.failover {
		return err
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, "target folder %s lost its marker: it was removed, replaced or unmounted while the failover ran", f.dir)
}

func (f *Folder) temporaryMarker() string { return MarkerFile + "." + f.failover }

// Claim makes the folder this failover's, durably, and names the files that it will hold. existed is what Check said
// before the folder was made. Of several failovers that claim a folder at once one succeeds, the others get
// TARGET_NOT_EMPTY. Repeating it is harmless; a failed one leaves nothing.
func (f *Folder) Claim(existed bool, files []string) error {
	if _, err := f.Check(); err != nil {
		return err
	}
	if owner, err := f.Owner(); err == nil && owner == f.failover {
		return nil
	}
	raw, err := json.MarshalIndent(marker{V: markerVersion, Failover: f.failover, CreatedFolder: !existed, Files: files}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode marker: %w", err)
	}
	err = f.claim(append(raw, '\n'))
	if err == nil {
		return nil
	}
	_ = os.Remove(filepath.Join(f.dir, f.temporaryMarker()))
	if owner, oerr := f.Owner(); oerr == nil && owner != "" && owner != f.failover {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "target folder %s was claimed by failover %s at the same moment", f.dir, owner).With("folder", f.dir)
	}
	if !existed {
		_ = f.Drop()
	}
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "claim target folder")
}

// claim writes the marker, whole or not at all, and never over another: a rename would replace it, a link does not.
func (f *Folder) claim(raw []byte) error {
	if err := os.Mkdir(f.dir, 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	temp, final := filepath.Join(f.dir, f.temporaryMarker()), filepath.Join(f.dir, MarkerFile)
	if err := writeFile(temp, raw, os.O_TRUNC); err != nil {
		return err
	}
	if err := os.Link(temp, final); errors.Is(err, os.ErrExist) {
		return err
	} else if err != nil { // a file system without links
		if err := writeFile(final, raw, os.O_EXCL); err != nil {
			return err
		}
	}
	if err := os.Remove(temp); err != nil {
		return err
	}
	return errors.Join(syncFolder(f.dir), syncFolder(filepath.Dir(f.dir)))
}

// WriteMachine writes vm.json.
func (f *Folder) WriteMachine(raw []byte) error { return f.Write(MachineFile, raw) }

// Write makes a file appear whole or not at all, in place of what it replaces, durably. The marker must name it.
func (f *Folder) Write(name string, raw []byte) error {
	temp := filepath.Join(f.dir, Partial(name))
	err := writeFile(temp, raw, os.O_TRUNC)
	if err == nil {
		err = f.Finish(name)
	}
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "write %s", name)
	}
	return nil
}

// Finish gives Partial(name), which is durable already, its final name.
func (f *Folder) Finish(name string) error {
	if err := os.Rename(filepath.Join(f.dir, Partial(name)), filepath.Join(f.dir, name)); err != nil {
		return err
	}
	return syncFolder(f.dir)
}

// writeFile makes a file and its content durable.
func writeFile(path string, raw []byte, flag int) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flag, 0o640)
	if err != nil {
		return err
	}
	_, err = file.Write(raw)
	return errors.Join(err, file.Sync(), file.Close())
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
		_ = os.Remove(filepath.Join(f.dir, f.temporaryMarker()))
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY, "folder %s belongs to failover %s: it is left alone", f.dir, m.Failover)
	}
	for _, name := range m.Files {
		if name != filepath.Base(name) || strings.HasPrefix(name, "..") {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INTERNAL, "marker of %s names %q, which is not a plain file name", f.dir, name)
		}
	}
	var problems []error
	for _, e := range entries {
		name := e.Name()
		if name == MarkerFile {
			continue // last
		}
		if !f.made(m, name) {
			kept = append(kept, name)
			continue
		}
		if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			problems = append(problems, err)
		}
	}
	if err := errors.Join(problems...); err != nil {
		return kept, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the test failover's files")
	}
	if err := syncFolder(f.dir); err != nil { // or a power cut could bring back files that no marker names
		return kept, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the test failover's files")
	}
	if err := os.Remove(filepath.Join(f.dir, MarkerFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return kept, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the marker")
	}
	if m.CreatedFolder {
		return kept, f.Drop()
	}
	return kept, nil
}

// made says whether a name is one that this failover made: a file of the marker, what an attempt at one left, a probe.
func (f *Folder) made(m marker, name string) bool {
	if name == f.temporaryMarker() || strings.HasPrefix(name, probePrefix) {
		return true
	}
	for _, file := range append(slices.Clip(m.Files), MachineFile) {
		if name == file && slices.Contains(m.Files, file) || strings.HasPrefix(name, Partial(file)) {
			return true
		}
	}
	return false
}

// Drop removes the folder if it is empty: for one that this failover made and of which nothing but the folder is left.
func (f *Folder) Drop() error {
	entries, err := os.ReadDir(f.dir)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(entries) > 0 {
		return nil
	}
	if err == nil {
		err = os.Remove(f.dir)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "remove the folder")
	}
	return nil
}

// Partial begins the names of unfinished copies of a file. Clean-up removes them with it.
func Partial(name string) string { return "." + name + ".partial" }
