package qemu

import (
	"context"
	"fmt"
	"strings"

	"github.com/landfall-dr/landfall/libs/qmp"
)

// seen is what a QEMU has, at one look.
type seen struct {
	nodes   map[string]*node
	exports []exported
	jobs    []string // of ours
	fronts  []front
}

type node struct {
	driver  string
	size    int64
	bitmaps map[string]bitmap
}

type bitmap struct {
	Name         string `json:"name"`
	Count        int64  `json:"count"` // bytes
	Recording    bool   `json:"recording"`
	Busy         bool   `json:"busy"`
	Inconsistent bool   `json:"inconsistent"`
}

type exported struct {
	ID       string `json:"id"`
	Node     string `json:"node-name"`
	Stopping bool   `json:"shutting-down"`
}

// front is a guest device and the node that it writes to.
type front struct {
	device string // QOM path, of the device or of a part of it
	root   string
}

// observe asks for everything that the driver decides by. It changes nothing.
func observe(ctx context.Context, m *qmp.Monitor) (*seen, error) {
	s := &seen{nodes: map[string]*node{}}
	var nodes []struct {
		Name    string   `json:"node-name"`
		Driver  string   `json:"drv"`
		Bitmaps []bitmap `json:"dirty-bitmaps"`
		Image   struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := m.Execute(ctx, "query-named-block-nodes", arguments{"flat": true}, &nodes); err != nil {
		return nil, fmt.Errorf("look at the disks: %w", err)
	}
	for _, n := range nodes {
		v := &node{driver: n.Driver, size: n.Image.Size, bitmaps: map[string]bitmap{}}
		for _, b := range n.Bitmaps {
			v.bitmaps[b.Name] = b
		}
		s.nodes[n.Name] = v
	}
	if err := m.Execute(ctx, "query-block-exports", nil, &s.exports); err != nil {
		return nil, fmt.Errorf("look at the exports: %w", err)
	}
	var jobs []struct {
		Device string `json:"device"`
	}
	if err := m.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
		return nil, fmt.Errorf("look at the jobs: %w", err)
	}
	for _, j := range jobs {
		if ours(j.Device) {
			s.jobs = append(s.jobs, j.Device)
		}
	}
	var blocks []struct {
		Device   string `json:"qdev"`
		Inserted *struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	if err := m.Execute(ctx, "query-block", nil, &blocks); err != nil {
		return nil, fmt.Errorf("look at the guest's devices: %w", err)
	}
	for _, b := range blocks {
		if b.Inserted != nil && b.Device != "" {
			device := b.Device
			if !strings.HasPrefix(device, "/") { // an id; what has none has a path
				device = "/machine/peripheral/" + device
			}
			s.fronts = append(s.fronts, front{device: device, root: b.Inserted.Node})
		}
	}
	return s, nil
}

// root is the node that a device writes to; false when there is no such device, or it has no medium.
func (s *seen) root(device string) (string, bool) {
	for _, f := range s.fronts {
		if f.device == device || strings.HasPrefix(f.device, device+"/") {
			return f.root, true
		}
	}
	return "", false
}

// filters are the drivers of nodes through which a guest's writes still reach the node below.
var filters = map[string]bool{
	"copy-before-write": true, "throttle": true, "copy-on-read": true, "preallocate": true, "blkdebug": true,
	"blklogwrites": true, "blkverify": true, "mirror_top": true, "commit_top": true, "compress": true,
}

// wrong says why the bitmaps are not what the record needs; empty when they are. Nothing is guessed: whatever is not exactly
// as this driver left it counts.
func (r *record) wrong(s *seen) string {
	for _, t := range r.Disks {
		n := s.nodes[t.Node]
		if n == nil {
			return fmt.Sprintf("disk %s: QEMU has no node %q any more", t.ID, t.Node)
		}
		if n.size != t.Size {
			return fmt.Sprintf("disk %s: its size changed from %d to %d bytes", t.ID, t.Size, n.size)
		}
		root, ok := s.root(t.Device)
		if !ok {
			return fmt.Sprintf("disk %s: the guest has no device %s any more", t.ID, t.Device)
		}
		if top := s.nodes[root]; root != t.Node && !ours(root) && (top == nil || !filters[top.driver]) {
			return fmt.Sprintf("disk %s: the guest writes to node %q instead of %q", t.ID, root, t.Node)
		}
		if what := r.wrongBitmap(t, n); what != "" {
			return what
		}
	}
	return ""
}

func (r *record) wrongBitmap(t tracked, n *node) string {
	need := map[uint64]bool{r.Active: true} // generation: must record
	if o := r.Open; o != nil && o.pass() {
		need = map[uint64]bool{o.New: true}
	} else if o != nil {
		need = map[uint64]bool{o.Old: false, o.New: true}
	} else if !n.bitmaps[r.bitmap(r.Active)].Recording {
		// A cut that was undone: its bitmap records until it is merged back.
		for name, b := range n.bitmaps {
			if g, ok := generationOf(name, r.Lineage); ok && g > r.Active && b.Recording && !b.Inconsistent {
				need[r.Active] = false
			}
		}
	}
	for g, record := range need {
		name := r.bitmap(g)
		b, ok := n.bitmaps[name]
		switch {
		case !ok:
			return fmt.Sprintf("disk %s: QEMU does not have the bitmap %s: it was restarted, or somebody removed it", t.ID, name)
		case b.Inconsistent:
			return fmt.Sprintf("disk %s: the bitmap %s is inconsistent: QEMU was killed", t.ID, name)
		case record && !b.Recording:
			return fmt.Sprintf("disk %s: the bitmap %s does not record: somebody disabled it", t.ID, name)
		}
	}
	return ""
}

// above names the first disk that another program has put a filter over, and the filter; empty when there is none.
func (r *record) above(s *seen) string {
	for _, t := range r.Disks {
		if root, ok := s.root(t.Device); ok && root != t.Node && !ours(root) {
			return fmt.Sprintf("another program has node %q over disk %s", root, t.ID)
		}
	}
	return ""
}
