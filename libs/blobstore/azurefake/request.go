package azurefake

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc64"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// request is one call, as far as it is understood.
type request struct {
	*http.Request
	query                     url.Values
	container, blob, snapshot string
	operation
	// replace says that the credentials allow to overwrite a blob that exists.
	replace bool
	body    body
	out     int64 // bytes of content in the answer
}

// operation is one of the REST reference, and what it needs.
type operation struct {
	name   string
	level  byte   // of account SAS: 's'ervice, 'c'ontainer, 'o'bject
	sas    string // any of these permissions
	action Action // any of these
	limit  int64  // of the body
	do     func(*Server, *request) (*answer, *refusal)
}

// answer is a success.
type answer struct {
	status int
	header map[string]string
	body   []byte
	// content is streamed instead of body: size bytes by read, which is called with offsets from 0 to size.
	content func(p []byte, off int64)
	size    int64
}

const (
	smallBody    = 8 << 20
	maxPutBlob   = 5000 << 20
	maxPutBlock  = 4000 << 20
	drainAtMost  = 128 << 20
	streamBuffer = 256 << 10
)

var (
	pageBuffers   = sync.Pool{New: func() any { b := make([]byte, maxPageWrite); return &b }}
	streamBuffers = sync.Pool{New: func() any { b := make([]byte, streamBuffer); return &b }}
)

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if what, ok := strings.CutPrefix(r.URL.Path, controlPath); ok {
		s.control(w, r, what)
		return
	}
	s.stats.begin()
	q := &request{Request: r}
	var e *refusal
	defer func() { s.stats.end(q.name, q.body.size, q.out, e) }()
	h := w.Header()
	h.Set("Server", "Windows-Azure-Blob/1.0 azurefake")
	h.Set("Date", s.now().Format(http.TimeFormat))
	h.Set("x-ms-request-id", fmt.Sprintf("%08x-001e-0000-0000-0000%08x", s.requests.Add(1), s.etagBase()))
	if v := r.Header.Get("x-ms-version"); v != "" {
		h.Set("x-ms-version", v)
	}
	if v := r.Header.Get("x-ms-client-request-id"); v != "" {
		h.Set("x-ms-client-request-id", v)
	}
	var a *answer
	var f Fault
	if e = s.admit(q); e == nil {
		f = s.fault(r)
		wait(r.Context(), f.Delay)
		switch {
		case f.ResetBefore:
			s.reset(w)
			return
		case f.Status != 0:
			e = &refusal{status: f.Status, code: f.Code, message: "A fault of the test.", retryAfter: f.RetryAfter}
		default:
			wait(r.Context(), s.opts.Latency)
			a, e = s.perform(w, q)
		}
	}
	wait(r.Context(), f.DelayAfter)
	if f.ResetAfter {
		s.reset(w)
		return
	}
	if e != nil {
		if r.Body != nil && r.Header.Get("Expect") == "" { // a client that is still sending would see a broken pipe and not the answer
			_, _ = io.CopyN(io.Discard, r.Body, drainAtMost)
		}
		s.send(w, r, e)
		return
	}
	s.reply(w, q, a, f.FlipBit)
}

// etagBase makes request ids of different servers differ.
func (s *Server) etagBase() uint32 { return binary.LittleEndian.Uint32(s.udKey) }

func (s *Server) fault(r *http.Request) Fault {
	s.mu.Lock()
	f := s.intercept
	s.mu.Unlock()
	if f == nil {
		return Fault{}
	}
	return f(r)
}

// admit understands and authorises the request.
func (s *Server) admit(q *request) *refusal {
	q.name = "Unknown"
	if e := s.route(q); e != nil {
		return e
	}
	return s.authorize(q)
}

// perform applies the limits, reads the body and does the operation.
func (s *Server) perform(w http.ResponseWriter, q *request) (*answer, *refusal) {
	if e := s.limited(q); e != nil {
		return nil, e
	}
	if q.limit > 0 || q.ContentLength != 0 {
		if e := s.readBody(w, q); e != nil {
			return nil, e
		}
		defer q.body.release()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return q.do(s, q)
}

// limited refuses what is above the targets of the account or of the page blob.
func (s *Server) limited(q *request) *refusal {
	n := max(q.ContentLength, 0)
	if q.name == "GetBlob" { // the range of Get Page Ranges moves no bytes
		if from, to, ok := parseRange(rangeHeader(q.Header)); ok && to >= 0 {
			n = to - from + 1
		}
	}
	pass := s.limit.pass(n)
	if pass && q.blob != "" {
		pass = s.blobLimit(q).pass(n)
	}
	if pass {
		return nil
	}
	e := *errBusy
	e.retryAfter = s.opts.RetryAfter
	return &e
}

func (s *Server) blobLimit(q *request) *limits {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, f, v, e := s.findBlob(q)
	if e != nil || !v.isPages {
		return nil
	}
	if f.limit == nil {
		f.limit = newLimits(s.opts.PageBlobRequests, s.opts.PageBlobBytes, s.opts.LimitBurst)
	}
	return f.limit
}

// blobPace is the shaping of one blob; a blob that is about to be created is not slowed by it.
func (s *Server) blobPace(q *request) *pace {
	if s.opts.BlobBandwidth <= 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c, e := s.find(q.container)
	if e != nil {
		return nil
	}
	f, ok := c.blobs.Get(q.blob)
	if !ok {
		return newPace(s.opts.BlobBandwidth)
	}
	if f.shape == nil {
		f.shape = newPace(s.opts.BlobBandwidth)
	}
	return f.shape
}

// body is what came with a request; data is nil when bytes are discarded.
type body struct {
	data   []byte
	size   int64
	crc    uint64 // if it was asked for
	digest uint64
	pooled *[]byte
}

func (b *body) release() {
	if b.pooled != nil {
		pageBuffers.Put(b.pooled)
		b.pooled, b.data = nil, nil
	}
}

// readBody reads the body and compares its checksums.
func (s *Server) readBody(w http.ResponseWriter, q *request) *refusal {
	size := q.ContentLength
	if size < 0 {
		return errNoLength
	}
	if size > q.limit {
		return errTooLarge
	}
	pagesWrite := q.name == "PutPage"
	content := pagesWrite || q.name == "PutBlob" || q.name == "PutBlock"
	discard := s.opts.Discard && content
	if content && !discard && !pagesWrite {
		s.mu.Lock()
		e := s.room(size)
		s.mu.Unlock()
		if e != nil {
			return e
		}
	}
	var sums []io.Writer
	var md5sum, crc hash.Hash
	wantMD5, wantCRC := q.Header.Get("Content-MD5"), q.Header.Get("x-ms-content-crc64")
	if wantMD5 != "" && wantCRC != "" {
		return badHeader("x-ms-content-crc64")
	}
	if wantMD5 != "" {
		if b, err := base64.StdEncoding.DecodeString(wantMD5); err != nil || len(b) != md5.Size {
			return refuse(400, "InvalidMd5", "Content-MD5 is no MD5.")
		}
		md5sum = md5.New()
		sums = append(sums, md5sum)
	}
	if wantCRC != "" || s.opts.Digest && content && !pagesWrite {
		crc = crc64.New(crcTable)
		sums = append(sums, crc)
	}
	at, _, _ := parseRange(rangeHeader(q.Header))
	read := func(p []byte, off int64) bool {
		r := &pacedReader{ctx: q.Context(), r: q.Body, paces: [2]*pace{s.shape, nil}}
		if content {
			r.paces[1] = s.blobPace(q)
		}
		if _, err := io.ReadFull(r, p); err != nil {
			return false
		}
		for _, h := range sums {
			_, _ = h.Write(p) // a hash never fails
		}
		if pagesWrite && s.opts.Digest {
			q.body.digest += PageDigest(at+off, p)
		}
		return true
	}
	switch {
	case discard:
		buf := streamBuffers.Get().(*[]byte)
		defer streamBuffers.Put(buf)
		for off := int64(0); off < size; {
			n := min(size-off, streamBuffer)
			if !read((*buf)[:n], off) {
				panic(http.ErrAbortHandler) // the client is gone: nothing happened
			}
			off += n
		}
	case pagesWrite:
		q.body.pooled = pageBuffers.Get().(*[]byte)
		q.body.data = (*q.body.pooled)[:size]
	default:
		q.body.data = make([]byte, size)
	}
	if q.body.data != nil && !read(q.body.data, 0) {
		panic(http.ErrAbortHandler)
	}
	q.body.size = size
	if md5sum != nil && base64.StdEncoding.EncodeToString(md5sum.Sum(nil)) != wantMD5 {
		return errMD5
	}
	if crc != nil {
		q.body.crc = binary.BigEndian.Uint64(crc.Sum(nil))
		if wantCRC != "" && crcText(q.body.crc) != wantCRC {
			return errCRC
		}
	}
	return nil
}

func crcText(v uint64) string {
	return base64.StdEncoding.EncodeToString(binary.LittleEndian.AppendUint64(nil, v))
}

// reset ends the connection as a dead peer would.
func (s *Server) reset(w http.ResponseWriter) {
	hj, ok := w.(http.Hijacker)
	if !ok {
		panic(http.ErrAbortHandler)
	}
	conn, _, err := hj.Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	raw := conn
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		raw = t.NetConn()
	}
	if t, ok := raw.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = raw.Close()
}

// reply sends a success.
func (s *Server) reply(w http.ResponseWriter, q *request, a *answer, flip bool) {
	h := w.Header()
	for k, v := range a.header {
		h.Set(k, v)
	}
	if a.content == nil {
		a.size = int64(len(a.body))
	}
	if q.Method != http.MethodHead {
		h.Set("Content-Length", strconv.FormatInt(a.size, 10))
	}
	w.WriteHeader(a.status)
	if q.Method == http.MethodHead || a.size == 0 {
		return
	}
	if a.content == nil {
		_, _ = w.Write(a.body) // a client that is gone has nobody to tell
		return
	}
	buf := streamBuffers.Get().(*[]byte)
	defer streamBuffers.Put(buf)
	blobPace := s.blobPace(q)
	for off := int64(0); off < a.size; {
		p := (*buf)[:min(a.size-off, streamBuffer)]
		a.content(p, off)
		if mid := a.size/2 - off; flip && mid >= 0 && mid < int64(len(p)) {
			p[mid] ^= 1
		}
		s.shape.take(q.Context(), len(p))
		blobPace.take(q.Context(), len(p))
		if _, err := w.Write(p); err != nil {
			return
		}
		off += int64(len(p))
		q.out = off
	}
}

// room says whether n more bytes fit into the account. Server.mu is held.
func (s *Server) room(n int64) *refusal {
	if s.full || s.opts.Capacity > 0 && s.used+n > s.opts.Capacity {
		return refuse(s.opts.FullStatus, s.opts.FullCode, "The account is full.")
	}
	return nil
}

func rangeHeader(h http.Header) string {
	if v := h.Get("x-ms-range"); v != "" {
		return v
	}
	return h.Get("Range")
}

// parseRange reads "bytes=a-b"; to is -1 in "bytes=a-".
func parseRange(v string) (from, to int64, ok bool) {
	v, ok = strings.CutPrefix(v, "bytes=")
	if !ok {
		return 0, 0, false
	}
	a, b, ok := strings.Cut(v, "-")
	from, err := strconv.ParseInt(a, 10, 64)
	if !ok || err != nil || from < 0 {
		return 0, 0, false
	}
	if b == "" {
		return from, -1, true
	}
	to, err = strconv.ParseInt(b, 10, 64)
	if err != nil || to < from {
		return 0, 0, false
	}
	return from, to, true
}

func (s *Server) xmlAnswer(status int, b *bytes.Buffer) (*answer, *refusal) {
	return &answer{status: status, header: map[string]string{"Content-Type": "application/xml"}, body: b.Bytes()}, nil
}

func httpTime(t time.Time) string { return t.UTC().Format(http.TimeFormat) }
