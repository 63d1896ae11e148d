package azurefake

import (
	"slices"
	"strconv"
	"time"
)

func (s *Server) deleteBlob(q *request) (*answer, *refusal) {
	c, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	how := q.Header.Get("x-ms-delete-snapshots")
	if how != "" && how != "include" && how != "only" || how != "" && q.snapshot != "" {
		return nil, badHeader("x-ms-delete-snapshots")
	}
	if e := q.conditions(v.etag, v.modified); e != nil {
		return nil, e
	}
	if e := c.undeletable(v, s.now()); e != nil {
		return nil, e
	}
	before := f.memory()
	switch {
	case q.snapshot != "":
		i := f.snap(q.snapshot)
		f.snaps = slices.Delete(f.snaps, i, i+1)
	case how == "only":
		f.snaps = nil
	default:
		if e := f.lease.write(q, s.now()); e != nil {
			return nil, e
		}
		if len(f.snaps) > 0 && how == "" {
			return nil, errSnapshots
		}
		f.base, f.snaps, f.lease, f.blocks = nil, nil, lease{}, nil
		c.blobs.Delete(f.name)
	}
	s.used += f.memory() - before
	permanent := strconv.FormatBool(s.opts.SoftDeleteDays == 0)
	return &answer{status: 202, header: map[string]string{"x-ms-delete-type-permanent": permanent}}, nil
}

// memory is what the family's bytes take; chunks shared by snapshots count once.
func (f *family) memory() (n int64) {
	seen := map[*chunk]struct{}{}
	for _, v := range append(slices.Clone(f.snaps), f.base) {
		if v == nil {
			continue
		}
		for _, b := range v.blocks {
			n += int64(len(b.data))
		}
		if v.pages != nil {
			for _, c := range v.pages.chunks {
				if _, ok := seen[c]; !ok && c.data != nil {
					seen[c] = struct{}{}
					n += chunkSize
				}
			}
		}
	}
	for _, b := range f.blocks {
		n += int64(len(b.data))
	}
	return n
}

const snapshotTime = "2006-01-02T15:04:05.0000000Z"

func (s *Server) snapshotBlob(q *request) (*answer, *refusal) {
	c, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := q.conditions(v.etag, v.modified); e != nil {
		return nil, e
	}
	// A leased blob needs no lease id here; one that is given must be that of the lease.
	if e := f.lease.read(q, s.now(), "Blob"); e != nil {
		return nil, e
	}
	if e := c.frozen(); e != nil {
		return nil, e
	}
	meta, e := metadata(q.Header)
	if e != nil {
		return nil, e
	}
	// Ids have a resolution of 100 ns: two snapshots at the same time get two ids.
	at := s.now().Truncate(100 * time.Nanosecond)
	if !at.After(f.lastSnap) {
		at = f.lastSnap.Add(100 * time.Nanosecond)
	}
	f.lastSnap = at
	snap := *v
	snap.snapshot = at.Format(snapshotTime)
	snap.blocks = slices.Clone(v.blocks)
	if meta != nil {
		snap.meta = meta
	}
	if v.isPages {
		snap.pages = v.pages.freeze()
	}
	f.snaps = append(f.snaps, &snap)
	a := &answer{status: 201, header: map[string]string{"ETag": snap.etag, "Last-Modified": httpTime(snap.modified), "x-ms-snapshot": snap.snapshot, "x-ms-request-server-encrypted": "true"}}
	s.addVersion(a)
	return a, nil
}
