package qemu

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strconv"
	"strings"
)

// prefix begins every name that the driver gives inside QEMU, and nothing else there is ours.
const prefix = "landfall-"

func ours(name string) bool { return strings.HasPrefix(name, prefix) }

// role is what a node or export is for. A node's name has 31 bytes at most: prefix, three letters, generation in base 36, disk.
type role string

const (
	scratchNode role = "tmp" // the copy of what the guest overwrites
	filterNode  role = "cbw" // copies before it writes
	topNode     role = "top" // passes through; switched from the disk to the filter, for all disks at once
	accessNode  role = "acc" // the frozen disk, to be read
	exportID    role = "exp"
	jobID       role = "job"
)

func name(r role, generation uint64, disk int) string {
	return prefix + string(r) + "-" + strconv.FormatUint(generation, 36) + "-" + strconv.Itoa(disk)
}

// parse undoes name.
func parse(s string) (r role, generation uint64, ok bool) {
	rest, ok := strings.CutPrefix(s, prefix)
	if !ok {
		return "", 0, false
	}
	parts := strings.Split(rest, "-")
	if len(parts) != 3 {
		return "", 0, false
	}
	generation, err := strconv.ParseUint(parts[1], 36, 64)
	return role(parts[0]), generation, err == nil
}

// bitmapName carries lineage and generation: a bitmap of another protection, or of an earlier cut, cannot be taken for it.
func bitmapName(lineage string, generation uint64) string {
	return prefix + lineage[:min(12, len(lineage))] + "-" + strconv.FormatUint(generation, 10)
}

// generationOf is the generation of a bitmap of the lineage.
func generationOf(bitmap, lineage string) (uint64, bool) {
	rest, ok := strings.CutPrefix(bitmap, prefix+lineage[:min(12, len(lineage))]+"-")
	if !ok || lineage == "" {
		return 0, false
	}
	g, err := strconv.ParseUint(rest, 10, 64)
	return g, err == nil
}

// short is a name of the machine for files: 12 hex digits.
func (h *held) short() string {
	sum := sha256.Sum256([]byte(h.id))
	return hex.EncodeToString(sum[:6])
}

func (h *held) socketPath() string { return filepath.Join(h.d.cfg.SocketDir, "lf-"+h.short()+".nbd") }

func (h *held) scratchDir() string {
	if h.machine != nil && h.machine.ScratchDir != "" {
		return h.machine.ScratchDir
	}
	return h.d.cfg.ScratchDir
}

func (h *held) scratchPrefix() string { return prefix + h.short() + "-" }

func (h *held) scratchPath(generation uint64, disk int) string {
	return filepath.Join(h.scratchDir(), h.scratchPrefix()+strconv.FormatUint(generation, 36)+"-"+strconv.Itoa(disk)+".scratch")
}

func exportName(generation uint64, disk string) string {
	return strconv.FormatUint(generation, 36) + "-" + disk
}
