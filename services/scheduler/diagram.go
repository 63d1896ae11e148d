package scheduler

import (
	"fmt"
	"slices"
	"strings"
)

// Diagram is docs/state-machine.md: the state machine and the table of legal actions as a page. A golden test holds
// the file to it; go test ./services/scheduler -run Diagram -update writes it.
func Diagram() string {
	var b strings.Builder
	b.WriteString("<!-- Generated from services/scheduler/state.go and actions.go; do not edit. -->\n")
	b.WriteString("# The states of a protected VM\n\n")
	b.WriteString("One pure table `(state, event) -> (state, effects)`; what has no row is refused with both names.\n")
	b.WriteString("Rows of failover are raised by what the failover's record says. Rows of failback come with later releases.\n\n")
	b.WriteString("```mermaid\nstateDiagram-v2\n    direction TB\n")
	fmt.Fprintf(&b, "    [*] --> %s\n", StateName(Unprotected))
	for _, edge := range edges() {
		fmt.Fprintf(&b, "    %s --> %s: %s\n", edge.from, edge.to, strings.Join(edge.events, ", "))
	}
	b.WriteString("```\n\n## Moves\n\n| from | event | to | effects |\n|---|---|---|---|\n")
	for _, m := range Moves() {
		fx := make([]string, len(m.Effects))
		for i, e := range m.Effects {
			fx[i] = string(e)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", StateName(m.From), m.Event, StateName(m.To), strings.Join(fx, "; "))
	}
	b.WriteString("\n## Legal actions\n\nY legal, C legal and ends what is running, - refused (`INVALID_STATE`).\n\n| state |")
	for _, a := range Actions() {
		fmt.Fprintf(&b, " %s |", a)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(Actions())) + "\n")
	for _, s := range States() {
		fmt.Fprintf(&b, "| %s |", StateName(s))
		for _, a := range Actions() {
			fmt.Fprintf(&b, " %s |", legal[s][a])
		}
		b.WriteString("\n")
	}
	b.WriteString("\nWhile a test failover waits for clean-up, these are refused too:")
	var refused []string
	for _, a := range Actions() {
		if duringTest[a] {
			refused = append(refused, " "+string(a))
		}
	}
	b.WriteString(strings.Join(refused, ",") + ".\n")
	return b.String()
}

type edge struct {
	from, to string
	events   []string
}

// edges merges the events between the same two states, in the order of the table.
func edges() []edge {
	var out []edge
	for _, m := range Moves() {
		from, to := StateName(m.From), StateName(m.To)
		i := slices.IndexFunc(out, func(e edge) bool { return e.from == from && e.to == to })
		if i < 0 {
			out = append(out, edge{from: from, to: to})
			i = len(out) - 1
		}
		out[i].events = append(out[i].events, string(m.Event))
	}
	return out
}
