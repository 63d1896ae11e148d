package replica

import (
	"context"
	"fmt"
	"iter"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Replica is one lineage in storage. It is safe for concurrent use; calls that read the head or commit take
// turns. Keep one per lineage and process: it caches the immutable chain.
type Replica struct {
	lineage                   Lineage
	store                     blobstore.Store
	journal, staging, replica blobstore.Container

	// turn is a lock of one slot that honours a context; it guards everything below.
	turn  chan struct{}
	chain chain
	ckpts map[Seq]*CheckpointRecord // cache of immutable records

	pace pace // how fast appliers of this process were
	seen seen // how they left the page blobs

	damage  error // of a chain that is for reading only; nil when it is whole
	opens   int   // segment indexes fetched at a time when reading a point
	bugs    bugs
	pending []pendingPut // only with bugs.ManifestBeforeSegments
}

// Create makes the containers of a lineage and opens it. It is idempotent.
func Create(ctx context.Context, store blobstore.Store, lineage Lineage) (*Replica, error) {
	l, err := ParseLineage(string(lineage))
	if err != nil {
		return nil, err
	}
	// The journal last: its existence says that the lineage exists.
	for _, name := range []string{l.StagingContainer(), l.ReplicaContainer(), l.FailoverContainer(), l.JournalContainer()} {
		if err := store.CreateContainer(ctx, name); err != nil {
			return nil, fmt.Errorf("create lineage %s: %w", l, err)
		}
	}
	return Open(ctx, store, l)
}

// Open reads the chain of an existing lineage: ErrNoLineage when it was never created, ErrCorrupt when the chain
// is not one.
func Open(ctx context.Context, store blobstore.Store, lineage Lineage) (*Replica, error) {
	return open(ctx, store, lineage, bugs{})
}

func open(ctx context.Context, store blobstore.Store, lineage Lineage, b bugs) (*Replica, error) {
	l, err := ParseLineage(string(lineage))
	if err != nil {
		return nil, err
	}
	r := newReplica(store, l, b)
	if err := r.refresh(ctx); err != nil {
		return nil, fmt.Errorf("open lineage %s: %w", l, err)
	}
	return r, nil
}

func newReplica(store blobstore.Store, l Lineage, b bugs) *Replica {
	return &Replica{
		lineage: l, store: store, turn: make(chan struct{}, 1), opens: openParallel, bugs: b,
		journal: store.Container(l.JournalContainer()),
		staging: store.Container(l.StagingContainer()),
		replica: store.Container(l.ReplicaContainer()),
	}
}

// Lineages yields the lineages that a store holds, in order of their ids.
func Lineages(ctx context.Context, store blobstore.Store) iter.Seq2[Lineage, error] {
	return func(yield func(Lineage, error) bool) {
		for name, err := range store.ListContainers(ctx, journalPrefix) {
			if err != nil {
				yield("", fmt.Errorf("list lineages: %w", err))
				return
			}
			if l, err := ParseLineage(strings.TrimPrefix(name, journalPrefix)); err == nil && l != ValidationLineage && !yield(l, nil) {
				return
			}
		}
	}
}

// Lineage returns the lineage's id.
func (r *Replica) Lineage() Lineage { return r.lineage }

// Store returns the store the replica lives in.
func (r *Replica) Store() blobstore.Store { return r.store }

// lock takes the turn, or returns the context's error.
func (r *Replica) lock(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *Replica) unlock() { <-r.turn }

// Refresh reads the retention record and the manifests that are new, verifies them, and returns the state at the
// head. Use the answer for decisions; it is as old as the call.
func (r *Replica) Refresh(ctx context.Context) (*State, error) {
	if err := r.lock(ctx); err != nil {
		return nil, err
	}
	defer r.unlock()
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	return r.chain.state.clone(), nil
}

// PassProgress refreshes, and says which tasks of the pass are in the chain. A pass with none yet is all missing,
// as far as the caller knows k.
func (r *Replica) PassProgress(ctx context.Context, pass Ordinal, k uint32) (PassProgress, error) {
	st, err := r.Refresh(ctx)
	if err != nil {
		return PassProgress{}, err
	}
	if p, ok := st.Pass(pass); ok {
		return p, nil
	}
	out := PassProgress{Ordinal: pass, K: k, Missing: make([]uint32, k)}
	for i := range out.Missing {
		out.Missing[i] = uint32(i) + 1
	}
	return out, nil
}

// Find refreshes and returns the manifest of the base or point with that ordinal; ErrNotFound when it is not in
// the chain or below the floor.
func (r *Replica) Find(ctx context.Context, point Ordinal) (*Manifest, error) {
	st, err := r.Refresh(ctx)
	if err != nil {
		return nil, err
	}
	seq, ok := st.PointSeq(point)
	if !ok {
		return nil, fmt.Errorf("point %d of lineage %s: %w", point, r.lineage, ErrNotFound)
	}
	return r.Manifest(ctx, seq)
}

// Manifest returns a manifest that the chain held at the last refresh. Treat it as read-only.
func (r *Replica) Manifest(ctx context.Context, seq Seq) (*Manifest, error) {
	if err := r.lock(ctx); err != nil {
		return nil, err
	}
	defer r.unlock()
	return r.manifest(ctx, seq)
}
