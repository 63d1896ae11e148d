package bandwidth

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
)

const (
	// burstTime is how much unused rate is kept for later.
	burstTime = 100 * time.Millisecond
	// Reads are paced in steps of the bytes of stepTime, between these bounds.
	stepTime = 50 * time.Millisecond
	minStep  = 8 << 10
	maxStep  = 256 << 10
)

// Limiter holds one worker to its part of the site's rate, by class. What a class does not use goes to the others, in
// the proportion of their parts; within a class it is first come, first served, step by step. A new one is unlimited. Its time is
// the machine's monotonic clock: a wall clock that is set must not stop or flood a link. Safe for concurrent use.
type Limiter struct {
	limited atomic.Bool
	sent    [Classes]atomic.Int64
	waited  [Classes]atomic.Int64 // nanoseconds
	active  [Classes]atomic.Int64 // streams
	changed atomic.Pointer[func()]

	mu      sync.Mutex
	part    Part
	rate    float64 // bytes a second in all
	tokens  float64 // bytes; below 0 is what was sent ahead
	filled  time.Time
	virtual float64          // time of fair queueing: bytes over weight
	finish  [Classes]float64 // virtual time at which the class's last grant ends
	queues  [Classes][]*grant
	timer   *time.Timer
}

// grant is one read that waits.
type grant struct {
	n     int
	ready chan struct{}
}

// NewLimiter returns one without a limit.
func NewLimiter() *Limiter { return &Limiter{} }

// Limit sets the part of this worker, at once for reads that wait too. A part of nothing at all is the smallest rate
// there is, not none: [Limiter.Unlimit] says none.
func (l *Limiter) Limit(p Part) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rate := float64(max(p.Total(), 1))
	if l.limited.Load() {
		if p == l.part {
			return
		}
		l.fill()
		l.tokens *= rate / l.rate // a debt is a time
	} else {
		l.tokens, l.filled = 0, time.Now()
	}
	l.part, l.rate = p, rate
	l.tokens = min(l.tokens, l.burst())
	l.limited.Store(true)
	l.pump()
}

// Unlimit takes the limit away.
func (l *Limiter) Unlimit() {
	if !l.limited.Load() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limited.Store(false)
	l.part, l.rate = Part{}, 0
	for c := range l.queues {
		for _, g := range l.queues[c] {
			close(g.ready)
		}
		l.queues[c] = nil
	}
	l.pump()
}

// Rate is what this worker may send now, in bytes a second; 0 is no limit.
func (l *Limiter) Rate() int64 {
	if !l.limited.Load() {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.limited.Load() {
		return 0
	}
	return int64(l.rate)
}

// Part is what each class has for itself; false: there is no limit.
func (l *Limiter) Part() (Part, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.part, l.limited.Load()
}

// Begin says that a stream of a class has something to send, until end is called.
func (l *Limiter) Begin(c Class) (end func()) {
	l.active[c].Add(1)
	l.tell()
	return func() {
		l.active[c].Add(-1)
		l.tell()
	}
}

func (l *Limiter) tell() {
	if f := l.changed.Load(); f != nil && l.limited.Load() {
		(*f)()
	}
}

// Active is how many streams there are by class.
func (l *Limiter) Active() (n [Classes]int) {
	for c := range l.active {
		n[c] = int(l.active[c].Load())
	}
	return n
}

// Sent is how many bytes of a class were let through so far, Waited how long all its reads waited together.
func (l *Limiter) Sent(c Class) int64 { return l.sent[c].Load() }

// Waited is how long all reads of a class waited together.
func (l *Limiter) Waited(c Class) time.Duration { return time.Duration(l.waited[c].Load()) }

// Step is how many bytes a read should ask for at most.
func (l *Limiter) Step() int {
	if !l.limited.Load() {
		return maxStep
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.step()
}

func (l *Limiter) step() int {
	if l.rate == 0 {
		return maxStep
	}
	return int(min(max(l.rate*stepTime.Seconds(), minStep), maxStep))
}

// Wait returns when n bytes of a class may be sent; the error is the context's, and nothing was taken then. Ask for
// no more than Step at once, or others wait for all of it.
func (l *Limiter) Wait(ctx context.Context, c Class, n int) error {
	if !l.limited.Load() || n <= 0 {
		l.sent[c].Add(int64(max(n, 0)))
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	g := l.enqueue(c, n)
	select {
	case <-g.ready:
		l.sent[c].Add(int64(n))
		return nil
	default:
	}
	done, began := pacing.Wait(ctx), time.Now()
	defer func() {
		done()
		l.waited[c].Add(int64(time.Since(began)))
	}()
	select {
	case <-g.ready:
		l.sent[c].Add(int64(n))
		return nil
	case <-ctx.Done():
		l.leave(c, g)
		return ctx.Err()
	}
}

func (l *Limiter) enqueue(c Class, n int) *grant {
	g := &grant{n: n, ready: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.limited.Load() {
		close(g.ready)
		return g
	}
	l.queues[c] = append(l.queues[c], g)
	l.pump()
	return g
}

// leave takes back a grant whose reader has gone.
func (l *Limiter) leave(c Class, g *grant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-g.ready: // at the same moment
		l.giveBack(g.n)
		return
	default:
	}
	for i, other := range l.queues[c] {
		if other == g {
			l.queues[c] = append(l.queues[c][:i], l.queues[c][i+1:]...)
			break
		}
	}
	l.pump()
}

// Return gives back n bytes that were granted and not sent.
func (l *Limiter) Return(c Class, n int) {
	if n <= 0 {
		return
	}
	l.sent[c].Add(int64(-n))
	if !l.limited.Load() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.giveBack(n)
}

func (l *Limiter) giveBack(n int) {
	if l.limited.Load() {
		l.tokens = min(l.tokens+float64(n), l.burst())
		l.pump()
	}
}

// burst is at least a step, or the clock's grain would cost rate.
func (l *Limiter) burst() float64 {
	return max(l.rate*burstTime.Seconds(), float64(l.step()))
}

func (l *Limiter) fill() {
	now := time.Now()
	l.tokens = min(l.tokens+now.Sub(l.filled).Seconds()*l.rate, l.burst())
	l.filled = now
}

// pump grants what may be sent now and sees to it that it runs again when more may be. The lock is held.
func (l *Limiter) pump() {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	if !l.limited.Load() {
		return
	}
	l.fill()
	for {
		c := l.next()
		if c < 0 {
			return
		}
		if l.tokens <= 0 {
			wait := time.Duration(-l.tokens/l.rate*float64(time.Second)) + time.Microsecond
			l.timer = time.AfterFunc(min(wait, time.Hour), func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.pump()
			})
			return
		}
		g := l.queues[c][0]
		l.queues[c] = l.queues[c][1:]
		l.virtual = max(l.virtual, l.finish[c])
		l.finish[c] = l.virtual + float64(g.n)/l.weight(c)
		l.tokens -= float64(g.n)
		close(g.ready)
	}
}

// next is the class whose turn it is: the one that got least for its weight (start-time fair queueing); -1: nobody waits.
func (l *Limiter) next() int {
	best, at := -1, 0.0
	for c := range l.queues {
		if len(l.queues[c]) == 0 {
			continue
		}
		if start := max(l.virtual, l.finish[c]); best < 0 || start < at {
			best, at = c, start
		}
	}
	if best < 0 { // everybody idle: nobody has anything to catch up
		l.virtual, l.finish = 0, [Classes]float64{}
	}
	return best
}

// weight is the class's part; a class that nobody announced yet has what it would have beside the others.
func (l *Limiter) weight(c int) float64 {
	if l.part[c] > 0 {
		return float64(l.part[c])
	}
	return max(l.rate*float64(weights[c])/10, 1)
}
