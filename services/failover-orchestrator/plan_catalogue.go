package failoverorchestrator

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/catalogue"
)

// planning mirrors plans to storage while this instance holds the lease (libs/catalogue). Nothing waits for it.
type planning struct {
	s      *Service
	mirror *catalogue.Mirror

	mu   sync.Mutex
	gone map[string]bool // keys of plans that were seen to be deleted
}

// cataloguePlans runs the mirror until ctx ends.
func (s *Service) cataloguePlans(ctx context.Context) {
	for ctx.Err() == nil {
		p := &planning{s: s, gone: map[string]bool{}}
		p.mirror = catalogue.NewMirror(catalogue.MirrorOptions{
			Catalogue: catalogue.Open(s.deps.Store), Source: p, Prefixes: []string{"plans/"}, Now: s.deps.Clock, Logger: s.log,
		})
		p.follow(ctx)
		s.pause(ctx)
	}
}

// follow watches the plans until that fails or ctx ends, and runs the mirror once all were seen.
func (p *planning) follow(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	var mirroring sync.WaitGroup
	defer mirroring.Wait()
	defer cancel()
	for u, err := range p.s.plans.Watch(ctx, "") {
		if err != nil {
			if ctx.Err() == nil {
				p.s.log.WarnContext(ctx, "watch plans", "error", err)
			}
			return
		}
		if u.Kind == bus.Current {
			mirroring.Go(func() { p.mirror.Run(ctx) })
			continue
		}
		p.mu.Lock()
		if u.Kind == bus.Deleted {
			p.gone[u.Key] = true
		} else {
			delete(p.gone, u.Key)
		}
		p.mu.Unlock()
		if parts, err := bus.KeyParts(u.Key); err == nil && len(parts) == 1 {
			p.mirror.Touch(catalogue.PlanName(parts[0]))
		}
	}
}

// Names implements catalogue.Source.
func (p *planning) Names(ctx context.Context) ([]string, error) {
	entries, err := p.s.plans.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, catalogue.PlanName(e.Value.GetName()))
	}
	return names, nil
}

// Truth implements catalogue.Source.
func (p *planning) Truth(ctx context.Context, name string) (catalogue.Truth, error) {
	key := bus.Key(strings.TrimSuffix(strings.TrimPrefix(name, "plans/"), ".json"))
	plan, _, err := p.s.plans.Get(ctx, key)
	if errors.Is(err, bus.ErrNotFound) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return catalogue.Truth{Ended: p.gone[key]}, nil
	}
	if err != nil {
		return catalogue.Truth{}, err
	}
	plan = proto.CloneOf(plan)
	plan.Revision = 0
	return catalogue.Truth{Record: &catalogue.Record{Plan: plan}}, nil
}

// forgetTimeout bounds what a deletion asks of storage, on which it does not depend.
const forgetTimeout = 5 * time.Second

// forgetPlan ends a plan that only storage knows, when somebody asks to delete it. It is best effort: storage may be away.
func (s *Service) forgetPlan(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, forgetTimeout)
	defer cancel()
	c := catalogue.Open(s.deps.Store)
	have, version, err := c.Get(ctx, catalogue.PlanName(name))
	if err == nil && have != nil && have.Ended.IsZero() {
		have.Ended = s.deps.Clock().UTC().Truncate(time.Millisecond)
		have.Written = have.Ended
		_, err = c.Put(ctx, have, version)
	}
	if err != nil {
		s.log.WarnContext(ctx, "a plan that only the catalogue in storage may know was not ended there", "plan", name, "error", err)
	}
}
