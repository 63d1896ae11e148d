package replica

import (
	"context"
	"fmt"
)

// Pin keeps what reaching a manifest needs: the manifest, the nearest checkpoint at or below it as of now, and everything in
// between. Pinning again with the same owner and number replaces Until and Reason. A pin without Until is a hold and
// ends by Unpin only; the others are dropped by Retain after Until, by storage time.
//
// ErrRetired: the number is at or below the floor or in a retired range. ErrNotFound: it is not in the chain.
// ErrNotReachable: what it needs is gone. ErrContention: the record changed too often meanwhile; try again.
func (r *Replica) Pin(ctx context.Context, p Pin) error {
	return fmt.Errorf("pin manifest %d for %s: not written yet: %w", p.Seq, p.Owner, ctx.Err())
}

// Unpin removes an owner's pin of a manifest, or all of its pins when seq is 0. It is success when there is none.
func (r *Replica) Unpin(ctx context.Context, owner string, seq Seq) error {
	return fmt.Errorf("unpin manifest %d for %s: not written yet: %w", seq, owner, ctx.Err())
}

// Pins reads the pins, expired ones too.
func (r *Replica) Pins(ctx context.Context) ([]Pin, error) {
	return nil, fmt.Errorf("read pins: not written yet: %w", ctx.Err())
}
