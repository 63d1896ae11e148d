package pace

import (
	"container/list"
	"context"
	"math/bits"
	"sync"
	"time"
)

const (
	// startLimit is where a window begins: enough to be useful, too little to hurt.
	startLimit = 8
	// minJudged is how many answers of one size make a mean that is believed.
	minJudged = 8
	// quietLatency is below what a slower answer says nothing about load.
	quietLatency = 40 * time.Millisecond
	// floorDrift makes the remembered floor rise by this share with each window, so that a longer route is learned.
	floorDrift = 0.02
	// sizes is how many powers of two of 16 KiB are told apart.
	sizes = 10
)

// window bounds requests in flight by additive increase and multiplicative decrease.
type window struct {
	mu       sync.Mutex
	limit    float64
	max      float64
	inflight int
	waiters  list.List // of chan uint64: receives the era
	era      uint64    // counts decreases: an answer to an older request says nothing new
	acked    int       // good answers since the limit last changed
	full     bool      // the limit was reached since it last changed
	cuts     uint64
	classes  [2 * sizes]class // latencies of writes, then of reads, by size
}

// class is what is known about answers of one size.
type class struct {
	floor time.Duration // lowest mean
	sum   time.Duration
	n     int
}

func newWindow(maxInFlight int) *window {
	return &window{limit: float64(min(startLimit, maxInFlight)), max: float64(maxInFlight)}
}

func (w *window) acquire(ctx context.Context) (era uint64, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	w.mu.Lock()
	if w.inflight+1 >= int(w.limit) {
		w.full = true
	}
	if w.inflight < int(w.limit) && w.waiters.Len() == 0 {
		w.inflight++
		defer w.mu.Unlock()
		return w.era, nil
	}
	turn := make(chan uint64, 1)
	e := w.waiters.PushBack(turn)
	w.mu.Unlock()
	select {
	case era := <-turn:
		return era, nil
	case <-ctx.Done():
		w.mu.Lock()
		defer w.mu.Unlock()
		select {
		case <-turn: // it came at the same moment: pass it on
			w.inflight--
			w.wake()
		default:
			w.waiters.Remove(e)
		}
		return 0, ctx.Err()
	}
}

// cancel gives back a place that was not used.
func (w *window) cancel() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inflight--
	w.wake()
}

func (w *window) release(era uint64, o Outcome, req Request, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inflight--
	switch {
	case o == Throttled:
		if era == w.era {
			w.cut()
		}
	case o == OK && era == w.era:
		if w.slow(req, took) {
			w.cut()
			break
		}
		if w.acked++; w.acked >= int(w.limit) {
			if w.full && w.limit < w.max {
				w.limit++
			}
			w.acked, w.full = 0, false
		}
	}
	w.wake()
}

// slow judges the mean latency of answers of one size, once for each window.
func (w *window) slow(req Request, took time.Duration) bool {
	if req.Bytes <= 0 {
		return false
	}
	at := min(bits.Len64(uint64(req.Bytes)>>14), sizes-1)
	if req.Read {
		at += sizes
	}
	c := &w.classes[at]
	c.sum += took
	if c.n++; c.n < max(minJudged, int(w.limit)) {
		return false
	}
	mean := c.sum / time.Duration(c.n)
	c.sum, c.n = 0, 0
	if c.floor == 0 || mean < c.floor {
		c.floor = mean
		return false
	}
	was := c.floor
	c.floor += time.Duration(float64(c.floor) * floorDrift)
	return mean > quietLatency && mean > 2*was
}

func (w *window) cut() {
	w.limit = max(1, w.limit/2)
	w.era++
	w.cuts++
	w.acked, w.full = 0, false
	for i := range w.classes {
		w.classes[i].sum, w.classes[i].n = 0, 0
	}
}

// wake lets in who waits longest; the caller holds mu.
func (w *window) wake() {
	for w.inflight < int(w.limit) && w.waiters.Len() > 0 {
		w.inflight++
		w.waiters.Remove(w.waiters.Front()).(chan uint64) <- w.era
	}
}

func (w *window) stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Stats{Limit: int(w.limit), InFlight: w.inflight, Cuts: w.cuts}
}
