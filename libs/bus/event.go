package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
)

// Event is a fact to publish.
type Event struct {
	// Type is "<context>.<past-tense>", for example "recovery-point.received".
	Type string
	// Site, and VM, the id, or "" for an event of no VM. Both are one token.
	Site, VM string
	// ID makes publishing again harmless: the server drops a second event of the
	// same id within 15 minutes, and consumers by id for good. Use [EventID] for
	// a fact that may be found out twice; "" makes a new one up.
	ID string
	// Time it happened; zero is now.
	Time time.Time
	// Payload is written as proto-JSON.
	Payload proto.Message
}

// Received is an event as a subscriber sees it.
type Received struct {
	Event           // Payload is nil: use Decode
	Source   string // service that published it
	Subject  string // of NATS
	Sequence uint64 // in the stream; grows
	Delivery int    // from 1

	data []byte
}

// JSON returns the payload as published.
func (r *Received) JSON() []byte { return r.data }

// Decode reads the payload into m; fields that m does not know are skipped,
// since publishers may be newer.
func (r *Received) Decode(m proto.Message) error {
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(r.data, m); err != nil {
		return Permanent(fmt.Errorf("decode event %s %s: %w", r.Type, r.ID, err))
	}
	return nil
}

// eventSpace is the namespace of ids made of parts.
var eventSpace = uuid.MustParse("6f6f3d1c-6a39-5d0e-9a55-1d1f2f1c7a10")

// EventID returns the same id for the same parts, for example lineage, type and
// point ordinal.
func EventID(parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		fmt.Fprintf(&b, "%d:%s", len(p), p)
	}
	return uuid.NewSHA1(eventSpace, []byte(b.String())).String()
}

// Headers of an event (CloudEvents 1.0, NATS binding).
const (
	headerCEID      = "ce-id"
	headerCEType    = "ce-type"
	headerCESource  = "ce-source"
	headerCESpec    = "ce-specversion"
	headerCETime    = "ce-time"
	headerCESubject = "ce-subject"
	headerCEData    = "ce-datacontenttype"
	headerCESchema  = "ce-dataschema"

	sourcePrefix = "/landfall/"
)

// PublishEvent stores an event and returns when the server has it on disk. After
// an error publish again with the same id.
func (b *Bus) PublishEvent(ctx context.Context, e Event) error {
	subject, err := eventSubject(e)
	if err != nil {
		return fmt.Errorf("publish event: %w", err)
	}
	return b.publishEvent(ctx, subject, e)
}

func (b *Bus) publishEvent(ctx context.Context, subject string, e Event) error {
	data, err := protojson.Marshal(e.Payload)
	if err != nil {
		return fmt.Errorf("publish event %s: %w", e.Type, err)
	}
	if e.ID == "" {
		id, err := uuid.NewV7()
		if err != nil {
			return fmt.Errorf("publish event %s: %w", e.Type, err)
		}
		e.ID = id.String()
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	about := "sites/" + e.Site
	if e.VM != "" {
		about += "/vms/" + e.VM
	}
	h := nats.Header{}
	h.Set(headerCEID, e.ID)
	h.Set(headerCEType, eventPrefix+e.Type)
	h.Set(headerCESource, sourcePrefix+b.name)
	h.Set(headerCESpec, "1.0")
	h.Set(headerCETime, e.Time.UTC().Format(time.RFC3339Nano))
	h.Set(headerCESubject, about)
	h.Set(headerCEData, "application/json")
	h.Set(headerCESchema, string(e.Payload.ProtoReflect().Descriptor().FullName()))
	inject(ctx, h)
	return b.publish(ctx, eventStream, &nats.Msg{Subject: subject, Header: h, Data: data}, e.ID)
}

// publishParked publishes the event of a task or event that was given up. Its
// subject has no site: one subscription watches all that is parked.
func (b *Bus) publishParked(ctx context.Context, task *Task, parked *eventsv1.TaskParked) error {
	vm := task.VM
	if i := strings.LastIndexByte(vm, '/'); i >= 0 {
		vm = vm[i+1:]
	}
	return b.publishEvent(ctx, eventPrefix+"parked."+string(task.Kind), Event{
		Type: "parked." + string(task.Kind), Site: task.Site, VM: vm, Payload: parked,
		ID: EventID("parked", string(task.Kind), task.Site, task.ID, task.Published.UTC().Format(time.RFC3339Nano)),
	})
}

func eventSubject(e Event) (string, error) {
	vm := e.VM
	var err error
	if vm == "" {
		vm = "-"
	} else {
		err = checkToken("VM", vm)
	}
	return eventPrefix + e.Site + "." + vm + "." + e.Type,
		errors.Join(checkToken("site", e.Site), err, checkType(e.Type))
}

func checkType(typ string) error {
	about, what, ok := strings.Cut(typ, ".")
	if !ok {
		return fmt.Errorf("event type %q: %w: want <context>.<past-tense>", typ, ErrName)
	}
	return errors.Join(checkToken("event type", about), checkToken("event type", what))
}

// Filter selects events; an empty field matches all.
type Filter struct {
	Site, VM string
	// Type is a whole type, or a context and ".*".
	Type string
	// Parked selects what was given up (and Type "parked.<kind>" of it) instead.
	Parked bool
}

// subjects returns the subject filters, nil for all events.
func (f Filter) subject() (string, error) {
	if f.Parked {
		kind, _ := strings.CutPrefix(f.Type, "parked.")
		if kind == "" {
			kind = "*"
		} else if err := checkToken("work kind", kind); err != nil {
			return "", err
		}
		return eventPrefix + "parked." + kind, nil
	}
	if f == (Filter{}) {
		return eventPrefix + ">", nil
	}
	var errs []error
	or := func(what, token string) string {
		if token == "" {
			return "*"
		}
		if token != "-" || what != "VM" {
			errs = append(errs, checkToken(what, token))
		}
		return token
	}
	typ := "*.*"
	if about, all := strings.CutSuffix(f.Type, ".*"); all {
		typ = or("event type", about) + ".*"
	} else if f.Type != "" {
		typ = f.Type
		errs = append(errs, checkType(f.Type))
	}
	return eventPrefix + or("site", f.Site) + "." + or("VM", f.VM) + "." + typ, errors.Join(errs...)
}

// Start says where a subscription that is new to the server begins.
type Start uint8

// Starts.
const (
	FromNow   Start = iota // only what is published later
	FromFirst              // everything that is kept
)

// Subscription configures [Bus.Subscribe]; zero fields take the default.
type Subscription struct {
	// Durable is "<service>-<purpose>": the server remembers what was
	// acknowledged, and programs that use the same name share the events. With
	// "" each call sees all events from Start on, in order, without
	// acknowledgement: for watching, not for acting.
	Durable string
	// Filters select events; none is all, several are united and must not overlap.
	Filters []Filter
	// Start applies to a durable subscription only when the server does not know
	// it yet; default FromNow.
	Start Start
	// AckWait, Concurrency, RetryDelay and RetryDelayMax as in [ConsumerOptions].
	// With Concurrency 1 and one program events are handled in order, except
	// that one that failed comes again later.
	AckWait                   time.Duration
	Concurrency               int
	RetryDelay, RetryDelayMax time.Duration
	// MaxDeliver is how often a failing event is delivered before it is parked
	// as landfall.v1.parked.<durable>; default 10.
	MaxDeliver int
}

// Subscribe calls handle for each event until ctx ends, and then returns nil.
// For a durable subscription an error of handle brings the event again after a
// delay; [Permanent] and the last failure park it. For an ephemeral one an error
// of handle ends Subscribe with that error. handle must be idempotent by event id.
func (b *Bus) Subscribe(ctx context.Context, sub Subscription, handle func(ctx context.Context, event *Received) error) error {
	var subjects []string
	for _, f := range sub.Filters {
		s, err := f.subject()
		if err != nil {
			return fmt.Errorf("subscribe: %w", err)
		}
		subjects = append(subjects, s)
	}
	deliver := jetstream.DeliverNewPolicy
	if sub.Start == FromFirst {
		deliver = jetstream.DeliverAllPolicy
	}
	if sub.Durable == "" {
		return b.follow(ctx, subjects, deliver, handle)
	}
	if err := checkToken("durable name", sub.Durable); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	if sub.MaxDeliver <= 0 {
		sub.MaxDeliver = 10
	}
	if sub.AckWait <= 0 {
		sub.AckWait = b.ackWait
	}
	o := ConsumerOptions{
		AckWait: sub.AckWait, Concurrency: sub.Concurrency, MaxDeliver: sub.MaxDeliver,
		RetryDelay: sub.RetryDelay, RetryDelayMax: sub.RetryDelayMax,
	}.withDefaults()
	s := spec{
		queue: sub.Durable, stream: eventStream, concurrency: o.Concurrency,
		config: jetstream.ConsumerConfig{
			Durable: sub.Durable, AckPolicy: jetstream.AckExplicitPolicy, AckWait: o.AckWait,
			MaxAckPending: o.MaxAckPending, MaxDeliver: -1, FilterSubjects: subjects, DeliverPolicy: deliver,
		},
		// Events are not copied when a worker stops, as that would show them to
		// everybody again; so stopping uses up deliveries and the hard limit is higher.
		ackWait: o.AckWait, maxDeliver: o.MaxDeliver, hardMax: 2 * o.MaxDeliver,
		retryDelay: o.RetryDelay, retryDelayMax: o.RetryDelayMax,
		spanOf: func(d *delivery) string { return "event " + received(d.msg, d.meta, d.attempt).Type },
		handle: func(ctx context.Context, d *delivery) error { return handle(ctx, received(d.msg, d.meta, d.attempt)) },
		park: func(ctx context.Context, d *delivery, cause error) error {
			r := received(d.msg, d.meta, d.attempt)
			c := Consumer{b: b}
			return c.park(ctx, &Task{
				Kind: Kind(sub.Durable), Site: r.Site, VM: r.VM, ID: r.ID, Delivery: r.Delivery,
				Published: d.meta.Timestamp, data: r.data,
			}, cause)
		},
	}
	// The start of a durable consumer cannot be changed once it exists.
	if known, err := b.js.Consumer(ctx, eventStream, sub.Durable); err == nil {
		was := known.CachedInfo().Config
		s.config.DeliverPolicy, s.config.OptStartSeq, s.config.OptStartTime = was.DeliverPolicy, was.OptStartSeq, was.OptStartTime
	}
	return b.consume(ctx, s)
}

// follow is the ephemeral subscription.
func (b *Bus) follow(
	ctx context.Context, subjects []string, deliver jetstream.DeliverPolicy, handle func(context.Context, *Received) error,
) error {
	consumer, err := b.js.OrderedConsumer(ctx, eventStream, jetstream.OrderedConsumerConfig{
		FilterSubjects: subjects, DeliverPolicy: deliver,
	})
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("subscribe: %w", ErrNotFound)
	} else if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(256), jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullHeartbeat))
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	defer messages.Stop()
	for {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, jetstream.ErrNoHeartbeat):
			continue // the ordered consumer repairs itself
		case err != nil:
			return fmt.Errorf("subscribe: %w", err)
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("subscribe: %w", err)
		}
		r := received(msg, meta, 1)
		hctx, span := b.tracer.Start(extract(ctx, msg.Headers()), "event "+r.Type, trace.WithSpanKind(trace.SpanKindConsumer))
		err = handle(hctx, r)
		span.End()
		if err != nil {
			return err
		}
	}
}

func received(msg jetstream.Msg, meta *jetstream.MsgMetadata, attempt int) *Received {
	h := msg.Headers()
	r := &Received{
		Source: strings.TrimPrefix(h.Get(headerCESource), sourcePrefix), Subject: msg.Subject(),
		Sequence: meta.Sequence.Stream, Delivery: attempt, data: msg.Data(),
	}
	r.ID = h.Get(headerCEID)
	if r.ID == "" { // published by something else: still unique
		r.ID = "seq-" + strconv.FormatUint(r.Sequence, 10)
	}
	r.Time, _ = time.Parse(time.RFC3339Nano, h.Get(headerCETime))
	if r.Time.IsZero() {
		r.Time = meta.Timestamp
	}
	tokens := strings.Split(strings.TrimPrefix(msg.Subject(), eventPrefix), ".")
	switch {
	case len(tokens) == 4:
		r.Site, r.Type = tokens[0], tokens[2]+"."+tokens[3]
		if tokens[1] != "-" {
			r.VM = tokens[1]
		}
	case len(tokens) == 2 && tokens[0] == "parked":
		r.Type = "parked." + tokens[1]
		parts := strings.Split(h.Get(headerCESubject), "/")
		if len(parts) >= 2 {
			r.Site = parts[1]
		}
		if len(parts) == 4 {
			r.VM = parts[3]
		}
	default:
		r.Type = strings.TrimPrefix(h.Get(headerCEType), eventPrefix)
	}
	return r
}
