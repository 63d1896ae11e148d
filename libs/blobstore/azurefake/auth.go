package azurefake

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// standardSkew is how far a request's date may be off.
const standardSkew = 15 * time.Minute

// authorize finds out who calls and whether that may be.
func (s *Server) authorize(q *request) *refusal {
	h := q.Header.Get("Authorization")
	scheme, value, _ := strings.Cut(h, " ")
	switch {
	case scheme == "SharedKey":
		q.replace = true
		return s.sharedKey(q, value)
	case scheme == "Bearer":
		return s.bearer(q, value)
	case h != "":
		return refuse(400, "InvalidHeaderValue", "The Authorization scheme is not known.")
	case q.query.Has("sig"):
		return s.sharedSignature(q)
	}
	e := *errNoAuth
	e.challenge = true
	return &e
}

// skewed refuses a date that is too far off.
func (s *Server) skewed(q *request, must bool) *refusal {
	v := q.Header.Get("x-ms-date")
	if v == "" {
		v = q.Header.Get("Date")
	}
	if v == "" && !must {
		return nil
	}
	t, err := http.ParseTime(v)
	if err != nil {
		return authFailed("The request has no date that can be read.")
	}
	if d := s.now().Sub(t); s.opts.MaxSkew > 0 && (d > s.opts.MaxSkew || d < -s.opts.MaxSkew) {
		return authFailed(fmt.Sprintf("The request's date is too far off: '%s', the server's is '%s'.", v, httpTime(s.now())))
	}
	return nil
}

func (s *Server) sharedKey(q *request, value string) *refusal {
	account, signature, ok := strings.Cut(value, ":")
	if !ok || account != s.Account {
		return authFailed("The credentials are of another account.")
	}
	if e := s.skewed(q, true); e != nil {
		return e
	}
	if s.opts.NoSharedKey {
		return errNoKeyAccess
	}
	for _, order := range []func(string) string{weight, plain} {
		if hmac.Equal([]byte(sign(s.key, s.stringToSign(q, order))), []byte(signature)) {
			return nil
		}
	}
	return authFailed("The MAC signature in the HTTP request is not the same as any computed signature. Server used following string to sign: '" + s.stringToSign(q, weight) + "'.")
}

func sign(key []byte, text string) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(m.Sum(nil))
}

// Clients sort the headers by the weights of a word sort, in which hyphens count for nothing and '_' is below the digits, or
// simply by bytes: they differ where one name continues another. The server takes either.
func weight(name string) string {
	return strings.NewReplacer("-", "", "_", "\x01").Replace(name)
}

func plain(name string) string { return name }

// stringToSign is that of "Authorize with Shared Key", for 2009-09-19 and later.
func (s *Server) stringToSign(q *request, order func(string) string) string {
	get := q.Header.Get
	length := ""
	if q.ContentLength > 0 {
		length = strconv.FormatInt(q.ContentLength, 10)
	}
	date := get("Date")
	if get("x-ms-date") != "" {
		date = ""
	}
	var names []string
	for k := range q.Header {
		if k = strings.ToLower(k); strings.HasPrefix(k, "x-ms-") {
			names = append(names, k)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(order(a), order(b)) })
	lines := []string{q.Method, get("Content-Encoding"), get("Content-Language"), length, get("Content-MD5"), get("Content-Type"), date,
		get("If-Modified-Since"), get("If-Match"), get("If-None-Match"), get("If-Unmodified-Since"), get("Range")}
	for _, n := range names {
		lines = append(lines, n+":"+strings.Join(q.Header.Values(n), ","))
	}
	path := q.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	lines = append(lines, "/"+s.Account+path)
	params := map[string][]string{}
	for k, v := range q.query {
		k = strings.ToLower(k)
		params[k] = append(params[k], v...)
	}
	keys := make([]string, 0, len(params))
	for k := range params {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		slices.Sort(params[k])
		lines = append(lines, k+":"+strings.Join(params[k], ","))
	}
	return strings.Join(lines, "\n")
}

func (s *Server) bearer(q *request, token string) *refusal {
	if !s.opts.TLS {
		return refuse(403, "AuthorizationProtocolMismatch", "A token is taken over https only.")
	}
	if e := s.skewed(q, false); e != nil {
		return e
	}
	s.mu.Lock()
	grants, ok := s.grants[token]
	s.mu.Unlock()
	if !ok {
		e := refuse(401, "InvalidAuthenticationInfo", "The token is not valid, or has expired.")
		e.challenge = true
		return e
	}
	blob := q.blob
	container := q.container
	switch q.name {
	case "ListBlobs":
		blob = q.query.Get("prefix")
	case "ListContainers":
		container = q.query.Get("prefix")
	}
	if !grants.allow(q.action, container, blob) {
		return errPermission
	}
	q.replace = grants.allow(Write, container, blob)
	return nil
}
