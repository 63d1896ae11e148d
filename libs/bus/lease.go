package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
)

// Fields of a lease record.
const (
	leaseHolder     = "holder" // "" once released
	leaseGeneration = "generation"
	leaseSeconds    = "ttl_seconds"
)

// minLeaseTTL keeps the renewals of a lease apart from each other and from the
// time that one synchronised write takes.
const minLeaseTTL = 100 * time.Millisecond

// Lease is the right to be the only one, for as long as it is renewed.
//
// No clock is compared with another. The holder counts from just before it sent
// its last successful renewal; a contender counts from when it first read that
// renewal, which is later, and waits an eighth longer than the holder believes.
// So the holder's context ends first as long as no clock runs an eighth slower
// than another. A process that was frozen, or a machine that was suspended, may
// still act for an instant after it thaws: what it writes must carry
// [Lease.Generation] and be refused where a higher one was seen.
type Lease struct {
	kv     *KV[*structpb.Struct]
	name   string
	holder string
	gen    uint64
	ttl    time.Duration

	ctx    context.Context // lifetime of the lease, ends with its loss
	cancel context.CancelCauseFunc
	done   chan struct{} // renewals have ended

	mu     sync.Mutex
	rev    uint64
	expiry time.Time // by our monotonic clock
	timer  *time.Timer
}

// Lease waits until holder, which must be different for every contender, holds
// the lease name, and renews it from then on every third of ttl (at least
// 100 ms). It ends with ctx's error when ctx ends first. The lease lives until it
// is released, lost, or ctx ends.
func (b *Bus) Lease(ctx context.Context, name, holder string, ttl time.Duration) (*Lease, error) {
	if holder == "" || ttl < minLeaseTTL {
		return nil, fmt.Errorf("lease %s: a holder and a time of at least %s are needed", name, minLeaseTTL)
	}
	kv, err := OpenKV[*structpb.Struct](ctx, b, BucketLeases)
	if err != nil {
		return nil, fmt.Errorf("lease %s: %w", name, err)
	}
	l := &Lease{kv: kv, name: name, holder: holder, ttl: ttl, done: make(chan struct{})}
	if err := l.acquire(ctx); err != nil {
		return nil, fmt.Errorf("lease %s: %w", name, err)
	}
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	l.timer = time.AfterFunc(time.Until(l.expiry), l.expire)
	go l.renew()
	return l, nil
}

// acquire returns when the record is ours.
func (l *Lease) acquire(ctx context.Context) error {
	var seen uint64     // revision that another holds
	var since time.Time // when we first saw it
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-wait.C:
		}
		record, rev, err := l.kv.Get(ctx, l.name)
		now := time.Now()
		switch {
		case errors.Is(err, ErrNotFound):
			err = l.take(ctx, 0, 1)
		case err != nil:
		case record.Fields[leaseHolder].GetStringValue() == "":
			err = l.take(ctx, rev, uint64(record.Fields[leaseGeneration].GetNumberValue())+1)
		default:
			if rev != seen {
				seen, since = rev, now
			}
			theirs := time.Duration(record.Fields[leaseSeconds].GetNumberValue() * float64(time.Second))
			free := since.Add(theirs + theirs/8)
			if now.Before(free) {
				wait.Reset(min(time.Until(free), max(theirs/4, 20*time.Millisecond), 2*time.Second))
				continue
			}
			err = l.take(ctx, rev, uint64(record.Fields[leaseGeneration].GetNumberValue())+1)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrVersion), ctx.Err() != nil && !errors.Is(err, ErrRevision):
			return err
		}
		wait.Reset(min(l.ttl/4, time.Second))
	}
}

func (l *Lease) record(holder string, gen uint64) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		leaseHolder:     structpb.NewStringValue(holder),
		leaseGeneration: structpb.NewNumberValue(float64(gen)),
		leaseSeconds:    structpb.NewNumberValue(l.ttl.Seconds()),
	}}
}

func (l *Lease) take(ctx context.Context, rev, gen uint64) error {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, l.ttl)
	defer cancel()
	var err error
	if rev == 0 {
		rev, err = l.kv.Create(ctx, l.name, l.record(l.holder, gen))
	} else {
		rev, err = l.kv.Update(ctx, l.name, l.record(l.holder, gen), rev)
	}
	if err != nil {
		return err
	}
	l.rev, l.gen, l.expiry = rev, gen, start.Add(l.ttl)
	if !time.Now().Before(l.expiry) {
		return fmt.Errorf("the lease was over before it was known to be held: %w", ErrLeaseLost)
	}
	return nil
}

func (l *Lease) expire() {
	l.cancel(fmt.Errorf("%w: %s not renewed within %s", ErrLeaseLost, l.name, l.ttl))
}

// renew keeps the lease until its context ends.
func (l *Lease) renew() {
	defer close(l.done)
	defer l.timer.Stop()
	tick := time.NewTimer(l.ttl / 3)
	defer tick.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
		}
		next := l.ttl / 3
		if err := l.renewOnce(); err != nil {
			if errors.Is(err, ErrLeaseLost) {
				l.cancel(err)
				return
			}
			l.kv.b.logger.WarnContext(l.ctx, "lease not renewed yet", "lease", l.name, "error", err)
			next = min(l.ttl/10, time.Second)
		}
		tick.Reset(next)
	}
}

func (l *Lease) renewOnce() error {
	start := time.Now()
	ctx, cancel := context.WithTimeout(l.ctx, l.ttl/3)
	defer cancel()
	l.mu.Lock()
	rev := l.rev
	l.mu.Unlock()
	rev, err := l.kv.Update(ctx, l.name, l.record(l.holder, l.gen), rev)
	if errors.Is(err, ErrRevision) {
		// Another holds it, or a renewal of ours was stored whose answer was lost.
		record, now, gerr := l.kv.Get(ctx, l.name)
		switch {
		case errors.Is(gerr, ErrNotFound):
			return fmt.Errorf("%w: %s was deleted", ErrLeaseLost, l.name)
		case gerr != nil:
			return gerr
		case record.Fields[leaseHolder].GetStringValue() != l.holder,
			uint64(record.Fields[leaseGeneration].GetNumberValue()) != l.gen:
			return fmt.Errorf("%w: %s is held by %q", ErrLeaseLost, l.name, record.Fields[leaseHolder].GetStringValue())
		}
		start = time.Now()
		rev, err = l.kv.Update(ctx, l.name, l.record(l.holder, l.gen), now)
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rev = rev
	// Not after the end was announced: whoever saw it stops for good.
	if l.ctx.Err() == nil && l.timer.Stop() {
		l.expiry = start.Add(l.ttl)
		l.timer.Reset(time.Until(l.expiry))
	}
	return nil
}

// Context ends when the lease is over, with [ErrLeaseLost] as its cause if it was
// lost. Everything done in the right of the lease uses it.
func (l *Lease) Context() context.Context { return l.ctx }

// Generation is higher than that of every earlier holder of the same name.
func (l *Lease) Generation() uint64 { return l.gen }

// Valid tells, by the clock and not by a goroutine that may be late, whether the
// lease is held now. Ask it right before an effect that carries no generation.
func (l *Lease) Valid() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ctx.Err() == nil && time.Now().Before(l.expiry)
}

// Release ends the lease's context and lets a waiting contender in, within two
// seconds at the latest. It waits for the renewals to end. Stop what the lease protects first.
func (l *Lease) Release(ctx context.Context) error {
	l.cancel(context.Canceled)
	<-l.done
	if errors.Is(context.Cause(l.ctx), ErrLeaseLost) {
		return nil
	}
	l.mu.Lock()
	rev := l.rev
	l.mu.Unlock()
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	if _, err := l.kv.Update(ctx, l.name, l.record("", l.gen), rev); err != nil && !errors.Is(err, ErrRevision) {
		return fmt.Errorf("release lease %s: %w", l.name, err)
	}
	return nil
}
