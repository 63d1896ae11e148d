package failoverorchestrator

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/qemutarget"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// targets are the recovery targets of this instance.
func targets(c Config, d Deps) map[failoverv1.TargetKind]target.Target {
	out := map[failoverv1.TargetKind]target.Target{}
	for _, t := range append(builtIn(c, d), d.Targets...) {
		out[t.Kind()] = t
	}
	return out
}

// builtIn are the targets that every instance has.
func builtIn(c Config, d Deps) []target.Target {
	return []target.Target{vhdtarget.Target{}, qemutarget.New(c.Qemu, d.Clock)}
}

// target finds a recovery target.
func (s *Service) target(kind failoverv1.TargetKind) (target.Target, error) {
	if t, ok := s.targets[kind]; ok {
		return t, nil
	}
	return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNSUPPORTED, "this version has no target %s", targetName(kind))
}

// targetName is what people call a target, for example "vhd".
func targetName(kind failoverv1.TargetKind) string { return word(kind.String(), "TARGET_KIND_") }

// planOf is the copy that a failover makes.
func planOf(f *failoverv1.Failover) target.Plan {
	return target.Plan{Failover: lastPart(f.Name), Dir: f.OutDir, Machine: f.Machine, Qemu: f.Qemu}
}

// thisMachine is the name by which records know the machine that the service runs on.
func thisMachine(c Config) (string, error) {
	if c.Machine != "" {
		return c.Machine, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("machine: the host name is not known (%w): configure one", err)
	}
	return name, nil
}

// settleHere makes this machine the one on which the copy is made, in the failover's record and before anything is made.
// Where another one began, it is taken over only as long as that one has made nothing; later its copy can be seen from
// here, or this instance cannot go on with it and says so.
func (s *Service) settleHere(ctx context.Context, t target.Target, f *failoverv1.Failover, j *journal) error {
	if f.MachineHost == s.machine {
		return nil
	}
	if f.MachineHost != "" {
		claimed, err := j.done(ctx, stepClaim, nil)
		if err != nil {
			return storeError(err)
		}
		if claimed {
			return s.reachable(t, f)
		}
		s.log.WarnContext(ctx, "taking a failover over from another machine", "failover", f.Name, "machine", f.MachineHost)
	}
	from := f.MachineHost
	r, _, err := s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
		if r.MachineHost != from {
			return bus.NoChange
		}
		r.MachineHost = s.machine
		return nil
	})
	if err != nil {
		return storeError(err)
	}
	f.MachineHost = r.MachineHost
	if f.MachineHost != s.machine {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION, "machine %s took failover %s over", f.MachineHost, lastPart(f.Name))
	}
	return nil
}

// reachable says whether the copy that a failover made can be handled from this machine. A folder is known by its marker,
// wherever it is mounted; a machine that runs is only known where it was started.
func (s *Service) reachable(t target.Target, f *failoverv1.Failover) error {
	if f.MachineHost == "" || f.MachineHost == s.machine {
		return nil
	}
	if !t.Boots() {
		if owner, err := t.Owner(planOf(f)); err == nil && owner == lastPart(f.Name) {
			return nil
		}
	}
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE,
		"the copy in %s was made on machine %s, and this failover-orchestrator runs on %s: run it there, and ask again", f.OutDir, f.MachineHost, s.machine).
		With("machine", f.MachineHost)
}

// removeTimeout bounds what clean-up asks of storage, on which it does not depend.
const removeTimeout = 10 * time.Second

// removeOrLeave takes away what a failover made. Where that cannot be done and somebody asked to go on all the same, what
// is left is named in the record and in the detail of the skipped step; never while the machine is seen to run.
func (s *Service) removeOrLeave(ctx context.Context, f *failoverv1.Failover) (detail string, err error) {
	detail, err = s.remove(ctx, f)
	if err == nil || ctx.Err() != nil || !s.forced(ctx, f) {
		return detail, err
	}
	if t, terr := s.target(f.Target); terr == nil && t.Boots() {
		if runs, rerr := t.Running(ctx, planOf(f)); runs && rerr == nil {
			return "", err
		}
	}
	left := fmt.Sprintf("left behind: what is in %s on machine %s, which could not be removed: %v", f.OutDir, f.MachineHost, err)
	s.log.WarnContext(ctx, "a copy is left behind by force", "failover", f.Name, "folder", f.OutDir, "machine", f.MachineHost, "error", err)
	if err := s.keep(ctx, f, func(r *failoverv1.Failover) { r.LeftBehind = left }); err != nil {
		return "", err
	}
	return "", skip("%s", left)
}

// forced says whether somebody asked to go on although the copy cannot be removed, perhaps since f was read.
func (s *Service) forced(ctx context.Context, f *failoverv1.Failover) bool {
	if f.Force {
		return true
	}
	r, _, err := s.failovers.Get(ctx, failoverKey(f.Name))
	return err == nil && !elsewhere(r, f, false) && r.Force
}

// remove takes away what a failover made, as far as the marker in its folder and the journal say so.
func (s *Service) remove(ctx context.Context, f *failoverv1.Failover) (detail string, err error) {
	t, err := s.target(f.Target)
	if err != nil {
		return "", err
	}
	if err := s.reachable(t, f); err != nil {
		return "", err
	}
	existed := true
	if lineage, err := replica.ParseLineage(f.Lineage); err == nil {
		short, cancel := context.WithTimeout(ctx, removeTimeout)
		if _, err := s.journalOf(lineage, f).done(short, stepCheck, &existed); err != nil {
			s.log.WarnContext(ctx, "read step journal", "failover", f.Name, "error", err)
		}
		cancel()
	}
	return t.Remove(ctx, planOf(f), existed)
}
