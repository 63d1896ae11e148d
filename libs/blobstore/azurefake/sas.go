package azurefake

import (
	"bytes"
	"crypto/hmac"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"time"
)

// SAS returns an account SAS, signed with the account's key, for all that the permissions (r, w, d, l, a, c, ...) allow until
// it expires.
func (s *Server) SAS(permissions string, expires time.Time) string {
	const services, types, version = "b", "sco", "2022-11-02"
	end := expires.UTC().Format("2006-01-02T15:04:05Z")
	text := strings.Join([]string{s.Account, permissions, services, types, "", end, "", "", version, "", ""}, "\n")
	return url.Values{"sv": {version}, "ss": {services}, "srt": {types}, "sp": {permissions}, "se": {end}, "sig": {sign(s.key, text)}}.Encode()
}

// sharedSignature checks an account SAS, a service SAS or a user delegation SAS.
func (s *Server) sharedSignature(q *request) *refusal {
	get := q.query.Get
	key := s.key
	var text, resource string
	switch {
	case get("ss") != "" || get("srt") != "":
		text = strings.Join([]string{s.Account, get("sp"), get("ss"), get("srt"), get("st"), get("se"), get("sip"), get("spr"), get("sv"), get("ses"), ""}, "\n")
	case get("skoid") != "":
		var e *refusal
		if key, e = s.delegated(q); e != nil {
			return e
		}
		resource = get("sr")
		text = strings.Join([]string{get("sp"), get("st"), get("se"), s.canonical(q, resource), get("skoid"), get("sktid"), get("skt"), get("ske"), get("sks"),
			get("skv"), get("saoid"), get("suoid"), get("scid"), get("skdutid"), get("sduoid"), get("sip"), get("spr"), get("sv"), resource, q.signedSnapshot(), get("ses"), "", "",
			get("rscc"), get("rscd"), get("rsce"), get("rscl"), get("rsct")}, "\n")
	default:
		resource = get("sr")
		text = strings.Join([]string{get("sp"), get("st"), get("se"), s.canonical(q, resource), get("si"), get("sip"), get("spr"), get("sv"), resource, q.signedSnapshot(), get("ses"),
			get("rscc"), get("rscd"), get("rsce"), get("rscl"), get("rsct")}, "\n")
	}
	if s.opts.NoSharedKey && get("skoid") == "" {
		return errNoKeyAccess
	}
	if get("sv") < "2020-12-06" {
		return authFailed("azurefake knows signed versions from 2020-12-06.")
	}
	if !hmac.Equal([]byte(sign(key, text)), []byte(get("sig"))) {
		return authFailed("The signature of the SAS is not the right one.")
	}
	if e := s.inTime(get("st"), get("se")); e != nil {
		return e
	}
	if get("si") != "" {
		return authFailed("azurefake has no stored access policies.")
	}
	if get("spr") == "https" && !s.opts.TLS {
		return refuse(403, "AuthorizationProtocolMismatch", "The SAS is for https only.")
	}
	if ip := get("sip"); ip != "" && !inside(ip, q.RemoteAddr) {
		return refuse(403, "AuthorizationSourceIPMismatch", "The SAS is for another address.")
	}
	return q.allowed(get("ss"), get("srt"), resource, get("sp"))
}

// allowed compares what the SAS allows with what the operation needs.
func (q *request) allowed(services, types, resource, permissions string) *refusal {
	switch {
	case q.level == 0:
		return errPermission // Get User Delegation Key takes a token only
	case resource == "" && !strings.Contains(services, "b"):
		return refuse(403, "AuthorizationServiceMismatch", "The SAS is not for the blob service.")
	case resource == "" && !strings.ContainsRune(types, rune(q.level)):
		return refuse(403, "AuthorizationResourceTypeMismatch", "The SAS is not for this type of resource.")
	case resource != "" && q.level != 'o' && !(q.name == "ListBlobs" && resource == "c"):
		return refuse(403, "AuthorizationResourceTypeMismatch", "A service SAS does not reach this resource.")
	case !strings.ContainsAny(permissions, q.sas):
		return errPermission
	}
	q.replace = strings.Contains(permissions, "w")
	return nil
}

func (s *Server) canonical(q *request, resource string) string {
	name := "/blob/" + s.Account + "/" + q.container
	if resource != "c" && q.blob != "" {
		name += "/" + q.blob
	}
	return name
}

func (q *request) signedSnapshot() string {
	if q.query.Get("sr") == "bs" {
		return q.snapshot
	}
	return ""
}

// inTime checks st and se by storage time; there is no tolerance.
func (s *Server) inTime(start, end string) *refusal {
	now := s.now()
	if start != "" {
		t, ok := sasTime(start)
		if !ok || now.Before(t) {
			return authFailed("The SAS is not yet valid: it begins at " + start + ", the server's time is " + now.Format(time.RFC3339) + ".")
		}
	}
	t, ok := sasTime(end)
	if !ok || !now.Before(t) {
		return authFailed("The SAS has expired: it ended at " + end + ", the server's time is " + now.Format(time.RFC3339) + ".")
	}
	return nil
}

func sasTime(v string) (time.Time, bool) {
	for _, layout := range []string{"2006-01-02T15:04:05Z", "2006-01-02T15:04:05.0000000Z", "2006-01-02T15:04Z", "2006-01-02"} {
		if t, err := time.Parse(layout, v); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

func inside(ips, remote string) bool {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return false
	}
	first, last, ok := strings.Cut(ips, "-")
	if !ok {
		last = first
	}
	a, b, x := net.ParseIP(first), net.ParseIP(last), net.ParseIP(host)
	return a != nil && b != nil && x != nil && bytes.Compare(a.To16(), x.To16()) <= 0 && bytes.Compare(x.To16(), b.To16()) <= 0
}

// delegated is the key of a user delegation SAS: it follows from the fields of the key, so none is kept.
func (s *Server) delegated(q *request) ([]byte, *refusal) {
	get := q.query.Get
	if get("sktid") != TenantID || get("sks") != "b" {
		return nil, authFailed("The user delegation key is not of this account.")
	}
	if e := s.inTime(get("skt"), get("ske")); e != nil {
		return nil, e
	}
	return s.delegationKey(get("skoid"), get("skt"), get("ske"), get("skv")), nil
}

func (s *Server) delegationKey(oid, start, end, version string) []byte {
	raw, err := base64.StdEncoding.DecodeString(sign(s.udKey, strings.Join([]string{oid, start, end, version}, "\n")))
	if err != nil {
		panic(err) // sign encodes it
	}
	return raw
}

const objectID = "00000000-0000-4000-8000-000000000002"

func (s *Server) userDelegationKey(q *request) (*answer, *refusal) {
	var in struct{ Start, Expiry string }
	if err := xml.NewDecoder(bytes.NewReader(q.body.data)).Decode(&in); err != nil && !errors.Is(err, io.EOF) {
		return nil, refuse(400, "InvalidXmlDocument", "The body is not valid.")
	}
	end, ok := parseAny(in.Expiry)
	start, started := parseAny(in.Start)
	if !ok || end.Sub(s.now()) > 7*24*time.Hour {
		return nil, refuse(400, "InvalidXmlNodeValue", "The expiry is missing or more than 7 days away.")
	}
	if !started {
		start = s.now()
	}
	from, to := start.UTC().Format("2006-01-02T15:04:05Z"), end.UTC().Format("2006-01-02T15:04:05Z")
	version := q.Header.Get("x-ms-version")
	var b bytes.Buffer
	b.WriteString(xml.Header + "<UserDelegationKey>")
	for _, p := range [][2]string{{"SignedOid", objectID}, {"SignedTid", TenantID}, {"SignedStart", from}, {"SignedExpiry", to}, {"SignedService", "b"},
		{"SignedVersion", version}, {"Value", base64.StdEncoding.EncodeToString(s.delegationKey(objectID, from, to, version))}} {
		element(&b, p[0], p[1])
	}
	b.WriteString("</UserDelegationKey>")
	return s.xmlAnswer(200, &b)
}

func parseAny(v string) (time.Time, bool) {
	if t, err := time.Parse(time.RFC3339Nano, v); err == nil {
		return t, true
	}
	return sasTime(v)
}
