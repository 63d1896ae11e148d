package scheduler

import (
	"context"
	"sync"
	"time"
)

// workQueue holds keys that want work, each at most once, and gives a key to one worker at a time. A key added while it
// is worked on comes again afterwards; of several delays the shortest counts. Its size is bounded by the number of keys.
type workQueue struct {
	mu      sync.Mutex
	ready   []string
	waiting map[string]bool        // in ready
	active  map[string]bool        // with a worker
	again   map[string]bool        // added while active
	timers  map[string]*queueTimer // added for later
	signal  chan struct{}          // one token: ready has something, or the queue is closed
	closed  bool
}

type queueTimer struct {
	at    time.Time
	timer *time.Timer
}

func newWorkQueue() *workQueue {
	return &workQueue{
		waiting: map[string]bool{}, active: map[string]bool{}, again: map[string]bool{},
		timers: map[string]*queueTimer{}, signal: make(chan struct{}, 1),
	}
}

// add wants key worked on now.
func (q *workQueue) add(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.addLocked(key)
}

func (q *workQueue) addLocked(key string) {
	if t := q.timers[key]; t != nil {
		t.timer.Stop()
		delete(q.timers, key)
	}
	switch {
	case q.closed, q.waiting[key]:
	case q.active[key]:
		q.again[key] = true
	default:
		q.waiting[key] = true
		q.ready = append(q.ready, key)
		q.wake()
	}
}

// addAfter wants key worked on after d, or earlier if somebody else wants that.
func (q *workQueue) addAfter(key string, d time.Duration) {
	if d <= 0 {
		q.add(key)
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	at := time.Now().Add(d) //nolint:forbidigo // when to look again, on the timers' own clock
	if q.closed || q.waiting[key] || q.again[key] {
		return
	}
	if t := q.timers[key]; t != nil {
		if t.at.Before(at) {
			return
		}
		t.timer.Stop()
	}
	t := &queueTimer{at: at}
	t.timer = time.AfterFunc(d, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.timers[key] == t {
			q.addLocked(key)
		}
	})
	q.timers[key] = t
}

func (q *workQueue) wake() {
	select {
	case q.signal <- struct{}{}:
	default:
	}
}

// get waits for a key and takes it; false when ctx ended or the queue is closed. The worker calls done.
func (q *workQueue) get(ctx context.Context) (string, bool) {
	for {
		q.mu.Lock()
		if q.closed {
			q.wake() // the next worker too
			q.mu.Unlock()
			return "", false
		}
		if len(q.ready) > 0 {
			key := q.ready[0]
			q.ready = q.ready[1:]
			delete(q.waiting, key)
			q.active[key] = true
			if len(q.ready) > 0 {
				q.wake()
			}
			q.mu.Unlock()
			return key, true
		}
		q.mu.Unlock()
		select {
		case <-ctx.Done():
			return "", false
		case <-q.signal:
		}
	}
}

// done gives a key back.
func (q *workQueue) done(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.active, key)
	if q.again[key] {
		delete(q.again, key)
		q.addLocked(key)
	}
}

// close stops the timers and sends the workers home.
func (q *workQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, t := range q.timers {
		t.timer.Stop()
	}
	q.wake()
}
