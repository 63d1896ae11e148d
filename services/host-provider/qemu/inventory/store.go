package inventory

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/encoding/protojson"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// seenVersion is the version of the stored description.
const seenVersion = 1

// seen is a machine as its QEMU last described it: <state>/<label>.json. Written by this package only.
type seen struct {
	Version     int             `json:"version"`
	ID          string          `json:"id"`
	Name        string          `json:"name"`
	QMP         string          `json:"qmp"`
	Agent       string          `json:"agent,omitempty"`
	Scratch     string          `json:"scratch,omitempty"`
	Start       []string        `json:"start,omitempty"`
	StartDir    string          `json:"start_dir,omitempty"`
	Disks       []seenDisk      `json:"disks"`
	Description json.RawMessage `json:"description"`
}

type seenDisk struct {
	ID     string             `json:"id"`
	Node   string             `json:"node"`
	Device string             `json:"device"`
	Size   int64              `json:"size"`
	Format typesv1.DiskFormat `json:"format"`
	Path   string             `json:"path"`
	OS     bool               `json:"os,omitempty"`
}

// store keeps one file per machine, by label.
type store struct{ folder string }

func (s store) path(label string) string { return filepath.Join(s.folder, label+".json") }

// save writes a machine durably, if anything but its power state changed.
func (s store) save(label string, m *Machine) error {
	description, err := protojson.Marshal(still(m.Description))
	if err != nil {
		return fmt.Errorf("encode description: %w", err)
	}
	var compact bytes.Buffer // protojson varies its spaces
	if err := json.Compact(&compact, description); err != nil {
		return fmt.Errorf("encode description: %w", err)
	}
	v := seen{
		Version: seenVersion, ID: m.ID, Name: m.Name, QMP: m.QMPSocket, Agent: m.AgentSocket, Scratch: m.ScratchDir, Start: m.Start,
		StartDir: m.StartDir, Description: compact.Bytes(),
	}
	for _, d := range m.Disks {
		v.Disks = append(v.Disks, seenDisk{ID: d.ID, Node: d.Node, Device: d.Device, Size: d.Size, Format: d.Format, Path: d.Path, OS: d.OSDisk})
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode description: %w", err)
	}
	b = append(b, '\n')
	if have, err := os.ReadFile(s.path(label)); err == nil && bytes.Equal(have, b) {
		return nil
	}
	return replaceFile(s.path(label), b)
}

// load reads every machine that was seen, by label. What cannot be read is left out and listed: QEMU will describe it again.
func (s store) load() (map[string]*Machine, []error) {
	entries, err := os.ReadDir(s.folder)
	if errors.Is(err, os.ErrNotExist) {
		return map[string]*Machine{}, nil
	}
	if err != nil {
		return map[string]*Machine{}, []error{err}
	}
	out, problems := map[string]*Machine{}, []error(nil)
	for _, e := range entries {
		label, ok := cutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		m, err := s.read(label)
		if err != nil {
			problems = append(problems, fmt.Errorf("description %s: %w", e.Name(), err))
			continue
		}
		out[label] = m
	}
	return out, problems
}

func (s store) read(label string) (*Machine, error) {
	b, err := os.ReadFile(s.path(label))
	if err != nil {
		return nil, err
	}
	var v seen
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, err
	}
	if v.Version != seenVersion {
		return nil, fmt.Errorf("version %d is not %d", v.Version, seenVersion)
	}
	m := &Machine{
		ID: v.ID, Name: v.Name, QMPSocket: v.QMP, AgentSocket: v.Agent, ScratchDir: v.Scratch, Start: v.Start, StartDir: v.StartDir,
		Description: &typesv1.Machine{},
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(v.Description, m.Description); err != nil {
		return nil, err
	}
	for _, d := range v.Disks {
		m.Disks = append(m.Disks, Disk{ID: d.ID, Node: d.Node, Device: d.Device, Size: d.Size, Format: d.Format, Path: d.Path, OSDisk: d.OS})
	}
	return m, nil
}

func (s store) remove(label string) error {
	err := os.Remove(s.path(label))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// replaceFile writes a file whole or not at all. A lost description is asked for again, so the folder need not be synced.
func replaceFile(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("write description: %w", err)
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write description: %w", err)
	}
	return nil
}
