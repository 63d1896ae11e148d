package bus

import (
	"context"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// recheck is how long after the announced end of a scan keys that are still missing are looked for again.
const recheck = 100 * time.Millisecond

// wholeness finds out when a watch has brought every key that there was at its start.
//
// The announced end is not to be trusted: it comes when the server counts nothing pending, and the server takes one off
// its count for each old revision that a write pushes out of a key's history. A key that is rewritten often while a
// watch begins is then counted as brought before it was, and a list of the bucket would lack a record that was there all
// the time. So the keys are counted: the stream says which there are, and what is missing is on its way.
type wholeness struct {
	stream  jetstream.Stream
	prefix  string // of the subjects of keys
	filter  string
	keys    map[string]struct{} // seen, until whole
	missing map[string]struct{} // nil before the announced end
	whole   bool                // was seen to be
	err     error               // of the last question, if it failed
	timer   *time.Timer
}

func (k *KV[T]) wholeness(filter string) *wholeness {
	prefix := "$KV." + bucketPrefix + k.bucket + "."
	return &wholeness{stream: k.stream, prefix: prefix, filter: prefix + orAll(filter), keys: map[string]struct{}{}}
}

// seen takes what a watch brought, nil for the announced end. It is true once: when everything has been seen.
func (h *wholeness) seen(ctx context.Context, e jetstream.KeyValueEntry) bool {
	switch {
	case h.whole:
		return false
	case e == nil:
		return h.ask(ctx)
	}
	h.keys[e.Key()] = struct{}{}
	if _, waited := h.missing[e.Key()]; !waited {
		return false
	}
	delete(h.missing, e.Key())
	return len(h.missing) == 0 && h.end()
}

// ask asks which keys there are. It is true once, as seen; when it is not, the question is asked again after a while:
// a missing key may have been forgotten since, or the answer was.
func (h *wholeness) ask(ctx context.Context) bool {
	if h.whole {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	info, err := h.stream.Info(ctx, jetstream.WithSubjectFilter(h.filter))
	if h.err = err; err == nil {
		h.missing = map[string]struct{}{}
		for subject := range info.State.Subjects {
			key := strings.TrimPrefix(subject, h.prefix)
			if _, ok := h.keys[key]; !ok {
				h.missing[key] = struct{}{}
			}
		}
		if len(h.missing) == 0 {
			return h.end()
		}
	}
	h.stop()
	h.timer = time.NewTimer(recheck)
	return false
}

func (h *wholeness) end() bool {
	h.stop()
	h.whole, h.keys, h.missing = true, nil, nil
	return true
}

// again is when to ask again; nil when there is nothing to ask.
func (h *wholeness) again() <-chan time.Time {
	if h.timer == nil {
		return nil
	}
	return h.timer.C
}

// restart forgets what was seen by a watch that another one replaces, unless everything was.
func (h *wholeness) restart() {
	if !h.whole {
		h.stop()
		h.keys, h.missing = map[string]struct{}{}, nil
	}
}

func (h *wholeness) stop() {
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
}
