package cli

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// A plan file is read as people write it, and what is wrong with it is said at once, by key.
func TestReadPlan(t *testing.T) {
	read := func(text string) (any, error) {
		a := &app{in: strings.NewReader(text), state: t.TempDir()}
		p, err := a.readPlan("-")
		return p.GetGroups(), err
	}
	a := &app{in: strings.NewReader("name: all\ngroups:\n- title: databases\n  vms: [db-01, sites/lab/vms/db-02]\n  wait: 1m30s\n- vms: [web-01]\n"), state: t.TempDir()}
	p, err := a.readPlan("-")
	require.NoError(t, err)
	require.Equal(t, "recoveryPlans/all", p.Name)
	require.Equal(t, []string{"sites/local/vms/db-01", "sites/lab/vms/db-02"}, p.Groups[0].Vms)
	require.EqualValues(t, 90, p.Groups[0].Wait.Seconds)

	for text, wants := range map[string][]string{
		"groups: [{vms: [3], wiat: 3s, wait: soon}, 7]\nnmae: x\n": {
			`unknown key "nmae"`, "name: there is none", `groups[0]: unknown key "wiat"`, "groups[0].vms[0]: 3 is not the name", "groups[0].wait: soon is not a duration", "groups[1]: it is not a group",
		},
		"name: a\ngroups: {a: b}\n": {"groups: it is not a list"},
		"just text":                 {"it is not a list of keys and values"},
		"a: [":                      {"yaml"},
	} {
		_, err := read(text)
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_PLAN_INVALID), "%v", err)
		for _, want := range wants {
			require.ErrorContains(t, err, want, text)
		}
	}
	_, err = (&app{}).readPlan("/nowhere/plan.yaml")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT))
}
