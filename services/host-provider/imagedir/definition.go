// Package imagedir is the reference hypervisor driver: a machine is a folder
// with a vm.yaml and disk images, on any operating system. The change-tracker
// serves the images to guests by NBD and is the only writer of them.
//
// docs/formats/vm-yaml.md describes the file.
package imagedir

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

	"github.com/landfall-dr/landfall/libs/config"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/host-provider/definition"
)

// DefinitionFile is the name of a machine's description in its folder.
const DefinitionFile = "vm.yaml"

// DefinitionVersion is the version of vm.yaml that this program reads.
const DefinitionVersion = 1

// Bounds of a definition: what Hyper-V and Azure allow at most, so that an absurd value is refused here.
const (
	maxDefinitionBytes = 1 << 20
	maxDisks           = 64
	maxAdapters        = 12
	maxCPUs            = 2048
)

// Definition is vm.yaml.
type Definition struct {
	Version         int                 `yaml:"version"`
	ID              string              `yaml:"id"`
	Name            string              `yaml:"name"`
	Generation      int                 `yaml:"generation"`
	CPUs            int                 `yaml:"cpus"`
	Memory          string              `yaml:"memory"`
	NetworkAdapters []AdapterDefinition `yaml:"network_adapters"`
	Disks           []DiskDefinition    `yaml:"disks"`

	folder string
	memory int64
}

// AdapterDefinition is one network adapter of vm.yaml.
type AdapterDefinition struct {
	Name       string `yaml:"name"`
	MACAddress string `yaml:"mac_address"`
	Network    string `yaml:"network"`
}

// DiskDefinition is one disk of vm.yaml.
type DiskDefinition struct {
	ID     string `yaml:"id"`
	Image  string `yaml:"image"`
	Format string `yaml:"format"`
	OS     bool   `yaml:"os"`
}

var (
	diskID = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)
	mac    = regexp.MustCompile(`^([0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}$`)
)

// ReadDefinition reads and checks folder/vm.yaml. Every problem is reported at once, joined. The definition is there
// with an error too, as far as it could be read: never nil, good for naming the machine and nothing else.
func ReadDefinition(folder string) (*Definition, error) {
	d := &Definition{folder: folder}
	raw, err := readBounded(filepath.Join(folder, DefinitionFile))
	if errors.Is(err, os.ErrNotExist) {
		if _, serr := os.Stat(filepath.Join(folder, misnamedFile)); serr == nil {
			return d, fmt.Errorf("there is %s, but the file must be called %s", misnamedFile, DefinitionFile)
		}
	}
	if err != nil {
		return d, err
	}
	problems, whole := d.parse(raw)
	if !whole { // every value would be missing: one message is enough
		return d, errors.Join(problems...)
	}
	if err := d.validate(); err != nil {
		problems = append(problems, flatten(err)...)
	}
	return d, errors.Join(problems...)
}

// misnamedFile is what people call vm.yaml by mistake.
const misnamedFile = "vm.yml"

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxDefinitionBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", DefinitionFile, err)
	}
	if len(raw) > maxDefinitionBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", DefinitionFile, maxDefinitionBytes)
	}
	return raw, nil
}

// parse decodes strictly; keys that are known are taken in despite others that are not. It is not whole when nothing
// could be taken in.
func (d *Definition) parse(raw []byte) (problems []error, whole bool) {
	problems, err := definition.Decode(raw, d)
	switch {
	case errors.Is(err, definition.ErrEmpty):
		return []error{fmt.Errorf("%s is empty", DefinitionFile)}, false
	case errors.Is(err, definition.ErrMore):
		problems = append(problems, fmt.Errorf("%s must be one document: what follows `---` would be ignored", DefinitionFile))
	case err != nil:
		return []error{fmt.Errorf("parse %s: %w", DefinitionFile, err)}, false
	}
	return problems, true
}

func (d *Definition) validate() error {
	var problems []error
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if d.Version != DefinitionVersion {
		bad("version: %d is not supported, this program reads %d", d.Version, DefinitionVersion)
	}
	if id, err := uuid.Parse(d.ID); err != nil || id == uuid.Nil {
		bad("id: %q is not a GUID", d.ID)
	} else {
		d.ID = id.String()
	}
	if d.Name == "" || len(d.Name) > 100 || strings.ContainsAny(d.Name, `/\`) || strings.ContainsFunc(d.Name, unicode.IsControl) || strings.TrimSpace(d.Name) != d.Name {
		bad("name: %q must be 1 to 100 bytes without slashes, control characters, or spaces at its ends", d.Name)
	}
	if d.Generation != 1 && d.Generation != 2 {
		bad("generation: %d must be 1 or 2", d.Generation)
	}
	if d.CPUs < 1 || d.CPUs > maxCPUs {
		bad("cpus: %d must be 1 to %d", d.CPUs, maxCPUs)
	}
	var memory config.ByteSize
	if err := memory.UnmarshalText([]byte(d.Memory)); err != nil || memory < 1<<20 {
		bad("memory: %q must be a size of at least 1MiB, for example 4GiB", d.Memory)
	}
	d.memory = int64(memory)
	if len(d.NetworkAdapters) > maxAdapters {
		bad("network_adapters: %d are more than %d", len(d.NetworkAdapters), maxAdapters)
	}
	for i, n := range d.NetworkAdapters {
		if n.MACAddress != "" && !mac.MatchString(n.MACAddress) {
			bad("network_adapters[%d].mac_address: %q is not a MAC address", i, n.MACAddress)
		}
	}
	if len(d.Disks) == 0 || len(d.Disks) > maxDisks {
		bad("disks: there must be 1 to %d, not %d", maxDisks, len(d.Disks))
	}
	ids, os := map[string]bool{}, 0
	for i, k := range d.Disks {
		if !diskID.MatchString(k.ID) {
			bad("disks[%d].id: %q must match %s", i, k.ID, diskID)
		}
		if ids[k.ID] {
			bad("disks[%d].id: %q is named twice", i, k.ID)
		}
		ids[k.ID] = true
		if k.Image == "" {
			bad("disks[%d].image: is missing", i)
		}
		if _, err := k.format(); err != nil {
			bad("disks[%d].format: %w", i, err)
		}
		if k.OS {
			os++
		}
	}
	if len(d.Disks) > 0 && os != 1 {
		bad("disks: exactly one must have `os: true`, not %d", os)
	}
	return errors.Join(problems...)
}

func (k DiskDefinition) format() (typesv1.DiskFormat, error) {
	switch f := strings.ToLower(k.Format); {
	case f == "raw":
		return typesv1.DiskFormat_DISK_FORMAT_RAW, nil
	case f == "vhd":
		return typesv1.DiskFormat_DISK_FORMAT_VHD, nil
	case f == "" && strings.EqualFold(filepath.Ext(k.Image), ".vhd"):
		return typesv1.DiskFormat_DISK_FORMAT_VHD, nil
	case f == "":
		return typesv1.DiskFormat_DISK_FORMAT_RAW, nil
	default:
		return 0, fmt.Errorf("%q is not raw or vhd", k.Format)
	}
}

// imagePath is the image's absolute path; relative ones are relative to the folder.
func (d *Definition) imagePath(k DiskDefinition) string {
	if filepath.IsAbs(k.Image) {
		return filepath.Clean(k.Image)
	}
	return filepath.Join(d.folder, k.Image)
}

// machine describes the definition without looking at the images: sizes are zero.
func (d *Definition) machine(site, host string) *typesv1.Machine {
	m := &typesv1.Machine{
		Name:        "sites/" + site + "/vms/" + d.ID,
		Id:          d.ID,
		DisplayName: d.Name,
		Generation:  int32(d.Generation),
		Cpus:        int32(d.CPUs),
		MemoryBytes: d.memory,
		Host:        "sites/" + site + "/hosts/" + host,
	}
	for _, n := range d.NetworkAdapters {
		m.NetworkAdapters = append(m.NetworkAdapters, &typesv1.NetworkAdapter{Name: n.Name, MacAddress: n.MACAddress, Network: n.Network})
	}
	for _, k := range d.Disks {
		format, _ := k.format() // checked by validate
		m.Disks = append(m.Disks, &typesv1.Disk{Id: k.ID, Path: d.imagePath(k), Format: format, OsDisk: k.OS})
	}
	return m
}
