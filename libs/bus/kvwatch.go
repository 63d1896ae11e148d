package bus

import (
	"context"
	"fmt"
	"iter"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
)

// UpdateKind says what an [Update] is.
type UpdateKind uint8

// Kinds of updates.
const (
	Put     UpdateKind = iota + 1 // the record has this value
	Deleted                       // the record is gone
	Current                       // everything that existed at the start has been seen; no entry
)

// Update is one step of a watch.
type Update[T proto.Message] struct {
	Kind UpdateKind
	Entry[T]
}

// Watch yields the records that match filter (see [KV.List]) as they are, then
// one update of kind [Current], then every change until ctx ends or the loop
// does. Changes made while the connection is away follow after the reconnect; of
// several changes of one record only the last is promised. The sequence ends
// with an error, ctx's at the end of ctx. A value that does not decode ends it.
func (k *KV[T]) Watch(ctx context.Context, filter string) iter.Seq2[Update[T], error] {
	return func(yield func(Update[T], error) bool) {
		if err := k.watch(ctx, filter, func(u Update[T]) bool { return yield(u, nil) }); err != nil {
			yield(Update[T]{}, fmt.Errorf("watch %s: %w", k.bucket, err))
		}
	}
}

// watch returns nil if yield wants no more.
func (k *KV[T]) watch(ctx context.Context, filter string, yield func(Update[T]) bool) error {
	var last uint64
	started := false
	current := k.wholeness(filter)
	defer current.stop()
	wait := reconnectFirst
	for {
		again := k.b.nextReconnect()
		opts := []jetstream.WatchOpt{}
		if last > 0 {
			opts = append(opts, jetstream.ResumeFromRevision(last+1))
		}
		w, err := k.kv.Watch(ctx, orAll(filter), opts...)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if !started && !unknownOutcome(err) {
				return err
			}
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			wait = min(2*wait, reconnectLast)
			continue
		}
		started, wait = true, reconnectFirst
		current.restart()
		more, err := k.drain(ctx, w, again, &last, current, yield)
		_ = w.Stop()
		if err != nil || !more {
			return err
		}
	}
}

// drain passes on what w brings until the connection was renewed, which leaves w
// without a server for a while.
func (k *KV[T]) drain(
	ctx context.Context, w jetstream.KeyWatcher, again <-chan struct{}, last *uint64, current *wholeness, yield func(Update[T]) bool,
) (more bool, err error) {
	for {
		whole := false
		select {
		case e, ok := <-w.Updates():
			if !ok {
				return true, nil
			}
			if e != nil && e.Revision() > *last {
				if more, err := k.pass(e, last, current.whole, yield); !more || err != nil {
					return false, err
				}
			}
			whole = current.seen(ctx, e)
		case <-current.again():
			whole = current.ask(ctx)
		case <-again:
			return true, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		if whole && !yield(Update[T]{Kind: Current}) {
			return false, nil
		}
	}
}

// pass yields one entry. current says that everything that existed at the start has been yielded.
func (k *KV[T]) pass(e jetstream.KeyValueEntry, last *uint64, current bool, yield func(Update[T]) bool) (more bool, err error) {
	entry, err := k.entry(e)
	if err != nil {
		return false, err
	}
	kind := Put
	if e.Operation() != jetstream.KeyValuePut {
		kind = Deleted
	}
	if current { // before that, a restart must begin afresh: keys come in no promised order
		*last = e.Revision()
	}
	return yield(Update[T]{Kind: kind, Entry: entry}), nil
}
