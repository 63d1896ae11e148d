package azurefake

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// conditions checks If-Match, If-None-Match, If-Modified-Since and If-Unmodified-Since against something that exists.
func (q *request) conditions(etag string, modified time.Time) *refusal {
	h := q.Header
	read := q.Method == http.MethodGet || q.Method == http.MethodHead
	modified = modified.Truncate(time.Second)
	if v := h.Get("If-Match"); v != "" && !matches(v, etag) {
		return errCondition
	}
	if v := h.Get("If-Unmodified-Since"); v != "" {
		if t, _ := http.ParseTime(v); modified.After(t) {
			return errCondition
		}
	}
	none, since := h.Get("If-None-Match"), h.Get("If-Modified-Since")
	unchanged := none != "" && matches(none, etag)
	if since != "" && none == "" {
		t, _ := http.ParseTime(since)
		unchanged = !modified.After(t)
	}
	if !unchanged {
		return nil
	}
	if read {
		return errNotModified
	}
	return errCondition
}

func matches(header, etag string) bool {
	for v := range strings.SplitSeq(header, ",") {
		if v = strings.TrimSpace(v); v == "*" || strings.Trim(v, `"`) == strings.Trim(etag, `"`) {
			return true
		}
	}
	return false
}

// sequence checks x-ms-if-sequence-number-le, -lt and -eq.
func (q *request) sequence(now int64) *refusal {
	for name, holds := range map[string]func(int64) bool{
		"x-ms-if-sequence-number-le": func(n int64) bool { return now <= n },
		"x-ms-if-sequence-number-lt": func(n int64) bool { return now < n },
		"x-ms-if-sequence-number-eq": func(n int64) bool { return now == n },
	} {
		v := q.Header.Get(name)
		if v == "" {
			continue
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return badHeader(name)
		}
		if !holds(n) {
			return errSequence
		}
	}
	return nil
}

// change checks what every write to an existing blob has to pass: conditions, then the lease, then the container's policy.
func (s *Server) change(q *request, c *container, f *family, v *version) *refusal {
	if e := q.conditions(v.etag, v.modified); e != nil {
		return e
	}
	if e := f.lease.write(q, s.now()); e != nil {
		return e
	}
	return c.frozen()
}

// look checks what every read has to pass.
func (s *Server) look(q *request, f *family, v *version) *refusal {
	if q.snapshot == "" {
		if e := f.lease.read(q, s.now(), "Blob"); e != nil {
			return e
		}
	}
	return q.conditions(v.etag, v.modified)
}
