package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/failpoint"
)

// maxCommitAttempts bounds the races one Commit may lose. Each lost race is somebody's success, and a lineage has a
// handful of shippers.
const maxCommitAttempts = 64

// maxUnknown bounds how often a put with an unknown outcome is tried again at the same number.
const maxUnknown = 3

// Proposal is what a task asks to commit. Commit adds the number, the hash link, and for fences and rewinds the epoch.
type Proposal struct {
	Kind Kind
	// Epoch and Open were granted with the task. They are ignored for close, open and rewind, which take them
	// from the head.
	Epoch Epoch
	Open  Seq
	// Point is the ordinal of a base or point; Pass the task of a partial.
	Point Ordinal
	Pass  *Pass
	// Base is what CutPoint or BeginPass of the host returned; for a rewind, the target ordinal.
	Base Ordinal
	// Failover names the failover of a close, rewind or open.
	Failover string
	// At, when not 0, is the only number acceptable (rules 13 and 17): ErrHeadMoved otherwise.
	At          Seq
	CutTime     time.Time
	Consistency Consistency
	// Config is what PutConfig returned.
	Config string
	// Signals of a base or point, when they are known.
	Signals *Signals
	// Disks: all disks of the VM for a base or point. Every segment was returned by PutSegment.
	Disks  []Disk
	Host   string
	Reason string
	Trace  string
}

// Result of a Commit that did not fail.
type Result struct {
	Outcome Outcome
	// Seq is the manifest in the chain that holds what was proposed: this call's, or the earlier one.
	Seq Seq
	// Epoch of that manifest. After an open, tasks carry this epoch and Open = Seq.
	Epoch Epoch
}

func (p *Proposal) manifest(l Lineage, s *State, b *bugs) *Manifest {
	m := &Manifest{V: ManifestVersion, Lineage: l, Epoch: p.Epoch, Open: p.Open, Seq: s.Head + 1, Prev: s.HeadHash,
		Kind: p.Kind, Point: p.Point, Pass: p.Pass, Base: p.Base, Failover: p.Failover, CutTime: p.CutTime.UTC(),
		Consistency: p.Consistency, Config: p.Config, Signals: p.Signals, Disks: p.Disks, Host: p.Host, Reason: p.Reason, Trace: p.Trace}
	switch p.Kind {
	case KindClose, KindRewind:
		m.Epoch, m.Open = max(s.Epoch, 1), s.Open
	case KindOpen:
		m.Epoch, m.Open = s.Epoch+1, s.Open
	}
	if (b.SelfRaisedEpoch) && m.Epoch < s.Epoch {
		m.Epoch = s.Epoch
	}
	return m
}

// Commit makes the proposal the next manifest of the chain, or finds that the chain has it already. A refusal
// (IsRefusal) is final for the task. After any other error the outcome may be unknown: proposing the same again is
// always safe. Segments and configuration must be stored before.
func (r *Replica) Commit(ctx context.Context, p Proposal) (Result, error) {
	if err := r.lock(ctx); err != nil {
		return Result{}, err
	}
	defer r.unlock()
	res, err := r.commit(ctx, &p)
	if err != nil {
		return Result{}, fmt.Errorf("commit %s: %w", p.describe(), err)
	}
	if err := r.putPending(ctx); err != nil {
		return Result{}, err
	}
	return res, nil
}

func (p *Proposal) describe() string {
	switch {
	case p.Pass != nil:
		return fmt.Sprintf("%s of pass %d, task %d of %d", p.Kind, p.Pass.Ordinal, p.Pass.I, p.Pass.K)
	case p.Failover != "":
		return fmt.Sprintf("%s by failover %s", p.Kind, p.Failover)
	}
	return fmt.Sprintf("%s %d", p.Kind, p.Point)
}

func (r *Replica) commit(ctx context.Context, p *Proposal) (Result, error) {
	if err := r.whole(); err != nil {
		return Result{}, err
	}
	fresh := false // the state was read from storage since the last change we know of
	for range maxCommitAttempts {
		st := &r.chain.state
		m := p.manifest(r.lineage, st, &r.bugs)
		var dup Seq
		var body []byte
		var err error
		if m.Open > st.Head { // an open that this process has not seen, or that never was
			err = fmt.Errorf("names open %d, head is %d: %w", m.Open, st.Head, ErrStaleOpen)
		} else {
			if body, err = m.Encode(); err != nil {
				return Result{}, err
			}
			dup, err = st.admit(m, &r.bugs)
		}
		if dup == 0 && err == nil && p.At != 0 && p.At != m.Seq {
			err = fmt.Errorf("must be manifest %d, next is %d: %w", p.At, m.Seq, ErrHeadMoved)
		}
		switch {
		case dup != 0:
			return r.already(ctx, dup)
		case err != nil && fresh:
			return Result{}, err
		case err != nil:
			if err := r.refresh(ctx); err != nil {
				return Result{}, err
			}
			fresh = true
			continue
		}
		won, stored, err := r.putManifest(ctx, m.Seq, body)
		if err != nil {
			return Result{}, err
		}
		if won {
			won, err = r.notRetired(ctx, m.Seq)
			if err != nil {
				return Result{}, err
			}
		}
		if won {
			if err := r.chain.add(body, stored, r.lineage, &r.bugs); err != nil {
				return Result{}, err
			}
			return Result{Outcome: Committed, Seq: m.Seq, Epoch: m.Epoch}, nil
		}
		if err := r.refresh(ctx); err != nil {
			return Result{}, err
		}
		fresh = true
	}
	return Result{}, fmt.Errorf("lost %d races: %w", maxCommitAttempts, ErrContention)
}

func (r *Replica) already(ctx context.Context, dup Seq) (Result, error) {
	m, err := r.manifest(ctx, dup)
	if errors.Is(err, ErrNotFound) { // a fence below the floor
		return Result{Outcome: AlreadyCommitted, Seq: dup}, nil
	}
	if err != nil {
		return Result{}, err
	}
	return Result{Outcome: AlreadyCommitted, Seq: dup, Epoch: m.Epoch}, nil
}

// putManifest reports whether the bytes at that number are ours, and since when, by storage time. An error means that
// storage did not say.
func (r *Replica) putManifest(ctx context.Context, seq Seq, body []byte) (won bool, stored time.Time, err error) {
	if err := failpoint.Hit(fpBeforeManifest); err != nil {
		return false, stored, err
	}
	name := manifestName(seq)
	for range maxUnknown {
		var p blobstore.Properties
		p, err = r.journal.Put(ctx, name, bytes.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
		if err == nil {
			return true, p.LastModified, failpoint.Hit(fpAfterManifest)
		}
		if definite(err) && !errors.Is(err, blobstore.ErrExists) {
			return false, stored, err
		}
		// Somebody's manifest, or our own whose answer was lost: reading tells.
		have, p, rerr := readAllOf(ctx, r.journal, name, MaxManifest)
		switch {
		case rerr == nil:
			return bytes.Equal(have, body), p.LastModified, nil
		case !errors.Is(rerr, blobstore.ErrNotFound):
			return false, stored, fmt.Errorf("put manifest %d: %w: %w; read back: %w", seq, ErrUnknownOutcome, err, rerr)
		case errors.Is(err, blobstore.ErrExists):
			return false, stored, nil // it was there and is gone: retention deleted it, so the number is retired
		}
	}
	return false, stored, fmt.Errorf("put manifest %d: %w: %w", seq, ErrUnknownOutcome, err)
}

// notRetired is rule 8: a number at or below the floor is no commit.
func (r *Replica) notRetired(ctx context.Context, seq Seq) (bool, error) {
	ret, _, err := r.readRetention(ctx)
	if err != nil {
		return false, fmt.Errorf("manifest %d is stored, but whether it counts is not known: %w: %w", seq, ErrUnknownOutcome, err)
	}
	return !ret.Retires(seq) || r.bugs.RefillCounts, nil
}

// definite reports whether storage said what happened. Anything else is an unknown outcome.
func definite(err error) bool {
	for _, s := range []error{blobstore.ErrNotFound, blobstore.ErrExists, blobstore.ErrConditionFailed,
		blobstore.ErrLeaseConflict, blobstore.ErrInvalid, blobstore.ErrFull} {
		if errors.Is(err, s) {
			return true
		}
	}
	return false
}
