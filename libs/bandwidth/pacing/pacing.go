// Package pacing keeps clocks honest about bodies that are sent slowly on purpose.
//
// A limiter holds back the reads of a body, so that a put takes as long as its share of the link allows. Whoever bounds
// such a put by time, or judges the service by how long it took, must not count that: [Timeout] is a context.WithTimeout
// whose time stands still during the waits, and [Waited] tells how long they were. It knows nothing of limits, so that
// backends can use it.
package pacing

import (
	"context"
	"io"
	"sync"
	"time"
)

// Body is a body whose Read waits, because what is read is sent. Who reads it for another reason, as a checksum is, reads
// Free instead, which does not wait. Both share one position; Seek the Body after reading Free.
type Body interface {
	io.ReadSeeker
	Free() io.ReadSeeker
}

// Free returns the reader of a body that does not wait; of any other body, the body.
func Free(body io.ReadSeeker) io.ReadSeeker {
	if b, ok := body.(Body); ok {
		return b.Free()
	}
	return body
}

// meter sums up the time in which at least one read under a context waited.
type meter struct {
	mu      sync.Mutex
	waiting int
	since   time.Time
	total   time.Duration
}

func (m *meter) waited() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting > 0 {
		return m.total + time.Since(m.since)
	}
	return m.total
}

type meterKey struct{}

// Context returns ctx with a place where waits are noted: the one that it has, or a new one.
func Context(ctx context.Context) context.Context {
	if _, ok := ctx.Value(meterKey{}).(*meter); ok {
		return ctx
	}
	return context.WithValue(ctx, meterKey{}, &meter{})
}

// Wait notes that a read waits from now on until done is called. ctx is one that [Context] or [Timeout] made, or a child;
// with any other nothing is noted.
func Wait(ctx context.Context) (done func()) {
	m, ok := ctx.Value(meterKey{}).(*meter)
	if !ok {
		return func() {}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting++; m.waiting == 1 {
		m.since = time.Now()
	}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.waiting--; m.waiting == 0 {
			m.total += time.Since(m.since)
		}
	}
}

// Waited is how long reads under ctx have waited so far.
func Waited(ctx context.Context) time.Duration {
	if m, ok := ctx.Value(meterKey{}).(*meter); ok {
		return m.waited()
	}
	return 0
}

// limited is a context that ended by its own time says so.
type limited struct{ context.Context }

// Err is DeadlineExceeded when the time was up.
func (c limited) Err() error {
	if c.Context.Err() != nil && context.Cause(c.Context) == context.DeadlineExceeded { //nolint:errorlint // exactly this one
		return context.DeadlineExceeded
	}
	return c.Context.Err()
}

// Timeout returns a context that ends d after now, not counting the time in which reads under it wait. It has no
// deadline of its own: nobody knows when that would be. The caller calls cancel.
func Timeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	ctx = Context(ctx)
	m := ctx.Value(meterKey{}).(*meter)
	inner, cancel := context.WithCancelCause(ctx)
	began, before := time.Now(), m.waited()
	var mu sync.Mutex
	var timer *time.Timer
	var check func()
	check = func() {
		left := d - (time.Since(began) - (m.waited() - before))
		if left <= 0 {
			cancel(context.DeadlineExceeded)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if inner.Err() == nil {
			timer = time.AfterFunc(max(left, time.Millisecond), check)
		}
	}
	mu.Lock()
	timer = time.AfterFunc(d, check)
	mu.Unlock()
	return limited{inner}, func() {
		cancel(context.Canceled)
		mu.Lock()
		defer mu.Unlock()
		timer.Stop()
	}
}
