package qemu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// afterwards bounds the work that follows an answer which is durable already, and the undoing of what failed.
const afterwards = 5 * time.Second

// follow compares QEMU with the record, lets the record say what is lost, and removes everything of ours that the record does
// not want. It is the whole of recovery: a driver that was killed anywhere, and one that only comes back to a machine, do the
// same. No mutation may be under way.
func (h *held) follow(ctx context.Context, m *qmp.Monitor) error {
	_, err := h.followed(ctx, m)
	return err
}

// followed is follow, and what was seen last.
func (h *held) followed(ctx context.Context, m *qmp.Monitor) (*seen, error) {
	if h.rec.Freezing {
		if err := h.thawLeft(ctx); err != nil {
			h.d.log.WarnContext(ctx, "thaw what an earlier cut may have left frozen; it will be tried again", "vm", h.id, "error", err)
		}
	}
	if why := h.crowded(); why != "" { // first: the record may need that room
		if err := h.giveWay(ctx, m, why); err != nil {
			return nil, err
		}
	}
	if o := h.rec.Open; o != nil && o.Phase == making {
		if err := h.update((*record).undo); err != nil {
			return nil, err
		}
	}
	s, err := observe(ctx, m)
	if err != nil {
		return nil, err
	}
	if len(s.jobs) > 0 { // a guest may have been stopped by them while nobody watched
		if err := h.d.rescue(ctx, m, h.id); err != nil {
			return nil, err
		}
		if s, err = observe(ctx, m); err != nil {
			return nil, err
		}
	}
	if err := h.judge(ctx, s); err != nil {
		return nil, err
	}
	changed, err := h.clean(ctx, m, s)
	if err != nil {
		return nil, err
	}
	if o := h.rec.Open; o != nil && o.pass() && o.Broken == "" && !h.exportsWhole(s) {
		// A live export holds nothing: it can be made again.
		if err := h.serve(ctx, m); err != nil {
			return nil, err
		}
		if err := h.exportLive(ctx, m, s); err != nil {
			return nil, err
		}
		changed = true
	}
	if o := h.rec.Open; o != nil && o.Method == byJob && o.Broken == "" {
		h.watch(m)
	}
	h.watchRoom()
	if changed {
		return observe(ctx, m)
	}
	return s, nil
}

// judge lets the record say what is not there any more.
func (h *held) judge(ctx context.Context, s *seen) error {
	r := h.rec
	if r.Lineage == "" || (r.Active == 0 && r.Open == nil) || (r.Active == 0 && !r.Open.pass()) {
		return nil
	}
	if what := r.wrong(s); what != "" {
		h.d.log.ErrorContext(ctx, "the dirty bitmaps are lost; a resynchronisation is required", "vm", h.id, "what", what)
		return h.update(func(r *record) { r.lose(lost, "%s", what) })
	}
	if o := r.Open; o != nil && !o.pass() && o.Broken == "" {
		if what := h.brokenCopy(s); what != "" {
			h.d.log.WarnContext(ctx, "the frozen copy is gone; the point must be abandoned", "vm", h.id, "point", o.Ordinal, "what", what)
			return h.update(func(r *record) { r.Open.Broken = what })
		}
	}
	return nil
}

// brokenCopy says what is missing of an open point's frozen copy.
func (h *held) brokenCopy(s *seen) string {
	o := h.rec.Open
	if !h.exportsWhole(s) {
		return "an export of the frozen copy is gone"
	}
	for i, t := range h.rec.Disks {
		root, _ := s.root(t.Device)
		if o.Method == byFilter && root != name(topNode, o.New, i) {
			return fmt.Sprintf("disk %s: the filter that keeps the frozen copy is gone", t.ID)
		}
		if o.Method == byJob && !slices.Contains(s.jobs, name(jobID, o.New, i)) {
			return fmt.Sprintf("disk %s: the job that keeps the frozen copy has ended", t.ID)
		}
	}
	return ""
}

func (h *held) exportsWhole(s *seen) bool {
	for i := range h.rec.Disks {
		want := name(exportID, h.rec.Open.New, i)
		if !slices.ContainsFunc(s.exports, func(e exported) bool { return e.ID == want && !e.Stopping }) {
			return false
		}
	}
	return true
}

// clean removes what the record does not want, from the reader's end to the guest's, and merges what an undone or abandoned
// point recorded. Every step may be repeated. It reports whether it changed anything.
func (h *held) clean(ctx context.Context, m *qmp.Monitor, s *seen) (bool, error) {
	keep := uint64(0) // generation of the nodes and exports that stay
	// A broken copy is a burden to the guest, and no use.
	if o := h.rec.Open; o != nil && (o.pass() || o.Broken == "") {
		keep = o.New
	}
	stale := func(s string) bool {
		_, g, ok := parse(s)
		return ours(s) && (!ok || g != keep || keep == 0)
	}
	changed := false
	if h.rec.Open == nil && h.stopWatch != nil {
		h.stopWatch()
		h.stopWatch = nil
	}
	gone, err := h.removeExports(ctx, m, s, stale)
	if err != nil {
		return false, err
	}
	changed = changed || gone
	if h.rec.Open == nil {
		stopped, err := h.stopServer(ctx, m, gone)
		if err != nil {
			return false, err
		}
		changed = changed || stopped
	}
	removed, err := h.removeNodes(ctx, m, s, stale)
	if err != nil {
		return false, err
	}
	changed = changed || removed
	settled, err := h.cleanBitmaps(ctx, m, s)
	if err != nil {
		return false, err
	}
	h.removeScratch(ctx, keep)
	return changed || settled, nil
}

func (h *held) removeExports(ctx context.Context, m *qmp.Monitor, s *seen, stale func(string) bool) (bool, error) {
	any := false
	for _, e := range s.exports {
		if !stale(e.ID) {
			continue
		}
		any = true
		if e.Stopping {
			continue
		}
		if err := h.do(ctx, m, "block-export-del", arguments{"id": e.ID, "mode": "hard"}); err != nil {
			return false, fmt.Errorf("remove export: %w", err)
		}
	}
	if !any {
		return false, nil
	}
	return true, poll(ctx, "exports to end", func() (bool, error) {
		var left []exported
		if err := m.Execute(ctx, "query-block-exports", nil, &left); err != nil {
			return false, err
		}
		return !slices.ContainsFunc(left, func(e exported) bool { return stale(e.ID) }), nil
	})
}

// removeNodes takes our filters out from under the guest, ends our jobs, and removes our nodes.
func (h *held) removeNodes(ctx context.Context, m *qmp.Monitor, s *seen, stale func(string) bool) (bool, error) {
	any := false
	remove := func(r role) error {
		for _, n := range slices.Sorted(maps.Keys(s.nodes)) {
			if what, _, ok := parse(n); !ok || what != r || !stale(n) || s.nodes[n].driver == "" {
				continue
			}
			any = true
			if err := h.removeNode(ctx, m, n); err != nil {
				return err
			}
		}
		return nil
	}
	if err := remove(accessNode); err != nil {
		return false, err
	}
	for _, j := range s.jobs {
		if !stale(j) {
			continue
		}
		any = true
		if err := h.do(ctx, m, "block-job-cancel", arguments{"device": j, "force": true}); err != nil && !qmp.Refused(err) {
			return false, fmt.Errorf("end job: %w", err)
		}
	}
	if any {
		if err := h.jobsGone(ctx, m, stale); err != nil {
			return false, err
		}
	}
	back, err := h.giveBack(ctx, m, s, stale)
	if err != nil {
		return false, err
	}
	any = any || back
	for _, r := range []role{topNode, filterNode, scratchNode} {
		if err := remove(r); err != nil {
			return false, err
		}
	}
	return any, nil
}

// giveBack lets the guest write to its disks directly again: first past the filters, all at once, then without our node.
func (h *held) giveBack(ctx context.Context, m *qmp.Monitor, s *seen, stale func(string) bool) (bool, error) {
	var options []any
	var sets []arguments
	var g graph
	for _, f := range s.fronts {
		if what, _, _ := parse(f.root); what != topNode || !stale(f.root) {
			continue
		}
		if g == nil {
			var err error
			if g, err = blockGraph(ctx, m); err != nil {
				return false, err
			}
		}
		below, ok := g.below(f.root)
		if !ok {
			below, ok = h.below(f)
		}
		if !ok {
			return false, fmt.Errorf("device %s writes through %s and its disk is not known", f.device, f.root)
		}
		options = append(options, arguments{"driver": "raw", "node-name": f.root, "file": below})
		sets = append(sets, arguments{"path": f.device, "property": "drive", "value": below})
	}
	if len(options) == 0 {
		return false, nil
	}
	if err := h.do(ctx, m, "blockdev-reopen", arguments{"options": options}); err != nil {
		return false, fmt.Errorf("give the guest its disks back: %w", err)
	}
	for _, args := range sets {
		if err := h.do(ctx, m, "qom-set", args); err != nil {
			return false, fmt.Errorf("give the guest its disk back: %w", err)
		}
	}
	return true, nil
}

func (h *held) jobsGone(ctx context.Context, m *qmp.Monitor, stale func(string) bool) error {
	return poll(ctx, "jobs to end", func() (bool, error) {
		s, err := observe(ctx, m)
		return err == nil && !slices.ContainsFunc(s.jobs, stale), err
	})
}

// below is the disk's node behind one of our nodes.
func (h *held) below(f front) (string, bool) {
	for _, t := range h.rec.Disks {
		if f.device == t.Device || strings.HasPrefix(f.device, t.Device+"/") {
			return t.Node, true
		}
	}
	if h.machine != nil {
		for _, t := range h.machine.Disks {
			if t.Device != "" && (f.device == t.Device || strings.HasPrefix(f.device, t.Device+"/")) {
				return t.Node, true
			}
		}
	}
	return "", false
}

// removeNode waits while the node is used by what is just going.
func (h *held) removeNode(ctx context.Context, m *qmp.Monitor, n string) error {
	var last error
	err := poll(ctx, "node "+n, func() (bool, error) {
		last = h.do(ctx, m, "blockdev-del", arguments{"node-name": n})
		if last == nil {
			return true, nil
		}
		if !qmp.Refused(last) {
			return false, last
		}
		s, err := observe(ctx, m) // gone with its job, perhaps
		return err == nil && s.nodes[n] == nil, err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("remove node: %w", err), last)
	}
	return nil
}

// cleanBitmaps merges newer generations into the active one and removes those that nothing needs (I-7: the record says so
// first).
func (h *held) cleanBitmaps(ctx context.Context, m *qmp.Monitor, s *seen) (bool, error) {
	r := h.rec
	want := map[uint64]bool{}
	switch {
	case r.Lineage == "":
	case r.Open != nil:
		want[r.Open.New] = true
		if !r.Open.pass() {
			want[r.Open.Old] = true
		}
	case r.Active != 0:
		want[r.Active] = true
	}
	var merge []any
	if r.Open == nil && r.Active != 0 {
		active := r.bitmap(r.Active)
		for _, t := range r.Disks {
			n := s.nodes[t.Node]
			var newer []string
			for b := range n.bitmaps {
				if g, ok := generationOf(b, r.Lineage); ok && g > r.Active {
					newer = append(newer, b)
				}
			}
			slices.Sort(newer)
			if !n.bitmaps[active].Recording {
				merge = append(merge, action("block-dirty-bitmap-enable", arguments{"node": t.Node, "name": active}))
			}
			if len(newer) > 0 {
				merge = append(merge, action("block-dirty-bitmap-merge", arguments{"node": t.Node, "target": active, "bitmaps": newer}))
			}
		}
	}
	if len(merge) > 0 {
		if err := h.do(ctx, m, "transaction", arguments{"actions": merge}); err != nil {
			return false, fmt.Errorf("merge bitmaps: %w", err)
		}
	}
	changed := len(merge) > 0
	for _, n := range slices.Sorted(maps.Keys(s.nodes)) {
		for _, b := range slices.Sorted(maps.Keys(s.nodes[n].bitmaps)) {
			g, known := generationOf(b, r.Lineage)
			if !ours(b) || (known && want[g]) {
				continue
			}
			changed = true
			if err := h.do(ctx, m, "block-dirty-bitmap-remove", arguments{"node": n, "name": b}); err != nil {
				return false, fmt.Errorf("remove bitmap: %w", err)
			}
		}
	}
	return changed, nil
}

func action(kind string, data arguments) any { return arguments{"type": kind, "data": data} }

// removeScratch removes files of the machine that belong to no open point.
func (h *held) removeScratch(ctx context.Context, keep uint64) {
	dir := h.scratchDir()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.d.log.WarnContext(ctx, "look for scratch files", "vm", h.id, "error", err)
	}
	kept := map[string]bool{}
	if keep != 0 {
		for i := range h.rec.Disks {
			kept[filepath.Base(h.scratchPath(keep, i))] = true
		}
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), h.scratchPrefix()) || kept[e.Name()] {
			continue
		}
		if h.d.effect("remove-scratch") != nil {
			return
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			h.d.log.WarnContext(ctx, "remove a scratch file", "vm", h.id, "error", err)
		}
	}
}

// scratchWithoutQEMU removes the files of a machine that has nothing open while its QEMU does not answer. One that is alive
// all the same has them open, and needs no name for them.
func (h *held) scratchWithoutQEMU(ctx context.Context) {
	if h.rec.Open == nil {
		h.removeScratch(ctx, 0)
	}
}

// followSoon is follow after an answer that is durable already. What fails is done by the next call or Refresh.
func (h *held) followSoon(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards) // the caller's going away is no reason to leave it
	defer cancel()
	m, err := h.monitor(ctx)
	if err == nil {
		err = h.follow(ctx, m)
	} else {
		h.scratchWithoutQEMU(ctx)
	}
	if err != nil {
		h.d.log.WarnContext(ctx, "tidy the hypervisor; it will be tried again", "vm", h.id, "error", err)
	}
}

// poll asks until done says so, fast at first, and gives up with ctx, or after [afterwards].
func poll(ctx context.Context, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, afterwards)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		ok, err := done()
		if err != nil || ok {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, ctx.Err(), "wait for %s", what)
		}
	}
}
