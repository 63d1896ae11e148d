package recovery

import (
	"context"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/replica"
)

// progressEvery bounds how often bytes are told.
const progressEvery = 250 * time.Millisecond

// counter is a sink that tells how far it is. Disks come one after the other and are written roughly in ascending order,
// so the end of the furthest write says how much of a disk is done, absent space included.
type counter struct {
	sink  replica.Sink
	say   func(Update)
	now   func() time.Time
	total int64

	mu         sync.Mutex
	last       time.Time
	done, sent int64
	high       int64
}

func newCounter(sink replica.Sink, m *replica.Manifest, now func() time.Time, say func(Update)) *counter {
	c := &counter{sink: sink, say: say, now: now}
	for _, d := range m.Disks {
		c.total += d.Size
	}
	return c
}

// Disk implements replica.Sink.
func (c *counter) Disk(ctx context.Context, d replica.DiskState) (replica.DiskSink, error) {
	inner, err := c.sink.Disk(ctx, d)
	if err != nil {
		return nil, err
	}
	c.add(func() {}, true)
	return &countedDisk{DiskSink: inner, c: c, size: d.Size}, nil
}

type countedDisk struct {
	replica.DiskSink
	c    *counter
	size int64
}

// WriteAt implements replica.DiskSink.
func (d *countedDisk) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := d.DiskSink.WriteAt(ctx, p, off); err != nil {
		return err
	}
	d.c.add(func() {
		d.c.sent += int64(len(p))
		d.c.high = max(d.c.high, off+int64(len(p)))
	}, false)
	return nil
}

// Finish implements replica.DiskSink.
func (d *countedDisk) Finish(ctx context.Context) error {
	if err := d.DiskSink.Finish(ctx); err != nil {
		return err
	}
	d.c.add(func() { d.c.done, d.c.high = d.c.done+d.size, 0 }, true)
	return nil
}

// add counts, and tells if that is due.
func (c *counter) add(count func(), due bool) {
	c.mu.Lock()
	count()
	now := c.now()
	if due = due || now.Sub(c.last) >= progressEvery; due {
		c.last = now
	}
	u := Update{Done: c.done + c.high, Total: c.total, Sent: c.sent}
	c.mu.Unlock()
	if due {
		c.say(u)
	}
}
