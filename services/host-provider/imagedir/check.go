package imagedir

import (
	"errors"
	"fmt"
	"os"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/vdisk"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Limits of the recovery side: a fixed VHD holds at most 2040 GiB ([VHD] and Azure), of whole MiB.
const (
	maxDiskBytes = 2040 << 30
	mib          = 1 << 20
)

// images remembers which file each disk image is, so that one file under two names is seen.
type images struct {
	names []string
	infos []os.FileInfo
}

func newImages() *images { return &images{} }

// claim returns the disk that has the same file already, or "".
func (s *images) claim(name string, info os.FileInfo) string {
	for i, other := range s.infos {
		if os.SameFile(other, info) {
			return s.names[i]
		}
	}
	s.names, s.infos = append(s.names, name), append(s.infos, info)
	return ""
}

// inspect runs every check of one machine folder. The machine is nil when vm.yaml cannot be read; sizes are
// filled in where the image is sound.
func inspect(folder, site, host string, seen *images) ([]*hostproviderv1.Finding, *typesv1.Machine) {
	def, err := ReadDefinition(folder)
	if err != nil {
		var out []*hostproviderv1.Finding
		for _, e := range flatten(err) {
			out = append(out, finding("vm-definition", typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
				fmt.Sprintf("%s: %v", folder, e), "correct "+DefinitionFile))
		}
		return out, nil
	}
	m := def.machine(site, host)
	var out []*hostproviderv1.Finding
	var largest int64
	for _, disk := range m.Disks {
		f, size := inspectImage(m.DisplayName, disk, seen)
		out = append(out, f...)
		disk.SizeBytes = size
		largest = max(largest, size)
	}
	if len(m.NetworkAdapters) == 0 {
		out = append(out, &hostproviderv1.Finding{Check: "network", Severity: hostproviderv1.Severity_SEVERITY_WARNING,
			What: m.DisplayName + " has no network adapter", Action: "nobody will reach the recovered machine; add one to " + DefinitionFile + " if that is not meant"})
	}
	if free, ok := freeSpace(folder); ok && free < largest/10 {
		out = append(out, &hostproviderv1.Finding{Check: "free-space", Severity: hostproviderv1.Severity_SEVERITY_WARNING,
			Reason: typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE,
			What:   fmt.Sprintf("%s: the volume has %d MiB free; logs of changed blocks are kept beside the disks", m.DisplayName, free/mib),
			Action: "free space, or expect changed ranges to be read again from the disks instead of from logs"})
	}
	return out, m
}

func inspectImage(machine string, disk *typesv1.Disk, seen *images) ([]*hostproviderv1.Finding, int64) {
	what := func(format string, args ...any) string {
		return fmt.Sprintf("disk %s of %s (%s): ", disk.Id, machine, disk.Path) + fmt.Sprintf(format, args...)
	}
	bad := func(reason typesv1.ErrorReason, text string) ([]*hostproviderv1.Finding, int64) {
		entry, _ := errcat.Lookup(reason)
		return []*hostproviderv1.Finding{finding("disk-image", reason, text, entry.Action)}, 0
	}
	info, err := os.Stat(disk.Path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, what("there is no such image"))
	case err != nil:
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, what("%v", err))
	case !info.Mode().IsRegular():
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, what("is not a regular file"))
	}
	if other := seen.claim(disk.Id+" of "+machine, info); other != "" {
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE, what("is the same file as disk %s", other))
	}
	size, err := probe(disk)
	switch {
	case err == nil:
	case errors.Is(err, vdisk.ErrUnsupported):
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, what("%v", err))
	default:
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED, what("%v", err))
	}
	if size > maxDiskBytes {
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_TOO_LARGE, what("%d bytes are more than the 2040 GiB of a fixed VHD", size))
	}
	var out []*hostproviderv1.Finding
	if size%mib != 0 {
		out = append(out, &hostproviderv1.Finding{Check: "disk-alignment", Severity: hostproviderv1.Severity_SEVERITY_WARNING,
			What:   what("%d bytes are not a whole number of MiB", size),
			Action: "the recovered disk is padded with zeros to the next MiB, as Azure demands; nothing to do"})
	}
	return out, size
}

// probe opens the image read-only and returns its virtual size.
func probe(disk *typesv1.Disk) (int64, error) {
	format := vdisk.FormatRaw
	if disk.Format == typesv1.DiskFormat_DISK_FORMAT_VHD {
		format = vdisk.FormatVHD
	}
	d, err := vdisk.Open(disk.Path, format, true)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	return d.Size(), nil
}

func finding(check string, reason typesv1.ErrorReason, what, action string) *hostproviderv1.Finding {
	return &hostproviderv1.Finding{Check: check, Severity: hostproviderv1.Severity_SEVERITY_ERROR, Reason: reason, What: what, Action: action}
}

// failed says whether any finding forbids protection.
func failed(findings []*hostproviderv1.Finding) bool {
	for _, f := range findings {
		if f.Severity == hostproviderv1.Severity_SEVERITY_ERROR {
			return true
		}
	}
	return false
}

// flatten lists the errors of an errors.Join.
func flatten(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
