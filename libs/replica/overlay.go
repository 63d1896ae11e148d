package replica

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/segment"
)

const (
	// wholeSegment: a segment up to this size is fetched in one request and its SHA-256 is verified, in bytes.
	wholeSegment = 4 << 20
	// keptBodies bounds the bodies of small segments that one overlay keeps, in bytes.
	keptBodies = 32 << 20
)

// piece is where the bytes of a range are: in a segment's data stream from pos, zero, or in the base snapshot.
type piece struct {
	seg int32 // index into overlay.segs, or one of the negatives
	pos int64
}

const (
	pieceZero int32 = -1
	pieceBase int32 = -2
)

// overlay is what the manifests of a range say about one disk, last write wins. Only indexes are in memory:
// about 100 bytes per surviving extent.
type overlay struct {
	m    extent.Map[piece]
	segs []*segData
	kept int64
}

// segData is an opened segment: its frame table, and its body when small.
type segData struct {
	ix   *segment.Index
	c    blobstore.Container
	name string
	body []byte
	r    *Replica // of an overlay: to look at the record again when the object is gone
	of   Seq      // the manifest that names it
}

// named is one segment with the manifest that names it.
type named struct {
	m *Manifest
	s Segment
}

// collect appends the segments of one manifest for a disk.
func collect(list []named, m *Manifest, d DiskState) []named {
	for i := range m.Disks {
		if x := &m.Disks[i]; x.ID == d.ID && x.Gen == d.Gen {
			for _, s := range x.Segments {
				list = append(list, named{m, s})
			}
		}
	}
	return list
}

// add lays segments over what is there, in order. Up to parallel indexes are fetched at a time; with 1 no goroutine is
// started. tick is called now and then.
func (o *overlay) add(ctx context.Context, r *Replica, d DiskState, list []named, parallel int, tick func() error) error {
	for len(list) > 0 {
		n := min(len(list), max(parallel, 1))
		group, opened := list[:n], make([]*segData, n)
		list = list[n:]
		if err := tick(); err != nil {
			return err
		}
		keep := (keptBodies - o.kept) / int64(n)
		if err := inParallel(ctx, n, func(ctx context.Context, i int) (err error) {
			if opened[i], err = r.openSegment(ctx, group[i].s, keep); err == nil {
				opened[i].r, opened[i].of = r, group[i].m.Seq
			}
			return r.orRetired(ctx, group[i].m.Seq, err)
		}); err != nil {
			return err
		}
		for i, sd := range opened {
			if err := sd.matches(r.lineage, group[i].m, d); err != nil {
				return fmt.Errorf("manifest %d: %w", group[i].m.Seq, sd.broken(err))
			}
			o.lay(sd)
		}
	}
	return nil
}

func (o *overlay) lay(sd *segData) {
	o.kept += int64(len(sd.body))
	n := int32(len(o.segs))
	o.segs = append(o.segs, sd)
	for _, e := range sd.ix.Extents {
		p := piece{seg: n, pos: e.Pos}
		if e.Zero {
			p = piece{seg: pieceZero}
		}
		o.m.Put(extent.Range{Off: e.Off, Len: e.Len}, p)
	}
	sd.ix.Extents = nil // they live in the map now
}

// inParallel runs fn for 0 to n-1, each in its goroutine; n is small. One alone runs in the caller's.
func inParallel(ctx context.Context, n int, fn func(ctx context.Context, i int) error) error {
	if n == 1 {
		return fn(ctx, 0)
	}
	g, ctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(func() error { return fn(ctx, i) })
	}
	return g.Wait()
}

// openSegment reads a segment's index, and all of it when it is small. keep is how many body bytes may stay.
func (r *Replica) openSegment(ctx context.Context, s Segment, keep int64) (*segData, error) {
	sd := &segData{c: r.container(s.Container), name: s.Name}
	src := io.ReaderAt(blobReader{ctx, sd.c, sd.name})
	var body []byte
	if s.Bytes <= wholeSegment {
		var err error
		if body, err = readAll(ctx, sd.c, sd.name, wholeSegment); err != nil {
			return nil, sd.broken(err)
		}
		if sha := sha256.Sum256(body); int64(len(body)) != s.Bytes || hex.EncodeToString(sha[:]) != s.SHA256 {
			return nil, sd.broken(fmt.Errorf("%d bytes, where its manifest says %d and the SHA-256 %s: %w", len(body), s.Bytes, s.SHA256, segment.ErrCorrupt))
		}
		src = memReader(body)
	}
	ix, err := segment.ReadIndex(src, s.Bytes)
	if err != nil {
		return nil, sd.broken(err)
	}
	sd.ix = ix
	if int64(len(body)) <= keep {
		sd.body = body
	}
	return sd, nil
}

// openIndex reads a segment's index alone: usually one read of its tail.
func (r *Replica) openIndex(ctx context.Context, s Segment) (*segData, error) {
	sd := &segData{c: r.container(s.Container), name: s.Name}
	var err error
	if sd.ix, err = segment.ReadIndex(blobReader{ctx, sd.c, sd.name}, s.Bytes); err != nil {
		return nil, sd.broken(err)
	}
	return sd, nil
}

// broken names the object of an error met when a segment was read. Damage and absence are segment.ErrCorrupt and
// ErrCorrupt; everything else, a store that does not answer for one, stays what it is.
func (sd *segData) broken(err error) error {
	at := sd.c.Name() + "/" + sd.name
	switch {
	case errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer):
		return fmt.Errorf("segment %s is not in storage, but a manifest names it: %w: %w: %w", at, ErrCorrupt, segment.ErrCorrupt, err)
	case errors.Is(err, blobstore.ErrInvalid): // an offset past its end
		return fmt.Errorf("segment %s is shorter than its manifest says: %w: %w: %w", at, ErrCorrupt, segment.ErrCorrupt, err)
	case errors.Is(err, segment.ErrCorrupt), errors.Is(err, ErrCorrupt):
		return fmt.Errorf("segment %s: %w: %w: %w", at, ErrCorrupt, segment.ErrCorrupt, err)
	}
	return fmt.Errorf("segment %s: %w", at, err)
}

// matches refuses a segment that is not what its manifest says.
func (sd *segData) matches(l Lineage, m *Manifest, d DiskState) error {
	h, want := sd.ix.Header, m.Ordinal()
	kind := segment.KindPoint
	switch m.Kind {
	case KindPartial:
		kind = segment.KindPass
	case KindRewind:
		kind, want = segment.KindRewind, m.Base
	}
	switch {
	case h.Lineage != l.Bytes(), h.DiskID != d.ID, h.Gen != d.Gen, h.DiskSize != d.Size:
		return fmt.Errorf("it is of lineage %x, disk %s generation %d: %w", h.Lineage, h.DiskID, h.Gen, ErrCorrupt)
	case h.Kind != kind, Ordinal(h.Ordinal) != want, m.Pass != nil && h.Task != m.Pass.I:
		return fmt.Errorf("it is of ordinal %d: %w", h.Ordinal, ErrCorrupt)
	}
	return nil
}

// blobReader lets segment read ranges of a blob. It lives for one operation, whose context it carries.
type blobReader struct {
	ctx  context.Context // io.ReaderAt has no parameter for it
	c    blobstore.Container
	name string
}

func (b blobReader) ReadAt(p []byte, off int64) (int, error) {
	rc, _, err := b.c.Get(b.ctx, b.name, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	return io.ReadFull(rc, p)
}

type memReader []byte

func (m memReader) ReadAt(p []byte, off int64) (int, error) {
	if off > int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Bounds of a fetcher: read ahead per segment, and how many segments at once.
const (
	readAhead  = 512 << 10
	maxWindows = 8
)

// fetcher reads pieces of one overlay for one worker: ascending offsets of a disk are ascending positions in each
// segment, so a window that moves forward serves them with few requests. At most 5 MiB of memory.
type fetcher struct {
	o       *overlay
	windows []*window // most recently used last
}

type window struct {
	seg    int32
	off    int64  // of buf in the object
	buf    []byte // stored bytes
	frame  int    // decoded frame, -1 for none
	raw    []byte
	rawBuf []byte
}

func (f *fetcher) window(seg int32) *window {
	if i := slices.IndexFunc(f.windows, func(w *window) bool { return w.seg == seg }); i >= 0 {
		w := f.windows[i]
		f.windows = append(slices.Delete(f.windows, i, i+1), w)
		return w
	}
	w := &window{}
	if len(f.windows) == maxWindows {
		w = f.windows[0]
		f.windows = slices.Delete(f.windows, 0, 1)
	}
	*w = window{seg: seg, frame: -1, buf: w.buf[:0], rawBuf: w.rawBuf}
	f.windows = append(f.windows, w)
	return w
}

// read fills p from position pos of a segment's data stream.
func (f *fetcher) read(ctx context.Context, seg int32, pos int64, p []byte) error {
	sd := f.o.segs[seg]
	w := f.window(seg)
	for len(p) > 0 {
		k := int(pos / segment.FrameSize)
		if k != w.frame {
			if err := w.load(ctx, sd, k, pos, int64(len(p))); err != nil {
				return sd.r.orRetired(ctx, sd.of, sd.broken(err))
			}
		}
		n := copy(p, w.raw[pos%segment.FrameSize:])
		p, pos = p[n:], pos+int64(n)
	}
	return nil
}

// load decodes frame k, fetching it and what follows when the window has it not. need raw bytes at pos are wanted.
func (w *window) load(ctx context.Context, sd *segData, k int, pos, need int64) error {
	w.frame = -1
	_, _, off, length, err := sd.ix.Frames(pos, need)
	if err != nil {
		return err
	}
	size := int64(sd.ix.StoredLen(k))
	var stored []byte
	switch {
	case sd.body != nil:
		stored = sd.body[off : off+size]
	default:
		if off < w.off || off+size > w.off+int64(len(w.buf)) {
			n := min(max(length, readAhead), readAhead+2*segment.FrameSize, sd.ix.StoredEnd()-off)
			n = max(n, size)
			if int64(cap(w.buf)) < n {
				w.buf = make([]byte, readAhead+2*segment.FrameSize)
			}
			w.off, w.buf = off, w.buf[:n]
			if _, err := (blobReader{ctx, sd.c, sd.name}).ReadAt(w.buf, off); err != nil {
				w.buf = w.buf[:0]
				return err
			}
		}
		stored = w.buf[off-w.off:][:size]
	}
	if w.rawBuf == nil {
		w.rawBuf = make([]byte, segment.FrameSize)
	}
	if w.raw, err = sd.ix.Decode(k, stored, w.rawBuf); err != nil {
		return err
	}
	w.frame = k
	return nil
}
