package guestvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/qmp"
)

// dialEach is the pause between attempts to reach a socket that is not there yet.
const dialEach = 10 * time.Millisecond

// maxEvents bounds what Events keeps.
const maxEvents = 1000

// monitor is the lab's connection to QEMU; events are kept.
type monitor struct {
	*qmp.Monitor

	collector sync.WaitGroup
	mu        sync.Mutex
	events    []qmp.Event
}

// persist repeats an attempt to reach a socket until it succeeds.
func persist[T any](ctx context.Context, what string, attempt func(context.Context) (T, error)) (T, error) {
	tick := time.NewTicker(dialEach)
	defer tick.Stop()
	for {
		v, err := attempt(ctx)
		if err == nil {
			return v, nil
		}
		select {
		case <-ctx.Done():
			return v, fmt.Errorf("reach %s: %w", what, errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}

// dial connects to a socket as soon as it is there.
func dial(ctx context.Context, path string) (net.Conn, error) {
	return persist(ctx, path, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	})
}

// dialMonitor waits also for a monitor that somebody else has still.
func dialMonitor(ctx context.Context, path string) (*monitor, error) {
	q, err := persist(ctx, path, func(ctx context.Context) (*qmp.Monitor, error) { return qmp.Dial(ctx, path) })
	if err != nil {
		return nil, err
	}
	m := &monitor{Monitor: q}
	events := q.Subscribe(maxEvents)
	m.collector.Go(func() {
		for e := range events.Events() { // until the connection ends
			m.mu.Lock()
			if len(m.events) < maxEvents {
				m.events = append(m.events, e)
			}
			m.mu.Unlock()
		}
	})
	return m, nil
}

func (m *monitor) close() {
	_ = m.Close()
	m.collector.Wait()
}
