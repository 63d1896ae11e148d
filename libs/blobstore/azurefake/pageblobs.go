package azurefake

import (
	"bytes"
	"encoding/xml"
	"math"
	"strconv"
	"strings"
)

// newPageBlob reads what Put Blob says of a page blob.
func (q *request) newPageBlob(v *version) *refusal {
	if q.body.size != 0 {
		return badHeader("Content-Length")
	}
	size, err := strconv.ParseInt(q.Header.Get("x-ms-blob-content-length"), 10, 64)
	if err != nil || size < 0 || size%pageSize != 0 || size > maxPageBlob {
		return badHeader("x-ms-blob-content-length")
	}
	if n := q.Header.Get("x-ms-blob-sequence-number"); n != "" {
		if v.seq, err = strconv.ParseInt(n, 10, 64); err != nil || v.seq < 0 {
			return badHeader("x-ms-blob-sequence-number")
		}
	}
	v.isPages, v.size = true, size
	return nil
}

// pageRange reads an aligned range of the blob.
func (q *request) pageRange(size int64) (off, length int64, e *refusal) {
	v := rangeHeader(q.Header)
	if v == "" {
		return 0, 0, missingHeader("x-ms-range")
	}
	from, to, ok := parseRange(v)
	if !ok || to < 0 {
		return 0, 0, badHeader("x-ms-range")
	}
	if from%pageSize != 0 || (to+1)%pageSize != 0 || to >= size {
		return 0, 0, errPageRange
	}
	return from, to - from + 1, nil
}

func (s *Server) putPage(q *request) (*answer, *refusal) {
	how := q.Header.Get("x-ms-page-write")
	if how != "update" && how != "clear" {
		return nil, badHeader("x-ms-page-write")
	}
	c, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if !v.isPages {
		return nil, errBlobType
	}
	off, length, e := q.pageRange(v.size)
	if e != nil {
		return nil, e
	}
	if how == "clear" && q.body.size != 0 || how == "update" && q.body.size != length {
		return nil, badHeader("Content-Length")
	}
	if e := s.change(q, c, f, v); e != nil {
		return nil, e
	}
	if e := q.sequence(v.seq); e != nil {
		return nil, e
	}
	if how == "update" {
		if e := s.room(length); e != nil {
			return nil, e
		}
		v.digest += q.body.digest
	}
	s.used += v.pages.write(off, length, q.body.data, how == "update")
	s.touch(v)
	a := s.written(q, v)
	delete(a.header, "x-ms-version-id") // Put Page makes no version
	a.header["x-ms-blob-sequence-number"] = strconv.FormatInt(v.seq, 10)
	return a, nil
}

func (s *Server) setBlobProperties(q *request) (*answer, *refusal) {
	c, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := s.change(q, c, f, v); e != nil {
		return nil, e
	}
	h := q.Header
	size, seq := v.size, v.seq
	if t := h.Get("x-ms-blob-content-length"); t != "" {
		if !v.isPages {
			return nil, errBlobType
		}
		n, err := strconv.ParseInt(t, 10, 64)
		if err != nil || n < 0 || n%pageSize != 0 || n > maxPageBlob {
			return nil, badHeader("x-ms-blob-content-length")
		}
		size = n
	}
	action := h.Get("x-ms-sequence-number-action")
	if action != "" {
		if !v.isPages {
			return nil, errBlobType
		}
		given := h.Get("x-ms-blob-sequence-number")
		n, err := strconv.ParseInt(given, 10, 64)
		switch {
		case action == "increment" && given != "":
			return nil, badHeader("x-ms-blob-sequence-number")
		case action == "increment" && seq == math.MaxInt64:
			return nil, refuse(409, "SequenceNumberIncrementTooLarge", "The sequence number would be too large.")
		case action == "increment":
			seq++
		case given == "":
			return nil, missingHeader("x-ms-blob-sequence-number")
		case err != nil || n < 0:
			return nil, badHeader("x-ms-blob-sequence-number")
		case action == "max":
			seq = max(seq, n)
		case action == "update":
			seq = n
		default:
			return nil, badHeader("x-ms-sequence-number-action")
		}
	}
	if size < v.size {
		s.used += v.pages.write(size, v.size-size, nil, false)
	}
	// The content headers are replaced as a whole, but not by a call that is about the size or the number.
	if action == "" && h.Get("x-ms-blob-content-length") == "" {
		v.header = q.given()
	}
	v.size, v.seq = size, seq
	s.touch(v)
	a := &answer{status: 200, header: map[string]string{"ETag": v.etag, "Last-Modified": httpTime(v.modified)}}
	if v.isPages {
		a.header["x-ms-blob-sequence-number"] = strconv.FormatInt(v.seq, 10)
	}
	return a, nil
}

func (s *Server) pageRanges(q *request) (*answer, *refusal) {
	_, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := s.look(q, f, v); e != nil {
		return nil, e
	}
	if !v.isPages {
		return nil, errBlobType
	}
	limit := maxPageRanges
	if t := q.query.Get("maxresults"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil || n < 1 {
			return nil, refuse(400, "OutOfRangeQueryParameterValue", "maxresults is out of range.")
		}
		limit = min(n, maxPageRanges)
	}
	off, end := int64(0), v.size
	if r := rangeHeader(q.Header); r != "" {
		from, to, ok := parseRange(r)
		if !ok {
			return nil, badHeader("x-ms-range")
		}
		if from >= v.size && v.size > 0 {
			return nil, errRange
		}
		// Ranges are answered in whole pages.
		off = from / pageSize * pageSize
		if to >= 0 {
			end = min(end, (to+pageSize)/pageSize*pageSize)
		}
	}
	if m := q.query.Get("marker"); m != "" {
		n, err := strconv.ParseInt(strings.TrimPrefix(m, "p!"), 10, 64)
		if err != nil {
			return nil, badQuery("marker")
		}
		off = max(off, n)
	}
	var prev *pages
	if p := q.query.Get("prevsnapshot"); p != "" {
		i := f.snap(p)
		switch {
		case i < 0:
			return nil, refuse(409, "PreviousSnapshotNotFound", "There is no such previous snapshot.")
		case v.snapshot != "" && p > v.snapshot:
			return nil, refuse(400, "PreviousSnapshotCannotBeNewer", "The previous snapshot is newer than the blob asked for.")
		case f.snaps[i].incarnation != v.incarnation:
			return nil, errBlobOverwritten
		}
		prev = f.snaps[i].pages
	}
	spans, next := v.pages.ranges(off, end, prev, limit)
	var b bytes.Buffer
	b.WriteString(xml.Header + "<PageList>")
	for _, r := range spans {
		name := "PageRange"
		if r.gone {
			name = "ClearRange"
		}
		b.WriteString("<" + name + "><Start>" + strconv.FormatInt(r.start, 10) + "</Start><End>" + strconv.FormatInt(r.end-1, 10) + "</End></" + name + ">")
	}
	if next > 0 {
		b.WriteString("<NextMarker>p!" + strconv.FormatInt(next, 10) + "</NextMarker>")
	}
	b.WriteString("</PageList>")
	a, _ := s.xmlAnswer(200, &b)
	a.header["ETag"], a.header["Last-Modified"] = v.etag, httpTime(v.modified)
	a.header["x-ms-blob-content-length"] = strconv.FormatInt(v.size, 10)
	return a, nil
}
