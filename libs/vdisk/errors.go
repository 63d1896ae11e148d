package vdisk

import "errors"

// Sentinel errors. Test with errors.Is; they are wrapped with the operation and the path.
var (
	// ErrNotFound means that there is no file at the path. It comes together with fs.ErrNotExist.
	ErrNotFound = errors.New("image not found")
	// ErrExists means that Create met an existing file. It comes together with fs.ErrExist.
	ErrExists = errors.New("image already exists")
	// ErrTruncated means that the file is empty, ends before its footer, or is shorter than its footer says.
	ErrTruncated = errors.New("image is truncated")
	// ErrBadFooter means that a VHD footer is there and wrong: checksum, version or fields.
	ErrBadFooter = errors.New("bad VHD footer")
	// ErrUnsupported means an image of a kind that is recognised and not handled: dynamic or differencing VHD, VHDX,
	// qcow2, or something that is not a regular file.
	ErrUnsupported = errors.New("unsupported image type")
	// ErrSectorSize means that the virtual size is not a multiple of 512 bytes.
	ErrSectorSize = errors.New("image size is not a multiple of 512 bytes")
	// ErrTooLarge means a size beyond what the format can hold, or a size of zero or less.
	ErrTooLarge = errors.New("disk size out of bounds")
	// ErrLocked means that somebody else has the image open for writing.
	ErrLocked = errors.New("image is in use by another owner")
	// ErrReadOnly means a write to an image opened read-only.
	ErrReadOnly = errors.New("image is open read-only")
	// ErrRange means an access beyond the end of the virtual disk.
	ErrRange = errors.New("access beyond the end of the disk")
)
