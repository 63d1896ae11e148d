package azurefake

import (
	"bytes"
	"encoding/base64"
	"encoding/xml"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// recreateAfter is how long a deleted container's name cannot be used ("Delete Container").
const recreateAfter = 30 * time.Second

const maxListed = 5000

func (s *Server) createContainer(q *request) (*answer, *refusal) {
	now := s.now()
	if c := s.containers[q.container]; c != nil {
		if c.deleted.IsZero() {
			return nil, errContainerExists
		}
		if now.Before(c.deleted.Add(recreateAfter)) {
			return nil, errContainerDeleting
		}
	}
	meta, e := metadata(q.Header)
	if e != nil {
		return nil, e
	}
	c := &container{name: q.container, etag: s.newETag(), modified: now, meta: meta}
	s.containers[q.container] = c
	return &answer{status: 201, header: map[string]string{"ETag": c.etag, "Last-Modified": httpTime(now)}}, nil
}

func (s *Server) deleteContainer(q *request) (*answer, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	if e := q.conditions(c.etag, c.modified); e != nil {
		return nil, e
	}
	if e := c.lease.writeTo(q, s.now(), "Container"); e != nil {
		return nil, e
	}
	switch {
	case c.once.LegalHold:
		return nil, refuse(409, "ContainerHasLegalHold", "The container has a legal hold.")
	case c.once.Locked && c.blobs.Len() > 0:
		return nil, refuse(409, "ContainerImmutabilityPolicyLocked", "The container has a locked policy.")
	}
	c.blobs.Scan(func(_ string, f *family) bool {
		s.used -= f.memory()
		return true
	})
	c.blobs.Clear()
	c.deleted = s.now()
	return &answer{status: 202}, nil
}

func (s *Server) containerProperties(q *request) (*answer, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	if e := c.lease.read(q, s.now(), "Container"); e != nil {
		return nil, e
	}
	h := map[string]string{
		"ETag": c.etag, "Last-Modified": httpTime(c.modified),
		"x-ms-has-immutability-policy":                   strconv.FormatBool(c.once.Retention > 0),
		"x-ms-has-legal-hold":                            strconv.FormatBool(c.once.LegalHold),
		"x-ms-immutable-storage-with-versioning-enabled": "false",
		"x-ms-default-encryption-scope":                  "$account-encryption-key",
		"x-ms-deny-encryption-scope-override":            "false",
	}
	c.lease.headers(s.now(), h)
	addMeta(h, c.meta)
	return &answer{status: 200, header: h}, nil
}

func (s *Server) setContainerMetadata(q *request) (*answer, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	if e := c.lease.read(q, s.now(), "Container"); e != nil {
		return nil, e
	}
	meta, e := metadata(q.Header)
	if e != nil {
		return nil, e
	}
	c.meta, c.etag, c.modified = meta, s.newETag(), s.now()
	return &answer{status: 200, header: map[string]string{"ETag": c.etag, "Last-Modified": httpTime(c.modified)}}, nil
}

func addMeta(h, meta map[string]string) {
	for k, v := range meta {
		h["X-Ms-Meta-"+k] = v
	}
}

// element writes <name>text</name>, escaped; an empty text is left out.
func element(b *bytes.Buffer, name, text string) {
	if text == "" {
		return
	}
	b.WriteString("<" + name + ">")
	_ = xml.EscapeText(b, []byte(text)) // a buffer takes everything
	b.WriteString("</" + name + ">")
}

// page reads maxresults, and the marker as the name that the page begins at.
func (q *request) page() (limit int, from string, e *refusal) {
	limit = maxListed
	if v := q.query.Get("maxresults"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			return 0, "", refuse(400, "OutOfRangeQueryParameterValue", "maxresults is out of range.")
		}
		limit = min(n, maxListed)
	}
	if v := q.query.Get("marker"); v != "" {
		raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(v, "2!"))
		if err != nil {
			return 0, "", badQuery("marker")
		}
		from = string(raw)
	}
	return limit, from, nil
}

func marker(at string) string { return "2!" + base64.RawURLEncoding.EncodeToString([]byte(at)) }

func (s *Server) listContainers(q *request) (*answer, *refusal) {
	limit, from, e := q.page()
	if e != nil {
		return nil, e
	}
	prefix, now := q.query.Get("prefix"), s.now()
	include := q.query.Get("include")
	var b bytes.Buffer
	b.WriteString(xml.Header + `<EnumerationResults ServiceEndpoint="` + s.scheme() + "://" + q.Host + "/" + s.Account + `/">`)
	element(&b, "Prefix", prefix)
	b.WriteString("<Containers>")
	next, n := "", 0
	for _, name := range slices.Sorted(maps.Keys(s.containers)) {
		c := s.containers[name]
		if !strings.HasPrefix(name, prefix) || name < from || !c.deleted.IsZero() {
			continue
		}
		if n == limit {
			next = marker(name)
			break
		}
		n++
		b.WriteString("<Container>")
		element(&b, "Name", name)
		b.WriteString("<Properties>")
		element(&b, "Last-Modified", httpTime(c.modified))
		element(&b, "Etag", c.etag)
		leaseElements(&b, &c.lease, now)
		element(&b, "HasImmutabilityPolicy", strconv.FormatBool(c.once.Retention > 0))
		element(&b, "HasLegalHold", strconv.FormatBool(c.once.LegalHold))
		b.WriteString("</Properties>")
		if strings.Contains(include, "metadata") {
			metaElements(&b, c.meta)
		}
		b.WriteString("</Container>")
	}
	b.WriteString("</Containers><NextMarker>" + next + "</NextMarker></EnumerationResults>")
	return s.xmlAnswer(200, &b)
}

func leaseElements(b *bytes.Buffer, l *lease, now time.Time) {
	h := map[string]string{}
	l.headers(now, h)
	element(b, "LeaseStatus", h["x-ms-lease-status"])
	element(b, "LeaseState", h["x-ms-lease-state"])
	element(b, "LeaseDuration", h["x-ms-lease-duration"])
}

func metaElements(b *bytes.Buffer, meta map[string]string) {
	b.WriteString("<Metadata>")
	for _, k := range slices.Sorted(maps.Keys(meta)) {
		element(b, k, meta[k])
	}
	b.WriteString("</Metadata>")
}

// listBlobs lists snapshots of a blob, oldest first, before the blob itself. The marker is the entry that the next page begins
// with: name, a zero byte, snapshot or 0xff for the blob.
func (s *Server) listBlobs(q *request) (*answer, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	limit, from, e := q.page()
	if e != nil {
		return nil, e
	}
	include := map[string]bool{}
	for _, v := range q.query["include"] {
		for w := range strings.SplitSeq(v, ",") {
			include[w] = true
		}
	}
	prefix, delimiter := q.query.Get("prefix"), q.query.Get("delimiter")
	if v := q.query.Get("startFrom"); v > from {
		from = v
	}
	fromName, fromEntry, _ := strings.Cut(from, "\x00")
	var b bytes.Buffer
	b.WriteString(xml.Header + `<EnumerationResults ServiceEndpoint="` + s.scheme() + "://" + q.Host + "/" + s.Account + `/" ContainerName="` + c.name + `">`)
	element(&b, "Prefix", prefix)
	element(&b, "Delimiter", delimiter)
	b.WriteString("<Blobs>")
	next, n, now, lastPrefix := "", 0, s.now(), ""
	c.blobs.Ascend(max(prefix, fromName), func(name string, f *family) bool {
		if !strings.HasPrefix(name, prefix) {
			return name < prefix
		}
		if delimiter != "" {
			if i := strings.Index(name[len(prefix):], delimiter); i >= 0 {
				group := name[:len(prefix)+i+len(delimiter)]
				if group == lastPrefix || f.base == nil {
					return true
				}
				if n == limit {
					next = marker(name)
					return false
				}
				n, lastPrefix = n+1, group
				b.WriteString("<BlobPrefix>")
				element(&b, "Name", group)
				b.WriteString("</BlobPrefix>")
				return true
			}
		}
		versions := []*version{f.base}
		if include["snapshots"] {
			versions = append(slices.Clone(f.snaps), f.base)
		}
		for _, v := range versions {
			uncommitted := v == nil
			if uncommitted {
				if !include["uncommittedblobs"] || len(f.blocks) == 0 {
					continue
				}
				v = &version{created: now, modified: now, etag: "\"0x0\""}
			}
			entry := v.snapshot
			if entry == "" {
				entry = "\xff"
			}
			if name == fromName && entry < fromEntry {
				continue
			}
			if n == limit {
				next = marker(name + "\x00" + entry)
				return false
			}
			n++
			blobElement(&b, f, v, include["metadata"], now)
		}
		return true
	})
	b.WriteString("</Blobs><NextMarker>" + next + "</NextMarker></EnumerationResults>")
	return s.xmlAnswer(200, &b)
}

func blobElement(b *bytes.Buffer, f *family, v *version, meta bool, now time.Time) {
	b.WriteString("<Blob>")
	element(b, "Name", f.name)
	element(b, "Snapshot", v.snapshot)
	b.WriteString("<Properties>")
	element(b, "Creation-Time", httpTime(v.created))
	element(b, "Last-Modified", httpTime(v.modified))
	element(b, "Etag", v.etag)
	element(b, "Content-Length", strconv.FormatInt(v.size, 10))
	for _, name := range contentHeaders {
		element(b, name, v.header[name])
	}
	element(b, "BlobType", v.kind())
	if v.isPages {
		element(b, "x-ms-blob-sequence-number", strconv.FormatInt(v.seq, 10))
	}
	if v.snapshot == "" {
		leaseElements(b, &f.lease, now)
	}
	element(b, "ServerEncrypted", "true")
	b.WriteString("</Properties>")
	if meta {
		metaElements(b, v.meta)
	}
	b.WriteString("</Blob>")
}

func (s *Server) serviceProperties(*request) (*answer, *refusal) {
	var b bytes.Buffer
	b.WriteString(xml.Header + "<StorageServiceProperties><Logging><Version>1.0</Version><Read>false</Read><Write>false</Write><Delete>false</Delete>" +
		"<RetentionPolicy><Enabled>false</Enabled></RetentionPolicy></Logging><Cors/>")
	if d := s.opts.SoftDeleteDays; d > 0 {
		b.WriteString("<DeleteRetentionPolicy><Enabled>true</Enabled><Days>" + strconv.Itoa(d) + "</Days></DeleteRetentionPolicy>")
	} else {
		b.WriteString("<DeleteRetentionPolicy><Enabled>false</Enabled></DeleteRetentionPolicy>")
	}
	b.WriteString("<StaticWebsite><Enabled>false</Enabled></StaticWebsite></StorageServiceProperties>")
	return s.xmlAnswer(200, &b)
}

func (s *Server) accountInformation(*request) (*answer, *refusal) {
	return &answer{status: 200, header: map[string]string{"x-ms-sku-name": "Standard_LRS", "x-ms-account-kind": "StorageV2", "x-ms-is-hns-enabled": "false"}}, nil
}
