package changetracker

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// stateVersion is the version of tracking.json and point-<ordinal>.json. docs/formats/point-record.md specifies both.
const stateVersion = 1

// Scope says what a pass copies.
type Scope string

// The scopes of passes.
const (
	// Full takes every allocated range of every disk.
	Full Scope = "FULL"
	// DirtyOnly takes what is dirty without data.
	DirtyOnly Scope = "DIRTY"
	// Compare takes no range: the caller compares the whole disk.
	Compare Scope = "COMPARE"
)

// Phase is where a point or pass stands.
type Phase string

// The phases.
const (
	Open      Phase = "OPEN"
	Committed Phase = "COMMITTED"
	Abandoned Phase = "ABANDONED"

	// beginning: the pass's marks are being written; a crash undoes it. Only in tracking.json.
	beginning Phase = "BEGINNING"
)

// Reason says why the baseline is not trusted.
type Reason string

// The reasons for a resynchronisation. None means that the baseline is trusted.
const (
	None               Reason = ""
	InitialReplication Reason = "INITIAL_REPLICATION"
	ChangedOffline     Reason = "DISK_CHANGED_OFFLINE"
	TrackingBroken     Reason = "TRACKING_BROKEN"
	TrackingGap        Reason = "TRACKING_GAP"
	StateLost          Reason = "HOST_STATE_LOST"
)

// Change is the size of a point or pass on one disk.
type Change struct {
	// Disk id.
	Disk string `json:"disk"`
	// Size of the disk in bytes.
	Size int64 `json:"size"`
	// Bytes logged, repeated writes counted each time, or bytes in the pass's extents.
	Bytes int64 `json:"bytes"`
}

// Point is a point or pass as the host remembers it.
type Point struct {
	// Ordinal within the lineage, from 1.
	Ordinal uint64 `json:"ordinal"`
	// Phase it is in.
	Phase Phase `json:"phase"`
	// Scope of a pass; empty for a point.
	Scope Scope `json:"scope,omitempty"`
	// Base that it starts from; 0 for none.
	Base uint64 `json:"base"`
	// Epoch of the call that made it.
	Epoch uint64 `json:"epoch"`
	// CutTime is the instant of the cut by the host's clock; zero for a pass.
	CutTime time.Time `json:"cut_time,omitzero"`
	// Pause is how long guest writes were held.
	Pause time.Duration `json:"pause_ns,omitempty"`
	// Disks in the machine's order.
	Disks []Change `json:"disks,omitempty"`
}

// IsPass reports whether it is a pass.
func (p Point) IsPass() bool { return p.Scope != "" }

// logRecord names one sealed log.
type logRecord struct {
	File     string    `json:"file"` // in the disk's folder
	ID       uuid.UUID `json:"unique_id"`
	Previous uuid.UUID `json:"previous_unique_id"`
	Bytes    int64     `json:"bytes"`   // size of the file
	Entries  int64     `json:"entries"` // of data
	Zeros    int64     `json:"zeros"`   // zero records; their file exists if there are any
}

// record is tracking.json: everything that is decided for all disks of a machine at once.
type record struct {
	V        int     `json:"v"`
	Machine  string  `json:"machine"`
	Lineage  string  `json:"lineage,omitempty"` // empty: not tracked
	Epoch    uint64  `json:"epoch"`
	Base     uint64  `json:"base"`
	Highest  uint64  `json:"highest_ordinal"`
	Floor    uint64  `json:"floor"` // outcomes at or below were forgotten
	Outcomes []Point `json:"outcomes,omitempty"`
	Pass     *Point  `json:"pass,omitempty"`
	Reason   Reason  `json:"resync_reason,omitempty"`
	Detail   string  `json:"resync_detail,omitempty"`
	// Fence is the failover for which the exports are closed; empty for none. It outlives the lineage.
	Fence string `json:"fence,omitempty"`
	// Clean: closed in good order. Pending and Prints mean something only then.
	Clean   bool                   `json:"clean"`
	Pending map[string][]logRecord `json:"pending,omitempty"`
	Prints  map[string]print       `json:"prints,omitempty"`
}

// pointRecord is point-<ordinal>.json: its presence is the cut.
type pointRecord struct {
	V       int                    `json:"v"`
	Machine string                 `json:"machine"`
	Lineage string                 `json:"lineage"`
	Point   Point                  `json:"point"`
	Logs    map[string][]logRecord `json:"logs"` // by disk id, oldest first
}

// maxOutcomes bounds the outcomes that are remembered one by one.
const maxOutcomes = 1024

func (r *record) outcome(ordinal uint64) (Point, bool) {
	for _, p := range r.Outcomes {
		if p.Ordinal == ordinal {
			return p, true
		}
	}
	return Point{}, false
}

func (r *record) settle(p Point) {
	r.Highest = max(r.Highest, p.Ordinal)
	r.Outcomes = append(r.Outcomes, p)
	for len(r.Outcomes) > maxOutcomes {
		r.Floor = max(r.Floor, r.Outcomes[0].Ordinal)
		r.Outcomes = r.Outcomes[1:]
	}
}

// lose records that the baseline is not trusted any more, and gives up the pass in hand.
func (r *record) lose(reason Reason, detail string) {
	r.Reason, r.Detail = reason, detail
	if r.Pass != nil {
		p := *r.Pass
		p.Phase = Abandoned
		r.settle(p)
		r.Pass = nil
	}
}

// clone returns a copy that can be changed and written before it replaces the original.
func (r *record) clone() *record {
	c := *r
	c.Outcomes = append([]Point(nil), r.Outcomes...)
	if r.Pass != nil {
		p := *r.Pass
		c.Pass = &p
	}
	return &c
}

func decodeState(b []byte, v any, version *int) error {
	if err := json.Unmarshal(b, v); err != nil {
		return err
	}
	if *version != stateVersion {
		return fmt.Errorf("version %d, this program knows %d", *version, stateVersion)
	}
	return nil
}

func encodeState(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	return append(b, '\n'), err
}
