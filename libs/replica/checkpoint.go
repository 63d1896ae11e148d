package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// CheckpointVersion is the version of the checkpoint record.
const CheckpointVersion = 1

const maxCheckpoint = 64 << 10

// CheckpointRecord is ckpt/<seq>.json in the replica container: one snapshot per disk, all at rest at manifest Seq.
// A void one says that the manifest has and will have no checkpoint.
type CheckpointRecord struct {
	V       int              `json:"v"`
	Lineage Lineage          `json:"lineage"`
	Seq     Seq              `json:"seq"`
	Kind    Kind             `json:"kind,omitempty"`
	Ordinal Ordinal          `json:"ordinal,omitempty"` // of a base or point
	Void    bool             `json:"void,omitempty"`
	Created time.Time        `json:"created"` // storage time
	Disks   []CheckpointDisk `json:"disks,omitempty"`
}

// CheckpointDisk is one disk of a checkpoint.
type CheckpointDisk struct {
	ID       string               `json:"id"`
	Gen      uint32               `json:"gen"`
	Size     int64                `json:"size"` // virtual, in bytes
	Snapshot blobstore.SnapshotID `json:"snapshot"`
}

// DecodeCheckpoint reads a stored record strictly.
func DecodeCheckpoint(b []byte) (*CheckpointRecord, error) {
	var c CheckpointRecord
	if err := decodeStrict(b, maxCheckpoint, CheckpointVersion, &c); err != nil {
		return nil, fmt.Errorf("decode checkpoint: %w", err)
	}
	bad := !isHex(string(c.Lineage), 32) || c.Seq == 0 || c.Seq > MaxSeq || c.Void != (len(c.Disks) == 0) || len(c.Disks) > maxDisks
	for _, d := range c.Disks {
		bad = bad || d.Snapshot == "" || d.Gen == 0 || !validToken(d.ID, 64) || d.Size <= 0
	}
	if bad {
		return nil, fmt.Errorf("decode checkpoint %d: %w", c.Seq, ErrInvalid)
	}
	return &c, nil
}

// Checkpoint marks manifest n, a base, point or rewind, if every disk of n is at rest at n (ErrNotAtRest
// otherwise). It is idempotent: the checkpoint that exists is returned; a voided one is ErrVoid. Any process may call
// it, without a lease.
func (r *Replica) Checkpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	c, err := r.checkpoint(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("checkpoint %d: %w", n, err)
	}
	return c, nil
}

func (r *Replica) checkpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	if err := r.whole(); err != nil {
		return nil, err
	}
	e, err := r.entryAt(ctx, n)
	if err != nil {
		return nil, err
	}
	if !e.Kind.IsPoint() && e.Kind != KindRewind {
		return nil, fmt.Errorf("a %s is never a checkpoint: %w", e.Kind, ErrInvalid)
	}
	if have, err := r.ReadCheckpoint(ctx, n); !errors.Is(err, ErrNotFound) {
		return have, err
	}
	if err := failpoint.Hit(fpBeforeCheckpoint); err != nil {
		return nil, err
	}
	disks := sortedDisks(e.disks)
	rest := make([]blobstore.Properties, len(disks))
	for i, d := range disks {
		p, err := r.replica.Stat(ctx, DiskBlobName(d.ID, d.Gen), "")
		if errors.Is(err, blobstore.ErrNotFound) {
			return nil, fmt.Errorf("disk %s was never applied: %w", d.ID, ErrNotAtRest)
		}
		if err != nil {
			return nil, err
		}
		if a, t := splitNumber(p.Sequence); (a != n || t != n) && !r.bugs.CheckpointUnfinished {
			return nil, fmt.Errorf("disk %s is at %d, going to %d: %w", d.ID, a, t, ErrNotAtRest)
		}
		rest[i] = p
	}
	rec := CheckpointRecord{V: CheckpointVersion, Lineage: r.lineage, Seq: n, Kind: e.Kind}
	if e.Kind.IsPoint() {
		rec.Ordinal = e.Ordinal
	}
	meta := map[string]string{"seq": strconv.FormatUint(uint64(n), 10)}
	for i, d := range disks {
		cond := blobstore.Conditions{IfMatch: rest[i].ETag}
		if r.bugs.CheckpointUnfinished || r.bugs.SnapshotAnyETag {
			cond = blobstore.Conditions{}
		}
		id, _, err := r.replica.SnapshotPages(ctx, DiskBlobName(d.ID, d.Gen), meta, cond)
		if errors.Is(err, blobstore.ErrConditionFailed) {
			return nil, fmt.Errorf("disk %s moved on: %w", d.ID, ErrNotAtRest)
		}
		if err != nil {
			return nil, err
		}
		rec.Disks = append(rec.Disks, CheckpointDisk{ID: d.ID, Gen: d.Gen, Size: d.Size, Snapshot: id})
	}
	won, err := r.putCheckpoint(ctx, &rec)
	if err != nil {
		return nil, err
	}
	if won != &rec {
		r.dropSnapshots(ctx, &rec, won)
	}
	if won.Void {
		return nil, ErrVoid
	}
	return won, failpoint.Hit(fpAfterCheckpoint)
}

// VoidCheckpoint makes sure that n never gets a checkpoint it has not (rule 23). A checkpoint that exists stays and is
// returned; otherwise the void record is.
func (r *Replica) VoidCheckpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	if n == 0 || n > MaxSeq {
		return nil, fmt.Errorf("void checkpoint %d: %w", n, ErrInvalid)
	}
	if err := r.whole(); err != nil {
		return nil, fmt.Errorf("void checkpoint %d: %w", n, err)
	}
	rec := CheckpointRecord{V: CheckpointVersion, Lineage: r.lineage, Seq: n, Void: true}
	won, err := r.putCheckpoint(ctx, &rec)
	if err != nil {
		return nil, fmt.Errorf("void checkpoint %d: %w", n, err)
	}
	return won, nil
}

// putCheckpoint stores rec, or returns the record that is there already.
func (r *Replica) putCheckpoint(ctx context.Context, rec *CheckpointRecord) (*CheckpointRecord, error) {
	now, err := r.store.Now(ctx)
	if err != nil {
		return nil, err
	}
	rec.Created = now.UTC()
	body, err := json.Marshal(rec)
	if err != nil {
		return nil, err
	}
	body = append(body, '\n')
	name := checkpointName(rec.Seq)
	for range maxUnknown {
		_, err = r.replica.Put(ctx, name, bytes.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
		if err == nil {
			return rec, nil
		}
		if definite(err) && !errors.Is(err, blobstore.ErrExists) {
			return nil, err
		}
		have, rerr := readAll(ctx, r.replica, name, maxCheckpoint)
		switch {
		case rerr == nil && bytes.Equal(have, body):
			return rec, nil
		case rerr == nil:
			return r.decodeCheckpoint(have, rec.Seq)
		case !errors.Is(rerr, blobstore.ErrNotFound):
			return nil, fmt.Errorf("%w: %w; read back: %w", ErrUnknownOutcome, err, rerr)
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
}

// dropSnapshots deletes our snapshots after another record of the same manifest won: n is decided, so nobody will
// name them (rule 23). What fails here is an orphan that retention finds.
func (r *Replica) dropSnapshots(ctx context.Context, ours, won *CheckpointRecord) {
	for _, d := range ours.Disks {
		if !slices.Contains(won.Disks, d) {
			_ = r.replica.DeleteSnapshot(ctx, DiskBlobName(d.ID, d.Gen), d.Snapshot)
		}
	}
}

// ReadCheckpoint returns the checkpoint of n: ErrNotFound when there is none, ErrVoid when it is void.
func (r *Replica) ReadCheckpoint(ctx context.Context, n Seq) (*CheckpointRecord, error) {
	b, err := readAll(ctx, r.replica, checkpointName(n), maxCheckpoint)
	if errors.Is(err, blobstore.ErrNotFound) {
		return nil, fmt.Errorf("checkpoint %d: %w", n, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read checkpoint %d: %w", n, err)
	}
	c, err := r.decodeCheckpoint(b, n)
	if err != nil {
		return nil, err
	}
	if c.Void {
		return nil, fmt.Errorf("checkpoint %d: %w", n, ErrVoid)
	}
	return c, nil
}

func (r *Replica) decodeCheckpoint(b []byte, n Seq) (*CheckpointRecord, error) {
	c, err := DecodeCheckpoint(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if c.Seq != n || c.Lineage != r.lineage {
		return nil, fmt.Errorf("checkpoint %d is of manifest %d of lineage %s: %w", n, c.Seq, c.Lineage, ErrCorrupt)
	}
	return c, nil
}

// checkpoints lists the records at or above the floor, ascending, without void ones. Records are immutable and cached.
// The caller holds the turn.
func (r *Replica) checkpoints(ctx context.Context) ([]*CheckpointRecord, error) {
	var out []*CheckpointRecord
	after := ""
	if f := r.chain.state.Floor; f > 1 {
		after = checkpointName(f - 1) // the floor itself has the oldest checkpoint that is kept
	}
	known := make(map[Seq]*CheckpointRecord, len(r.ckpts))
	for p, err := range r.replica.List(ctx, ckptPrefix, after) {
		if err != nil {
			return nil, fmt.Errorf("list checkpoints: %w", err)
		}
		n, ok := seqOfName(p.Name, ckptPrefix)
		if !ok || r.chain.retention.givesUpCheckpoint(n) {
			continue // at the end of what is retired a checkpoint may still carry what lies above
		}
		c := r.ckpts[n]
		if c == nil {
			b, err := readAll(ctx, r.replica, p.Name, maxCheckpoint)
			if errors.Is(err, blobstore.ErrNotFound) {
				continue // deleted since the listing
			}
			if err != nil {
				return nil, fmt.Errorf("read checkpoint %d: %w", n, err)
			}
			if c, err = r.decodeCheckpoint(b, n); err != nil {
				return nil, err
			}
		}
		known[n] = c
		if !c.Void {
			out = append(out, c)
		}
	}
	r.ckpts = known
	return out, nil
}

// processed is the manifest up to which all disks at the head have taken the chain in.
func (r *Replica) processed(ctx context.Context) (Seq, error) {
	low := r.chain.state.Head
	for _, d := range r.chain.state.Disks() {
		p, err := r.replica.Stat(ctx, DiskBlobName(d.ID, d.Gen), "")
		a := Seq(0)
		if err == nil {
			a, _ = splitNumber(p.Sequence)
		} else if !errors.Is(err, blobstore.ErrNotFound) {
			return 0, err
		}
		low = min(low, max(a, d.First-1))
	}
	return low, nil
}

// entryAt refreshes when the chain in memory does not reach n yet.
func (r *Replica) entryAt(ctx context.Context, n Seq) (Entry, error) {
	if err := r.lock(ctx); err != nil {
		return Entry{}, err
	}
	defer r.unlock()
	if n > r.chain.state.Head {
		if err := r.refresh(ctx); err != nil {
			return Entry{}, err
		}
	}
	e, ok := r.chain.entry(n)
	if !ok {
		return Entry{}, fmt.Errorf("manifest %d: %w", n, ErrNotFound)
	}
	return *e, nil
}

func sortedDisks(m map[string]DiskState) []DiskState {
	out := make([]DiskState, 0, len(m))
	for _, d := range m {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b DiskState) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
	return out
}
