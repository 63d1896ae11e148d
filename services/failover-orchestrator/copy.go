package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// copying makes one copy of a point on a target: the steps that drills and failovers share.
type copying struct {
	s *Service
	r *replica.Replica
	t target.Target
	j *journal
	f *failoverv1.Failover

	existed bool     // whether the folder was there before
	files   []string // that the copy consists of
}

// open prepares the work of a failover's job.
func (s *Service) open(ctx context.Context, f *failoverv1.Failover) (*copying, error) {
	lineage, err := replica.ParseLineage(f.Lineage)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "failover %s", lastPart(f.Name))
	}
	t, err := s.target(f.Target)
	if err != nil {
		return nil, err
	}
	r, err := replica.Open(ctx, s.deps.Store, lineage)
	if err != nil {
		return nil, chainError(err, "open the replica")
	}
	return &copying{s: s, r: r, t: t, j: s.journalOf(lineage, f), f: f}, nil
}

// check finds out whether the target can be used. rival says whether another failover stands in the way.
func (c *copying) check(rival func(context.Context) error) step {
	return step{id: stepCheck, into: &c.existed, do: func(ctx context.Context) (any, string, error) {
		err := rival(ctx)
		if err != nil {
			return nil, "", err
		}
		c.existed, err = c.t.Check(ctx, planOf(c.f))
		return c.existed, c.f.OutDir, err
	}}
}

// claim makes the folder ours.
func (c *copying) claim() step {
	return step{id: stepClaim, into: &c.files, do: func(ctx context.Context) (any, string, error) {
		point, err := c.point(ctx)
		if err != nil {
			return nil, "", err
		}
		p := planOf(c.f)
		if p.Machine, err = machineAt(ctx, c.r, point, c.f.Machine); err != nil {
			return nil, "", err
		}
		c.files, err = c.t.Claim(ctx, p, c.existed)
		return c.files, fmt.Sprintf("%d files", len(c.files)), err
	}}
}

// point is the manifest of the failover's point.
func (c *copying) point(ctx context.Context) (*replica.Manifest, error) {
	m, err := c.r.Find(ctx, replica.Ordinal(c.f.Point))
	return m, chainError(err, "find point %d", c.f.Point)
}

// materialised is the result of step materialise-disks in the journal.
type materialised struct {
	Checkpoint replica.Seq `json:"checkpoint"` // 0: from the chain alone
	Bytes      int64       `json:"bytes"`
}

// materialise writes the disks. It begins anew after a kill: files get their names only when they are whole.
func (c *copying) materialise() step {
	return step{id: stepMaterialise, do: func(ctx context.Context) (any, string, error) {
		point, err := c.point(ctx)
		if err != nil {
			return nil, "", err
		}
		sink, err := c.t.Sink(ctx, planOf(c.f))
		if err != nil {
			return nil, "", err
		}
		defer sink.Close()
		s := c.s
		counted := &progress{sink: sink, report: s.reporter(ctx, c.f.Job), now: s.deps.Clock, total: diskBytes(point.Disks)}
		m, err := c.r.Materialise(ctx, replica.Ordinal(c.f.Point), counted, replica.MaterialiseOptions{Parallel: s.config.Parallel})
		if err != nil {
			return nil, "", replicaError(err, "write the disks of point %d", c.f.Point)
		}
		s.metrics.bytes.Add(ctx, m.Bytes)
		return materialised{Checkpoint: m.Checkpoint, Bytes: m.Bytes}, fmt.Sprintf("%d disks, %d bytes written", len(m.Disks), m.Bytes), nil
	}}
}

// describe writes vm.json.
func (c *copying) describe() step {
	return step{id: stepDescribe, do: func(ctx context.Context) (any, string, error) {
		m, err := c.point(ctx)
		if err != nil {
			return nil, "", err
		}
		p := planOf(c.f)
		if p.Machine, err = machineAt(ctx, c.r, m, c.f.Machine); err != nil {
			return nil, "", err
		}
		raw, err := describe(c.t, c.f, m, p.Machine)
		if err != nil {
			return nil, "", err
		}
		return nil, "vm.json", c.t.Describe(ctx, p, raw)
	}}
}

// unproven ends the work on a copy whose machine has not shown in time that it is up: it may only be slow, and it is for
// people to look at it and decide. Nothing of it is removed.
type unproven struct{ error }

// Unwrap returns what was marked.
func (u unproven) Unwrap() error { return u.error }

// boot starts the machine and waits until it has shown that it is up. What it showed is kept in the record, also when
// that was not enough.
func (c *copying) boot() step {
	return step{id: stepBoot, do: func(ctx context.Context) (any, string, error) {
		s := c.s
		evidence, err := c.t.Boot(ctx, planOf(c.f), func(line string) {
			if err := s.step(ctx, c.f.Job, stepBoot, typesv1.JobState_JOB_STATE_IN_PROGRESS, line); err != nil && ctx.Err() == nil {
				s.log.DebugContext(ctx, "report progress", "job", c.f.Job, "error", err)
			}
		})
		if evidence != nil && ctx.Err() == nil {
			kerr := s.keep(ctx, c.f, func(r *failoverv1.Failover) { r.Boot = evidence })
			switch {
			case kerr != nil && (err == nil || errcat.Is(err, didNotBoot)):
				err = kerr // whoever works on it next looks at the machine again
			case errcat.Is(err, didNotBoot) && c.keeps(ctx):
				err = unproven{s.whereToLook(c.f, evidence, err)}
			}
		}
		return nil, proof(evidence), err
	}}
}

const didNotBoot = typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT

// keeps says whether a copy stays whose machine has not shown that it is up: a drill's as evidence, another one's as long
// as it is not known that nothing runs any more, since then there is nothing to wait for.
func (c *copying) keeps(ctx context.Context) bool {
	if isTest(c.f) {
		return true
	}
	runs, err := c.t.Running(ctx, planOf(c.f))
	return runs || err != nil
}

// whereToLook says what is there to look at of a machine that has not shown that it is up.
func (s *Service) whereToLook(f *failoverv1.Failover, e *typesv1.BootEvidence, err error) error {
	var known *errcat.Error
	if !errors.As(err, &known) {
		return err
	}
	look := *known
	look.What += fmt.Sprintf("; it is left as it is in %s on %s", f.OutDir, s.machine)
	if e.ConsoleFile != "" {
		look.What += ", console: " + e.ConsoleFile
	}
	if e.ScreenshotFile != "" {
		look.What += ", screenshot: " + e.ScreenshotFile
	}
	return &look
}

// shown is what a machine showed whose files are gone: the text that is in the record stays.
func shown(e *typesv1.BootEvidence) *typesv1.BootEvidence {
	if e == nil {
		return nil
	}
	e = proto.CloneOf(e)
	e.ConsoleFile, e.ScreenshotFile = "", ""
	return e
}

// proof is one line about how a machine showed that it is up.
func proof(e *typesv1.BootEvidence) string {
	switch e.GetProof() {
	case "":
		return ""
	case "none":
		return "started, not waited for"
	}
	return fmt.Sprintf("%s after %.1f s", e.Proof, e.Seconds)
}

// bringUp makes the copy, its point held, and boots it. Steps that the journal has are not repeated.
func (c *copying) bringUp(ctx context.Context) error {
	err := c.holding(ctx, func(ctx context.Context) error {
		return c.s.perform(ctx, c.f.Job, c.j, c.claim(), c.materialise(), c.describe())
	})
	if err != nil || !c.t.Boots() {
		return err
	}
	return c.s.perform(ctx, c.f.Job, c.j, c.boot())
}

// keep changes the record of a failover that this instance works on, and f with it. Where the record has moved on,
// another instance works on it: that is an error, and nothing is written.
func (s *Service) keep(ctx context.Context, f *failoverv1.Failover, change func(*failoverv1.Failover)) error {
	_, _, err := s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
		if elsewhere(r, f, true) {
			return takenOver(f)
		}
		change(r)
		return nil
	})
	if err != nil {
		return storeError(err)
	}
	change(f)
	return nil
}
