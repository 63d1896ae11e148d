package imagedir

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

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

// found is one machine folder with everything that was found out about it.
type found struct {
	folder string
	// id (canonical, lower case) and name, as far as vm.yaml could be read; "" otherwise.
	id, name string
	// machine is nil when vm.yaml cannot be read. Sizes are filled in where the image is sound.
	machine  *typesv1.Machine
	findings []*hostproviderv1.Finding
	files    []imageFile
}

// imageFile is a disk's file: the same one may be reached by several names.
type imageFile struct {
	disk *typesv1.Disk
	info os.FileInfo
}

func (f *found) add(findings ...*hostproviderv1.Finding) {
	f.findings = append(f.findings, findings...)
}

// label names a machine for people.
func (f *found) label() string {
	if f.name != "" {
		return f.name
	}
	return f.folder
}

// errors are the findings that forbid protection.
func (f *found) errors() (out []*hostproviderv1.Finding) {
	for _, x := range f.findings {
		if x.Severity == hostproviderv1.Severity_SEVERITY_ERROR {
			out = append(out, x)
		}
	}
	return out
}

// answers says whether the folder is meant by a GUID, a display name, or, where vm.yaml does not say who it is, the
// name of the folder.
func (f *found) answers(vm string) (byID, byName bool) {
	id := f.id != "" && f.id == strings.ToLower(vm)
	return id, !id && (f.name == vm || f.name == "" && filepath.Base(f.folder) == vm)
}

// inspectAll runs every check of every machine folder. What two of them contradict each other in is found at both:
// nobody here knows which one is right.
func inspectAll(folders []string, site, host string) []*found {
	var all []*found
	for _, folder := range folders {
		all = append(all, inspect(folder, site, host))
	}
	ids := map[string][]*found{}
	for _, f := range all {
		if f.id != "" {
			ids[f.id] = append(ids[f.id], f)
		}
	}
	for id, group := range ids {
		for _, f := range group {
			for _, other := range group {
				if other != f {
					f.add(finding("machine-id", typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
						fmt.Sprintf("%s: id %s is also that of %s", f.folder, id, other.folder), "give each machine its own GUID"))
				}
			}
		}
	}
	findDuplicates(all)
	return all
}

// findDuplicates finds files that are the image of more than one disk, by whatever names.
func findDuplicates(all []*found) {
	type use struct {
		f    *found
		disk *typesv1.Disk
		info os.FileInfo
	}
	type key struct { // cheap and equal for one file; os.SameFile decides
		size  int64
		mtime time.Time
	}
	uses := map[key][]use{}
	for _, f := range all {
		for _, i := range f.files {
			k := key{i.info.Size(), i.info.ModTime()}
			uses[k] = append(uses[k], use{f, i.disk, i.info})
		}
	}
	entry, _ := errcat.Lookup(typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE)
	for _, group := range uses {
		for i, u := range group {
			for j, other := range group {
				if i != j && os.SameFile(u.info, other.info) {
					u.f.add(finding("disk-image", typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE,
						about(u.f, u.disk)+fmt.Sprintf("is the same file as disk %s of %s (%s)", other.disk.Id, other.f.label(), other.disk.Path), entry.Action))
				}
			}
		}
	}
}

func about(f *found, disk *typesv1.Disk) string {
	return fmt.Sprintf("disk %s of %s (%s): ", disk.Id, f.label(), disk.Path)
}

// inspect runs every check of one machine folder by itself.
func inspect(folder, site, host string) *found {
	def, err := ReadDefinition(folder)
	f := &found{folder: folder, name: def.Name}
	if id, err := uuid.Parse(def.ID); err == nil {
		f.id = id.String()
	}
	if err != nil {
		for _, e := range flatten(err) {
			f.add(finding("vm-definition", typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
				fmt.Sprintf("%s: %v", folder, e), "correct "+DefinitionFile))
		}
		return f
	}
	f.machine = def.machine(site, host)
	var largest int64
	for i, disk := range f.machine.Disks {
		disk.SizeBytes = f.inspectImage(disk, def.Disks[i].Format != "")
		largest = max(largest, disk.SizeBytes)
	}
	if len(f.machine.NetworkAdapters) == 0 {
		f.add(&hostproviderv1.Finding{Check: "network", Severity: hostproviderv1.Severity_SEVERITY_WARNING,
			What: f.name + " has no network adapter", Action: "nobody will reach the recovered machine; add one to " + DefinitionFile + " if that is not meant"})
	}
	if free, ok := freeSpace(folder); ok && free < largest/10 {
		f.add(&hostproviderv1.Finding{Check: "free-space", Severity: hostproviderv1.Severity_SEVERITY_WARNING,
			Reason: typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE,
			What:   fmt.Sprintf("%s: the volume has %d MiB free; logs of changed blocks are kept beside the disks", f.name, free/mib),
			Action: "free space, or expect changed ranges to be read again from the disks instead of from logs"})
	}
	return f
}

// inspectImage checks one image and returns its virtual size, 0 if it is not sound. stated says that vm.yaml names the
// format.
func (f *found) inspectImage(disk *typesv1.Disk, stated bool) int64 {
	bad := func(reason typesv1.ErrorReason, action, format string, args ...any) int64 {
		if action == "" {
			entry, _ := errcat.Lookup(reason)
			action = entry.Action
		}
		f.add(finding("disk-image", reason, about(f, disk)+fmt.Sprintf(format, args...), action))
		return 0
	}
	const readable = "make the file readable for the host-provider"
	info, err := os.Stat(disk.Path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, "", "there is no such image")
	case err != nil:
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, readable, "%v", err)
	case !info.Mode().IsRegular():
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "", "it is not a regular file")
	}
	f.files = append(f.files, imageFile{disk, info})
	size, looksLikeVHD, err := probe(disk, stated)
	switch {
	case errors.Is(err, vdisk.ErrUnsupported):
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "", "%v", err)
	case errors.Is(err, vdisk.ErrTooLarge), err == nil && size > maxDiskBytes:
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_TOO_LARGE, "", "%d bytes are more than the 2040 GiB of a fixed VHD", info.Size())
	case errors.Is(err, vdisk.ErrTruncated), errors.Is(err, vdisk.ErrBadFooter), errors.Is(err, vdisk.ErrSectorSize):
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED, "", "%v", err)
	case err != nil:
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING, readable, "it cannot be read: %v", err)
	case looksLikeVHD:
		return bad(typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED, "add `format: vhd` or `format: raw` to the disk in "+DefinitionFile,
			"it ends like a fixed VHD, but neither its name nor %s says that it is one", DefinitionFile)
	}
	if size%mib != 0 {
		f.add(&hostproviderv1.Finding{Check: "disk-alignment", Severity: hostproviderv1.Severity_SEVERITY_WARNING,
			What:   about(f, disk) + fmt.Sprintf("%d bytes are not a whole number of MiB", size),
			Action: "the recovered disk is padded with zeros to the next MiB, as Azure demands; nothing to do"})
	}
	return size
}

// probe opens the image read-only and returns its virtual size. Where vm.yaml does not state the format it also looks
// for signs of another one than the name suggests: a qcow2 taken for raw would replicate, and never start.
func probe(disk *typesv1.Disk, stated bool) (size int64, looksLikeVHD bool, err error) {
	format := vdisk.FormatRaw
	switch {
	case disk.Format == typesv1.DiskFormat_DISK_FORMAT_VHD:
		format = vdisk.FormatVHD
	case !stated:
		format = vdisk.FormatAuto
	}
	d, err := vdisk.Open(disk.Path, format, true)
	if err != nil {
		return 0, false, err
	}
	defer d.Close()
	return d.Size(), format == vdisk.FormatAuto && d.Format() == vdisk.FormatVHD, nil
}

func finding(check string, reason typesv1.ErrorReason, what, action string) *hostproviderv1.Finding {
	return &hostproviderv1.Finding{Check: check, Severity: hostproviderv1.Severity_SEVERITY_ERROR, Reason: reason, What: what, Action: action}
}

// flatten lists the errors of an errors.Join.
func flatten(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
