package inventory

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"

	"github.com/google/uuid"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/host-provider/definition"
)

// DefinitionVersion is the version of NAME.yaml that this program reads.
const DefinitionVersion = 1

// Endings of the files of a machine, beside each other in the folder of machines.
const (
	definitionSuffix = ".yaml"
	misnamedSuffix   = ".yml"
	monitorSuffix    = ".qmp"
	agentSuffix      = ".qga"
)

// Bounds of a definition: an absurd value is refused here.
const (
	maxDefinitionBytes = 1 << 20
	maxDisks           = 64
	maxStartArguments  = 4096
	// maxSocketPath is what the kernel takes as the address of a unix socket.
	maxSocketPath = 107
)

// Definition is NAME.yaml (docs/formats/qemu-machine.md). All but the version may be absent: what QEMU says is used then.
type Definition struct {
	Version    int              `yaml:"version"`
	ID         string           `yaml:"id"`
	Name       string           `yaml:"name"`
	QMP        string           `yaml:"qmp"`
	Agent      string           `yaml:"agent"`
	Disks      []DiskDefinition `yaml:"disks"`
	Firmware   string           `yaml:"firmware"`
	Generation int              `yaml:"generation"`
	Start      []string         `yaml:"start"`
	StartDir   string           `yaml:"start_dir"`
	Scratch    string           `yaml:"scratch"`

	// path of the file, or of the monitor's socket when there is no file.
	path string
	// label is the file's name without its ending: unique in the folder.
	label string
}

// DiskDefinition names one replicated disk, by its node, its device, or both.
type DiskDefinition struct {
	ID     string `yaml:"id"`
	Node   string `yaml:"node"`
	Device string `yaml:"device"`
	OS     bool   `yaml:"os"`
}

var (
	diskID = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)
)

// ReadDefinition reads and checks a NAME.yaml. Every problem is reported at once, joined. The definition is there with an
// error too, as far as it could be read: never nil, good for naming the machine and nothing else. Paths in it are absolute.
func ReadDefinition(path string) (*Definition, error) {
	d := &Definition{path: path, label: strings.TrimSuffix(filepath.Base(path), definitionSuffix)}
	raw, err := readBounded(path)
	if err != nil {
		return d, err
	}
	problems, whole := d.parse(raw)
	if !whole { // every value would be missing: one message is enough
		return d, errors.Join(problems...)
	}
	d.resolve()
	return d, errors.Join(append(problems, d.validate()...)...)
}

// bareDefinition is the definition of a monitor's socket without a file: all is asked of QEMU.
func bareDefinition(socket string) (*Definition, error) {
	d := &Definition{Version: DefinitionVersion, QMP: socket, path: socket, label: strings.TrimSuffix(filepath.Base(socket), monitorSuffix)}
	d.resolve()
	return d, errors.Join(d.validate()...)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxDefinitionBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read definition: %w", err)
	}
	if len(raw) > maxDefinitionBytes {
		return nil, fmt.Errorf("larger than %d bytes", maxDefinitionBytes)
	}
	return raw, nil
}

// parse decodes strictly; keys that are known are taken in despite others that are not. It is not whole when nothing
// could be taken in.
func (d *Definition) parse(raw []byte) (problems []error, whole bool) {
	problems, err := definition.Decode(raw, d)
	switch {
	case errors.Is(err, definition.ErrEmpty):
		return []error{errors.New("the file is empty")}, false
	case errors.Is(err, definition.ErrMore):
		problems = append(problems, errors.New("it must be one document: what follows `---` would be ignored"))
	case err != nil:
		return []error{fmt.Errorf("parse: %w", err)}, false
	}
	return problems, true
}

// resolve fills in what follows from the file's own name, and makes paths absolute: relative ones are beside the file.
func (d *Definition) resolve() {
	folder := filepath.Dir(d.path)
	if d.QMP == "" {
		d.QMP = d.label + monitorSuffix
	}
	if d.Agent == "" {
		beside := filepath.Join(folder, d.label+agentSuffix)
		if _, err := os.Lstat(beside); err == nil {
			d.Agent = beside
		}
	}
	if d.StartDir == "" && len(d.Start) > 0 {
		d.StartDir = folder
	}
	for _, p := range []*string{&d.QMP, &d.Agent, &d.Scratch, &d.StartDir} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(folder, *p)
		}
	}
}

func (d *Definition) validate() (problems []error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if d.Version != DefinitionVersion {
		bad("version: %d is not supported, this program reads %d", d.Version, DefinitionVersion)
	}
	if d.ID != "" {
		if id, err := uuid.Parse(d.ID); err != nil || id == uuid.Nil {
			bad("id: %q is not a GUID", d.ID)
		} else {
			d.ID = id.String()
		}
	}
	if d.Name != "" && !soundName(d.Name) {
		bad("name: %q must be 1 to 100 bytes without slashes, control characters, or spaces at its ends", d.Name)
	}
	for _, f := range []struct{ key, path string }{{"qmp", d.QMP}, {"agent", d.Agent}} {
		if len(f.path) > maxSocketPath {
			bad("%s: %q is longer than the %d bytes of a socket's path: move it to a shorter one", f.key, f.path, maxSocketPath)
		}
	}
	if d.Agent != "" && d.Agent == d.QMP {
		bad("agent: is the same socket as qmp")
	}
	if _, err := d.firmware(); err != nil {
		problems = append(problems, err)
	}
	if d.Generation < 0 || d.Generation > 2 {
		bad("generation: %d must be 1 or 2, or absent", d.Generation)
	}
	if len(d.Start) > maxStartArguments || len(d.Start) > 0 && d.Start[0] == "" {
		bad("start: must be a program and at most %d arguments", maxStartArguments-1)
	}
	if d.StartDir != "" && len(d.Start) == 0 {
		bad("start_dir: means nothing without start")
	}
	return append(problems, d.validateDisks()...)
}

func (d *Definition) validateDisks() (problems []error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if len(d.Disks) > maxDisks {
		bad("disks: %d are more than %d", len(d.Disks), maxDisks)
		return problems
	}
	type key struct{ field, value string }
	seen, boots := map[key]bool{}, 0
	for i, k := range d.Disks {
		if !diskID.MatchString(k.ID) {
			bad("disks[%d].id: %q must match %s", i, k.ID, diskID)
		}
		if k.Node == "" && k.Device == "" {
			bad("disks[%d]: node or device must say which disk it is", i)
		}
		if isGenerated(k.Node) {
			bad("disks[%d].node: %q is a generated name, which changes with every start: give the disk one with `-blockdev node-name=`", i, k.Node)
		}
		for _, f := range []key{{"id", k.ID}, {"node", k.Node}, {"device", devicePath(k.Device)}} {
			if f.value != "" && seen[f] {
				bad("disks[%d].%s: %q is named twice", i, f.field, f.value)
			}
			seen[f] = true
		}
		if k.OS {
			boots++
		}
	}
	if boots > 1 {
		bad("disks: %d have `os: true`, at most one can", boots)
	}
	return problems
}

func (d *Definition) firmware() (typesv1.Firmware, error) {
	switch d.Firmware {
	case "":
		return typesv1.Firmware_FIRMWARE_UNSPECIFIED, nil
	case "bios":
		return typesv1.Firmware_FIRMWARE_BIOS, nil
	case "uefi":
		return typesv1.Firmware_FIRMWARE_UEFI, nil
	}
	return 0, fmt.Errorf("firmware: %q is not bios or uefi", d.Firmware)
}

// soundName says whether a name can be shown and typed.
func soundName(name string) bool {
	return name != "" && len(name) <= 100 && !strings.ContainsAny(name, `/\`) && !strings.ContainsFunc(name, unicode.IsControl) && strings.TrimSpace(name) == name
}

// isGenerated says that QEMU made the node's name up.
func isGenerated(node string) bool { return strings.HasPrefix(node, "#") }

// devicePath is the QOM path of a device as it is named by users (its id) or by QEMU (an id, or a path down to a part of
// the device).
func devicePath(device string) string {
	device = strings.TrimSuffix(device, "/virtio-backend")
	if device == "" || strings.HasPrefix(device, "/") {
		return device
	}
	return "/machine/peripheral/" + device
}

// identify makes a disk's id of its node's name; "" when nothing is left of it.
func identify(node string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(node) {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0:
			b.WriteByte('-')
		}
	}
	id := b.String()
	return strings.TrimRight(id[:min(len(id), 40)], "-")
}
