package azure

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure/internal/pace"
)

// maxBackoff bounds the delay between two tries.
const maxBackoff = 30 * time.Second

var errNoDate = errors.New("storage answers without a date")

// call describes one operation to [Store.call].
type call struct {
	op    string
	name  string // container/blob, or container, or ""
	blob  bool   // name is a blob: its window applies
	pages bool   // and it is a page blob: its rates apply
	read  bool   // bytes are the answer's
	bytes int64  // of the body or of the answer
}

// ready refuses work for an ended context or a closed store.
func (s *Store) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return ErrClosed
	}
	return nil
}

// wrap names the operation.
func (s *Store) wrap(op, name string, err error) error {
	if name == "" {
		return fmt.Errorf("%s: %w", op, err)
	}
	return fmt.Errorf("%s %s: %w", op, name, err)
}

// tryTimeout is how long one try of so many bytes may take.
func (s *Store) tryTimeout(bytes int64) time.Duration {
	return s.settings.TryTimeout + time.Duration(float64(bytes)/float64(s.settings.MinRate)*float64(time.Second))
}

// call tries fn until it is answered for good. lost tells that some try may have been done although it was not answered, so
// that a refusal by a condition may be our own trace. The error is translated and names the operation.
func (s *Store) call(ctx context.Context, c call, fn func(ctx context.Context) error) (lost bool, err error) {
	if err := s.ready(ctx); err != nil {
		return false, s.wrap(c.op, c.name, err)
	}
	req := pace.Request{Bytes: c.bytes, Read: c.read, Pages: c.pages}
	if c.blob {
		req.Blob = c.name
	}
	giveUp, waited := time.Now().Add(s.settings.RetryFor), pacing.Waited(ctx)
	for try := 0; ; try++ {
		slot, err := s.pacer.Acquire(ctx, req)
		if err != nil {
			return lost, s.wrap(c.op, c.name, err)
		}
		v := s.try(ctx, c, try, slot, fn)
		if v.err == nil {
			return lost, nil
		}
		lost = lost || v.maybe
		switch {
		case ctx.Err() != nil && !answered(v.err):
			return lost, s.wrap(c.op, c.name, fmt.Errorf("%w: %w", ctx.Err(), withoutContext(v.err)))
		case !v.again:
			return lost, s.wrap(c.op, c.name, v.err)
		}
		// Full jitter, so that workers that failed together do not come back together; but not before they are asked to.
		delay := max(v.after, time.Duration(rand.Int64N(int64(min(maxBackoff, s.opts.Backoff<<min(try, 16)))))+s.opts.Backoff/10)
		at := time.Now().Add(delay)
		if deadline, ok := ctx.Deadline(); at.After(giveUp.Add(pacing.Waited(ctx)-waited)) || ok && at.After(deadline) {
			return lost, s.wrap(c.op, c.name, fmt.Errorf("gave up after %d tries: %w", try+1, v.err))
		}
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return lost, s.wrap(c.op, c.name, fmt.Errorf("%w: %w", ctx.Err(), v.err))
		}
	}
}

// try makes one try and tells the pacer what came of it.
func (s *Store) try(ctx context.Context, c call, n int, slot *pace.Slot, fn func(ctx context.Context) error) verdict {
	tctx, cancel := pacing.Timeout(ctx, s.tryTimeout(c.bytes)) // a body that is held back says nothing about the service
	defer cancel()
	began, waited := time.Now(), pacing.Waited(tctx)
	err := fn(tctx)
	paused := pacing.Waited(tctx) - waited
	slot.Paused(paused)
	var v verdict
	if err != nil {
		v = judge(err, s.opts.Clock())
		if tctx.Err() != nil && ctx.Err() == nil && isContext(err) {
			v = verdict{err: fmt.Errorf("no answer from storage in %s", s.tryTimeout(c.bytes)), again: true, maybe: true}
		}
	}
	switch {
	case v.throttle:
		slot.Done(pace.Throttled)
	case v.again || ctx.Err() != nil:
		slot.Done(pace.Lost)
	default:
		slot.Done(pace.OK)
	}
	if s.opts.OnRequest != nil {
		s.opts.OnRequest(Request{Op: c.op, Blob: c.name, Bytes: c.bytes, Try: n, Took: time.Since(began) - paused, Err: v.err, Lost: v.maybe, Limited: v.throttle})
	}
	return v
}

// answered tells whether the service said something: then that is what is known, whatever became of the context since.
func answered(err error) bool {
	var e *ServiceError
	return errors.As(err, &e)
}

// withoutContext keeps the text of an error that is itself the end of a context out of the way of the real reason.
func withoutContext(err error) error {
	if isContext(err) {
		return errors.New("no answer from storage")
	}
	return err
}

// unknown is the error of a call that may have been done: outside the sentinels, whatever the last answer was.
func unknown(err error) error {
	return fmt.Errorf("outcome unknown: a try was not answered, then: %s", err.Error())
}

// refused tells whether err is a sentinel whose meaning is that nothing happened.
func refused(err error) bool {
	for _, s := range []error{
		blobstore.ErrNotFound, blobstore.ErrExists, blobstore.ErrConditionFailed, blobstore.ErrLeaseConflict,
		blobstore.ErrPermission, blobstore.ErrWriteOnce, blobstore.ErrCredentials, blobstore.ErrFull, blobstore.ErrInvalid,
	} {
		if errors.Is(err, s) {
			return true
		}
	}
	return false
}
