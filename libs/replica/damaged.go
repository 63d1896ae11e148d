package replica

import (
	"context"
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// ValidationLineage is the one whose containers `landfall storage validate` makes and writes to. No machine is ever given it.
const ValidationLineage Lineage = "00000000000000000000000000000000"

// OpenDamaged opens a lineage also when its chain is broken: what lies below the first manifest that is missing or wrong is
// what it was, and can be read. damage says what is wrong, nil when nothing is; then the replica is as Open makes it. A
// damaged one is for reading only: whatever commits, applies, pins or retires is refused with ErrCorrupt, since a number that
// looks free may be one that somebody lost.
func OpenDamaged(ctx context.Context, store blobstore.Store, lineage Lineage) (r *Replica, damage, err error) {
	r, err = Open(ctx, store, lineage)
	if err == nil || !errors.Is(err, ErrCorrupt) {
		return r, nil, err
	}
	l, perr := ParseLineage(string(lineage))
	if perr != nil {
		return nil, nil, perr
	}
	r = newReplica(store, l, bugs{})
	switch damage = r.refresh(ctx); {
	case damage == nil: // it was being repaired
		return r, nil, nil
	case !errors.Is(damage, ErrCorrupt):
		return nil, nil, fmt.Errorf("open lineage %s: %w", l, damage)
	case r.chain.state.Head == 0:
		return nil, nil, err
	}
	r.damage = damage
	return r, damage, nil
}

// whole refuses what a damaged chain must not be used for.
func (r *Replica) whole() error {
	if r.damage != nil {
		return fmt.Errorf("the chain is damaged: %w", r.damage)
	}
	return nil
}
