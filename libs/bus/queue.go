package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	"github.com/landfall-dr/landfall/libs/errcat"
)

// Headers of a task.
const (
	headerType       = "landfall-type"       // full name of the message
	headerTask       = "landfall-task"       // id given by the publisher
	headerVM         = "landfall-vm"         // resource name, where the task has a field vm
	headerDeliveries = "landfall-deliveries" // deliveries of earlier copies that count
)

// Task is one piece of work as a handler sees it.
type Task struct {
	// Kind and Site of its queue.
	Kind Kind
	Site string
	// ID is what the publisher gave.
	ID string
	// VM is the resource name that the task's field vm has, or "".
	VM string
	// Delivery counts from 1; it is above 1 after a failure or a lost worker.
	Delivery int
	// Published is when the server stored it.
	Published time.Time

	typ  string
	data []byte
}

// Decode reads the task into m, whose type must be the published one.
func (t *Task) Decode(m proto.Message) error {
	if name := string(m.ProtoReflect().Descriptor().FullName()); name != t.typ {
		return Permanent(fmt.Errorf("decode task %s: it is a %s, not a %s", t.ID, t.typ, name))
	}
	if err := proto.Unmarshal(t.data, m); err != nil {
		return Permanent(fmt.Errorf("decode task %s: %w", t.ID, err))
	}
	return nil
}

// PublishTask stores a task in the queue of kind and site and returns when the
// server has it on disk. Within two minutes a second task of the same id is
// dropped silently, so an id names one attempt: what is tried again on purpose
// gets a new one. After an error publish again with the same id.
func (b *Bus) PublishTask(ctx context.Context, kind Kind, site, id string, task proto.Message) error {
	if err := errors.Join(checkToken("work kind", string(kind)), checkToken("site", site)); err != nil {
		return fmt.Errorf("publish task: %w", err)
	}
	if id == "" {
		return fmt.Errorf("publish task: id: %w", ErrName)
	}
	data, err := proto.Marshal(task)
	if err != nil {
		return fmt.Errorf("publish task %s: %w", id, err)
	}
	header := nats.Header{}
	header.Set(headerType, string(task.ProtoReflect().Descriptor().FullName()))
	header.Set(headerTask, id)
	if vm := vmOf(task); vm != "" {
		header.Set(headerVM, vm)
	}
	inject(ctx, header)
	msg := &nats.Msg{Subject: workPrefix + string(kind) + "." + site, Header: header, Data: data}
	return b.publish(ctx, workStream(kind), msg, "task/"+site+"/"+id)
}

func (b *Bus) publish(ctx context.Context, stream string, msg *nats.Msg, id string) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	_, err := b.js.PublishMsg(ctx, msg, jetstream.WithMsgID(id), jetstream.WithExpectStream(stream))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse):
		return fmt.Errorf("publish to %s: no stream answers, is it declared? %w", msg.Subject, err)
	case unknownOutcome(err):
		return fmt.Errorf("publish to %s: %w: %w", msg.Subject, ErrUnknown, err)
	}
	return fmt.Errorf("publish to %s: %w", msg.Subject, err)
}

// vmOf returns the value of the task's string field vm, if it has one.
func vmOf(m proto.Message) string {
	r := m.ProtoReflect()
	f := r.Descriptor().Fields().ByName("vm")
	if f == nil || f.Kind() != protoreflect.StringKind || f.Cardinality() == protoreflect.Repeated {
		return ""
	}
	return r.Get(f).String()
}

// ConsumerOptions configures a consumer; zero fields take the default.
type ConsumerOptions struct {
	// AckWait is how long the server waits for a sign of life before it delivers
	// a task again; default [Options.AckWait], else 30 s. While a handler runs, one is sent every third
	// of it.
	AckWait time.Duration
	// MaxDeliver is how often a task is delivered before it is parked; default 3.
	MaxDeliver int
	// MaxAckPending bounds the tasks in work at all workers of this durable
	// consumer together; default 1024.
	MaxAckPending int
	// Concurrency is how many handlers run at once here; default 1. No task is
	// fetched before a handler is free for it.
	Concurrency int
	// RetryDelay is the pause after the first failure, doubled after each
	// further one up to RetryDelayMax; defaults 1 s and 30 s.
	RetryDelay, RetryDelayMax time.Duration
	// OnPermanent reports a task whose handler returned a [Permanent] error; if
	// it returns nil, the task is acknowledged, else tried again. Without it
	// such tasks are parked.
	OnPermanent func(ctx context.Context, task *Task, err error) error
}

func (o ConsumerOptions) withDefaults() ConsumerOptions {
	if o.AckWait <= 0 {
		o.AckWait = 30 * time.Second
	}
	if o.MaxDeliver <= 0 {
		o.MaxDeliver = 3
	}
	if o.MaxAckPending <= 0 {
		o.MaxAckPending = 1024
	}
	if o.Concurrency <= 0 {
		o.Concurrency = 1
	}
	if o.RetryDelay <= 0 {
		o.RetryDelay = time.Second
	}
	if o.RetryDelayMax <= 0 {
		o.RetryDelayMax = 30 * time.Second
	}
	return o
}

// Consumer takes tasks of one kind.
type Consumer struct {
	b    *Bus
	kind Kind
	site string
	o    ConsumerOptions
	spec spec
}

// Consumer describes a worker of the queue of kind and site, or of [AllSites].
// durable is "<service>-<purpose>"; all workers that share a queue use the same.
// A queue has one durable consumer per site, or one for all sites, not both.
func (b *Bus) Consumer(kind Kind, site, durable string, o ConsumerOptions) (*Consumer, error) {
	err := errors.Join(checkToken("work kind", string(kind)), checkToken("durable name", durable))
	name := durable
	if site != AllSites {
		err = errors.Join(err, checkToken("site", site))
		name += "_" + site
	}
	if err != nil {
		return nil, fmt.Errorf("consumer of %s: %w", kind, err)
	}
	if o.AckWait <= 0 {
		o.AckWait = b.ackWait
	}
	o = o.withDefaults()
	return &Consumer{b: b, kind: kind, site: site, o: o, spec: spec{
		queue: string(kind), span: "task " + string(kind), stream: workStream(kind), concurrency: o.Concurrency,
		config: jetstream.ConsumerConfig{
			Durable: name, AckPolicy: jetstream.AckExplicitPolicy, AckWait: o.AckWait, MaxAckPending: o.MaxAckPending,
			// Counting is ours: a server that stops delivering leaves a task of a
			// crashed worker in the queue where nobody parks it.
			MaxDeliver:    -1,
			FilterSubject: workPrefix + string(kind) + "." + site,
		},
		ackWait: o.AckWait, maxDeliver: o.MaxDeliver, hardMax: o.MaxDeliver,
		retryDelay: o.RetryDelay, retryDelayMax: o.RetryDelayMax,
	}}, nil
}

// Run takes tasks and calls handle for each until ctx ends; then it waits for
// the handlers, whose contexts end with ctx, and returns nil. What handle
// returns decides:
//
//	nil                the task is done: acknowledged, the acknowledgement confirmed
//	Permanent(err)     reported by OnPermanent, or parked
//	an error, ctx over the task goes back to the queue and the delivery does not count
//	any other error    delivered again after a delay; after the last delivery parked
//
// A panic counts as an error. A parked task becomes the event
// landfall.v1.parked.<kind> and leaves the queue. handle must be idempotent: a
// task may be in work twice, at once even, when a sign of life was late.
func (c *Consumer) Run(ctx context.Context, handle func(ctx context.Context, task *Task) error) error {
	s := c.spec
	s.handle = func(ctx context.Context, d *delivery) error { return handle(ctx, c.task(d)) }
	s.requeue = c.requeue
	s.park = func(ctx context.Context, d *delivery, cause error) error { return c.park(ctx, c.task(d), cause) }
	if c.o.OnPermanent != nil {
		s.permanent = func(ctx context.Context, d *delivery, err error) error { return c.o.OnPermanent(ctx, c.task(d), err) }
	}
	return c.b.consume(ctx, s)
}

func (c *Consumer) task(d *delivery) *Task {
	h := d.msg.Headers()
	return &Task{
		Kind: c.kind, Site: d.msg.Subject()[len(workPrefix)+len(c.kind)+1:],
		ID: h.Get(headerTask), VM: h.Get(headerVM), Delivery: d.attempt, Published: d.meta.Timestamp,
		typ: h.Get(headerType), data: d.msg.Data(),
	}
}

// requeue puts a copy in place of a task that a stopping worker gives back, so
// that a rolling restart uses up no delivery. A crash between the two steps
// leaves both, which handlers stand.
func (c *Consumer) requeue(ctx context.Context, d *delivery) error {
	header := nats.Header{}
	for k, v := range d.msg.Headers() {
		if k != jetstream.MsgIDHeader {
			header[k] = v
		}
	}
	header.Set(headerDeliveries, strconv.Itoa(d.attempt-1))
	msg := &nats.Msg{Subject: d.msg.Subject(), Header: header, Data: d.msg.Data()}
	id := fmt.Sprintf("requeue/%d/%d", d.meta.Sequence.Stream, d.meta.NumDelivered)
	return c.b.publish(ctx, c.spec.stream, msg, id)
}

// park publishes the event of a task that is given up.
func (c *Consumer) park(ctx context.Context, task *Task, cause error) error {
	reason := errcat.Reason(cause)
	detail := &typesv1.ErrorDetail{What: cause.Error(), Time: timestamppb.Now()}
	if entry, known := errcat.Lookup(reason); known {
		detail.Reason, detail.Cause, detail.Action = errcat.Code(reason), entry.Cause, entry.Action
	}
	return c.b.publishParked(ctx, task, &eventsv1.TaskParked{
		Kind: string(task.Kind), Vm: task.VM, Deliveries: int64(task.Delivery), Error: detail, Task: task.data,
	})
}
