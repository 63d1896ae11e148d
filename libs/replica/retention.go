package replica

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// RetentionVersion is the version of the retention record.
const RetentionVersion = 1

const maxRetention = 8 << 20

// Retention is retention.json of the replica container, changed by If-Match only. This package reads it and obeys
// it (rule 8); raising floors and deleting is the retention worker's, and comes with its own issue.
type Retention struct {
	V       int     `json:"v"`
	Lineage Lineage `json:"lineage"`
	// Floor: manifests at or below it are no part of the chain. Anchor is the state at it, required when Floor > 0.
	Floor  Seq     `json:"floor"`
	Anchor *Anchor `json:"anchor,omitempty"`
	// Retired are ranges above the floor that are no part of the chain, ascending and disjoint.
	Retired []RetiredRange `json:"retired,omitempty"`
	// Pins keep points: each names what it holds and who wants it.
	Pins []Pin `json:"pins,omitempty"`
}

// RetiredRange is a range of manifests [From, To] between kept checkpoints. Anchor is the state at To.
type RetiredRange struct {
	From   Seq    `json:"from"`
	To     Seq    `json:"to"`
	Anchor Anchor `json:"anchor"`
}

// Pin keeps what is needed to reach the manifest Seq.
type Pin struct {
	Seq Seq `json:"seq"`
	// Owner is "failover/<id>", "restore/<session>", "hold/<name>" or "suspect/<ordinal>".
	Owner string `json:"owner"`
	// Until ends it, by storage time; zero for a hold, which has no end.
	Until  time.Time `json:"until,omitzero"`
	Reason string    `json:"reason,omitempty"`
	// From is set by Replica.Pin: the checkpoint that Seq was reached from then. Everything above it up to Seq is kept,
	// and it.
	From Seq `json:"from,omitempty"`
}

// Anchor is the state of the chain at a base, point or rewind, so that readers can go on without what is below it.
type Anchor struct {
	Seq          Seq           `json:"seq"`
	SHA256       string        `json:"sha256"`
	Epoch        Epoch         `json:"epoch"`
	Open         Seq           `json:"open"`
	StateOrdinal Ordinal       `json:"state_ordinal"`
	Highest      Ordinal       `json:"highest"`
	Base         Seq           `json:"base"`
	Newest       Seq           `json:"newest"`
	Fences       []AnchorFence `json:"fences,omitempty"`
	Disks        []DiskState   `json:"disks"`
}

// AnchorFence is what the chain knows of one failover; 0 is "not in the chain".
type AnchorFence struct {
	Failover string `json:"failover"`
	Closed   Seq    `json:"closed"`
	Rewound  Seq    `json:"rewound,omitempty"`
	Opened   Seq    `json:"opened,omitempty"`
}

// DecodeRetention reads a stored record strictly.
func DecodeRetention(b []byte) (*Retention, error) {
	var ret Retention
	if err := decodeStrict(b, maxRetention, RetentionVersion, &ret); err != nil {
		return nil, fmt.Errorf("decode retention record: %w", err)
	}
	if err := ret.Validate(); err != nil {
		return nil, fmt.Errorf("decode retention record: %w", err)
	}
	return &ret, nil
}

// Encode returns the stored bytes, after Validate.
func (ret *Retention) Encode() ([]byte, error) {
	if err := ret.Validate(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(ret)
	if err != nil {
		return nil, fmt.Errorf("encode retention record: %w", err)
	}
	return append(b, '\n'), nil
}

// Validate checks the record alone. A pin below the floor or in a retired range is refused (rule 24).
func (ret *Retention) Validate() error {
	switch {
	case ret.V != RetentionVersion:
		return fmt.Errorf("retention record: version %d: %w", ret.V, ErrInvalid)
	case !isHex(string(ret.Lineage), 32):
		return fmt.Errorf("retention record: lineage %q: %w", ret.Lineage, ErrInvalid)
	case ret.Floor > MaxSeq, (ret.Floor > 0) != (ret.Anchor != nil):
		return fmt.Errorf("retention record: floor %d, anchor present %t: %w", ret.Floor, ret.Anchor != nil, ErrInvalid)
	}
	if ret.Anchor != nil {
		if err := ret.Anchor.validate(ret.Floor); err != nil {
			return err
		}
	}
	low := ret.Floor
	for _, r := range ret.Retired {
		if r.From <= low || r.To < r.From || r.To > MaxSeq {
			return fmt.Errorf("retention record: retired range %d to %d above %d: %w", r.From, r.To, low, ErrInvalid)
		}
		if err := r.Anchor.validate(r.To); err != nil {
			return err
		}
		low = r.To
	}
	for _, p := range ret.Pins {
		if ret.Retires(p.Seq) {
			return fmt.Errorf("retention record: pin of %s at retired %d: %w", p.Owner, p.Seq, ErrInvalid)
		}
	}
	return nil
}

func (a *Anchor) validate(at Seq) error {
	if a.Seq != at || !isHex(a.SHA256, 64) || a.Open > at || a.Base > at || a.Newest > at || a.Epoch == 0 ||
		a.StateOrdinal > a.Highest || len(a.Disks) > maxDisks {
		return fmt.Errorf("retention record: anchor at %d: %w", at, ErrInvalid)
	}
	return nil
}

// Retires reports whether the manifest number is no part of the chain (rule 8). A nil record retires nothing.
func (ret *Retention) Retires(s Seq) bool {
	_, in := ret.anchorFor(s)
	return in
}

// anchorFor returns the anchor to go on from when s is retired.
func (ret *Retention) anchorFor(s Seq) (*Anchor, bool) {
	if ret == nil {
		return nil, false
	}
	if s <= ret.Floor {
		return ret.Anchor, true
	}
	i := slices.IndexFunc(ret.Retired, func(r RetiredRange) bool { return r.From <= s && s <= r.To })
	if i < 0 {
		return nil, false
	}
	return &ret.Retired[i].Anchor, true
}

// Anchor is the state as an anchor. It is an error when a run of partials is unfinished at the head.
func (s *State) Anchor() (*Anchor, error) {
	if s.Head == 0 || s.Running {
		return nil, fmt.Errorf("anchor at %d: the head must end a run: %w", s.Head, ErrInvalid)
	}
	return newAnchor(s.Head, &anchorState{hash: s.HeadHash, epoch: s.Epoch, open: s.Open, base: s.Base, newest: s.Newest,
		stateOrdinal: s.StateOrdinal, highest: s.Highest, fences: s.fences}, s.Disks()), nil
}

func newAnchor(seq Seq, s *anchorState, disks []DiskState) *Anchor {
	a := &Anchor{Seq: seq, SHA256: s.hash, Epoch: s.epoch, Open: s.open, StateOrdinal: s.stateOrdinal,
		Highest: s.highest, Base: s.base, Newest: s.newest, Disks: disks}
	for id, f := range s.fences {
		a.Fences = append(a.Fences, AnchorFence{Failover: id, Closed: f.closed, Rewound: f.rewound, Opened: f.opened})
	}
	slices.SortFunc(a.Fences, func(x, y AnchorFence) int { return cmp.Compare(x.Closed, y.Closed) })
	return a
}

// state is the state that the anchor describes.
func (a *Anchor) state(floor Seq) *State {
	s := &State{Head: a.Seq, HeadHash: a.SHA256, Epoch: a.Epoch, Open: a.Open, StateOrdinal: a.StateOrdinal,
		Highest: a.Highest, Base: a.Base, Newest: a.Newest, Floor: floor,
		disks: map[string]DiskState{}, points: map[Ordinal]Seq{}, passes: map[Ordinal]*passState{}, fences: map[string]fenceSeqs{}}
	for _, d := range a.Disks {
		s.disks[d.ID] = d
	}
	for _, f := range a.Fences {
		s.fences[f.Failover] = fenceSeqs{closed: f.Closed, rewound: f.Rewound, opened: f.Opened}
		if f.Closed > s.Fence.Seq {
			s.Fence = Fence{Kind: KindClose, Seq: f.Closed, Failover: f.Failover}
		}
		if f.Opened > s.Fence.Seq {
			s.Fence = Fence{Kind: KindOpen, Seq: f.Opened, Failover: f.Failover}
		}
	}
	return s
}

// readRetention returns nil and an empty tag when there is no record yet.
func (r *Replica) readRetention(ctx context.Context) (*Retention, blobstore.ETag, error) {
	b, p, err := readAllOf(ctx, r.replica, retentionName, maxRetention)
	if errors.Is(err, blobstore.ErrNotFound) {
		return nil, "", nil // absence is a state of the record, not an error
	}
	if err != nil {
		return nil, "", fmt.Errorf("read retention record: %w", err)
	}
	ret, err := DecodeRetention(b)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if ret.Lineage != r.lineage {
		return nil, "", fmt.Errorf("retention record of lineage %s: %w", ret.Lineage, ErrCorrupt)
	}
	return ret, p.ETag, nil
}

// readAll reads a small block blob whole.
func readAll(ctx context.Context, c blobstore.Container, name string, limit int64) ([]byte, error) {
	b, _, err := readAllOf(ctx, c, name, limit)
	return b, err
}

// readAllOf is readAll with the properties of the version that was read.
func readAllOf(ctx context.Context, c blobstore.Container, name string, limit int64) ([]byte, blobstore.Properties, error) {
	rc, props, err := c.Get(ctx, name, 0, -1)
	if err != nil {
		return nil, props, err
	}
	defer rc.Close()
	if props.Size > limit {
		return nil, props, fmt.Errorf("read %s: %d bytes, at most %d: %w", name, props.Size, limit, ErrCorrupt)
	}
	b := make([]byte, props.Size)
	if _, err := io.ReadFull(rc, b); err != nil {
		return nil, props, fmt.Errorf("read %s: %w", name, err)
	}
	return b, props, nil
}
