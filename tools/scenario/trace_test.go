package scenario

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// cycleTrace is what the trace of one cycle has at least, in this order. A level may have other spans in between, and
// other siblings. Every call is seen twice: as its caller's span and, below, as its server's.
const cycleTrace = `
replication cycle
  cut
    landfall.hostprovider.v1.HostService/CutPoint
      landfall.hostprovider.v1.HostService/CutPoint
        landfall.changetracker.v1.ChangeTrackerService/SwitchLogs
          landfall.changetracker.v1.ChangeTrackerService/SwitchLogs
  publish tasks
    task ship
      landfall.changetracker.v1.ChangeTrackerService/ReadChanges
        landfall.changetracker.v1.ChangeTrackerService/ReadChanges
      event recovery-point.received
  settle
    landfall.hostprovider.v1.HostService/SettlePoint
      landfall.hostprovider.v1.HostService/SettlePoint
        landfall.changetracker.v1.ChangeTrackerService/SettleLogs
          landfall.changetracker.v1.ChangeTrackerService/SettleLogs
  publish tasks
    task apply
      event recovery-point.processed
`

// copyTrace is the same of initial replication's pass.
const copyTrace = `
replication pass
  begin pass
    landfall.hostprovider.v1.HostService/BeginPass
      landfall.hostprovider.v1.HostService/BeginPass
        landfall.changetracker.v1.ChangeTrackerService/BeginPass
          landfall.changetracker.v1.ChangeTrackerService/BeginPass
  publish tasks
    task copy
      landfall.changetracker.v1.ChangeTrackerService/ReadRanges
        landfall.changetracker.v1.ChangeTrackerService/ReadRanges
      event pass-task.shipped
  settle
    landfall.hostprovider.v1.HostService/SettlePass
      landfall.hostprovider.v1.HostService/SettlePass
        landfall.changetracker.v1.ChangeTrackerService/SettlePass
          landfall.changetracker.v1.ChangeTrackerService/SettlePass
  publish tasks
    task apply
`

// node is one span of a printed tree.
type node struct {
	name     string
	children []*node
}

func parse(tree string) *node {
	root := &node{}
	path := []*node{root}
	for line := range strings.Lines(tree) {
		name := strings.TrimRight(strings.TrimLeft(line, " "), "\n")
		if name == "" {
			continue
		}
		depth := (len(line) - len(strings.TrimLeft(line, " "))) / 2
		n := &node{name: name}
		path = append(path[:depth+1], n)
		path[depth].children = append(path[depth].children, n)
	}
	return root
}

// missing says what of want's children is not found, in order, below have.
func missing(want, have *node) error {
	rest := below(have)
	for _, w := range want.children {
		err := fmt.Errorf("no %q below %q", w.name, have.name)
		for i, h := range rest {
			if h.name != w.name {
				continue
			}
			if err = missing(w, h); err == nil {
				rest = rest[i+1:]
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// below lists a node's descendants, parents first.
func below(n *node) (all []*node) {
	for _, c := range n.children {
		all = append(append(all, c), below(c)...)
	}
	return all
}

// One delta cycle is one trace across all services: from the decision through the host, the worker and the events to
// the settled point and its application.
func TestOneTraceSpansACycle(t *testing.T) {
	spans := testkit.NewSpans(t)
	l := newLab(t)
	l.tracer = spans.Provider()
	l.web()
	l.up()
	l.policy("quick", "1s")
	l.ok("protect", "web-01", "--policy", "quick", "--wait")
	last := l.status("web-01").LastPoint
	d := l.disk("web-01", "os")
	p := make([]byte, 64<<10)
	testkit.Fill(p, 7)
	_, err := d.WriteAt(p, 8*mib)
	require.NoError(t, err)
	l.awaitPoint("web-01", last+2)
	l.stop()

	check := func(root, want string) {
		t.Helper()
		found := spans.Find(root)
		require.NotEmpty(t, found)
		var errs []string
		whole := 0
		for _, sp := range found {
			tree := spans.Trace(sp.SpanContext().TraceID())
			if err := missing(parse(want), parse(tree)); err != nil {
				errs = append(errs, err.Error()+" in\n"+tree)
				continue
			}
			whole++
		}
		require.LessOrEqual(t, len(errs), 1, "%s", strings.Join(errs, "\n")) // the last one may have been cut off by the end
		require.Positive(t, whole, "%s", strings.Join(errs, "\n"))
	}
	check("replication cycle", cycleTrace)
	check("replication pass", copyTrace)

	// Work of the data path never runs outside of a trace that began with a decision.
	for _, name := range []string{"task ship", "task copy", "task apply", "landfall.changetracker.v1.ChangeTrackerService/ReadChanges", "landfall.changetracker.v1.ChangeTrackerService/ReadRanges"} {
		for _, sp := range spans.Find(name) {
			require.True(t, sp.Parent().IsValid(), "%s began a trace of its own:\n%s", name, spans.Trace(sp.SpanContext().TraceID()))
		}
	}
}
