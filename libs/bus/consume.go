package bus

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"
)

const (
	// pullExpiry is how long one pull request waits at the server, pullHeartbeat
	// how often the server says that it still knows of it.
	pullExpiry    = 20 * time.Second
	pullHeartbeat = 2 * time.Second
)

// spec is what the workers of tasks and of events have in common.
type spec struct {
	queue, span, stream       string
	spanOf                    func(*delivery) string // in place of span, if set
	config                    jetstream.ConsumerConfig
	concurrency               int
	ackWait                   time.Duration
	maxDeliver                int // the last delivery whose failure is followed by another
	hardMax                   int // above it the handler is not called any more: its worker dies of it
	retryDelay, retryDelayMax time.Duration

	handle    func(context.Context, *delivery) error
	permanent func(context.Context, *delivery, error) error // nil: park
	requeue   func(context.Context, *delivery) error        // nil: give back with a nak
	park      func(context.Context, *delivery, error) error
}

type delivery struct {
	msg     jetstream.Msg
	meta    *jetstream.MsgMetadata
	attempt int // from 1
}

// consume runs the workers until ctx ends and they are done.
func (b *Bus) consume(ctx context.Context, s spec) error {
	// The first declaration may fail the caller: a missing stream is a mistake.
	if _, err := b.js.CreateOrUpdateConsumer(ctx, s.stream, s.config); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			err = ErrNotFound
		}
		return fmt.Errorf("consume %s: %w", s.queue, err)
	}
	var group errgroup.Group
	for range s.concurrency {
		group.Go(func() error {
			b.work(ctx, s)
			return nil
		})
	}
	return group.Wait()
}

// work is one worker: it pulls one message, handles it, and only then pulls the
// next. It survives everything but the end of ctx.
func (b *Bus) work(ctx context.Context, s spec) {
	wait := reconnectFirst
	for ctx.Err() == nil {
		err := b.pull(ctx, s, func() { wait = reconnectFirst })
		if ctx.Err() != nil {
			return
		}
		b.logger.WarnContext(ctx, "consumer starts again", "queue", s.queue, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, reconnectLast)
	}
}

func (b *Bus) pull(ctx context.Context, s spec, progress func()) error {
	consumer, err := b.js.CreateOrUpdateConsumer(ctx, s.stream, s.config)
	if err != nil {
		return err
	}
	messages, err := consumer.Messages(
		jetstream.PullMaxMessages(1), jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullHeartbeat),
		jetstream.WithMessagesErrOnMissingHeartbeat(false))
	if err != nil {
		return err
	}
	defer b.giveBack(ctx, s, messages)
	for {
		if ctx.Err() != nil { // before Next, which would ask for a message that nobody wants
			return ctx.Err()
		}
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		progress()
		b.deliver(ctx, s, msg)
	}
}

// giveBack returns a message that arrived after nobody wanted one.
func (b *Bus) giveBack(ctx context.Context, s spec, messages jetstream.MessagesContext) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	messages.Drain()
	for {
		msg, err := messages.Next(jetstream.NextMaxWait(time.Second))
		if err != nil {
			messages.Stop()
			return
		}
		d, err := newDelivery(msg)
		if err == nil {
			err = b.giveBackOne(ctx, s, d, nil)
		}
		if err != nil {
			b.logger.WarnContext(ctx, "message not given back, redelivery waits for the ack wait", "queue", s.queue, "error", err)
		}
	}
}

func newDelivery(msg jetstream.Msg) (*delivery, error) {
	meta, err := msg.Metadata()
	if err != nil {
		return nil, fmt.Errorf("message without JetStream metadata: %w", err)
	}
	d := &delivery{msg: msg, meta: meta, attempt: int(meta.NumDelivered)}
	if n, err := strconv.Atoi(msg.Headers().Get(headerDeliveries)); err == nil && n > 0 {
		d.attempt += n
	}
	return d, nil
}

func (b *Bus) deliver(ctx context.Context, s spec, msg jetstream.Msg) {
	d, err := newDelivery(msg)
	if err != nil {
		b.logger.ErrorContext(ctx, "message dropped", "queue", s.queue, "error", err)
		return
	}
	name := s.span
	if s.spanOf != nil {
		name = s.spanOf(d)
	}
	ctx, span := b.tracer.Start(extract(ctx, msg.Headers()), name, trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(attribute.Int("landfall.delivery", d.attempt)))
	defer span.End()

	stopBeat := b.heartbeat(ctx, s, msg)
	outcome, err := b.decide(ctx, s, d)
	stopBeat()

	span.SetAttributes(attribute.String("landfall.outcome", outcome))
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, err.Error())
	}
	b.counter.Add(ctx, 1, metric.WithAttributes(attribute.String("queue", s.queue), attribute.String("outcome", outcome)))
}

// decide runs the handler and carries out what its result asks for. The error is
// what the span shows.
func (b *Bus) decide(ctx context.Context, s spec, d *delivery) (outcome string, err error) {
	log := b.logger.With("queue", s.queue, "delivery", d.attempt, "subject", d.msg.Subject())
	crashed := d.attempt > s.hardMax
	if crashed {
		err = fmt.Errorf("%d deliveries ended without a result: a worker was lost each time", d.attempt-1)
	} else {
		err = guard(ctx, d, s.handle)
	}
	stopping := ctx.Err() != nil

	// What follows must happen although ctx may be over: the result of the work
	// is known. It has its own bound.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()

	switch {
	case err == nil:
		if ackErr := d.msg.DoubleAck(after); ackErr != nil {
			log.WarnContext(ctx, "acknowledgement not confirmed, the message may come again", "error", ackErr)
			return "ack-unconfirmed", nil
		}
		return "done", nil
	case stopping && !crashed && !IsPermanent(err):
		return "given-back", b.giveBackOne(after, s, d, err)
	case IsPermanent(err) && s.permanent != nil:
		if reportErr := s.permanent(after, d, err); reportErr != nil {
			log.ErrorContext(ctx, "report of a permanent failure did not succeed", "error", reportErr)
			b.nak(after, s, d)
			return "retry", errors.Join(err, reportErr)
		}
		if ackErr := d.msg.DoubleAck(after); ackErr != nil {
			log.WarnContext(ctx, "acknowledgement not confirmed, the message may come again", "error", ackErr)
		}
		return "permanent", err
	case IsPermanent(err), d.attempt >= s.maxDeliver:
		if parkErr := s.park(after, d, err); parkErr != nil {
			log.ErrorContext(ctx, "message could not be parked", "error", parkErr, "cause", err)
			b.nak(after, s, d)
			return "retry", errors.Join(err, parkErr)
		}
		if termErr := d.msg.TermWithReason("parked"); termErr != nil {
			log.WarnContext(ctx, "parked message not ended, it may come again", "error", termErr)
		}
		log.ErrorContext(ctx, "message parked: it failed for good, see the event", "error", err)
		return "parked", err
	default:
		log.WarnContext(ctx, "message failed and will be delivered again", "error", err)
		b.nak(after, s, d)
		return "retry", err
	}
}

func (b *Bus) giveBackOne(ctx context.Context, s spec, d *delivery, cause error) error {
	if s.requeue == nil {
		_ = d.msg.Nak()
		return cause
	}
	if err := s.requeue(ctx, d); err != nil {
		_ = d.msg.Nak() // costs a delivery, loses nothing
		return errors.Join(cause, err)
	}
	if err := d.msg.DoubleAck(ctx); err != nil {
		return errors.Join(cause, err)
	}
	return cause
}

func (b *Bus) nak(ctx context.Context, s spec, d *delivery) {
	delay := s.retryDelayMax
	if shift := d.attempt - 1; shift < 16 {
		delay = min(s.retryDelay<<shift, s.retryDelayMax)
	}
	if err := d.msg.NakWithDelay(delay); err != nil {
		b.logger.WarnContext(ctx, "negative acknowledgement not sent, redelivery waits for the ack wait", "error", err)
	}
}

// guard calls the handler and makes a panic an error.
func guard(ctx context.Context, d *delivery, handle func(context.Context, *delivery) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return handle(ctx, d)
}

// heartbeat tells the server every third of the ack wait that work goes on. The
// result stops it and returns when it has.
func (b *Bus) heartbeat(ctx context.Context, s spec, msg jetstream.Msg) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(s.ackWait / 3)
		defer ticker.Stop()
		for {
			select {
			case <-quit:
				return
			case <-ticker.C:
				if err := msg.InProgress(); err != nil {
					b.logger.WarnContext(ctx, "sign of life not sent", "queue", s.queue, "error", err)
				}
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}
