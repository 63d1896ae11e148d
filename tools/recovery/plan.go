package recovery

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/catalogue"
	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
)

// PlanRequest is a plan to follow. Of is not looked at, and Dir is the folder above those of the machines.
type PlanRequest struct {
	Request
	// Plan is its name, with or without "recoveryPlans/".
	Plan string
}

// Outcome of one machine of a plan.
type Outcome struct {
	// VM as the plan names it.
	VM string `json:"vm"`
	// Group counts from 1.
	Group int `json:"group"`
	// Result is nil when it was not recovered.
	Result *Result `json:"result"`
	// Error is "" when it was, or was not begun.
	Error string `json:"error"`
	// Begun is false where an earlier group failed.
	Begun bool `json:"begun"`

	err error
}

// member is one machine of a plan.
type member struct {
	outcome *Outcome
	of      *Protection
	dir     string
}

// plan finds a plan in the catalogue: PLAN_NOT_FOUND, or why its record cannot be read.
func (s *Session) plan(ctx context.Context, name string) (*failoverv1.RecoveryPlan, error) {
	name = strings.TrimPrefix(name, "recoveryPlans/")
	r, _, err := catalogue.Open(s.store).Get(ctx, catalogue.PlanName(name))
	switch {
	case errors.Is(err, catalogue.ErrNewer):
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_FORMAT_NEWER, err, "read plan %s", name)
	case errors.Is(err, catalogue.ErrInvalid):
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID, err, "plan %s is damaged in storage: recover its machines one by one with --vm", name)
	case err != nil:
		return nil, storeError(err, "read plan %s", name)
	case r == nil:
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_PLAN_NOT_FOUND, "this store has no plan %q; without --plan the command lists those that it has", name).With("plan", name)
	case !r.Ended.IsZero():
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_PLAN_NOT_FOUND, "plan %q was deleted at %s", name, r.Ended.UTC().Format(time.RFC3339)).With("plan", name)
	}
	return r.Plan, nil
}

// FollowPlan brings the machines of a plan back, group after group, those of a group together, each into its folder below
// Dir. Everything is found and checked before anything is made; with TakeOver all lineages are closed before the first
// machine is made, in the name of one failover. Where a machine of a group fails the others of its group go on, later
// groups are not begun, and the error is returned beside the outcomes; repeating the request goes on. notes hears what a
// person should know.
func (s *Session) FollowPlan(ctx context.Context, req PlanRequest, say func(Update), notes func(string)) ([]*Outcome, error) {
	plan, err := s.plan(ctx, req.Plan)
	if err != nil {
		return nil, err
	}
	groups, outcomes, err := s.members(ctx, plan, req.Dir, notes)
	if err != nil {
		return nil, err
	}
	if err := s.checkMembers(ctx, req, groups); err != nil || req.Check {
		return outcomes, err
	}
	if req.TakeOver {
		if err := s.closeMembers(ctx, req.Failover, groups, say); err != nil {
			return outcomes, err
		}
	}
	if err := os.Mkdir(req.Dir, 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		return outcomes, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "make the folder of the plan")
	}
	for i, group := range groups {
		again, err := s.group(ctx, req, group, say)
		if err != nil {
			return outcomes, err
		}
		wait := plan.Groups[i].GetWait().AsDuration()
		if wait <= 0 || again || i == len(groups)-1 {
			continue
		}
		notes(fmt.Sprintf("group %d is up: waiting %s before the next", i+1, wait))
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return outcomes, context.Cause(ctx)
		case <-t.C:
		}
	}
	return outcomes, nil
}

// members finds every machine of a plan, or says everything that stands in the way at once.
func (s *Session) members(ctx context.Context, plan *failoverv1.RecoveryPlan, dir string, notes func(string)) (groups [][]*member, outcomes []*Outcome, err error) {
	if err := failoverorchestrator.CheckPlan(plan, func(vm string) (string, error) { return vm, nil }); err != nil {
		return nil, nil, err
	}
	survey, err := s.identify(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, w := range survey.Warnings {
		notes(w)
	}
	var problems []string
	var first error
	lineages, folders := map[string]string{}, map[string]bool{}
	for i, g := range plan.Groups {
		var group []*member
		for _, vm := range g.Vms {
			p, note, err := s.find(ctx, survey, vm, "")
			if err == nil && lineages[p.Lineage] != "" {
				err = errcat.New(typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID, "%s and %s are one machine", lineages[p.Lineage], vm)
			}
			if err != nil {
				problems = append(problems, err.Error())
				first = errors.Join(first, err)
				continue
			}
			if note != "" {
				notes(note)
			}
			lineages[p.Lineage] = vm
			folder := folderName(p)
			if folders[folder] {
				folder = p.ID()
			}
			folders[folder] = true
			o := &Outcome{VM: vm, Group: i + 1}
			outcomes = append(outcomes, o)
			group = append(group, &member{outcome: o, of: p, dir: filepath.Join(dir, folder)})
		}
		groups = append(groups, group)
	}
	if len(problems) > 0 {
		return nil, nil, errcat.New(errcat.Reason(first), "plan %s: %s", plan.GetName(), strings.Join(problems, "; "))
	}
	return groups, outcomes, nil
}

// plain is a display name that is a folder's name everywhere.
var plain = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9]$|^[A-Za-z0-9]$`)

func folderName(p *Protection) string {
	if plain.MatchString(p.DisplayName) {
		return p.DisplayName
	}
	if plain.MatchString(p.ID()) {
		return p.ID()
	}
	return p.Lineage
}

// one is the request of one member.
func (m *member) one(req PlanRequest) Request {
	r := req.Request
	r.Of, r.Dir = m.of, m.dir
	return r
}

// checkMembers checks the points and folders of all before anything is made. The folder above theirs may not be there yet.
func (s *Session) checkMembers(ctx context.Context, req PlanRequest, groups [][]*member) error {
	above := filepath.Dir(req.Dir)
	if info, err := os.Stat(above); err != nil || !info.IsDir() {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, "the folder above the target, %s, does not exist", above)
	}
	_, err := os.Stat(req.Dir)
	fresh := errors.Is(err, os.ErrNotExist)
	return s.forAll(ctx, groups, func(ctx context.Context, m *member) error {
		one := m.one(req)
		one.Check = true
		if fresh {
			one.Dir = req.Dir // as good as the machine's, which cannot be looked at yet
		}
		_, err := s.Recover(ctx, one, nil)
		return err
	})
}

// forAll does something for all members, a bounded number at once, and joins what went wrong.
func (s *Session) forAll(ctx context.Context, groups [][]*member, do func(context.Context, *member) error) error {
	var mu sync.Mutex
	var problems []error
	var group errgroup.Group
	group.SetLimit(s.o.Parallel)
	for _, g := range groups {
		for _, m := range g {
			group.Go(func() error {
				if err := do(ctx, m); err != nil {
					mu.Lock()
					defer mu.Unlock()
					problems = append(problems, err)
				}
				return nil
			})
		}
	}
	_ = group.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return joined(problems)
}

// joined is one error of several, with the reason of the first.
func joined(problems []error) error {
	switch len(problems) {
	case 0:
		return nil
	case 1:
		return problems[0]
	}
	texts := make([]string, len(problems))
	for i, err := range problems {
		texts[i] = err.Error()
	}
	return errcat.New(errcat.Reason(problems[0]), "%d machines: %s", len(problems), strings.Join(texts, "; "))
}

func (s *Session) closeMembers(ctx context.Context, failover string, groups [][]*member, say func(Update)) error {
	return s.forAll(ctx, groups, func(ctx context.Context, m *member) error {
		seq, err := s.Close(ctx, m.of, failover)
		if err == nil && say != nil {
			say(Update{VM: m.of.Title(), Step: StepClose, Detail: fmt.Sprintf("manifest %d", seq), Ended: true})
		}
		return err
	})
}

// group brings one group up. again says that all of it was complete before.
func (s *Session) group(ctx context.Context, req PlanRequest, group []*member, say func(Update)) (again bool, err error) {
	again = true
	var mu sync.Mutex
	err = s.forAll(ctx, [][]*member{group}, func(ctx context.Context, m *member) error {
		m.outcome.Begun = true
		res, err := s.Recover(ctx, m.one(req), say)
		mu.Lock()
		defer mu.Unlock()
		m.outcome.Result, m.outcome.err = res, err
		if err != nil {
			m.outcome.Result, m.outcome.Error = nil, reasonText(err)
			return fmt.Errorf("%s: %w", m.of.Title(), err)
		}
		again = again && res.Complete
		return nil
	})
	return again, err
}
