package cli

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/policy"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) policyCommand() *cobra.Command {
	var file string
	apply := &cobra.Command{
		Use: "apply -f FILE", Short: "Create or change a policy from a YAML or JSON file (- is standard input)", Args: cobra.NoArgs,
		Example: "  printf 'name: policies/gold\\ncopy_interval: 30s\\n' | landfall policy apply -f -",
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := a.readPolicy(file)
			if err != nil {
				return err
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.policies(ctx)
			if err != nil {
				return err
			}
			r, err := client.ApplyPolicy(ctx, &schedulerv1.ApplyPolicyRequest{Policy: p})
			if err != nil {
				return err
			}
			return a.print(r.Policy, func(w io.Writer) { policyRows(w, r.Policy) })
		},
	}
	apply.Flags().StringVarP(&file, "file", "f", "", "policy file")
	_ = apply.MarkFlagRequired("file")
	get := &cobra.Command{
		Use: "get [POLICY]", Short: "Show one policy, or all", Args: cobra.MaximumNArgs(1), Example: "  landfall policy get default -o yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.policies(ctx)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				r, err := client.GetPolicy(ctx, &schedulerv1.GetPolicyRequest{Name: resource("policies", args[0])})
				if err != nil {
					return err
				}
				return a.print(r.Policy, func(w io.Writer) { policyRows(w, r.Policy) })
			}
			r, err := client.ListPolicies(ctx, &schedulerv1.ListPoliciesRequest{PageSize: 1000})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { policyRows(w, r.Policies...) })
		},
	}
	remove := &cobra.Command{
		Use: "delete POLICY", Short: "Delete a policy that no machine uses", Args: cobra.ExactArgs(1), Example: "  landfall policy delete gold",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.policies(ctx)
			if err != nil {
				return err
			}
			_, err = client.DeletePolicy(ctx, &schedulerv1.DeletePolicyRequest{Name: resource("policies", args[0])})
			return err
		},
	}
	return group("policy", "Replication policies: how often, how long", apply, get, remove)
}

// policyRows shows what holds, also where a policy says nothing: a value with a star is the default.
func policyRows(w io.Writer, policies ...*schedulerv1.Policy) {
	row(w, "POLICY", "COPY INTERVAL", "APPLICATION-CONSISTENT", "KEEP ALL", "KEEP HOURLY", "RETENTION", "WRITE-ONCE", "SUSPICION", "APPLY DELAY", "PARALLEL UPLOADS")
	for _, p := range policies {
		row(w, last(p.Name), span(p.CopyInterval), span(p.AppConsistentInterval), orDefault(p.KeepAll, policy.KeepAll(p)),
			orDefault(p.KeepHourly, policy.KeepHourly(p)), orDefault(p.Retention, policy.Retention(p)), shortOr(p.WriteOnce), suspicion(p), applyDelay(p), parallel(p))
	}
	fmt.Fprintln(w, "* default")
}

// orDefault is a duration of a policy, or what its absence means.
func orDefault(d *durationpb.Duration, def time.Duration) string {
	if d.AsDuration() > 0 {
		return short(d.AsDuration())
	}
	return short(def) + "*"
}

// short is a duration without the parts that are zero at its end: 24h, not 24h0m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// shortOr is a duration of a policy, or a dash.
func shortOr(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return short(d.AsDuration())
}

func suspicion(p *schedulerv1.Policy) string {
	text := strconv.FormatFloat(policy.SuspicionFactor(p), 'g', -1, 64) + "x"
	switch {
	case policy.SuspicionFactor(p) == policy.SuspicionOff:
		return "off"
	case p.SuspicionFactor == 0:
		return text + "*"
	}
	return text
}

func applyDelay(p *schedulerv1.Policy) string {
	if p.ApplyDelay == nil {
		return "by the store*"
	}
	return short(p.ApplyDelay.AsDuration())
}

func parallel(p *schedulerv1.Policy) string {
	if p.ParallelUploads == 0 {
		return strconv.Itoa(policy.ParallelUploads(p)) + "*"
	}
	return strconv.Itoa(int(p.ParallelUploads))
}

// readPolicy reads a policy; unknown keys are refused with their name.
func (a *app) readPolicy(file string) (*schedulerv1.Policy, error) {
	p := &schedulerv1.Policy{}
	err := a.readDocument("policy", file, typesv1.ErrorReason_ERROR_REASON_POLICY_INVALID, func(v any) error {
		return intoMessage(v, "copy_interval: 30s", policyValues, p)
	})
	return p, err
}

// policyPattern is a policy's short name.
var policyPattern = regexp.MustCompile(`^(policies/)?[a-z0-9][a-z0-9-]{0,39}$`)

// policyValues checks keys and turns what people write into what proto-JSON wants: durations, the short name.
func policyValues(m map[string]any) error {
	fields := (&schedulerv1.Policy{}).ProtoReflect().Descriptor().Fields()
	var known []string
	for i := range fields.Len() {
		known = append(known, string(fields.Get(i).Name()))
	}
	for _, key := range slices.Sorted(maps.Keys(m)) {
		if !slices.Contains(known, key) {
			return fmt.Errorf("unknown key %q: a policy has %s", key, strings.Join(known, ", "))
		}
	}
	for _, key := range []string{"copy_interval", "retention", "rpo_alert_threshold", "app_consistent_interval",
		"keep_all", "keep_hourly", "write_once", "apply_delay"} {
		v, ok := m[key]
		if !ok {
			continue
		}
		s, ok := v.(string)
		if !ok {
			return fmt.Errorf("%s: %v is not a duration such as 30s or 5m", key, v)
		}
		d, err := protoDuration(s)
		if err != nil {
			return fmt.Errorf("%s: %q is not a duration such as 30s or 5m", key, s)
		}
		m[key] = d
	}
	name, _ := m["name"].(string)
	if !policyPattern.MatchString(name) {
		return fmt.Errorf("name: %q is not up to 40 of a-z, 0-9 and hyphens", name)
	}
	m["name"] = resource("policies", name)
	return nil
}
