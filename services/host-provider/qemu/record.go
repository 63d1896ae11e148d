package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// recordVersion is the version of <state>/<vm>.json.
const recordVersion = 1

// phase is where a point or pass stands.
type phase string

const (
	// making: QEMU is being changed for it. It was never answered; a restart undoes it and the ordinal stays free.
	making    phase = "MAKING"
	open      phase = "OPEN"
	committed phase = "COMMITTED"
	abandoned phase = "ABANDONED"
)

// reason says why the base is not trusted.
type reason string

const (
	none reason = ""
	// initial: nothing was copied yet. It is told by pass_required alone.
	initial reason = "INITIAL_REPLICATION"
	// lost: the bitmap is not what the record says.
	lost reason = "BITMAP_LOST"
	// gap: a pass dropped the bitmaps and was not committed.
	gap reason = "TRACKING_GAP"
)

// diskSize is what a point or pass holds of one disk, in bytes.
type diskSize struct {
	Disk   string `json:"disk"`
	Size   int64  `json:"size"`
	Change int64  `json:"change"`
}

// point is a point or pass.
type point struct {
	Ordinal uint64            `json:"ordinal"`
	Phase   phase             `json:"phase"`
	Scope   typesv1.PassScope `json:"scope,omitempty"` // of a pass; 0 for a point
	Base    uint64            `json:"base"`
	Epoch   uint64            `json:"epoch"`
	Cut     time.Time         `json:"cut,omitzero"`
	Pause   time.Duration     `json:"pause_ns,omitempty"`
	Disks   []diskSize        `json:"disks,omitempty"`
}

func (p point) pass() bool { return p.Scope != 0 }

// unsettled is the point or pass that is being made or is open, with what it has in QEMU.
type unsettled struct {
	point
	// Old is the generation that the point ships; 0 for a pass. New is the one that records since.
	Old uint64 `json:"old_generation,omitempty"`
	New uint64 `json:"new_generation"`
	// Method of the frozen copy.
	Method method `json:"method,omitempty"`
	// Consistency that was reached, and why not more.
	Consistency typesv1.Consistency  `json:"consistency,omitempty"`
	Degraded    *typesv1.ErrorDetail `json:"degraded,omitempty"`
	// Broken says why it cannot be read any more; it can still be settled.
	Broken string `json:"broken,omitempty"`
}

// method is how a frozen copy is made.
type method string

const (
	// byFilter: copy-before-write, which gives up the copy and never the guest's write.
	byFilter method = "FILTER"
	// byJob: blockdev-backup, which needs a watcher.
	byJob method = "JOB"
)

// tracked is a disk as it was when its bitmap was begun.
type tracked struct {
	ID     string `json:"id"`
	Node   string `json:"node"`   // of the format
	Device string `json:"device"` // QOM path
	Size   int64  `json:"size"`
	Path   string `json:"path,omitempty"`
	// Map: the format knows which ranges are zero.
	Map bool `json:"map,omitempty"`
}

// record is <state>/<vm>.json: everything that is decided. QEMU is made to follow it, never the other way round, except that
// a bitmap found missing makes the record say so.
type record struct {
	V       int    `json:"v"`
	VM      string `json:"vm"`
	Lineage string `json:"lineage,omitempty"` // empty: not tracked
	Epoch   uint64 `json:"epoch"`
	Base    uint64 `json:"base"`    // newest committed ordinal
	Highest uint64 `json:"highest"` // newest ordinal seen
	Floor   uint64 `json:"floor"`   // outcomes at or below were forgotten
	// Outcomes, oldest first.
	Outcomes []point `json:"outcomes,omitempty"`
	// Generation is the highest ever put into a bitmap's name; it only grows, so a name never means two things.
	Generation uint64 `json:"generation"`
	// Active is the generation that records since Base; 0: none does.
	Active uint64 `json:"active,omitempty"`
	// Disks as they were when Active began.
	Disks []tracked `json:"disks,omitempty"`
	// Open is the point or pass in hand.
	Open *unsettled `json:"open,omitempty"`
	// Reason that the base is not trusted.
	Reason reason `json:"resync_reason,omitempty"`
	Detail string `json:"resync_detail,omitempty"`
	// Freezing: the guest may be frozen by us. Durable before the freeze, cleared after the thaw.
	Freezing bool `json:"freezing,omitempty"`
	// Server: an NBD server of this QEMU may be ours, at this path. Durable before it is started, and never cleared: whether it
	// is ours is known by whether an NBD server answers there.
	Server string `json:"nbd_server,omitempty"`
	// Fence is the failover that holds the machine; empty when none does. Written by power.go.
	Fence string `json:"fence,omitempty"`
}

// maxOutcomes bounds the outcomes that are remembered one by one.
const maxOutcomes = 1024

func (r *record) outcome(ordinal uint64) (point, bool) {
	for _, p := range r.Outcomes {
		if p.Ordinal == ordinal {
			return p, true
		}
	}
	return point{}, false
}

func (r *record) settle(p point) {
	r.Highest = max(r.Highest, p.Ordinal)
	r.Outcomes = append(r.Outcomes, p)
	for len(r.Outcomes) > maxOutcomes {
		r.Floor = max(r.Floor, r.Outcomes[0].Ordinal)
		r.Outcomes = r.Outcomes[1:]
	}
}

// lose records that nothing is known of what changed since the base. An open pass is given up with it: it cannot become a
// base. An open point stays: what was read of it before is right.
func (r *record) lose(why reason, format string, args ...any) {
	if r.Reason == none {
		r.Reason, r.Detail = why, fmt.Sprintf(format, args...)
	}
	r.Active = 0
	if o := r.Open; o != nil && o.pass() {
		p := o.point
		p.Phase = abandoned
		r.settle(p)
		r.Open = nil
	} else if o != nil && o.Broken == "" {
		o.Broken = r.Detail
	}
}

// undo forgets what was being made.
func (r *record) undo() {
	o := r.Open
	r.Open = nil
	if o.pass() {
		r.noBase(o.Ordinal)
	}
}

// noBase: the bitmaps went when the pass began, and it did not become the base.
func (r *record) noBase(pass uint64) {
	r.Active = 0
	if r.Reason == none {
		r.Reason, r.Detail = gap, fmt.Sprintf("pass %d dropped what was recorded before it and was not completed", pass)
	}
}

func (r *record) clone() *record {
	c := *r
	c.Outcomes = slices.Clone(r.Outcomes)
	c.Disks = slices.Clone(r.Disks)
	if r.Open != nil {
		o := *r.Open
		o.Disks = slices.Clone(o.Disks)
		c.Open = &o
	}
	return &c
}

// bitmap is the name of a generation's bitmap.
func (r *record) bitmap(generation uint64) string { return bitmapName(r.Lineage, generation) }

func recordPath(dir, vm string) string { return filepath.Join(dir, vm+".json") }

func loadRecord(dir, vm string) (*record, error) {
	b, err := os.ReadFile(recordPath(dir, vm))
	if errors.Is(err, os.ErrNotExist) {
		return &record{V: recordVersion, VM: vm}, nil
	}
	if err != nil {
		return nil, err
	}
	r := &record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("read %s: %w", recordPath(dir, vm), err)
	}
	if r.V != recordVersion || r.VM != vm {
		return nil, fmt.Errorf("%s is version %d of machine %s, wanted are version %d and %s", recordPath(dir, vm), r.V, r.VM, recordVersion, vm)
	}
	return r, nil
}

// saveRecord replaces the file: whole and durable when it returns, or the old one stays.
func saveRecord(dir string, r *record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	path := recordPath(dir, r.VM)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // absent once renamed
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	return err
}

// recorded lists the machines that have a record.
func recorded(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if vm, ok := strings.CutSuffix(e.Name(), ".json"); ok && !strings.HasPrefix(vm, ".") {
			out = append(out, vm)
		}
	}
	return out, nil
}
