package azurefake

import (
	"fmt"
	"hash/crc64"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// container, family and version are the state of the account, all guarded by Server.mu.
type container struct {
	name     string
	etag     string
	modified time.Time
	meta     map[string]string
	lease    lease
	once     WriteOnce
	blobs    btree.Map[string, *family]
	deleted  time.Time // zero while it exists
}

// family is a blob with its snapshots and uncommitted blocks.
type family struct {
	name   string
	base   *version   // nil while only uncommitted blocks exist
	snaps  []*version // by age, which is by id
	blocks []block    // uncommitted
	lease  lease
	shape  *pace   // BlobBandwidth
	limit  *limits // of a page blob
	// lastSnap keeps snapshot ids rising, whatever the clock does.
	lastSnap time.Time
}

// version is a blob's state, or a snapshot of it.
type version struct {
	snapshot    string // its id, empty for the blob itself
	incarnation uint64 // changes when the blob is put again
	isPages     bool
	size        int64
	etag        string
	created     time.Time
	modified    time.Time
	seq         int64
	meta        map[string]string
	header      map[string]string // Content-Type and the like, by the answer's header
	blocks      []block
	pages       *pages
	digest      uint64
}

// block is a part of a block blob; data is nil when bytes are discarded.
type block struct {
	id   string
	size int64
	data []byte
	crc  uint64
}

// readAt fills p from offset off of a block blob; the range is inside.
func (v *version) readAt(p []byte, off int64) {
	if v.isPages {
		v.pages.read(p, off)
		return
	}
	for _, b := range v.blocks {
		if len(p) == 0 {
			return
		}
		if off >= b.size {
			off -= b.size
			continue
		}
		n := min(int64(len(p)), b.size-off)
		if b.data == nil {
			clear(p[:n])
		} else {
			copy(p[:n], b.data[off:])
		}
		p, off = p[n:], 0
	}
}

// touch gives a changed blob a new ETag and time.
func (s *Server) touch(v *version) {
	v.etag, v.modified = s.newETag(), s.now()
}

func (s *Server) newETag() string {
	s.etags++
	return fmt.Sprintf("\"0x8DE%012X\"", s.etags)
}

// TakeContainer takes a container away behind everybody's back, as a deletion of minutes ago, and returns what puts it back as
// an undelete does: nil when there is no such container. Putting it back replaces what was made under its name meanwhile.
func (s *Server) TakeContainer(name string) (restore func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.containers[name]
	if !ok {
		return nil
	}
	delete(s.containers, name)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.containers[name] = c
	}
}

// HasContainer tells whether there is such a container.
func (s *Server) HasContainer(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.containers[name]
	return ok && c.deleted.IsZero()
}

// WriteOnce is a container-level immutability policy.
type WriteOnce struct {
	// Retention is counted from a blob's creation; 0 is no policy.
	Retention time.Duration
	// Locked says that it can only be extended. The server enforces locked and unlocked policies alike.
	Locked bool
	// LegalHold forbids everything until it is lifted.
	LegalHold bool
}

// frozen refuses to change an existing blob of the container: also after the policy expired.
func (c *container) frozen() *refusal {
	switch {
	case c.once.LegalHold:
		return errLegalHold
	case c.once.Retention > 0:
		return errImmutable
	}
	return nil
}

// undeletable refuses to delete a blob before the policy of the container has expired for it.
func (c *container) undeletable(v *version, now time.Time) *refusal {
	switch {
	case c.once.LegalHold:
		return errLegalHold
	case c.once.Retention > 0 && now.Before(v.created.Add(c.once.Retention)):
		return errImmutable
	}
	return nil
}

// find returns the container, which exists.
func (s *Server) find(name string) (*container, *refusal) {
	c := s.containers[name]
	if c == nil || !c.deleted.IsZero() {
		return nil, errContainerNotFound
	}
	return c, nil
}

// findBlob returns the family and the version that the request names; the version exists.
func (s *Server) findBlob(q *request) (*container, *family, *version, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, nil, nil, e
	}
	f, ok := c.blobs.Get(q.blob)
	if !ok {
		return nil, nil, nil, errBlobNotFound
	}
	if q.snapshot == "" {
		if f.base == nil {
			return nil, nil, nil, errBlobNotFound
		}
		return c, f, f.base, nil
	}
	if i := f.snap(q.snapshot); i >= 0 {
		return c, f, f.snaps[i], nil
	}
	return nil, nil, nil, errBlobNotFound
}

func (f *family) snap(id string) int {
	return slices.IndexFunc(f.snaps, func(v *version) bool { return v.snapshot == id })
}

// metadata reads x-ms-meta-*. The service keeps the case of names, which net/http loses: they become lower case.
func metadata(h http.Header) (map[string]string, *refusal) {
	const prefix = "X-Ms-Meta-"
	var m map[string]string
	for k, v := range h {
		name, ok := strings.CutPrefix(k, prefix)
		if !ok {
			continue
		}
		if name == "" {
			return nil, refuse(400, "EmptyMetadataKey", "A metadata name is empty.")
		}
		for i, c := range []byte(name) {
			letter := c == '_' || c|0x20 >= 'a' && c|0x20 <= 'z'
			if !letter && (i == 0 || c < '0' || c > '9') {
				return nil, refuse(400, "InvalidMetadata", "A metadata name is no identifier.")
			}
		}
		if m == nil {
			m = map[string]string{}
		}
		m[strings.ToLower(name)] = strings.Join(v, ",")
	}
	size := 0
	for k, v := range m {
		size += len(k) + len(v)
	}
	if size > 8<<10 {
		return nil, refuse(400, "MetadataTooLarge", "The metadata is larger than 8 KiB.")
	}
	return m, nil
}

var crcTable = crc64.MakeTable(0x9A6C9329AC4BC9B5)

// CRC64 is the checksum that Azure uses (x-ms-content-crc64 has it in little endian, base64).
func CRC64(p []byte) uint64 { return crc64.Checksum(p, crcTable) }
