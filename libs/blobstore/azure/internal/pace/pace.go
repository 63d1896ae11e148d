// Package pace decides when a request to a storage account may start.
//
// A service that is asked too much answers slower, then refuses. Three things hold requests back, in this order: the window
// of the blob (requests in flight, found by trial: one more for each window without trouble, half of them at a refusal or
// when answers take twice as long as they did), the token buckets of a page blob (the service's published limits for one
// page blob, which are lower than the account's), and the window of the account. A request that waits for its blob thus
// holds nothing that another blob could use.
package pace

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits bound a [Pacer]. Zero rates are no limit.
type Limits struct {
	// Account and Blob are the most requests in flight to the account and to one blob; at least 1.
	Account, Blob int
	// Requests is how many requests/s one page blob takes, Bytes how many bytes/s.
	Requests float64
	Bytes    int64
	// MaxBlobs bounds how many idle blobs are remembered; 0 is 1024.
	MaxBlobs int
	// Now is the clock that latencies are measured by; nil is time.Now.
	Now func() time.Time
}

// Outcome is what a request tells about the service.
type Outcome int

// Outcomes.
const (
	// OK: answered as asked, or refused for a reason that has nothing to do with load.
	OK Outcome = iota
	// Throttled: the service said that it is asked too much, or did not get done in its time.
	Throttled
	// Lost: no answer, for a reason that need not be load.
	Lost
)

// Pacer is safe for concurrent use.
type Pacer struct {
	limits  Limits
	account *window

	mu    sync.Mutex
	blobs map[string]*blob
	clock uint64 // counts uses, to find the blob that was idle longest
}

type blob struct {
	window   *window
	requests *rate.Limiter // nil is no limit
	bytes    *rate.Limiter
	users    int
	used     uint64
}

// New returns a pacer.
func New(l Limits) *Pacer {
	l.Account, l.Blob = max(1, l.Account), max(1, l.Blob)
	if l.MaxBlobs <= 0 {
		l.MaxBlobs = 1024
	}
	if l.Now == nil {
		l.Now = time.Now
	}
	return &Pacer{limits: l, account: newWindow(l.Account), blobs: map[string]*blob{}}
}

// Request is what is to be sent.
type Request struct {
	Blob  string // "" when it is about no blob
	Pages bool   // it is about a page blob: the buckets apply
	Read  bool   // Bytes are the answer's
	Bytes int64  // of its body or of its answer's; the latency of requests without any says too little to judge it
}

// Slot is the right to have one request in flight.
type Slot struct {
	p       *Pacer
	req     Request
	b       *blob
	began   time.Time
	blobEra uint64
	era     uint64
}

// Acquire waits until the request may start. The error is the context's.
func (p *Pacer) Acquire(ctx context.Context, req Request) (*Slot, error) {
	s := &Slot{p: p, req: req}
	if req.Blob != "" {
		s.b = p.blob(req.Blob)
		era, err := s.b.window.acquire(ctx)
		if err != nil {
			p.leave(s.b)
			return nil, err
		}
		s.blobEra = era
		if req.Pages {
			if err := s.b.take(ctx, req.Bytes); err != nil {
				s.b.window.cancel()
				p.leave(s.b)
				return nil, err
			}
		}
	}
	era, err := p.account.acquire(ctx)
	if err != nil {
		if s.b != nil {
			s.b.window.cancel()
			p.leave(s.b)
		}
		return nil, err
	}
	s.era, s.began = era, p.limits.Now()
	return s, nil
}

// Paused says that the caller itself held the request back for d: the latency is judged without it.
func (s *Slot) Paused(d time.Duration) { s.began = s.began.Add(d) }

// Done ends the request.
func (s *Slot) Done(o Outcome) {
	took := s.p.limits.Now().Sub(s.began)
	s.p.account.release(s.era, o, s.req, took)
	if s.b != nil {
		s.b.window.release(s.blobEra, o, s.req, took)
		s.p.leave(s.b)
	}
}

// Stats are for metrics and tests.
type Stats struct {
	// Limit is how many requests the account is believed to take at once, InFlight how many there are.
	Limit, InFlight int
	// Cuts counts how often the limit was halved.
	Cuts uint64
	// Blobs is how many blobs are remembered.
	Blobs int
}

// Stats returns the account's present state.
func (p *Pacer) Stats() Stats {
	st := p.account.stats()
	p.mu.Lock()
	defer p.mu.Unlock()
	st.Blobs = len(p.blobs)
	return st
}

// BlobStats returns one blob's state; zero when it is not remembered.
func (p *Pacer) BlobStats(name string) Stats {
	p.mu.Lock()
	b := p.blobs[name]
	p.mu.Unlock()
	if b == nil {
		return Stats{}
	}
	return b.window.stats()
}

func (p *Pacer) blob(name string) *blob {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.blobs[name]
	if b == nil {
		p.evict()
		b = &blob{window: newWindow(p.limits.Blob)}
		if r := p.limits.Requests; r > 0 {
			b.requests = rate.NewLimiter(rate.Limit(r), max(1, int(r/10)))
		}
		if n := p.limits.Bytes; n > 0 {
			b.bytes = rate.NewLimiter(rate.Limit(n), int(max(n/10, 64<<10)))
		}
		p.blobs[name] = b
	}
	p.clock++
	b.users++
	b.used = p.clock
	return b
}

// evict forgets the blob that was idle longest when there are too many; the caller holds mu.
func (p *Pacer) evict() {
	if len(p.blobs) < p.limits.MaxBlobs {
		return
	}
	oldest := ""
	for name, b := range p.blobs {
		if b.users == 0 && (oldest == "" || b.used < p.blobs[oldest].used) {
			oldest = name
		}
	}
	if oldest != "" {
		delete(p.blobs, oldest)
	}
}

func (p *Pacer) leave(b *blob) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b.users--
}

// take waits for one request and its bytes.
func (b *blob) take(ctx context.Context, bytes int64) error {
	if b.requests != nil {
		if err := wait(ctx, b.requests, 1); err != nil {
			return err
		}
	}
	if b.bytes == nil {
		return nil
	}
	for bytes > 0 {
		n := min(bytes, int64(b.bytes.Burst()))
		if err := wait(ctx, b.bytes, int(n)); err != nil {
			return err
		}
		bytes -= n
	}
	return nil
}

// wait is Limiter.WaitN whose error is always a context's: one that knows beforehand that the deadline will pass says so
// at once.
func wait(ctx context.Context, l *rate.Limiter, n int) error {
	err := l.WaitN(ctx, n)
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("wait for the page blob's rate: %w", context.DeadlineExceeded)
}
