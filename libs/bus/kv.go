package bus

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
)

const (
	kvFormat = 1 // first byte of every value
	kvNonce  = 8 // bytes after it, random for each write
	kvHeader = 1 + kvNonce

	// writeTries bounds how often a write with an unknown outcome is repeated.
	writeTries = 5
	// tryTimeout bounds one of them: repeating is safe, so waiting long for an
	// answer that went down with a connection is not worth it.
	tryTimeout = 2 * time.Second
	// mutateTries bounds how often Mutate starts again after another writer won.
	mutateTries = 32
)

// KV is one bucket of records of one message type, written by compare-and-set
// only. It is safe for concurrent use.
//
// Each value carries a random number of its write. When the answer to a write is
// lost, the record is read again and the number tells whether the write was
// carried out, so that two writers who write equal content are not mistaken for
// each other.
type KV[T proto.Message] struct {
	b      *Bus
	bucket string
	kv     jetstream.KeyValue
	stream jetstream.Stream // the one that keeps the bucket
}

// Entry is one record.
type Entry[T proto.Message] struct {
	Key      string
	Value    T      // nil for a deleted record
	Revision uint64 // grows with every write of the bucket
	Time     time.Time
}

// OpenKV opens a bucket that [Bus.Declare] made; [ErrNotFound] if it did not.
func OpenKV[T proto.Message](ctx context.Context, b *Bus, bucket string) (*KV[T], error) {
	kv, err := b.js.KeyValue(ctx, bucketPrefix+bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, fmt.Errorf("open bucket %s: %w", bucket, ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bucket, err)
	}
	stream, err := b.js.Stream(ctx, "KV_"+bucketPrefix+bucket)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bucket, err)
	}
	return &KV[T]{b: b, bucket: bucket, kv: kv, stream: stream}, nil
}

// Key joins parts to a key with dots. Bytes that a key cannot hold, and dots
// inside a part, are written as "=" and two hexadecimal digits; an empty part,
// which a key cannot hold either, as "=00".
func Key(parts ...string) string {
	var b strings.Builder
	for i, part := range parts {
		if i > 0 {
			b.WriteByte('.')
		}
		if part == "" {
			b.WriteString("=00")
		}
		for _, c := range []byte(part) {
			if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
				b.WriteByte(c)
			} else {
				fmt.Fprintf(&b, "=%02X", c)
			}
		}
	}
	return b.String()
}

// KeyParts undoes [Key].
func KeyParts(key string) ([]string, error) {
	parts := strings.Split(key, ".")
	for i, part := range parts {
		if part == "=00" {
			parts[i] = ""
			continue
		}
		var b strings.Builder
		for j := 0; j < len(part); j++ {
			c := part[j]
			if c == '=' {
				var v byte
				if len(part) < j+3 {
					return nil, fmt.Errorf("key %q: %w", key, ErrName)
				}
				if _, err := fmt.Sscanf(part[j+1:j+3], "%02X", &v); err != nil {
					return nil, fmt.Errorf("key %q: %w", key, ErrName)
				}
				c, j = v, j+2
			}
			b.WriteByte(c)
		}
		parts[i] = b.String()
	}
	if Key(parts...) != key {
		return nil, fmt.Errorf("key %q: %w", key, ErrName)
	}
	return parts, nil
}

func checkKey(key string) error {
	_, err := KeyParts(key)
	return err
}

func (k *KV[T]) wrap(op, key string, err error) error {
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound), errors.Is(err, jetstream.ErrKeyDeleted):
		err = ErrNotFound
	case errors.Is(err, jetstream.ErrKeyRevisionMismatch):
		err = ErrRevision
	case errors.Is(err, jetstream.ErrKeyExists):
		err = ErrExists
	}
	return fmt.Errorf("%s %s/%s: %w", op, k.bucket, key, err)
}

func (k *KV[T]) message() T {
	var zero T
	return zero.ProtoReflect().New().Interface().(T)
}

func (k *KV[T]) encode(m T) ([]byte, error) {
	out := make([]byte, kvHeader, kvHeader+proto.Size(m))
	out[0] = kvFormat
	if _, err := rand.Read(out[1:kvHeader]); err != nil {
		return nil, err
	}
	return proto.MarshalOptions{}.MarshalAppend(out, m)
}

func (k *KV[T]) decode(value []byte) (T, error) {
	var zero T
	if len(value) == 0 || value[0] != kvFormat {
		var version int
		if len(value) > 0 {
			version = int(value[0])
		}
		return zero, fmt.Errorf("%w %d, this program knows %d", ErrVersion, version, kvFormat)
	}
	if len(value) < kvHeader {
		return zero, fmt.Errorf("value of %d bytes is cut short", len(value))
	}
	m := k.message()
	if err := proto.Unmarshal(value[kvHeader:], m); err != nil {
		return zero, err
	}
	return m, nil
}

// Get reads a record and its revision; [ErrNotFound] if there is none.
func (k *KV[T]) Get(ctx context.Context, key string) (T, uint64, error) {
	var zero T
	if err := checkKey(key); err != nil {
		return zero, 0, err
	}
	e, err := k.kv.Get(ctx, key)
	if err != nil {
		return zero, 0, k.wrap("get", key, err)
	}
	m, err := k.decode(e.Value())
	if err != nil {
		return zero, 0, k.wrap("decode", key, err)
	}
	return m, e.Revision(), nil
}

// Create writes a record that does not exist yet and returns its revision;
// [ErrExists] if it does, [ErrUnknown] if that could not be found out.
func (k *KV[T]) Create(ctx context.Context, key string, value T) (uint64, error) {
	rev, err := k.write(ctx, key, value, func(ctx context.Context, data []byte) (uint64, error) {
		return k.kv.Create(ctx, key, data)
	}, 0)
	if err != nil {
		return 0, k.wrap("create", key, err)
	}
	return rev, nil
}

// Update replaces a record that is at revision rev and returns the new revision;
// [ErrRevision] if it is not at rev or does not exist, [ErrUnknown] if the
// outcome could not be found out.
func (k *KV[T]) Update(ctx context.Context, key string, value T, rev uint64) (uint64, error) {
	if rev == 0 {
		return 0, k.wrap("update", key, ErrRevision)
	}
	rev, err := k.write(ctx, key, value, func(ctx context.Context, data []byte) (uint64, error) {
		return k.kv.Update(ctx, key, data, rev)
	}, rev)
	if err != nil {
		return 0, k.wrap("update", key, err)
	}
	return rev, nil
}

// write repeats one conditional write until its outcome is known. base is the
// revision it builds upon, 0 for none.
func (k *KV[T]) write(
	ctx context.Context, key string, value T, put func(context.Context, []byte) (uint64, error), base uint64,
) (uint64, error) {
	if err := checkKey(key); err != nil {
		return 0, err
	}
	data, err := k.encode(value)
	if err != nil {
		return 0, err
	}
	var last error
	for range writeTries {
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		rev, err := put(try, data)
		cancel()
		switch {
		case err == nil:
			return rev, nil
		case errors.Is(err, jetstream.ErrKeyRevisionMismatch), errors.Is(err, jetstream.ErrKeyExists):
			// Somebody wrote: ourselves in an earlier try, or another.
			rev, found, complete, ferr := k.find(ctx, key, data[1:kvHeader], base)
			switch {
			case ferr != nil:
				return 0, fmt.Errorf("%w: %w", ErrUnknown, ferr)
			case found:
				return rev, nil
			case last != nil && !complete:
				return 0, fmt.Errorf("%w: the record was rewritten since", ErrUnknown)
			}
			return 0, err
		case !unknownOutcome(err):
			return 0, err
		}
		last = err
		if ctx.Err() != nil {
			break
		}
	}
	return 0, fmt.Errorf("%w: %w", ErrUnknown, last)
}

// find looks for the write of nonce among the kept revisions. complete is false
// if a revision between base and the oldest kept one may have been ours.
func (k *KV[T]) find(ctx context.Context, key string, nonce []byte, base uint64) (rev uint64, found, complete bool, err error) {
	try, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	history, err := k.kv.History(try, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, false, base == 0, nil // gone: with a base, deleted by somebody after whatever we did
	} else if err != nil {
		return 0, false, false, err
	}
	for _, e := range history {
		complete = complete || e.Revision() <= base
		if v := e.Value(); e.Operation() == jetstream.KeyValuePut && len(v) >= kvHeader && bytes.Equal(v[1:kvHeader], nonce) {
			return e.Revision(), true, true, nil
		}
	}
	return 0, false, complete || len(history) < kvHistory && base == 0, nil
}

// Delete removes a record that is at revision rev; [ErrRevision] if it is not.
// Deleting a record that does not exist succeeds.
func (k *KV[T]) Delete(ctx context.Context, key string, rev uint64) error {
	if err := checkKey(key); err != nil {
		return err
	}
	if rev == 0 {
		return k.wrap("delete", key, ErrRevision)
	}
	var last error
	for range writeTries {
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		err := k.kv.Purge(try, key, jetstream.LastRevision(rev), jetstream.PurgeTTL(kvMarkerAge))
		cancel()
		if err == nil {
			return nil
		}
		if errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			if _, gerr := k.kv.Get(ctx, key); errors.Is(gerr, jetstream.ErrKeyNotFound) {
				return nil
			}
			return k.wrap("delete", key, err)
		}
		if !unknownOutcome(err) {
			return k.wrap("delete", key, err)
		}
		last = err
		if ctx.Err() != nil {
			break
		}
	}
	return k.wrap("delete", key, fmt.Errorf("%w: %w", ErrUnknown, last))
}

// Mutate reads a record, lets change edit it, and writes it if nobody else did
// meanwhile, else starts again, a bounded number of times. change may run
// several times, each time on a fresh copy, and must have no other effect. It
// returns the record as written. If change returns [NoChange], nothing is
// written and the record as read is returned; any other error ends it.
func (k *KV[T]) Mutate(ctx context.Context, key string, change func(T) error) (T, uint64, error) {
	return k.mutate(ctx, key, change, false)
}

// MutateOrCreate is [KV.Mutate] that begins with an empty message where there is
// no record.
func (k *KV[T]) MutateOrCreate(ctx context.Context, key string, change func(T) error) (T, uint64, error) {
	return k.mutate(ctx, key, change, true)
}

func (k *KV[T]) mutate(ctx context.Context, key string, change func(T) error, create bool) (T, uint64, error) {
	var zero T
	var last error
	for range mutateTries {
		value, rev, err := k.Get(ctx, key)
		if create && errors.Is(err, ErrNotFound) {
			value, rev, err = k.message(), 0, nil
		}
		if err != nil {
			return zero, 0, err
		}
		if err := change(value); errors.Is(err, NoChange) {
			return value, rev, nil
		} else if err != nil {
			return zero, 0, fmt.Errorf("change %s/%s: %w", k.bucket, key, err)
		}
		if rev == 0 {
			rev, err = k.Create(ctx, key, value)
		} else {
			rev, err = k.Update(ctx, key, value, rev)
		}
		if err == nil {
			return value, rev, nil
		}
		if !errors.Is(err, ErrRevision) && !errors.Is(err, ErrExists) {
			return zero, 0, err
		}
		last = err
	}
	return zero, 0, fmt.Errorf("%d other writers were faster: %w", mutateTries, last)
}

// List returns the records whose keys match filter, by key. A filter is a key in
// which "*" stands for one part and a last ">" for one or more; "" is all.
func (k *KV[T]) List(ctx context.Context, filter string) ([]Entry[T], error) {
	found := map[string]Entry[T]{}
	err := k.scan(ctx, filter, func(e jetstream.KeyValueEntry) error {
		if e.Operation() != jetstream.KeyValuePut {
			delete(found, e.Key())
			return nil
		}
		entry, err := k.entry(e)
		if err != nil {
			return err
		}
		found[e.Key()] = entry // a key written during the scan comes twice: the later one counts
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", k.bucket, err)
	}
	keys := make([]string, 0, len(found))
	for key := range found {
		keys = append(keys, key)
	}
	out := make([]Entry[T], 0, len(found))
	for _, key := range sorted(keys) {
		out = append(out, found[key])
	}
	return out, nil
}

// Keys returns the keys that match filter, in order; see [KV.List].
func (k *KV[T]) Keys(ctx context.Context, filter string) ([]string, error) {
	found := map[string]struct{}{}
	err := k.scan(ctx, filter, func(e jetstream.KeyValueEntry) error {
		if e.Operation() != jetstream.KeyValuePut {
			delete(found, e.Key())
			return nil
		}
		found[e.Key()] = struct{}{}
		return nil
	}, jetstream.MetaOnly())
	if err != nil {
		return nil, fmt.Errorf("list keys of %s: %w", k.bucket, err)
	}
	keys := make([]string, 0, len(found))
	for key := range found {
		keys = append(keys, key)
	}
	return sorted(keys), nil
}

func (k *KV[T]) scan(ctx context.Context, filter string, each func(jetstream.KeyValueEntry) error, opts ...jetstream.WatchOpt) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	w, err := k.kv.Watch(ctx, orAll(filter), opts...)
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }()
	all := k.wholeness(filter)
	defer all.stop()
	for {
		select {
		case e, ok := <-w.Updates():
			if !ok {
				return errors.New("the watch ended early")
			}
			if e != nil {
				if err := each(e); err != nil {
					return err
				}
			}
			if all.seen(ctx, e) {
				return nil
			}
		case <-all.again():
			if all.ask(ctx) {
				return nil
			}
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), all.err)
		}
	}
}

func (k *KV[T]) entry(e jetstream.KeyValueEntry) (Entry[T], error) {
	out := Entry[T]{Key: e.Key(), Revision: e.Revision(), Time: e.Created()}
	if e.Operation() != jetstream.KeyValuePut {
		return out, nil
	}
	var err error
	if out.Value, err = k.decode(e.Value()); err != nil {
		return out, k.wrap("decode", e.Key(), err)
	}
	return out, nil
}

func orAll(filter string) string {
	if filter == "" {
		return ">"
	}
	return filter
}

// withTimeout bounds a request whose context has no deadline.
func withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, has := ctx.Deadline(); has {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, requestTimeout)
}
