package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// stopSource waits until the scheduler has stopped the source and its last point is in the chain. The scheduler sees the
// failover's record by itself; this service never calls a host.
func (c *fencing) stopSource() step {
	return step{id: stepStopSource, into: &c.last, do: func(ctx context.Context) (any, string, error) {
		state, err := c.r.Refresh(ctx)
		if err != nil {
			return nil, "", chainError(err, "read the chain")
		}
		if closed, _ := state.FenceSeqs(lastPart(c.f.Name)); closed != 0 { // started again
			return nil, "", skip("the lineage is closed already")
		}
		c.last, err = c.awaitSource(ctx)
		return c.last, fmt.Sprintf("the source is off, point %d was its last", c.last), err
	}}
}

// takenUp is how long the scheduler has to take a planned failover up.
const takenUp = 30 * time.Second

// awaitSource follows the scheduler's record of the VM.
func (c *fencing) awaitSource(ctx context.Context) (replica.Ordinal, error) {
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, c.s.config.SourceTimeout)
	defer cancel()
	unseen := time.AfterFunc(takenUp, func() {
		_ = c.s.step(ctx, c.f.Job, stepStopSource, typesv1.JobState_JOB_STATE_IN_PROGRESS, "waiting for the scheduler, which has not taken the failover up")
	})
	defer unseen.Stop()
	var seen *schedulerv1.FailoverProgress
	last := ""
	for ctx.Err() == nil {
		for u, err := range c.s.vms.Watch(ctx, vmKey(c.f.Vm)) {
			if err != nil {
				break
			}
			p := u.Value.GetFailover()
			if p.GetFailover() != c.f.Name {
				continue
			}
			unseen.Stop()
			seen = p
			switch p.Stage {
			case schedulerv1.FailoverStage_FAILOVER_STAGE_REFUSED:
				return 0, final{refusal(p)}
			case schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE, schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED:
				return replica.Ordinal(p.FinalPoint), nil
			}
			if d := stageDetail(p); d != last {
				last = d
				if err := c.s.step(ctx, c.f.Job, stepStopSource, typesv1.JobState_JOB_STATE_IN_PROGRESS, d); err != nil {
					return 0, storeError(err)
				}
			}
		}
		c.s.pause(ctx)
	}
	switch {
	case outer.Err() != nil:
		return 0, outer.Err()
	case seen == nil:
		return 0, final{errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "the scheduler did not take the failover up within %s", c.s.config.SourceTimeout)}
	case seen.Error != nil:
		return 0, final{errcat.FromDetail(seen.Error)}
	}
	return 0, final{errcat.New(typesv1.ErrorReason_ERROR_REASON_GUEST_DID_NOT_STOP, "the source was not stopped within %s: %s", c.s.config.SourceTimeout, last)}
}

func refusal(p *schedulerv1.FailoverProgress) error {
	if p.Error == nil {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "the scheduler refused the failover")
	}
	return errcat.FromDetail(p.Error)
}

// stageDetail is one line about how far the source's side is.
func stageDetail(p *schedulerv1.FailoverProgress) string {
	line := strings.ReplaceAll(word(p.Stage.String(), "FAILOVER_STAGE_"), "-", " ")
	if p.Stage == schedulerv1.FailoverStage_FAILOVER_STAGE_UNSPECIFIED {
		line = "taken up"
	}
	if p.Error != nil {
		line += ": " + p.Error.What
	}
	return line
}

// findVM finds the record of a VM by resource name, id or display name. The records are read where the scheduler keeps
// them, so that a failover does not need it; it is asked only about a VM that has none.
func (s *Service) findVM(ctx context.Context, name string) (*schedulerv1.ProtectedVm, error) {
	site, id := "", name
	if parts := strings.Split(name, "/"); len(parts) == 4 && parts[0] == "sites" && parts[2] == "vms" {
		site, id = parts[1], parts[3]
		vm, _, err := s.vms.Get(ctx, vmKey(name))
		if err == nil {
			return vm, nil
		}
		if !errors.Is(err, bus.ErrNotFound) {
			return nil, storeError(err)
		}
	}
	all, err := s.vms.List(ctx, "")
	if err != nil {
		return nil, storeError(err)
	}
	var hits []*schedulerv1.ProtectedVm
	for _, e := range all {
		vm := e.Value
		if site != "" && siteOf(vm.Name, "") != site {
			continue
		}
		if lastPart(vm.Name) == id || strings.EqualFold(vm.DisplayName, id) {
			hits = append(hits, vm)
		}
	}
	switch len(hits) {
	case 1:
		return hits[0], nil
	case 0:
		return s.unknownVM(ctx, name)
	}
	return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "%q means more than one protected VM: %s and %s; use the id", name, hits[0].Name, hits[1].Name)
}

// askTimeout bounds a question to a scheduler that may be down.
const askTimeout = 2 * time.Second

// unknownVM lets the scheduler say what is wrong with a name: there is no such machine, or it is not protected.
func (s *Service) unknownVM(ctx context.Context, name string) (*schedulerv1.ProtectedVm, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	r, err := s.deps.Scheduler.GetProtectedVm(ctx, &schedulerv1.GetProtectedVmRequest{Vm: name})
	switch {
	case err == nil:
		return r.Vm, nil
	case errcat.Recoverable(err), ctx.Err() != nil:
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED, "%s has no record, and the scheduler does not answer", name)
	}
	return nil, err
}

// vmKey is the key of a VM's record in bucket "vms" (docs/formats/kv.md).
func vmKey(name string) string { return bus.Key(siteOf(name, ""), lastPart(name)) }

// siteOf is the site in a resource name.
func siteOf(name, otherwise string) string {
	if parts := strings.Split(name, "/"); len(parts) > 1 && parts[0] == "sites" {
		return parts[1]
	}
	return otherwise
}
