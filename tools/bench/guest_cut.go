package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

// cutsOfARun is how many points of each kind the row guest-cut takes: enough for a 99th percentile that is not the worst.
const cutsOfARun = 120

// guestCut takes points of the lab guest's two disks while it writes to both as fast as it can.
func guestCut(o *Options) []subject {
	list := make([]subject, 0, 2)
	for _, kind := range []struct {
		name string
		want typesv1.Consistency
	}{{"crash-consistent", typesv1.Consistency_CONSISTENCY_CRASH}, {"application-consistent", typesv1.Consistency_CONSISTENCY_APPLICATION}} {
		list = append(list, subject{
			name: fmt.Sprintf("driver qemu, %d cuts of two disks, %s", cutsOfARun, kind.name), once: true,
			check: "each point reaches the consistency that was asked for; the guest goes on writing, and verifies",
			run:   func(ctx context.Context, folder string) (sample, error) { return cutOften(ctx, o, folder, kind.want) },
		})
	}
	return list
}

// guestOnHost starts a guest and a host that tracks it. Call end in any case.
func guestOnHost(ctx context.Context, o *Options, folder string) (g *labGuest, h *hostRig, end func(*error), err error) {
	if g, err = startGuest(ctx, o, folder, image.VHDX); err != nil {
		return nil, nil, nil, err
	}
	if h, err = startHost(ctx, folder, g); err != nil {
		g.end()
		return nil, nil, nil, err
	}
	return g, h, func(err *error) {
		*err = errors.Join(*err, h.stop())
		g.end()
	}, nil
}

func cutOften(ctx context.Context, o *Options, folder string, want typesv1.Consistency) (s sample, err error) {
	g, h, end, err := guestOnHost(ctx, o, folder)
	if err != nil {
		return s, err
	}
	defer end(&err)
	if err := g.vm.SetRate(ctx, 0); err != nil {
		return s, err
	}
	var cuts, pauses, settles []time.Duration
	began, self, hypervisor := time.Now(), ownCPU(), g.cpu()
	for range cutsOfARun {
		start := time.Now()
		r, err := h.cut(ctx, want)
		if err != nil {
			return s, err
		}
		cuts, pauses = append(cuts, time.Since(start)), append(pauses, r.Point.GetPause().AsDuration())
		if r.Consistency != want {
			return s, fmt.Errorf("point %d is %s: %w", h.last, r.Consistency, r.Degraded)
		}
		acked := g.vm.Acked()
		start = time.Now()
		if err := h.settle(ctx); err != nil {
			return s, err
		}
		settles = append(settles, time.Since(start))
		if err := g.vm.WaitAcked(ctx, acked+2); err != nil {
			return s, fmt.Errorf("after point %d: %w", h.last, err)
		}
	}
	s.wall, s.cpu = time.Since(began), ownCPU()-self
	frozen := h.frozen.take()
	if want == typesv1.Consistency_CONSISTENCY_APPLICATION && len(frozen) != cutsOfARun {
		return s, fmt.Errorf("%d freezes of %d cuts", len(frozen), cutsOfARun)
	}
	s.figures = quantiles("pause (writes of both disks held)", pauses)
	if len(frozen) > 0 {
		s.figures = append(s.figures, quantiles("freeze (asked for until thawed)", frozen)...)
	}
	s.figures = append(append(s.figures, quantiles("whole cut", cuts)...), quantiles("whole settle", settles)...)
	s.figures = append(s.figures,
		figure{name: "CPU of the driver a cut and settle", unit: "ms", value: s.cpu.Seconds() * 1e3 / cutsOfARun},
		figure{name: "CPU of QEMU and its writing guest a cut and settle", unit: "ms", value: (g.cpu() - hypervisor).Seconds() * 1e3 / cutsOfARun})
	return s, g.verify(ctx)
}

// verify has the running guest verify itself.
func (g *labGuest) verify(ctx context.Context) error {
	r, err := g.vm.Verify(ctx)
	if err == nil && !r.OK {
		err = fmt.Errorf("the guest found %v", r.Bad)
	}
	return err
}

// at is a quantile of durations, by the nearest rank.
func at(list []time.Duration, share float64) time.Duration {
	if len(list) == 0 {
		return 0
	}
	list = slices.Sorted(slices.Values(list))
	return list[max(0, int(math.Ceil(share*float64(len(list))))-1)]
}

// quantiles are the figures of a time in milliseconds.
func quantiles(name string, list []time.Duration) []figure {
	ms := func(d time.Duration) float64 { return d.Seconds() * 1e3 }
	return []figure{
		{name: name + ", p50", unit: "ms", value: ms(at(list, 0.5))},
		{name: name + ", p99", unit: "ms", value: ms(at(list, 0.99))},
		{name: name + ", max", unit: "ms", value: ms(at(list, 1))},
	}
}

// latencyTime is how long the guest's writes are timed, in each state of each round.
const latencyTime = 4 * time.Second

// guestLatency times durable writes of 4 KiB in the guest in three states, in turn.
func guestLatency(o *Options) []subject {
	return []subject{{
		name: "lab guest, durable writes of 4 KiB", check: "the guest verifies", once: true,
		run: func(ctx context.Context, folder string) (s sample, err error) {
			g, h, end, err := guestOnHost(ctx, o, folder)
			if err != nil {
				return s, err
			}
			defer end(&err)
			if err := g.quiet(ctx); err != nil {
				return s, err
			}
			began, self := time.Now(), ownCPU()
			states := []struct {
				name string
				run  func() (guest.Latency, error)
				got  []guest.Latency
				cuts int
			}{{name: "no cut"}, {name: "cuts without pause"}, {name: "an open frozen copy"}}
			measure := func() (guest.Latency, error) { return g.vm.MeasureLatency(ctx, latencyTime, deltaDisk) }
			states[0].run = measure
			states[1].run = func() (guest.Latency, error) {
				l, n, err := h.whileCutting(ctx, measure)
				states[1].cuts += n
				return l, err
			}
			states[2].run = func() (guest.Latency, error) {
				if _, err := h.cut(ctx, typesv1.Consistency_CONSISTENCY_CRASH); err != nil {
					return guest.Latency{}, err
				}
				l, err := measure()
				return l, errors.Join(err, h.settle(ctx))
			}
			for range o.Runs {
				for i := range states {
					l, err := states[i].run()
					if err != nil {
						return s, fmt.Errorf("%s: %w", states[i].name, err)
					}
					states[i].got = append(states[i].got, l)
				}
			}
			s.wall, s.cpu = time.Since(began), ownCPU()-self
			for _, st := range states {
				var p50, p99, most, writes []float64
				for _, l := range st.got {
					p50, p99, most = append(p50, float64(l.P50US)/1e3), append(p99, float64(l.P99US)/1e3), append(most, float64(l.MaxUS)/1e3)
					writes = append(writes, float64(l.Writes)/latencyTime.Seconds())
				}
				s.figures = append(s.figures,
					figure{name: st.name + ": p50", unit: "ms", value: spread(p50).Median},
					figure{name: st.name + ": p99", unit: "ms", value: spread(p99).Median},
					figure{name: st.name + ": max of all rounds", unit: "ms", value: spread(most).Max},
					figure{name: st.name + ": writes", unit: "/s", value: spread(writes).Median})
			}
			s.figures = append(s.figures, figure{name: states[1].name + ": cuts", unit: "/s", value: float64(states[1].cuts) / float64(o.Runs) / latencyTime.Seconds()})
			return s, g.verify(ctx)
		},
	}}
}

// whileCutting cuts and settles without pause until f returns, and says how often.
func (h *hostRig) whileCutting(ctx context.Context, f func() (guest.Latency, error)) (l guest.Latency, cuts int, err error) {
	done := make(chan struct{})
	var all sync.WaitGroup
	var failed error
	all.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if _, failed = h.cut(ctx, typesv1.Consistency_CONSISTENCY_CRASH); failed == nil {
				failed = h.settle(ctx)
			}
			if failed != nil {
				return
			}
			cuts++
		}
	})
	l, err = f()
	close(done)
	all.Wait()
	return l, cuts, errors.Join(err, failed)
}
