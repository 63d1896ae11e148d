package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Bounds of the retention record.
const (
	// maxPins bounds the pins of a lineage.
	maxPins = 4096
	// maxOwner bounds the owner of a pin, in bytes.
	maxOwner = 200
	// maxRecordTries bounds the races that one change of the record may lose.
	maxRecordTries = 16
)

// validOwner accepts two to four tokens with slashes between them: "failover/<id>", "hold/<name>".
func validOwner(s string) bool {
	parts := strings.Split(s, "/")
	return len(s) <= maxOwner && len(parts) <= 4 && !slices.ContainsFunc(parts, func(p string) bool { return !validToken(p, maxOwner) })
}

// Pin keeps what reaching a manifest needs: the manifest, the nearest checkpoint at or below it as of now, and everything in
// between. Pinning again with the same owner and number replaces Until and Reason, and keeps From. A pin without Until is a
// hold and ends by Unpin only; the others are dropped by Retain after Until, by storage time. Whoever reads a point pins it
// first: retention takes anything else away at any time.
//
// ErrRetired: the number is at or below the floor or in a retired range. ErrNotFound: it is not in the chain.
// ErrNotReachable: what it needs is gone. ErrContention: the record changed too often meanwhile; try again.
func (r *Replica) Pin(ctx context.Context, p Pin) error {
	if !validOwner(p.Owner) || p.Seq == 0 || p.Seq > MaxSeq || len(p.Reason) > maxText {
		return fmt.Errorf("pin manifest %d for %q: %w", p.Seq, p.Owner, ErrInvalid)
	}
	err := r.changeRecord(ctx, func(ret *Retention) (bool, error) { return r.addPin(ctx, ret, p) })
	if err != nil {
		return fmt.Errorf("pin manifest %d for %s: %w", p.Seq, p.Owner, err)
	}
	return nil
}

// addPin adds a pin to a record that the chain in memory obeys. The checkpoints are listed after the record was read: if
// retention gives one up meanwhile, the record has changed when it is put.
func (r *Replica) addPin(ctx context.Context, ret *Retention, p Pin) (bool, error) {
	if ret.Retires(p.Seq) {
		return false, ErrRetired
	}
	e, ok := r.chain.entry(p.Seq)
	if !ok {
		return false, ErrNotFound
	}
	p.Until = p.Until.UTC().Truncate(0)
	i := slices.IndexFunc(ret.Pins, func(q Pin) bool { return q.Owner == p.Owner && q.Seq == p.Seq })
	if i >= 0 {
		p.From = ret.Pins[i].From
		if ret.Pins[i] == p {
			return false, nil
		}
		ret.Pins[i] = p
		return true, nil
	}
	if len(ret.Pins) >= maxPins {
		return false, fmt.Errorf("%d pins, at most %d: %w", len(ret.Pins), maxPins, ErrInvalid)
	}
	ckpts, err := r.checkpoints(ctx)
	if err != nil {
		return false, err
	}
	how := reaches(ret, r.chain.entries, ckpts, func(q *Entry) bool { return q.Seq == e.Seq })
	if len(how) != 1 || !how[0].ok {
		return false, ErrNotReachable
	}
	p.From = how[0].from
	ret.Pins = append(ret.Pins, p)
	return true, nil
}

// Unpin removes an owner's pin of a manifest, or all of its pins when seq is 0. It is success when there is none.
func (r *Replica) Unpin(ctx context.Context, owner string, seq Seq) error {
	err := r.changeRecord(ctx, func(ret *Retention) (bool, error) {
		before := len(ret.Pins)
		ret.Pins = slices.DeleteFunc(ret.Pins, func(p Pin) bool { return p.Owner == owner && (seq == 0 || p.Seq == seq) })
		return len(ret.Pins) != before, nil
	})
	if err != nil {
		return fmt.Errorf("unpin manifest %d for %s: %w", seq, owner, err)
	}
	return nil
}

// Pins reads the pins, expired ones too.
func (r *Replica) Pins(ctx context.Context) ([]Pin, error) {
	ret, _, err := r.readRetention(ctx)
	if err != nil {
		return nil, fmt.Errorf("read pins: %w", err)
	}
	if ret == nil {
		return nil, nil
	}
	return ret.Pins, nil
}

// changeRecord reads the chain and the record, lets change work on a copy of the record, and puts it on the condition
// that the record is still the one that was read; again from the start when it is not. change says whether there is
// anything to put.
func (r *Replica) changeRecord(ctx context.Context, change func(ret *Retention) (bool, error)) error {
	if err := r.whole(); err != nil {
		return err
	}
	if err := r.lock(ctx); err != nil {
		return err
	}
	defer r.unlock()
	for range maxRecordTries {
		if err := r.refresh(ctx); err != nil {
			return err
		}
		next := r.chain.retention.clone(r.lineage)
		changed, err := change(next)
		if errors.Is(err, ErrNotReachable) {
			// What was looked at may have been given up since the record was read: then the record says so.
			if moved, rerr := r.recordMoved(ctx); rerr != nil {
				return fmt.Errorf("%s; whether it was retired since is not known: %w", err.Error(), rerr)
			} else if moved {
				continue
			}
		}
		if err != nil || !changed {
			return err
		}
		if won, err := r.putRecord(ctx, next); won || err != nil {
			return err
		}
	}
	return fmt.Errorf("the record changed %d times: %w", maxRecordTries, ErrContention)
}

// recordMoved reports whether the record is no longer the one that the chain in memory obeys.
func (r *Replica) recordMoved(ctx context.Context) (bool, error) {
	_, tag, err := r.readRetention(ctx)
	return err == nil && tag != r.chain.tag, err
}

// putRecord puts the next version of the record in place of the one that the chain in memory obeys, which it obeys then.
// won is false when another process was faster. An error means that storage did not say. The caller holds the turn.
func (r *Replica) putRecord(ctx context.Context, next *Retention) (won bool, err error) {
	body, err := next.Encode()
	if err != nil {
		return false, err
	}
	cond := blobstore.Conditions{IfMatch: r.chain.tag}
	if r.bugs.NoIfMatch {
		cond = blobstore.Conditions{}
	} else if r.chain.tag == "" {
		cond = blobstore.Conditions{CreateOnly: true}
	}
	for range maxUnknown {
		var p blobstore.Properties
		p, err = r.replica.Put(ctx, retentionName, bytes.NewReader(body), int64(len(body)), cond)
		if err == nil {
			r.obey(next, p.ETag)
			return true, nil
		}
		raced := errors.Is(err, blobstore.ErrConditionFailed) || errors.Is(err, blobstore.ErrExists)
		if definite(err) && !raced {
			return false, fmt.Errorf("put retention record: %w", err)
		}
		have, p, rerr := readAllOf(ctx, r.replica, retentionName, maxRetention)
		switch {
		case rerr == nil && bytes.Equal(have, body):
			r.obey(next, p.ETag)
			return true, nil
		case rerr != nil && !errors.Is(rerr, blobstore.ErrNotFound):
			return false, fmt.Errorf("put retention record: %w: %w; read back: %w", ErrUnknownOutcome, err, rerr)
		case raced, p.ETag != r.chain.tag:
			return false, nil
		}
	}
	return false, fmt.Errorf("put retention record: %w: %w", ErrUnknownOutcome, err)
}
