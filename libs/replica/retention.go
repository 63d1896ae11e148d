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

// Retention is retention.json of the replica container, changed by If-Match only. Every reader and committer obeys it
// (rule 8); Retain raises floors and retires ranges in it, Pin and Unpin keep the pins. What one version of it retires, every
// later version retires.
type Retention struct {
	V       int     `json:"v"`
	Lineage Lineage `json:"lineage"`
	// Floor: manifests at or below it are no part of the chain. Anchor is the state at it, required when Floor > 0.
	Floor  Seq     `json:"floor"`
	Anchor *Anchor `json:"anchor,omitempty"`
	// NoCheckpoint: nothing in the chain is reached from a checkpoint at the floor. Readers ignore one that is there; it is
	// being deleted.
	NoCheckpoint bool `json:"no_checkpoint,omitempty"`
	// Retired are ranges above the floor that are no part of the chain, ascending and disjoint.
	Retired []RetiredRange `json:"retired,omitempty"`
	// Released are runs of partials, ascending and disjoint, whose segments in staging are gone or going (rule 15). Their
	// manifests are in the chain.
	Released []SeqRange `json:"released,omitempty"`
	// Pins keep points: each names what it holds and who wants it.
	Pins []Pin `json:"pins,omitempty"`
	// Keep is what the last Retain was told, so that readers can tell tiers.
	Keep *KeepRecord `json:"keep,omitempty"`
}

// SeqRange is a range of manifests, both ends in it.
type SeqRange struct {
	From Seq `json:"from"`
	To   Seq `json:"to"`
}

func (s SeqRange) has(n Seq) bool { return s.From <= n && n <= s.To }

// KeepRecord is Keep in seconds.
type KeepRecord struct {
	All    int64 `json:"all_seconds"`
	Hourly int64 `json:"hourly_seconds"`
	Limit  int64 `json:"limit_seconds"`
}

// RetiredRange is a range of manifests [From, To] between kept ones. Anchor is the state at To.
type RetiredRange struct {
	From   Seq    `json:"from"`
	To     Seq    `json:"to"`
	Anchor Anchor `json:"anchor"`
	// NoCheckpoint is as that of the floor, for a checkpoint at To.
	NoCheckpoint bool `json:"no_checkpoint,omitempty"`
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
	case ret.Floor > MaxSeq, (ret.Floor > 0) != (ret.Anchor != nil), ret.NoCheckpoint && ret.Floor == 0:
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
	low = ret.Floor
	for _, r := range ret.Released {
		if r.From <= low || r.To < r.From || r.To > MaxSeq {
			return fmt.Errorf("retention record: released range %d to %d above %d: %w", r.From, r.To, low, ErrInvalid)
		}
		low = r.To
	}
	if k := ret.Keep; k != nil && (k.All < 0 || k.Hourly < 0 || k.Limit < 0) {
		return fmt.Errorf("retention record: keep %v: %w", *k, ErrInvalid)
	}
	for _, p := range ret.Pins {
		if p.From > p.Seq || !validOwner(p.Owner) || len(p.Reason) > maxText {
			return fmt.Errorf("retention record: pin of %q at %d from %d: %w", p.Owner, p.Seq, p.From, ErrInvalid)
		}
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

// released reports whether the segments of the partial s are given up.
func (ret *Retention) released(s Seq) bool {
	return ret != nil && slices.ContainsFunc(ret.Released, func(r SeqRange) bool { return r.has(s) })
}

// givesUpCheckpoint reports whether a checkpoint of n, if there is one, carries nothing: n is retired and is not an end
// that something above builds on.
func (ret *Retention) givesUpCheckpoint(n Seq) bool {
	if ret == nil {
		return false
	}
	if n <= ret.Floor {
		return n != ret.Floor || ret.NoCheckpoint
	}
	i, ok := ret.retiredAt(n)
	return ok && (n != ret.Retired[i].To || ret.Retired[i].NoCheckpoint)
}

// retiredAt finds the retired range of s above the floor.
func (ret *Retention) retiredAt(s Seq) (int, bool) {
	i, _ := slices.BinarySearchFunc(ret.Retired, s, func(r RetiredRange, s Seq) int { return cmp.Compare(r.To, s) })
	return i, i < len(ret.Retired) && ret.Retired[i].From <= s
}

// clone copies what plans change in place.
func (ret *Retention) clone(l Lineage) *Retention {
	if ret == nil {
		return &Retention{V: RetentionVersion, Lineage: l}
	}
	c := *ret
	c.Retired, c.Released, c.Pins = slices.Clone(ret.Retired), slices.Clone(ret.Released), slices.Clone(ret.Pins)
	return &c
}

// anchorFor returns the anchor to go on from when s is retired.
func (ret *Retention) anchorFor(s Seq) (*Anchor, bool) {
	if ret == nil {
		return nil, false
	}
	if s <= ret.Floor {
		return ret.Anchor, true
	}
	i, ok := ret.retiredAt(s)
	if !ok {
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

// orRetired decides about an object that manifest n needs and that is missing: when retention has given it up since the
// chain was read, that is no damage, and the answer is ErrNotReachable. Whoever reads without a pin may be that late.
func (r *Replica) orRetired(ctx context.Context, n Seq, err error) error {
	if err == nil || !errors.Is(err, blobstore.ErrNotFound) || errors.Is(err, blobstore.ErrNoContainer) {
		return err
	}
	ret, _, rerr := r.readRetention(ctx)
	switch {
	case rerr != nil:
		return fmt.Errorf("manifest %d needs something that is missing, and whether it was retired is not known: %w", n, rerr)
	case ret.Retires(n), ret.released(n):
		return fmt.Errorf("manifest %d was retired meanwhile: %w", n, ErrNotReachable)
	}
	return err
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
