package pace

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is moved by hand.
type clock struct{ at atomic.Int64 }

func (c *clock) now() time.Time { return time.Unix(0, c.at.Load()) }

func (c *clock) add(d time.Duration) { c.at.Add(int64(d)) }

// fill takes as many places as there are.
func fill(t *testing.T, p *Pacer, req Request) (slots []*Slot) {
	t.Helper()
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		s, err := p.Acquire(ctx, req)
		cancel()
		if err != nil {
			require.ErrorIs(t, err, context.DeadlineExceeded)
			return slots
		}
		slots = append(slots, s)
	}
}

func TestWindowGrowsByOneAndHalves(t *testing.T) {
	p := New(Limits{Account: 12, Blob: 100})
	for want := 8; want <= 12; want++ {
		slots := fill(t, p, Request{})
		require.Len(t, slots, want)
		for _, s := range slots {
			s.Done(OK)
		}
	}
	slots := fill(t, p, Request{})
	require.Len(t, slots, 12, "never above the most")
	for _, s := range slots {
		s.Done(Throttled) // all were sent before the first refusal: they say it once
	}
	require.Equal(t, 6, p.Stats().Limit)
	require.EqualValues(t, 1, p.Stats().Cuts)
	for range 10 {
		s, err := p.Acquire(t.Context(), Request{})
		require.NoError(t, err)
		s.Done(Throttled)
	}
	require.Equal(t, 1, p.Stats().Limit, "one request is always allowed")
	s, err := p.Acquire(t.Context(), Request{})
	require.NoError(t, err)
	s.Done(Lost)
	require.Equal(t, 1, p.Stats().Limit)
}

func TestIdleWindowDoesNotGrow(t *testing.T) {
	p := New(Limits{Account: 64, Blob: 64})
	for range 1000 {
		s, err := p.Acquire(t.Context(), Request{})
		require.NoError(t, err)
		s.Done(OK)
	}
	require.Equal(t, 8, p.Stats().Limit, "one at a time proves nothing about nine")
}

func TestLatencyHalves(t *testing.T) {
	var c clock
	c.add(time.Hour)
	p := New(Limits{Account: 8, Blob: 8, Now: c.now})
	window := func(took time.Duration) {
		for range 8 {
			s, err := p.Acquire(t.Context(), Request{Bytes: 4 << 20})
			require.NoError(t, err)
			c.add(took)
			s.Done(OK)
		}
	}
	for range 20 { // a slow list after quick looks is no sign of load
		s, err := p.Acquire(t.Context(), Request{})
		require.NoError(t, err)
		c.add(10 * time.Second)
		s.Done(OK)
	}
	window(50 * time.Millisecond)
	window(90 * time.Millisecond)
	require.EqualValues(t, 0, p.Stats().Cuts)
	window(120 * time.Millisecond)
	require.EqualValues(t, 1, p.Stats().Cuts)
	require.Equal(t, 4, p.Stats().Limit)
}

func TestBlobsDoNotHoldEachOther(t *testing.T) {
	p := New(Limits{Account: 16, Blob: 2, MaxBlobs: 4})
	a := fill(t, p, Request{Blob: "a"})
	require.Len(t, a, 2)
	b := fill(t, p, Request{Blob: "b"})
	require.Len(t, b, 2, "those that wait for a hold no place of the account")
	for _, s := range append(a, b...) {
		s.Done(OK)
	}
	for i := range 100 {
		s, err := p.Acquire(t.Context(), Request{Blob: fmt.Sprint(i)})
		require.NoError(t, err)
		s.Done(OK)
	}
	require.LessOrEqual(t, p.Stats().Blobs, 4)
	require.Zero(t, p.Stats().InFlight)
}

func TestPageBlobRate(t *testing.T) {
	p := New(Limits{Account: 8, Blob: 8, Requests: 100, Bytes: 1 << 20})
	began := time.Now()
	for range 30 { // 10 at once, 20 more take 200 ms
		s, err := p.Acquire(t.Context(), Request{Blob: "p", Pages: true})
		require.NoError(t, err)
		s.Done(OK)
	}
	require.GreaterOrEqual(t, time.Since(began), 150*time.Millisecond)
	s, err := p.Acquire(t.Context(), Request{Blob: "q", Pages: true, Bytes: 300 << 10}) // more than the bucket holds
	require.NoError(t, err)
	s.Done(OK)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = p.Acquire(ctx, Request{Blob: "q", Pages: true, Bytes: 4 << 20})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Zero(t, p.Stats().InFlight)
	require.Zero(t, p.BlobStats("q").InFlight)
	for range 100 { // block blobs have no such limit
		s, err := p.Acquire(t.Context(), Request{Blob: "q", Bytes: 4 << 20})
		require.NoError(t, err)
		s.Done(OK)
	}
}

func TestManyWaiters(t *testing.T) {
	p := New(Limits{Account: 4, Blob: 3})
	var now, most atomic.Int64
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*time.Millisecond)
			defer cancel()
			s, err := p.Acquire(ctx, Request{Blob: fmt.Sprint(i % 3)})
			if err != nil {
				return
			}
			n := now.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			now.Add(-1)
			s.Done(OK)
		})
	}
	wg.Wait()
	require.LessOrEqual(t, most.Load(), int64(4))
	require.Zero(t, p.Stats().InFlight)
	require.Len(t, fill(t, p, Request{}), 4)
}
