package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/bus/bustest"
	"github.com/landfall-dr/landfall/libs/testkit"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open starts a server, connects to it and declares everything.
func open(t testing.TB) *bus.Bus { return bustest.Open(t, bus.Options{}) }

// run starts a consumer and returns what stops it and waits for it.
func run(t testing.TB, c *bus.Consumer, handle func(context.Context, *bus.Task) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(testkit.Context(t))
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, handle) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			require.NoError(t, <-done)
		})
	}
	t.Cleanup(stop)
	return stop
}

func consumer(t testing.TB, b *bus.Bus, o bus.ConsumerOptions) *bus.Consumer {
	t.Helper()
	if o.RetryDelay == 0 {
		o.RetryDelay = 10 * time.Millisecond
	}
	c, err := b.Consumer(bus.KindShip, "s1", "uploader-ship", o)
	require.NoError(t, err)
	return c
}

func ship(n uint64) *uploaderv1.ShipTask {
	return &uploaderv1.ShipTask{Vm: "sites/s1/vms/v1", Epoch: n}
}

func empty(t testing.TB, b *bus.Bus) {
	t.Helper()
	testkit.Eventually(t, 10*time.Second, func() error {
		n, err := b.Backlog(testkit.Context(t), bus.KindShip, "s1")
		if err == nil && n > 0 {
			err = fmt.Errorf("%d tasks left", n)
		}
		return err
	}, "queue empties")
}

// parked collects the parked tasks of a kind.
func parked(t testing.TB, b *bus.Bus) func() []*eventsv1.TaskParked {
	t.Helper()
	var mu sync.Mutex
	var got []*eventsv1.TaskParked
	ctx, cancel := context.WithCancel(testkit.Context(t))
	done := make(chan error, 1)
	go func() {
		done <- b.Subscribe(ctx, bus.Subscription{Filters: []bus.Filter{{Parked: true}}, Start: bus.FromFirst},
			func(_ context.Context, e *bus.Received) error {
				var p eventsv1.TaskParked
				if err := e.Decode(&p); err != nil {
					return err
				}
				mu.Lock()
				defer mu.Unlock()
				got = append(got, &p)
				return nil
			})
	}()
	t.Cleanup(func() { cancel(); require.NoError(t, <-done) })
	return func() []*eventsv1.TaskParked {
		mu.Lock()
		defer mu.Unlock()
		return append([]*eventsv1.TaskParked(nil), got...)
	}
}

func TestTasksAreHandledOnceAndLeave(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	var mu sync.Mutex
	got := map[uint64]int{}
	var inWork, most atomic.Int64
	for i := range 40 {
		require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", fmt.Sprint("t", i), ship(uint64(i))))
		require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", fmt.Sprint("t", i), ship(uint64(i))), "again: dropped")
	}
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s2", "t0", ship(99)), "another site")
	run(t, consumer(t, b, bus.ConsumerOptions{Concurrency: 4}), func(_ context.Context, task *bus.Task) error {
		most.Store(max(most.Load(), inWork.Add(1)))
		defer inWork.Add(-1)
		var m uploaderv1.ShipTask
		if err := task.Decode(&m); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		got[m.Epoch]++
		if task.ID != fmt.Sprint("t", m.Epoch) || task.VM != "sites/s1/vms/v1" || task.Site != "s1" || task.Delivery != 1 {
			return bus.Permanent(errors.New("wrong task"))
		}
		return nil
	})
	empty(t, b)
	require.Len(t, got, 40)
	for i, n := range got {
		require.Equal(t, 1, n, "task %d", i)
	}
	require.LessOrEqual(t, most.Load(), int64(4))
	n, err := b.Backlog(ctx, bus.KindShip, bus.AllSites)
	require.NoError(t, err)
	require.EqualValues(t, 1, n, "the other site's task is left alone")
}

func TestFailingTaskIsParkedAfterThreeDeliveries(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	got := parked(t, b)
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "bad", ship(1)))
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "worse", ship(2)))
	var bad, worse atomic.Int64
	run(t, consumer(t, b, bus.ConsumerOptions{Concurrency: 2}), func(_ context.Context, task *bus.Task) error {
		if task.ID == "worse" {
			worse.Add(1)
			panic("no such disk")
		}
		require.EqualValues(t, bad.Add(1), task.Delivery)
		return errors.New("disk on fire")
	})
	empty(t, b)
	testkit.Eventually(t, 5*time.Second, func() bool { return len(got()) == 2 })
	require.EqualValues(t, 3, bad.Load())
	require.EqualValues(t, 3, worse.Load())
	for _, p := range got() {
		require.Equal(t, "ship", p.Kind)
		require.Equal(t, "sites/s1/vms/v1", p.Vm)
		require.EqualValues(t, 3, p.Deliveries)
		require.Regexp(t, "disk on fire|panic: no such disk", p.Error.What)
		require.NotEmpty(t, p.Task)
	}
}

func TestPermanentError(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	got := parked(t, b)
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "a", ship(1)))
	var reports atomic.Int64
	stop := run(t, consumer(t, b, bus.ConsumerOptions{
		OnPermanent: func(_ context.Context, task *bus.Task, err error) error {
			if reports.Add(1) == 1 {
				return errors.New("report did not get through")
			}
			require.Equal(t, "a", task.ID)
			require.ErrorContains(t, err, "refused")
			return nil
		},
	}), func(context.Context, *bus.Task) error { return bus.Permanent(errors.New("refused")) })
	empty(t, b)
	require.EqualValues(t, 2, reports.Load(), "a report that fails is tried again")
	stop()
	require.Empty(t, got())

	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "b", ship(1)))
	run(t, consumer(t, b, bus.ConsumerOptions{}), func(_ context.Context, task *bus.Task) error {
		return task.Decode(&wrapperspb.StringValue{})
	})
	testkit.Eventually(t, 5*time.Second, func() bool { return len(got()) == 1 }, "without a hook it is parked")
	require.EqualValues(t, 1, got()[0].Deliveries)
	require.Contains(t, got()[0].Error.What, "it is a landfall.uploader.v1.ShipTask")
}

func TestLongWorkIsNotDeliveredTwice(t *testing.T) {
	t.Parallel()
	b, ctx := open(t), testkit.Context(t)
	var calls atomic.Int64
	begin := time.Now()
	o := bus.ConsumerOptions{AckWait: 600 * time.Millisecond, Concurrency: 2}
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "long", ship(1)))
	run(t, consumer(t, b, o), func(ctx context.Context, _ *bus.Task) error {
		calls.Add(1)
		return testkit.Poll(ctx, func(context.Context) (bool, error) { return time.Since(begin) > 2*time.Second, nil })
	})
	empty(t, b)
	require.EqualValues(t, 1, calls.Load())
	require.Greater(t, time.Since(begin), 3*o.AckWait)
}

func TestStoppingGivesBackWithoutCounting(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "t", ship(1)))
	for range 5 { // more often than MaxDeliver
		started := make(chan int, 1)
		stop := run(t, consumer(t, b, bus.ConsumerOptions{}), func(ctx context.Context, task *bus.Task) error {
			started <- task.Delivery
			<-ctx.Done()
			return ctx.Err()
		})
		require.Equal(t, 1, <-started)
		stop()
	}
	run(t, consumer(t, b, bus.ConsumerOptions{}), func(_ context.Context, task *bus.Task) error {
		require.Equal(t, "t", task.ID)
		return nil
	})
	empty(t, b)
}

// A worker whose process is gone sends neither signs of life nor an answer.
func TestLostWorker(t *testing.T) {
	t.Parallel()
	server := bustest.Serve(t, bus.ServerOptions{})
	b, ctx := bustest.Dial(t, bus.Options{Server: server}), testkit.Context(t)
	require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	got := parked(t, b)
	o := bus.ConsumerOptions{AckWait: 300 * time.Millisecond}
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "t", ship(1)))
	take := func() {
		victim := bustest.Dial(t, bus.Options{Server: server})
		c, err := victim.Consumer(bus.KindShip, "s1", "uploader-ship", o)
		require.NoError(t, err)
		taken, hold := make(chan int, 1), make(chan struct{})
		stop := run(t, c, func(context.Context, *bus.Task) error {
			taken <- -1
			<-hold
			return nil
		})
		require.Equal(t, -1, <-taken)
		require.NoError(t, victim.Close(bustest.Cleanup(t))) // the connection dies under the handler
		close(hold)
		stop()
	}
	take()
	take()
	begin := time.Now()
	var delivery atomic.Int64
	stop := run(t, consumer(t, b, o), func(_ context.Context, task *bus.Task) error {
		delivery.Store(int64(task.Delivery))
		return nil
	})
	empty(t, b)
	require.EqualValues(t, 3, delivery.Load())
	require.Less(t, time.Since(begin), 5*time.Second)
	stop()

	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "killer", ship(2)))
	take()
	take()
	take()
	var calls atomic.Int64
	run(t, consumer(t, b, o), func(context.Context, *bus.Task) error { calls.Add(1); return nil })
	empty(t, b)
	testkit.Eventually(t, 5*time.Second, func() bool { return len(got()) == 1 }, "a task that kills its workers is parked")
	require.Zero(t, calls.Load())
	require.Contains(t, got()[0].Error.What, "worker was lost")
}

func TestTraceGoesOn(t *testing.T) {
	spans := testkit.NewSpans(t)
	b := bustest.Dial(t, bus.Options{Server: bustest.Serve(t, bus.ServerOptions{}), TracerProvider: spans.Provider(), Name: "uploader"})
	ctx := testkit.Context(t)
	require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	seen := make(chan *bus.Received, 1)
	subCtx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		done <- b.Subscribe(subCtx, bus.Subscription{
			Durable: "scheduler-points", Start: bus.FromFirst,
			Filters: []bus.Filter{{Type: "recovery-point.*"}},
		}, func(_ context.Context, e *bus.Received) error { seen <- e; return nil })
	}()
	defer func() { cancel(); require.NoError(t, <-done) }()

	cycle, root := spans.Provider().Tracer("t").Start(ctx, "cycle")
	run(t, consumer(t, b, bus.ConsumerOptions{}), func(ctx context.Context, task *bus.Task) error {
		return b.PublishEvent(ctx, bus.Event{
			Type: "recovery-point.received", Site: "s1", VM: "v1", ID: bus.EventID("l", "1"),
			Payload: &eventsv1.RecoveryPointReceived{Point: 7},
		})
	})
	require.NoError(t, b.PublishTask(cycle, bus.KindShip, "s1", "t", ship(1)))
	e := <-seen
	root.End()
	want := "cycle\n  task ship\n    event recovery-point.received\n"
	testkit.Eventually(t, 5*time.Second, func() error {
		if got := spans.Trace(root.SpanContext().TraceID()); got != want {
			return fmt.Errorf("span tree\n%s", got)
		}
		return nil
	})
	require.Equal(t, "uploader", e.Source)
	require.Equal(t, "landfall.v1.s1.v1.recovery-point.received", e.Subject)
	var p eventsv1.RecoveryPointReceived
	require.NoError(t, e.Decode(&p))
	require.EqualValues(t, 7, p.Point)
}

// The envelope is a contract with programs that are not ours.
func TestEventEnvelope(t *testing.T) {
	server := bustest.Serve(t, bus.ServerOptions{Listen: "127.0.0.1:0"})
	spans := testkit.NewSpans(t)
	b, ctx := bustest.Dial(t, bus.Options{Server: server, Name: "scheduler"}), testkit.Context(t)
	require.NoError(t, b.Declare(ctx, bus.Declaration{}))
	nc, err := nats.Connect(server.URL(), nats.Token(server.Token()))
	require.NoError(t, err)
	defer nc.Close()
	sub, err := nc.SubscribeSync("landfall.v1.>")
	require.NoError(t, err)
	require.NoError(t, nc.Flush())

	sctx, span := spans.Provider().Tracer("t").Start(ctx, "s")
	at := time.Date(2026, 11, 22, 10, 0, 0, 5, time.UTC)
	e := bus.Event{Type: "health.changed", Site: "s1", ID: "id-1", Time: at, Payload: &eventsv1.HealthChanged{}}
	require.NoError(t, b.PublishEvent(sctx, e))
	require.NoError(t, b.PublishEvent(sctx, e), "a repeated id is dropped")
	span.End()

	msg, err := sub.NextMsg(5 * time.Second)
	require.NoError(t, err)
	require.Equal(t, "landfall.v1.s1.-.health.changed", msg.Subject)
	for header, want := range map[string]string{
		"ce-id": "id-1", "Nats-Msg-Id": "id-1", "ce-type": "landfall.v1.health.changed", "ce-source": "/landfall/scheduler",
		"ce-specversion": "1.0", "ce-time": "2026-11-22T10:00:00.000000005Z", "ce-subject": "sites/s1",
		"ce-datacontenttype": "application/json", "ce-dataschema": "landfall.events.v1.HealthChanged",
	} {
		require.Equal(t, want, msg.Header.Get(header), header)
	}
	require.Contains(t, msg.Header.Get("traceparent"), span.SpanContext().TraceID().String(), "lower case")

	js, err := jetstream.New(nc)
	require.NoError(t, err)
	s, err := js.Stream(ctx, "LANDFALL_EVENTS")
	require.NoError(t, err)
	require.EqualValues(t, 1, s.CachedInfo().State.Msgs)

	for _, bad := range []bus.Event{
		{Type: "health", Site: "s1"}, {Type: "Health.changed", Site: "s1"}, {Type: "health.changed"},
		{Type: "health.changed", Site: "s.1"}, {Type: "health.changed", Site: "s1", VM: "*"},
	} {
		bad.Payload = &eventsv1.HealthChanged{}
		require.ErrorIs(t, b.PublishEvent(ctx, bad), bus.ErrName, "%+v", bad)
	}
}

func TestFailingEventIsParked(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	got := parked(t, b)
	subCtx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	var calls atomic.Int64
	go func() {
		done <- b.Subscribe(subCtx, bus.Subscription{
			Durable: "test-sub", Start: bus.FromFirst, MaxDeliver: 2, RetryDelay: time.Millisecond,
			Filters: []bus.Filter{{Site: "s1"}},
		}, func(context.Context, *bus.Received) error { calls.Add(1); return errors.New("no") })
	}()
	defer func() { cancel(); require.NoError(t, <-done) }()
	require.NoError(t, b.PublishEvent(ctx, bus.Event{Type: "job.changed", Site: "s1", Payload: &eventsv1.JobChanged{}}))
	testkit.Eventually(t, 5*time.Second, func() bool { return len(got()) == 1 })
	require.EqualValues(t, 2, calls.Load())
	require.Equal(t, "test-sub", got()[0].Kind)
}

func TestDeclareTwiceKeepsContent(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	require.NoError(t, b.PublishTask(ctx, bus.KindShip, "s1", "t", ship(1)))
	require.NoError(t, b.Declare(ctx, bus.Declaration{ExtraKinds: []bus.Kind{"extra"}, ExtraBuckets: []string{"extra"}}))
	n, err := b.Backlog(ctx, bus.KindShip, "s1")
	require.NoError(t, err)
	require.EqualValues(t, 1, n)
	require.NoError(t, b.PublishTask(ctx, "extra", "s1", "t", ship(1)))
	require.ErrorIs(t, b.PublishTask(ctx, "Bad", "s1", "t", ship(1)), bus.ErrName)
}
