package failoverorchestrator

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Bounds of a plan.
const (
	maxGroups   = 100
	maxGroupVMs = 100
	maxTitle    = 100
	maxWait     = time.Hour
)

var (
	planPattern   = regexp.MustCompile(`^recoveryPlans/[a-z0-9][a-z0-9-]{0,39}$`)
	planVMPattern = regexp.MustCompile(`^sites/[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?/vms/[^/\x00-\x1f]{1,253}$`)
)

// CheckPlan reports everything that is wrong with a plan at once (PLAN_INVALID). meaning tells a machine by its name, so
// that one named by its GUID and by its display name counts as one; it answers the name where it knows no better, and an
// error where the name means several machines. A machine that is not protected now may be by the day of the plan.
func CheckPlan(p *failoverv1.RecoveryPlan, meaning func(vm string) (string, error)) error {
	var fields []errcat.Field
	bad := func(ok bool, path, format string, args ...any) bool {
		if !ok {
			fields = append(fields, errcat.Field{Path: "plan." + path, Message: fmt.Sprintf(format, args...)})
		}
		return ok
	}
	bad(planPattern.MatchString(p.GetName()), "name", "%q is not recoveryPlans/NAME with up to 40 of a-z, 0-9 and hyphens", p.GetName())
	bad(len(p.GetGroups()) > 0, "groups", "there is none")
	bad(len(p.GetGroups()) <= maxGroups, "groups", "there are %d, at most %d are allowed", len(p.GetGroups()), maxGroups)
	first := map[string]string{} // path of a machine's first mention
	for i, g := range p.GetGroups() {
		at := fmt.Sprintf("groups[%d]", i)
		bad(len(g.GetTitle()) <= maxTitle, at+".title", "has %d bytes, at most %d are allowed", len(g.GetTitle()), maxTitle)
		bad(len(g.GetVms()) > 0, at+".vms", "there is none")
		bad(len(g.GetVms()) <= maxGroupVMs, at+".vms", "there are %d, at most %d are allowed", len(g.GetVms()), maxGroupVMs)
		if w := g.GetWait(); w != nil {
			d := w.AsDuration()
			bad(w.IsValid() && d >= 0 && d <= maxWait, at+".wait", "%s is not between 0 and %s", d, maxWait)
		}
		for j, vm := range g.GetVms() {
			path := fmt.Sprintf("%s.vms[%d]", at, j)
			if !bad(planVMPattern.MatchString(vm), path, "%q is not sites/SITE/vms/VM", vm) {
				continue
			}
			name, err := meaning(vm)
			if !bad(err == nil, path, "%v", err) {
				continue
			}
			key := strings.ToLower(name)
			before, again := first[key]
			if bad(!again, path, "%s is in the plan already, at %s", vm, before) {
				first[key] = path
			}
		}
	}
	if len(fields) == 0 {
		return nil
	}
	texts := make([]string, len(fields))
	for i, f := range fields {
		texts[i] = strings.TrimPrefix(f.Path, "plan.") + ": " + f.Message
	}
	e := errcat.New(typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID, "%s: %s", planTitle(p), strings.Join(texts, "; "))
	e.Fields = fields
	return e
}

func planTitle(p *failoverv1.RecoveryPlan) string {
	if p.GetName() == "" {
		return "the plan"
	}
	return p.GetName()
}
