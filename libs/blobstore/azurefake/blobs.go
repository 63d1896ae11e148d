package azurefake

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// contentHeaders are kept with a blob and given back; in requests they have the prefix x-ms-blob-.
var contentHeaders = []string{"Content-Type", "Content-Encoding", "Content-Language", "Content-MD5", "Cache-Control", "Content-Disposition"}

const rangeSumLimit = 4 << 20 // of x-ms-range-get-content-md5 and -crc64

func (v *version) kind() string {
	if v.isPages {
		return "PageBlob"
	}
	return "BlockBlob"
}

// given are the content headers of a request.
func (q *request) given() map[string]string {
	out := map[string]string{}
	for _, name := range contentHeaders {
		if v := q.Header.Get("x-ms-blob-" + name); v != "" {
			out[name] = v
		}
	}
	if out["Content-Type"] == "" {
		out["Content-Type"] = "application/octet-stream"
	}
	return out
}

// target returns the container and the family to put a blob into, after what an existing blob demands. base is nil for a new
// blob.
func (s *Server) target(q *request) (c *container, f *family, e *refusal) {
	if c, e = s.find(q.container); e != nil {
		return nil, nil, e
	}
	f, ok := c.blobs.Get(q.blob)
	if !ok {
		f = &family{name: q.blob}
	}
	if f.base == nil {
		if q.Header.Get("If-Match") != "" {
			return nil, nil, errCondition
		}
		if q.Header.Get("x-ms-lease-id") != "" {
			return nil, nil, refuse(412, "LeaseNotPresentWithBlobOperation", "There is no lease.")
		}
		return c, f, nil
	}
	if !q.replace {
		return nil, nil, errOverwrite
	}
	frozen := c.frozen()
	if s.opts.ImmutableFirst && frozen != nil {
		return nil, nil, frozen
	}
	if q.Header.Get("If-None-Match") == "*" {
		return nil, nil, errBlobExists
	}
	if e := s.change(q, c, f, f.base); e != nil {
		return nil, nil, e
	}
	return c, f, nil
}

// store makes v the family's blob.
func (s *Server) store(c *container, f *family, v *version) {
	s.born++
	v.incarnation = s.born
	v.created = s.now()
	if f.base != nil {
		v.created = f.base.created
		if f.base.isPages != v.isPages || v.isPages {
			v.created = s.now()
		}
	}
	s.touch(v)
	before := f.memory()
	f.base, f.blocks = v, nil
	s.used += f.memory() - before
	c.blobs.Set(f.name, f)
}

func (s *Server) putBlob(q *request) (*answer, *refusal) {
	kind := q.Header.Get("x-ms-blob-type")
	meta, e := metadata(q.Header)
	if e != nil {
		return nil, e
	}
	v := &version{meta: meta, header: q.given()}
	switch kind {
	case "BlockBlob":
		v.size = q.body.size
		v.blocks = []block{{size: q.body.size, data: q.body.data, crc: q.body.crc}}
		if m := q.Header.Get("Content-MD5"); m != "" {
			v.header["Content-MD5"] = m
		}
	case "PageBlob":
		if e := q.newPageBlob(v); e != nil {
			return nil, e
		}
		v.pages = newPages(s.opts.Discard)
	case "":
		return nil, missingHeader("x-ms-blob-type")
	default:
		return nil, errNotImplemented
	}
	c, f, e := s.target(q)
	if e != nil {
		return nil, e
	}
	if e := s.room(q.body.size); e != nil {
		return nil, e
	}
	if f.base != nil && f.base.isPages != v.isPages && len(f.snaps) > 0 {
		return nil, errSnapshots
	}
	s.store(c, f, v)
	return s.written(q, v), nil
}

// written answers a write that made a version.
func (s *Server) written(q *request, v *version) *answer {
	a := &answer{status: 201, header: map[string]string{"ETag": v.etag, "Last-Modified": httpTime(v.modified), "x-ms-request-server-encrypted": "true"}}
	if m := q.Header.Get("Content-MD5"); m != "" {
		a.header["Content-MD5"] = m
	}
	if q.Header.Get("x-ms-content-crc64") != "" {
		a.header["x-ms-content-crc64"] = crcText(q.body.crc)
	}
	s.addVersion(a)
	return a
}

func (s *Server) addVersion(a *answer) {
	if s.opts.Versioning {
		a.header["x-ms-version-id"] = s.now().Format(snapshotTime)
	}
}

func (s *Server) putBlock(q *request) (*answer, *refusal) {
	raw, err := base64.StdEncoding.DecodeString(q.query.Get("blockid"))
	if err != nil || len(raw) == 0 || len(raw) > 64 {
		return nil, badQuery("blockid")
	}
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	f, ok := c.blobs.Get(q.blob)
	if !ok {
		f = &family{name: q.blob}
	}
	if f.base != nil && f.base.isPages {
		return nil, errBlobType
	}
	if e := f.lease.write(q, s.now()); e != nil {
		return nil, e
	}
	for _, b := range f.blocks {
		if len(b.id) != len(raw) {
			return nil, errBlockID
		}
	}
	if len(f.blocks) >= 100_000 {
		return nil, refuse(409, "BlockCountExceedsLimit", "There are 100,000 uncommitted blocks.")
	}
	if e := s.room(q.body.size); e != nil {
		return nil, e
	}
	before := f.memory()
	f.blocks = slices.DeleteFunc(f.blocks, func(b block) bool { return b.id == string(raw) })
	f.blocks = append(f.blocks, block{id: string(raw), size: q.body.size, data: q.body.data, crc: q.body.crc})
	s.used += f.memory() - before
	c.blobs.Set(q.blob, f)
	a := s.written(q, &version{})
	delete(a.header, "ETag")
	delete(a.header, "Last-Modified")
	delete(a.header, "x-ms-version-id")
	return a, nil
}

func (s *Server) putBlockList(q *request) (*answer, *refusal) {
	meta, e := metadata(q.Header)
	if e != nil {
		return nil, e
	}
	c, f, e := s.target(q)
	if e != nil {
		return nil, e
	}
	if f.base != nil && f.base.isPages {
		return nil, errBlobType
	}
	v := &version{meta: meta, header: q.given()}
	find := func(in []block, id string) (block, bool) {
		i := slices.IndexFunc(in, func(b block) bool { return b.id == id })
		if i < 0 {
			return block{}, false
		}
		return in[i], true
	}
	var committed []block
	if f.base != nil {
		committed = f.base.blocks
	}
	d := xml.NewDecoder(bytes.NewReader(q.body.data))
	for depth := 0; ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, refuse(400, "InvalidXmlDocument", "The body is not valid.")
		}
		start, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		if depth++; depth == 1 {
			continue // BlockList
		}
		var text string
		if err := d.DecodeElement(&text, &start); err != nil {
			return nil, refuse(400, "InvalidXmlDocument", "The body is not valid.")
		}
		raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
		if err != nil {
			return nil, refuse(400, "InvalidBlockId", "A block id is not valid.")
		}
		var b block
		switch start.Name.Local {
		case "Latest":
			if b, ok = find(f.blocks, string(raw)); !ok {
				b, ok = find(committed, string(raw))
			}
		case "Uncommitted":
			b, ok = find(f.blocks, string(raw))
		case "Committed":
			b, ok = find(committed, string(raw))
		default:
			return nil, refuse(400, "UnsupportedXmlNode", "The body has an element that is not known.")
		}
		if !ok {
			return nil, errBlockList
		}
		v.blocks = append(v.blocks, b)
		v.size += b.size
	}
	if len(v.blocks) > 50_000 {
		return nil, refuse(400, "BlockListTooLong", "The list has more than 50,000 blocks.")
	}
	s.store(c, f, v)
	return s.written(q, v), nil
}

func (s *Server) getBlockList(q *request) (*answer, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	f, ok := c.blobs.Get(q.blob)
	if !ok {
		return nil, errBlobNotFound
	}
	if f.base != nil && f.base.isPages {
		return nil, errBlobType
	}
	if e := f.lease.read(q, s.now(), "Blob"); e != nil {
		return nil, e
	}
	var b bytes.Buffer
	list := func(name string, blocks []block) {
		b.WriteString("<" + name + ">")
		for _, k := range blocks {
			if k.id == "" {
				continue // by Put Blob
			}
			b.WriteString("<Block>")
			element(&b, "Name", base64.StdEncoding.EncodeToString([]byte(k.id)))
			element(&b, "Size", strconv.FormatInt(k.size, 10))
			b.WriteString("</Block>")
		}
		b.WriteString("</" + name + ">")
	}
	which := q.query.Get("blocklisttype")
	b.WriteString(xml.Header + "<BlockList>")
	if which != "uncommitted" && f.base != nil {
		list("CommittedBlocks", f.base.blocks)
	}
	if which == "uncommitted" || which == "all" {
		list("UncommittedBlocks", f.blocks)
	}
	b.WriteString("</BlockList>")
	a, _ := s.xmlAnswer(200, &b)
	if f.base != nil {
		a.header["ETag"], a.header["Last-Modified"] = f.base.etag, httpTime(f.base.modified)
		a.header["x-ms-blob-content-length"] = strconv.FormatInt(f.base.size, 10)
	}
	return a, nil
}

func (s *Server) blobProperties(q *request) (*answer, *refusal) {
	_, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := s.look(q, f, v); e != nil {
		return nil, e
	}
	a := &answer{status: 200, header: s.describe(q, f, v)}
	if q.name == "GetBlobProperties" {
		a.header["Content-Length"] = strconv.FormatInt(v.size, 10)
		a.header["x-ms-access-tier"], a.header["x-ms-access-tier-inferred"] = "Hot", "true"
	}
	return a, nil
}

// describe makes the headers of Get Blob and Get Blob Properties.
func (s *Server) describe(q *request, f *family, v *version) map[string]string {
	h := map[string]string{
		"ETag": v.etag, "Last-Modified": httpTime(v.modified), "x-ms-creation-time": httpTime(v.created), "x-ms-blob-type": v.kind(),
		"x-ms-server-encrypted": "true", "Accept-Ranges": "bytes",
	}
	maps.Copy(h, v.header)
	if v.isPages {
		h["x-ms-blob-sequence-number"] = strconv.FormatInt(v.seq, 10)
	}
	if q.snapshot == "" {
		f.lease.headers(s.now(), h)
		if s.opts.Versioning {
			h["x-ms-version-id"], h["x-ms-is-current-version"] = v.modified.UTC().Format(snapshotTime), "true"
		}
	}
	addMeta(h, v.meta)
	return h
}

func (s *Server) getBlob(q *request) (*answer, *refusal) {
	_, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := s.look(q, f, v); e != nil {
		return nil, e
	}
	a := &answer{status: 200, header: s.describe(q, f, v), size: v.size}
	off := int64(0)
	if r := rangeHeader(q.Header); r != "" {
		from, to, ok := parseRange(r)
		if !ok {
			return nil, badHeader("x-ms-range")
		}
		if from >= v.size {
			return nil, errRange
		}
		if to < 0 || to >= v.size {
			to = v.size - 1
		}
		off, a.size, a.status = from, to-from+1, 206
		a.header["Content-Range"] = "bytes " + strconv.FormatInt(from, 10) + "-" + strconv.FormatInt(to, 10) + "/" + strconv.FormatInt(v.size, 10)
		if m := a.header["Content-MD5"]; m != "" {
			delete(a.header, "Content-MD5")
			a.header["x-ms-blob-content-md5"] = m
		}
		if e := q.rangeSum(a, v, off); e != nil {
			return nil, e
		}
	}
	if v.isPages {
		a.content = func(p []byte, at int64) {
			s.mu.Lock()
			defer s.mu.Unlock()
			v.readAt(p, off+at)
		}
	} else {
		fixed := &version{blocks: slices.Clone(v.blocks)} // their bytes are never written again
		a.content = func(p []byte, at int64) { fixed.readAt(p, off+at) }
	}
	return a, nil
}

// rangeSum adds the checksum of a range of at most 4 MiB if the request asks for one.
func (q *request) rangeSum(a *answer, v *version, off int64) *refusal {
	wantMD5 := q.Header.Get("x-ms-range-get-content-md5") == "true"
	wantCRC := q.Header.Get("x-ms-range-get-content-crc64") == "true"
	if !wantMD5 && !wantCRC {
		return nil
	}
	if a.size > rangeSumLimit || wantMD5 && wantCRC {
		return badHeader("x-ms-range-get-content-md5")
	}
	p := make([]byte, a.size)
	v.readAt(p, off)
	if wantMD5 {
		sum := md5.Sum(p)
		a.header["Content-MD5"] = base64.StdEncoding.EncodeToString(sum[:])
	} else {
		a.header["x-ms-content-crc64"] = crcText(CRC64(p))
	}
	return nil
}

func (s *Server) setBlobMetadata(q *request) (*answer, *refusal) {
	c, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := s.change(q, c, f, v); e != nil {
		return nil, e
	}
	meta, e := metadata(q.Header)
	if e != nil {
		return nil, e
	}
	v.meta = meta
	s.touch(v)
	a := s.written(q, v)
	a.status = 200
	return a, nil
}
