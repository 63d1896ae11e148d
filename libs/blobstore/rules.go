package blobstore

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Limits that every backend enforces, so that what works on one works on all.
const (
	// MaxBlobName is the longest blob name, in bytes.
	MaxBlobName = 1024
	// MaxNameSegment is the longest part of a blob name between two slashes, in bytes.
	// It is a limit of the dir backend (one file name), kept everywhere.
	MaxNameSegment = 200
	// MaxPageBlob is the largest page blob, in bytes (Azure: 8 TiB).
	MaxPageBlob = 8 << 40
	// MinLease and MaxLease bound a lease's duration.
	MinLease = 15 * time.Second
	MaxLease = 60 * time.Second
)

// CheckContainerName refuses names that Azure would refuse: 3 to 63 lower-case letters,
// digits and single hyphens inside. The error wraps ErrInvalid.
func CheckContainerName(name string) error {
	bad := func(why string) error {
		return fmt.Errorf("%w: container name %q: %s", ErrInvalid, name, why)
	}
	if len(name) < 3 || len(name) > 63 {
		return bad("length must be 3 to 63")
	}
	if name[0] == '-' || name[len(name)-1] == '-' || strings.Contains(name, "--") {
		return bad("hyphens must be single and inside")
	}
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return bad("only a-z, 0-9 and '-'")
		}
	}
	return nil
}

// CheckBlobName refuses names that are not '/'-separated segments of [A-Za-z0-9._-], and
// segments that end in a dot (which also rules out "." and ".."). The error wraps ErrInvalid.
func CheckBlobName(name string) error {
	bad := func(why string) error {
		return fmt.Errorf("%w: blob name %q: %s", ErrInvalid, name, why)
	}
	if name == "" {
		return bad("empty")
	}
	if len(name) > MaxBlobName {
		return bad("too long")
	}
	for seg := range strings.SplitSeq(name, "/") {
		switch {
		case seg == "":
			return bad("empty segment")
		case len(seg) > MaxNameSegment:
			return bad("segment too long")
		case seg[len(seg)-1] == '.':
			return bad("segment ends in a dot")
		}
		for i := range len(seg) {
			c := seg[i]
			ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
				c == '.' || c == '_' || c == '-'
			if !ok {
				return bad("only A-Z, a-z, 0-9, '.', '_', '-' and '/'")
			}
		}
	}
	return nil
}

// CheckMetadata refuses keys and values that do not survive every backend: keys are [a-z][a-z0-9_]*
// (Azure returns keys with changed case), values printable ASCII, 8 KiB in all. The error wraps ErrInvalid.
func CheckMetadata(md map[string]string) error {
	total := 0
	for k, v := range md {
		total += len(k) + len(v)
		if k == "" || k[0] < 'a' || k[0] > 'z' {
			return fmt.Errorf("%w: metadata key %q: must start with a-z", ErrInvalid, k)
		}
		for i := range len(k) {
			c := k[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
				return fmt.Errorf("%w: metadata key %q: only a-z, 0-9 and '_'", ErrInvalid, k)
			}
		}
		for i := range len(v) {
			if v[i] < ' ' || v[i] > '~' {
				return fmt.Errorf("%w: metadata value of %q: only printable ASCII", ErrInvalid, k)
			}
		}
	}
	if total > 8<<10 {
		return fmt.Errorf("%w: metadata of %d bytes", ErrInvalid, total)
	}
	return nil
}

// CheckPages refuses a page range that is not aligned to PageSize or leaves a blob of size bytes.
// The error wraps ErrInvalid.
func CheckPages(offset, length, size int64) error {
	if offset%PageSize != 0 || length%PageSize != 0 {
		return fmt.Errorf("%w: pages at %d, %d bytes: not a multiple of %d", ErrInvalid, offset, length, PageSize)
	}
	if length == 0 {
		return fmt.Errorf("%w: pages at %d: no bytes", ErrInvalid, offset)
	}
	return CheckRange(offset, length, size)
}

// CheckRange refuses a byte range that leaves a blob of size bytes. The error wraps ErrInvalid.
func CheckRange(offset, length, size int64) error {
	if offset < 0 || length < 0 || offset > math.MaxInt64-length || offset+length > size {
		return fmt.Errorf("%w: range at %d, %d bytes, leaves a blob of %d bytes", ErrInvalid, offset, length, size)
	}
	return nil
}

// CheckPageBlobSize refuses sizes that no page blob can have. The error wraps ErrInvalid.
func CheckPageBlobSize(size int64) error {
	if size < 0 || size%PageSize != 0 || size > MaxPageBlob {
		return fmt.Errorf("%w: page blob of %d bytes", ErrInvalid, size)
	}
	return nil
}

// CheckLeaseID refuses ids that are not UUIDs. The error wraps ErrInvalid.
func CheckLeaseID(id LeaseID) error {
	if len(id) != 36 || uuid.Validate(string(id)) != nil {
		return fmt.Errorf("%w: lease id %q is no UUID", ErrInvalid, id)
	}
	return nil
}

// CheckLeaseDuration refuses durations outside MinLease to MaxLease. The error wraps ErrInvalid.
func CheckLeaseDuration(d time.Duration) error {
	if d < MinLease || d > MaxLease {
		return fmt.Errorf("%w: lease of %s, must be %s to %s", ErrInvalid, d, MinLease, MaxLease)
	}
	return nil
}
