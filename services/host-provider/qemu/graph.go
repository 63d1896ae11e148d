package qemu

import (
	"context"
	"fmt"

	"github.com/landfall-dr/landfall/libs/qmp"
)

// graph names the node that each node writes its data to.
type graph map[string]string

// blockGraph asks how QEMU's nodes lie on each other. It is empty when QEMU does not say (before 4.0).
func blockGraph(ctx context.Context, m *qmp.Monitor) (graph, error) {
	var all struct {
		Nodes []struct {
			ID   uint64 `json:"id"`
			Type string `json:"type"`
			Name string `json:"name"`
		} `json:"nodes"`
		Edges []struct {
			Parent uint64 `json:"parent"`
			Child  uint64 `json:"child"`
			Name   string `json:"name"`
		} `json:"edges"`
	}
	out := graph{}
	err := m.Execute(ctx, "x-debug-query-block-graph", nil, &all)
	if qmp.Refused(err) {
		return out, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at how the nodes lie on each other: %w", err)
	}
	names := map[uint64]string{}
	for _, n := range all.Nodes {
		if n.Type == "block-driver" {
			names[n.ID] = n.Name
		}
	}
	for _, e := range all.Edges {
		if parent, child := names[e.Parent], names[e.Child]; e.Name == "file" && parent != "" && child != "" {
			out[parent] = child
		}
	}
	return out, nil
}

// below is the first node under one of ours that is not ours. It may be another than the disk's: who began a snapshot or a
// backup while ours were there has put a node between, which the guest must go on writing through.
func (g graph) below(node string) (string, bool) {
	for range 8 { // ours are two
		next, ok := g[node]
		if !ok || !ours(next) {
			return next, ok
		}
		node = next
	}
	return "", false
}
