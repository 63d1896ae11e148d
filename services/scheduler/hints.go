package scheduler

import (
	"sync"
	"time"

	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
)

// hints is what events said of one VM. It is advice: when to look, and numbers to show.
type hints struct {
	mu       sync.Mutex
	poll     bool
	received *eventsv1.RecoveryPointReceived
	pass     passInfo
}

// passInfo adds up what the tasks of one pass reported, once per task.
type passInfo struct {
	ordinal                    uint64
	seen                       map[int32]bool
	covered, stored, differing int64
}

// pointReceived notes an event and asks for a look at storage.
func (h *hints) pointReceived(e *eventsv1.RecoveryPointReceived) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.received, h.poll = e, true
}

// taskShipped notes an event and asks for a look at storage.
func (h *hints) taskShipped(e *eventsv1.PassTaskShipped) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.poll = true
	if h.pass.ordinal != e.GetPass() {
		h.pass = passInfo{ordinal: e.GetPass()}
	}
	if h.pass.seen == nil {
		h.pass.seen = map[int32]bool{}
	}
	if len(h.pass.seen) >= 1<<20 || h.pass.seen[e.GetIndex()] {
		return
	}
	h.pass.seen[e.GetIndex()] = true
	h.pass.covered += e.GetCoveredBytes()
	h.pass.stored += e.GetStoredBytes()
	h.pass.differing += e.GetDifferingBytes()
}

// takePoll says whether an event asked for a look at storage since the last one.
func (h *hints) takePoll() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	was := h.poll
	h.poll = false
	return was
}

func (h *hints) point() *eventsv1.RecoveryPointReceived {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.received
}

// startPass forgets the pass before.
func (h *hints) startPass(ordinal uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pass = passInfo{ordinal: ordinal}
}

// passSums is what the tasks of a pass reported so far.
func (h *hints) passSums(ordinal uint64) (covered, stored, differing int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pass.ordinal != ordinal {
		return 0, 0, 0
	}
	return h.pass.covered, h.pass.stored, h.pass.differing
}

// lastStored is what the tasks of the newest pass stored.
func (h *hints) lastStored() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pass.stored
}

// cycleLog counts cycles by the hour for the last twelve. It is lost with the process: health then counts from there.
type cycleLog struct {
	hours [int(missedWindow / time.Hour)]struct {
		hour int64
		Cycles
	}
}

func (l *cycleLog) add(now time.Time, due, missed int64) {
	hour := now.Unix() / 3600
	slot := &l.hours[hour%int64(len(l.hours))]
	if slot.hour != hour {
		slot.hour, slot.Cycles = hour, Cycles{}
	}
	slot.Due += due
	slot.Missed += missed
}

func (l *cycleLog) recent(now time.Time) (c Cycles) {
	hour := now.Unix() / 3600
	for _, s := range l.hours {
		if s.hour > hour-int64(len(l.hours)) && s.hour <= hour {
			c.Due += s.Due
			c.Missed += s.Missed
		}
	}
	return c
}
