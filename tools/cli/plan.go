package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) plans(context.Context) (failoverv1.PlanServiceClient, error) {
	c, err := a.conn("failover-orchestrator")
	if err != nil {
		return nil, err
	}
	return failoverv1.NewPlanServiceClient(c), nil
}

func (a *app) planCommand() *cobra.Command {
	var file string
	var check bool
	apply := &cobra.Command{
		Use: "apply -f FILE", Short: "Create or change a plan from a YAML or JSON file (- is standard input)", Args: cobra.NoArgs,
		Long: `Create or change a plan: groups of machines that come up one after the other.

  name: everything
  groups:
  - title: databases
    vms: [db-01, db-02]
    wait: 2m            # after the group is up, before the next
  - vms: [web-01]

A machine is a name that is unique in its site, an id, or sites/SITE/vms/ID. It does not
have to be protected yet. Plans are kept in storage too: landfall recover --from-storage
follows one with nothing else left.`,
		Example: "  landfall plan apply -f everything.yaml\n  landfall plan apply -f everything.yaml --check",
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := a.readPlan(file)
			if err != nil {
				return err
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.plans(ctx)
			if err != nil {
				return err
			}
			r, err := client.ApplyPlan(ctx, &failoverv1.ApplyPlanRequest{Plan: p, ValidateOnly: check})
			if err != nil {
				return err
			}
			return a.print(r.Plan, func(w io.Writer) { planRows(w, r.Plan) })
		},
	}
	apply.Flags().StringVarP(&file, "file", "f", "", "plan file")
	apply.Flags().BoolVar(&check, "check", false, "check only")
	_ = apply.MarkFlagRequired("file")
	get := &cobra.Command{
		Use: "get [PLAN]", Short: "Show one plan, or all", Args: cobra.MaximumNArgs(1), Example: "  landfall plan get everything -o yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.plans(ctx)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				r, err := client.GetPlan(ctx, &failoverv1.GetPlanRequest{Name: resource("recoveryPlans", args[0])})
				if err != nil {
					return err
				}
				return a.print(r.Plan, func(w io.Writer) { planGroupRows(w, r.Plan) })
			}
			r, err := client.ListPlans(ctx, &failoverv1.ListPlansRequest{PageSize: 1000})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { planRows(w, r.Plans...) })
		},
	}
	remove := &cobra.Command{
		Use: "delete PLAN", Short: "Delete a plan", Args: cobra.ExactArgs(1), Example: "  landfall plan delete everything",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.plans(ctx)
			if err != nil {
				return err
			}
			_, err = client.DeletePlan(ctx, &failoverv1.DeletePlanRequest{Name: resource("recoveryPlans", args[0])})
			return err
		},
	}
	return group("plan", "Recovery plans: which machines come up in which order", apply, get, remove)
}

func planRows(w io.Writer, plans ...*failoverv1.RecoveryPlan) {
	row(w, "PLAN", "GROUPS", "MACHINES")
	for _, p := range plans {
		n := 0
		for _, g := range p.Groups {
			n += len(g.Vms)
		}
		row(w, last(p.Name), len(p.Groups), n)
	}
}

func planGroupRows(w io.Writer, p *failoverv1.RecoveryPlan) {
	row(w, "GROUP", "TITLE", "MACHINE", "WAIT AFTER")
	for i, g := range p.Groups {
		for _, vm := range g.Vms {
			row(w, i+1, dash(g.Title), vm, span(g.Wait))
		}
	}
}

// readPlan reads a plan; unknown keys are refused with their name.
func (a *app) readPlan(file string) (*failoverv1.RecoveryPlan, error) {
	p := &failoverv1.RecoveryPlan{}
	err := a.readDocument("plan", file, typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID, func(v any) error {
		return intoMessage(v, "name: everything", a.planValues, p)
	})
	return p, err
}

// planValues checks keys and turns what people write into what proto-JSON wants: durations, short names. It says
// everything that is wrong at once.
func (a *app) planValues(m map[string]any) error {
	problems := []string{}
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	keys := func(where string, m map[string]any, known ...string) {
		for _, key := range slices.Sorted(maps.Keys(m)) {
			if !slices.Contains(known, key) {
				bad("%sunknown key %q: there are %s", where, key, strings.Join(known, ", "))
			}
		}
	}
	keys("", m, "name", "groups", "revision")
	name, _ := m["name"].(string)
	if name == "" {
		bad("name: there is none")
	}
	m["name"] = resource("recoveryPlans", name)
	groups, ok := m["groups"].([]any)
	if !ok && m["groups"] != nil {
		bad("groups: it is not a list")
	}
	for i, g := range groups {
		at := fmt.Sprintf("groups[%d]", i)
		group, ok := g.(map[string]any)
		if !ok {
			bad("%s: it is not a group such as {vms: [web-01]}", at)
			continue
		}
		keys(at+": ", group, "title", "vms", "wait")
		vms, ok := group["vms"].([]any)
		if !ok && group["vms"] != nil {
			bad("%s.vms: it is not a list", at)
		}
		for j, v := range vms {
			vm, ok := v.(string)
			if !ok || vm == "" {
				bad("%s.vms[%d]: %v is not the name of a machine", at, j, v)
				continue
			}
			vms[j] = a.vmName(vm)
		}
		if w, ok := group["wait"]; ok && w != nil {
			s, _ := w.(string)
			d, err := protoDuration(s)
			if err != nil {
				bad("%s.wait: %v is not a duration such as 30s or 5m", at, w)
				continue
			}
			group["wait"] = d
		}
	}
	if len(problems) > 0 {
		return errors.New(strings.Join(problems, "; "))
	}
	return nil
}
