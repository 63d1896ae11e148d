package azurefake

import (
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// lease follows the tables of "Lease Blob": what each action and each write does in each state.
type lease struct {
	id       string // empty is available
	duration time.Duration
	until    time.Time // of a fixed lease
	broken   bool      // breaking until breakAt, broken after
	breakAt  time.Time
}

const infinite = time.Duration(-1)

func (l *lease) state(now time.Time) string {
	switch {
	case l.id == "":
		return "available"
	case l.broken && now.Before(l.breakAt):
		return "breaking"
	case l.broken:
		return "broken"
	case l.duration != infinite && !now.Before(l.until):
		return "expired"
	}
	return "leased"
}

// headers are x-ms-lease-state, -status and -duration.
func (l *lease) headers(now time.Time, into map[string]string) {
	state := l.state(now)
	into["x-ms-lease-state"] = state
	into["x-ms-lease-status"] = "unlocked"
	if state == "leased" || state == "breaking" {
		into["x-ms-lease-status"] = "locked"
	}
	if state == "leased" {
		into["x-ms-lease-duration"] = "fixed"
		if l.duration == infinite {
			into["x-ms-lease-duration"] = "infinite"
		}
	}
}

// read refuses a lease id that is not the active lease's.
func (l *lease) read(q *request, now time.Time, what string) *refusal {
	id := q.Header.Get("x-ms-lease-id")
	if id == "" {
		return nil
	}
	switch l.state(now) {
	case "available":
		return refuse(412, "LeaseNotPresentWith"+what+"Operation", "There is no lease.")
	case "broken", "expired":
		return refuse(412, "LeaseLost", "The lease has ended.")
	}
	if !strings.EqualFold(id, l.id) {
		return refuse(412, "LeaseIdMismatchWith"+what+"Operation", "The lease id is not that of the lease.")
	}
	return nil
}

// write refuses a write without the active lease's id. Writing without an id to a blob whose lease expired makes the lease
// available, so that its holder cannot renew it.
func (l *lease) write(q *request, now time.Time) *refusal {
	return l.writeTo(q, now, "Blob")
}

func (l *lease) writeTo(q *request, now time.Time, what string) *refusal {
	if e := l.read(q, now, what); e != nil {
		return e
	}
	if q.Header.Get("x-ms-lease-id") != "" {
		return nil
	}
	switch l.state(now) {
	case "leased", "breaking":
		return refuse(412, "LeaseIdMissing", "There is a lease and the request has no lease id.")
	case "expired", "broken":
		*l = lease{}
	}
	return nil
}

// act does one lease action; left is the time until a broken lease ends, in seconds, or -1.
func (l *lease) act(q *request, now time.Time) (status int, id string, left int, e *refusal) {
	h := q.Header
	given, proposed := h.Get("x-ms-lease-id"), h.Get("x-ms-proposed-lease-id")
	for name, v := range map[string]string{"x-ms-lease-id": given, "x-ms-proposed-lease-id": proposed} {
		if v != "" {
			if _, err := uuid.Parse(v); err != nil {
				return 0, "", 0, badHeader(name)
			}
		}
	}
	conflict := func(code, message string) (int, string, int, *refusal) { return 0, "", 0, refuse(409, code, message) }
	state := l.state(now)
	same := func(id string) bool { return strings.EqualFold(id, l.id) }
	action := h.Get("x-ms-lease-action")
	if action != "acquire" && action != "break" && given == "" {
		return 0, "", 0, missingHeader("x-ms-lease-id")
	}
	switch action {
	case "acquire":
		seconds, err := strconv.Atoi(h.Get("x-ms-lease-duration"))
		if err != nil || seconds != -1 && (seconds < 15 || seconds > 60) {
			return 0, "", 0, badHeader("x-ms-lease-duration")
		}
		switch {
		case state == "leased" && !same(proposed), state == "breaking" && !same(proposed):
			return conflict("LeaseAlreadyPresent", "There is a lease.")
		case state == "breaking":
			return conflict("LeaseIsBreakingAndCannotBeAcquired", "The lease is breaking.")
		}
		if proposed == "" {
			proposed = newUUID()
		}
		*l = lease{id: proposed, duration: infinite}
		if seconds > 0 {
			l.duration = time.Duration(seconds) * time.Second
			l.until = now.Add(l.duration)
		}
		return 201, l.id, -1, nil
	case "renew":
		switch {
		case state == "available":
			return conflict("LeaseNotPresentWithLeaseOperation", "There is no lease.")
		case !same(given):
			return conflict("LeaseIdMismatchWithLeaseOperation", "The lease id is not that of the lease.")
		case l.broken:
			return conflict("LeaseIsBrokenAndCannotBeRenewed", "The lease is broken.")
		}
		if l.duration != infinite {
			l.until = now.Add(l.duration)
		}
		return 200, l.id, -1, nil
	case "change":
		switch {
		case proposed == "":
			return 0, "", 0, missingHeader("x-ms-proposed-lease-id")
		case state == "available" || state == "expired" || state == "broken":
			return conflict("LeaseNotPresentWithLeaseOperation", "There is no active lease.")
		case !same(given) && !same(proposed):
			return conflict("LeaseIdMismatchWithLeaseOperation", "The lease id is not that of the lease.")
		case state == "breaking":
			return conflict("LeaseIsBreakingAndCannotBeChanged", "The lease is breaking.")
		}
		l.id = proposed
		return 200, l.id, -1, nil
	case "release":
		switch {
		case state == "available":
			return conflict("LeaseNotPresentWithLeaseOperation", "There is no lease.")
		case !same(given):
			return conflict("LeaseIdMismatchWithLeaseOperation", "The lease id is not that of the lease.")
		}
		*l = lease{}
		return 200, "", -1, nil
	case "break":
		if state == "available" {
			return conflict("LeaseNotPresentWithLeaseOperation", "There is no lease.")
		}
		period, asked := time.Duration(0), false
		if v := h.Get("x-ms-lease-break-period"); v != "" {
			n, err := strconv.Atoi(v)
			if err != nil || n < 0 || n > 60 {
				return 0, "", 0, badHeader("x-ms-lease-break-period")
			}
			period, asked = time.Duration(n)*time.Second, true
		}
		left := l.remaining(state, now)
		if asked && (state == "leased" && l.duration == infinite || period < left) {
			left = period
		}
		l.broken, l.breakAt = true, now.Add(left)
		return 202, "", int((left + time.Second - 1) / time.Second), nil
	}
	return 0, "", 0, badHeader("x-ms-lease-action")
}

// remaining is how long a break takes that names no period.
func (l *lease) remaining(state string, now time.Time) time.Duration {
	switch {
	case state == "breaking":
		return l.breakAt.Sub(now)
	case state == "leased" && l.duration != infinite:
		return l.until.Sub(now)
	}
	return 0
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// leased answers a lease action; the ETag does not change.
func leased(q *request, l *lease, now time.Time, etag string, modified time.Time) (*answer, *refusal) {
	status, id, left, e := l.act(q, now)
	if e != nil {
		return nil, e
	}
	a := &answer{status: status, header: map[string]string{"ETag": etag, "Last-Modified": httpTime(modified)}}
	if id != "" {
		a.header["x-ms-lease-id"] = id
	}
	if left >= 0 {
		a.header["x-ms-lease-time"] = strconv.Itoa(left)
	}
	return a, nil
}

func (s *Server) leaseBlob(q *request) (*answer, *refusal) {
	_, f, v, e := s.findBlob(q)
	if e != nil {
		return nil, e
	}
	if e := q.conditions(v.etag, v.modified); e != nil {
		return nil, e
	}
	return leased(q, &f.lease, s.now(), v.etag, v.modified)
}

func (s *Server) leaseContainer(q *request) (*answer, *refusal) {
	c, e := s.find(q.container)
	if e != nil {
		return nil, e
	}
	if e := q.conditions(c.etag, c.modified); e != nil {
		return nil, e
	}
	return leased(q, &c.lease, s.now(), c.etag, c.modified)
}
