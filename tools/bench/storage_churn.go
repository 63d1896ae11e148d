package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/bus"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/tools/nbdclient"
)

// churnTask is what a guest does to its disk.
type churnTask struct {
	// Control of the sink, for its counters.
	Control string
	Seed    uint64
	// Rates in bytes/s, one after the other, in random blocks of Block bytes; a point is cut every Cycle, Cycles times.
	Rates  []float64
	Block  int
	Cycle  time.Duration
	Cycles int
	// Bursts are written at once, each followed by one point.
	Bursts []burst
}

// burst is Bytes in scattered blocks of Block bytes.
type burst struct{ Bytes, Block int64 }

type churnResult struct {
	Rates  []rateResult
	Bursts []burstResult
}

// rateResult is how a rate was kept up with.
type rateResult struct {
	// Wrote is the bytes/s that the guest got.
	Wrote float64
	// Receive is the longest time from cut to received; AgeP99 and AgeMax are the age of the newest durable point, looked at
	// evenly over time; all in seconds.
	Receive, AgeP99, AgeMax float64
	Stored                  int64
	// Drain is how long an urgent apply took after the writes ended, in seconds.
	Drain float64
	Moved movedJSON
}

type burstResult struct {
	// Received and Processed are seconds since the cut.
	Received, Processed float64
	Stored              int64
	ToReceived, All     movedJSON
}

// movedJSON is [moved] for the way between processes.
type movedJSON struct{ Blocks, Pages, Requests, Refused, PageOps int64 }

func (s *site) counters(ctx context.Context, control string) (movedJSON, error) {
	if control == "" {
		return movedJSON{}, nil
	}
	m, err := sinkStats(ctx, control)
	return movedJSON{m.blocks, m.pages, m.requests, m.refused, m.pageOps}, err
}

func (s *site) churn(ctx context.Context, t churnTask) (*churnResult, error) {
	next := uint64(3)
	if err := s.drain(ctx, next-1); err != nil { // the base is on the disks before anything is measured
		return nil, err
	}
	out := &churnResult{}
	c, err := nbdclient.Dial(ctx, s.disks[0][0].GetExportUri())
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	for i, b := range t.Bursts {
		r, err := s.burst(ctx, t, c, b, next, t.Seed+uint64(i))
		if err != nil {
			return out, fmt.Errorf("burst %d: %w", i, err)
		}
		out.Bursts = append(out.Bursts, r)
		next++
	}
	for i, rate := range t.Rates {
		r, err := s.sustain(ctx, t, rate, &next, t.Seed+100+uint64(i))
		if err != nil {
			return out, fmt.Errorf("rate %.0f: %w", rate, err)
		}
		fmt.Fprintf(os.Stderr, "at %.0f bytes/s: %+v\n", rate, r) // what is known already, for the error of a row that takes too long
		out.Rates = append(out.Rates, r)
	}
	return out, nil
}

// drain applies at once and waits until a point is on the disks.
func (s *site) drain(ctx context.Context, ordinal uint64) error {
	m := s.task.Machines[0]
	err := s.publish(ctx, bus.KindApply, &uploaderv1.ApplyTask{Vm: s.shipTask(0, 0).GetVm(), Lineage: string(m.Lineage), Urgent: true})
	if err == nil {
		_, err = s.await(ctx, processedKey(m), int(ordinal))
	}
	return err
}

func (s *site) burst(ctx context.Context, t churnTask, c *nbdclient.Client, b burst, ordinal, seed uint64) (out burstResult, err error) {
	r := rand.New(rand.NewPCG(seed, 5))
	n := b.Bytes / b.Block
	room := s.task.Machines[0].Size / b.Block / n
	if room < 2 {
		return out, errors.New("the disk is too small to scatter this")
	}
	buf := make([]byte, b.Block)
	for _, i := range r.Perm(int(n)) {
		random(r, buf)
		if _, err := c.WriteAt(buf, (int64(i)*room+r.Int64N(room))*b.Block); err != nil {
			return out, err
		}
	}
	if err := c.Flush(); err != nil {
		return out, err
	}
	if t.Control != "" {
		if err := ask(ctx, http.MethodPost, t.Control+"reset", &struct{}{}); err != nil {
			return out, err
		}
	}
	cut, f, err := s.cycle(ctx, 0, ordinal, typesv1.PointKind_POINT_KIND_POINT)
	if err != nil {
		return out, err
	}
	out.Received, out.Stored = f.at.Sub(cut).Seconds(), f.stored
	if out.ToReceived, err = s.counters(ctx, t.Control); err != nil {
		return out, err
	}
	if err := s.drain(ctx, ordinal); err != nil {
		return out, err
	}
	out.Processed = time.Since(cut).Seconds()
	out.All, err = s.counters(ctx, t.Control)
	return out, err
}

func random(r *rand.Rand, p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		v := r.Uint64()
		for k := range 8 {
			p[i+k] = byte(v >> (8 * k))
		}
	}
}

// writers is how many of the guest's writes are in flight.
const writers = 2

// sustain writes at a rate while points are cut, then drains.
func (s *site) sustain(ctx context.Context, t churnTask, rate float64, next *uint64, seed uint64) (out rateResult, err error) {
	if t.Control != "" {
		if err := ask(ctx, http.MethodPost, t.Control+"reset", &struct{}{}); err != nil {
			return out, err
		}
	}
	var wrote atomic.Int64
	writing, stop := context.WithCancel(ctx)
	defer stop()
	g, gctx := errgroup.WithContext(writing)
	begin := time.Now()
	for w := range writers {
		g.Go(func() error { return s.write(gctx, t.Block, rate/writers, begin, seed*writers+uint64(w), &wrote) })
	}
	type durable struct{ cut, at time.Time }
	var points []durable
	for i := range t.Cycles {
		select {
		case <-time.After(time.Until(begin.Add(time.Duration(i+1) * t.Cycle))): // at once when the one before took longer
		case <-gctx.Done():
			return out, errors.Join(g.Wait(), ctx.Err())
		}
		cut, f, err := s.cycle(ctx, 0, *next, typesv1.PointKind_POINT_KIND_POINT)
		if err != nil {
			return out, err
		}
		*next++
		points = append(points, durable{cut, f.at})
		out.Stored += f.stored
		out.Receive = max(out.Receive, f.at.Sub(cut).Seconds())
		if err := s.publish(ctx, bus.KindApply, &uploaderv1.ApplyTask{Vm: s.shipTask(0, 0).GetVm(), Lineage: string(s.task.Machines[0].Lineage)}); err != nil {
			return out, err
		}
	}
	took := time.Since(begin).Seconds()
	stop()
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return out, err
	}
	out.Wrote = float64(wrote.Load()) / took
	var ages []float64
	for i := 1; i < len(points); i++ {
		for at := points[i-1].at; at.Before(points[i].at); at = at.Add(10 * time.Millisecond) {
			ages = append(ages, at.Sub(points[i-1].cut).Seconds())
		}
	}
	if slices.Sort(ages); len(ages) > 0 {
		out.AgeP99, out.AgeMax = ages[int(0.99*float64(len(ages)-1))], ages[len(ages)-1]
	}
	_, _, err = s.cycle(ctx, 0, *next, typesv1.PointKind_POINT_KIND_POINT) // what was written during the last one
	if err != nil {
		return out, err
	}
	drained := time.Now()
	if err := s.drain(ctx, *next); err != nil {
		return out, err
	}
	*next++
	out.Drain = time.Since(drained).Seconds()
	out.Moved, err = s.counters(ctx, t.Control)
	return out, err
}

// write writes random blocks at a rate until ctx ends.
func (s *site) write(ctx context.Context, block int, rate float64, begin time.Time, seed uint64, wrote *atomic.Int64) error {
	c, err := nbdclient.Dial(ctx, s.disks[0][0].GetExportUri())
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	r := rand.New(rand.NewPCG(seed, 6))
	buf, n := make([]byte, block), int64(0)
	blocks := s.task.Machines[0].Size / int64(block)
	for {
		due := begin.Add(time.Duration(float64(n) / rate * float64(time.Second)))
		if d := time.Until(due); d > time.Millisecond {
			select {
			case <-time.After(d):
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		random(r, buf)
		if _, err := c.WriteAt(buf, r.Int64N(blocks)*int64(block)); err != nil {
			return errors.Join(err, ctx.Err())
		}
		n += int64(block)
		wrote.Add(int64(block))
	}
}
