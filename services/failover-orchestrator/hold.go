package failoverorchestrator

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
)

// Bounds of the pin that a failover holds on its point. What a dead orchestrator leaves ends by pointHold, unless the next one
// goes on with it.
const (
	pointHold  = 2 * time.Hour
	holdRenew  = 10 * time.Minute
	letGoBound = 20 * time.Second
)

// holder owns the pin of a failover. Every attempt and every instance uses the same one.
func holder(f *failoverv1.Failover) string { return "failover/" + lastPart(f.Name) }

// holding does work that reads the failover's point while retention may not take it away. The pin stays when the work is to be
// tried again, here or by the next holder of the lease; letGo ends it where the failover is given up.
func (c *copying) holding(ctx context.Context, work func(context.Context) error) error {
	if err := c.hold(ctx); err != nil {
		return err
	}
	renewing, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.renew(renewing)
	}()
	err := work(ctx)
	stop()
	<-done
	if err == nil && ctx.Err() == nil {
		c.letGo(ctx)
	}
	return err
}

// hold pins the point. Only retention having been there first is an error: a failover does not wait for a record that cannot
// be written, and what it reads is checked.
func (c *copying) hold(ctx context.Context) error {
	err := c.pin(ctx)
	switch {
	case err == nil || ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, replica.ErrRetired), errors.Is(err, replica.ErrNotFound), errors.Is(err, replica.ErrNotReachable):
		return chainError(err, "keep point %d", c.f.Point)
	}
	c.s.log.WarnContext(ctx, "the point is not pinned while it is read: retention may take it", "failover", c.f.Name, "point", c.f.Point, "error", err)
	return nil
}

func (c *copying) pin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	m, err := c.r.Find(ctx, replica.Ordinal(c.f.Point))
	if err != nil {
		return err
	}
	now, err := c.s.deps.Store.Now(ctx)
	if err != nil {
		return err
	}
	return c.r.Pin(ctx, replica.Pin{Seq: m.Seq, Owner: holder(c.f), Until: now.Add(pointHold), Reason: kindName(c.f) + " failover"})
}

// renew lengthens the pin until ctx ends.
func (c *copying) renew(ctx context.Context) {
	tick := time.NewTicker(c.s.holdRenew)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := c.pin(ctx); err != nil && ctx.Err() == nil {
			c.s.log.WarnContext(ctx, "the pin of a point that is being read was not lengthened", "failover", c.f.Name, "point", c.f.Point, "error", err)
		}
	}
}

// letGo ends the failover's pin. Nothing depends on it: a pin that stays ends by its time.
func (c *copying) letGo(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, letGoBound)
	defer cancel()
	if err := c.r.Unpin(ctx, holder(c.f), 0); err != nil && ctx.Err() == nil {
		c.s.log.WarnContext(ctx, "the pin of a failover stays until its time", "failover", c.f.Name, "error", err)
	}
}

// letGo ends the pin of a failover that is given up, if it has one.
func (s *Service) letGo(ctx context.Context, f *failoverv1.Failover) {
	lineage, err := lineageOf(f)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, letGoBound)
	defer cancel()
	pins, err := replica.ReadPins(ctx, s.deps.Store, lineage)
	if err == nil && !slices.ContainsFunc(pins, func(p replica.Pin) bool { return p.Owner == holder(f) }) {
		return
	}
	r, err := replica.Open(ctx, s.deps.Store, lineage)
	if err != nil {
		s.log.WarnContext(ctx, "the pin of a failover stays until its time", "failover", f.Name, "error", err)
		return
	}
	(&copying{s: s, r: r, f: f}).letGo(ctx)
}
