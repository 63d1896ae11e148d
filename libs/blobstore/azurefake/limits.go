package azurefake

import (
	"context"
	"io"
	"maps"
	"sync"
	"time"
)

// pace slows a stream of bytes down to a rate. Nil is no limit.
type pace struct {
	rate float64
	mu   sync.Mutex
	next time.Time
}

func newPace(rate float64) *pace {
	if rate <= 0 {
		return nil
	}
	return &pace{rate: rate}
}

// take waits until n more bytes may have passed.
func (p *pace) take(ctx context.Context, n int) {
	if p == nil {
		return
	}
	p.mu.Lock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	p.next = p.next.Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
	until := p.next.Sub(now)
	p.mu.Unlock()
	if until > 500*time.Microsecond { // less is made up for by later bytes
		wait(ctx, until)
	}
}

// pacedReader reads at the pace of all its limits.
type pacedReader struct {
	ctx   context.Context
	r     io.Reader
	paces [2]*pace
}

func (p *pacedReader) Read(buf []byte) (int, error) {
	if len(buf) > 128<<10 {
		buf = buf[:128<<10]
	}
	n, err := p.r.Read(buf)
	for _, l := range p.paces {
		l.take(p.ctx, n)
	}
	return n, err
}

// limits refuses what is above a rate of requests and of bytes. Nil is no limit; a rate of 0 is none either.
type limits struct {
	mu              sync.Mutex
	requests, bytes bucket
}

type bucket struct {
	rate, burst, have float64
	last              time.Time
}

func newLimits(requests, bytes float64, burst time.Duration) *limits {
	if requests <= 0 && bytes <= 0 {
		return nil
	}
	mk := func(rate, least float64) bucket {
		b := max(rate*burst.Seconds(), least)
		return bucket{rate: rate, burst: b, have: b, last: time.Now()}
	}
	return &limits{requests: mk(requests, 1), bytes: mk(bytes, 1)}
}

func (b *bucket) fill(now time.Time) bool {
	if b.rate <= 0 {
		return true
	}
	b.have = min(b.burst, b.have+now.Sub(b.last).Seconds()*b.rate)
	b.last = now
	return b.have >= 1
}

// pass says whether one more request of n bytes is within the limits. A request may overdraw the bytes: the next ones pay.
func (l *limits) pass(n int64) bool {
	if l == nil {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	r, b := l.requests.fill(now), l.bytes.fill(now)
	if !r || !b {
		return false
	}
	l.requests.have--
	l.bytes.have -= float64(n)
	return true
}

// Counts are the requests of one operation.
type Counts struct {
	Requests int64
	Refused  int64 // with a status of 400 or above
	BytesIn  int64 // of request bodies
	BytesOut int64 // of answers' bodies, of blob content only
}

// Stats is what the server has seen since its start or the last Reset.
type Stats struct {
	// Operations by the name in the REST reference, without spaces: PutPage, ClearPages, PutBlob, GetBlob, ...
	Operations map[string]Counts
	// Codes counts refusals by error code.
	Codes map[string]int64
	// MostAtOnce is the largest number of requests that were in the server at the same time.
	MostAtOnce int64
}

// Requests is the number over all operations.
func (s Stats) Requests() (n int64) {
	for _, c := range s.Operations {
		n += c.Requests
	}
	return n
}

type stats struct {
	mu   sync.Mutex
	now  int64
	seen Stats
}

func (s *stats) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = Stats{Operations: map[string]Counts{}, Codes: map[string]int64{}}
}

func (s *stats) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now++
	s.seen.MostAtOnce = max(s.seen.MostAtOnce, s.now)
}

func (s *stats) end(op string, in, out int64, e *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now--
	c := s.seen.Operations[op]
	c.Requests++
	c.BytesIn += in
	c.BytesOut += out
	if e != nil && e.status >= 400 {
		c.Refused++
		s.seen.Codes[e.code]++
	}
	s.seen.Operations[op] = c
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	s.stats.mu.Lock()
	defer s.stats.mu.Unlock()
	out := s.stats.seen
	out.Operations, out.Codes = maps.Clone(out.Operations), maps.Clone(out.Codes)
	return out
}

// ResetStats sets the counters to zero.
func (s *Server) ResetStats() { s.stats.reset() }
