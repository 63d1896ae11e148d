package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// alarms says, once, when a backlog passes its bound and when it is well below it again. Which ones are raised is kept in
// bucket "backlogs", because the next task of a VM may be another process's: a record is there as long as the alarm stands.
type alarms struct {
	bus    *bus.Bus
	config BacklogConfig
	clock  func() time.Time
	logger *slog.Logger

	mu sync.Mutex
	kv *bus.KV[*typesv1.ApplyBacklog]
}

// look compares a backlog with its bounds, tells what changed, and returns it as events carry it. What it cannot find out
// is logged: the next look finds it.
func (a *alarms) look(ctx context.Context, vm string, lineage string, b replica.Backlog) *typesv1.ApplyBacklog {
	out := backlogProto(b, a.clock())
	level := a.config.level(b)
	if !b.Based { // nothing to fail over to yet: the initial copy is not a debt
		return out
	}
	var err error
	if out.High, err = a.turn(ctx, vm, lineage, b, level, out); err != nil {
		a.logger.WarnContext(ctx, "alarm of the apply backlog not settled", "vm", vm, "error", err)
		out.High = level == levelHigh
	}
	return out
}

// turn raises or clears the alarm; raised is how it stands afterwards. The event comes before the record: a crash between
// them repeats it under the same id.
func (a *alarms) turn(ctx context.Context, vm, lineage string, b replica.Backlog, l level, out *typesv1.ApplyBacklog) (raised bool, err error) {
	kv, err := a.bucket(ctx)
	if err != nil {
		return false, err
	}
	_, rev, err := kv.Get(ctx, bus.Key(lineage))
	raised = err == nil
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return false, err
	}
	switch {
	case l == levelHigh && !raised:
		out.High = true
		bound := fmt.Sprintf("%s, or %d %% of the disks", a.config.Bound, a.config.Percent)
		if err := a.tell(ctx, vm, "apply-backlog.raised", &eventsv1.ApplyBacklogRaised{
			Vm: vm, Backlog: out, Bound: bound, ResyncMayBeCheaper: b.Share() > resyncShare,
		}, lineage, number(b.Applied)); err != nil {
			return false, err
		}
		if _, err := kv.Create(ctx, bus.Key(lineage), out); err != nil && !errors.Is(err, bus.ErrExists) {
			return false, err
		}
		return true, nil
	case l == levelLow && raised:
		if err := a.tell(ctx, vm, "apply-backlog.cleared", &eventsv1.ApplyBacklogCleared{Vm: vm, Backlog: out}, lineage, number(rev)); err != nil {
			return true, err
		}
		if err := kv.Delete(ctx, bus.Key(lineage), rev); err != nil && !errors.Is(err, bus.ErrRevision) {
			return true, err
		}
		return false, nil
	}
	return raised, nil
}

func (a *alarms) tell(ctx context.Context, vm, typ string, payload proto.Message, parts ...string) error {
	e, err := event(vm, typ, payload, parts...)
	if err != nil {
		return err
	}
	return a.bus.PublishEvent(ctx, e)
}

func (a *alarms) bucket(ctx context.Context) (*bus.KV[*typesv1.ApplyBacklog], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kv == nil {
		kv, err := bus.OpenKV[*typesv1.ApplyBacklog](ctx, a.bus, bus.BucketBacklogs)
		if err != nil {
			return nil, err
		}
		a.kv = kv
	}
	return a.kv, nil
}

func backlogProto(b replica.Backlog, now time.Time) *typesv1.ApplyBacklog {
	out := &typesv1.ApplyBacklog{
		Bytes: b.Bytes, Manifests: int64(b.Manifests), Estimate: durationpb.New(b.Drain), Time: timestamppb.New(now),
	}
	if !b.Oldest.IsZero() {
		out.Age = durationpb.New(max(now.Sub(b.Oldest), 0))
	}
	return out
}

// backlogGauges sums the backlogs that this process looked at lately. They have no label of the VM: which one it is says the
// alarm.
type backlogGauges struct {
	clock func() time.Time

	mu    sync.Mutex
	known map[string]lookedAt
}

type lookedAt struct {
	b  replica.Backlog
	at time.Time
}

// gaugeAge is how long a backlog counts after it was looked at: another process may have worked on it since.
const gaugeAge = 15 * time.Minute

func (g *backlogGauges) set(lineage string, b replica.Backlog) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known == nil {
		g.known = map[string]lookedAt{}
	}
	now := g.clock()
	for l, k := range g.known {
		if now.Sub(k.at) > gaugeAge {
			delete(g.known, l)
		}
	}
	g.known[lineage] = lookedAt{b, now}
}

// sums are bytes and requests of all, and the longest time of one.
func (g *backlogGauges) sums() (bytes, requests int64, longest time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, k := range g.known {
		if g.clock().Sub(k.at) <= gaugeAge {
			bytes, requests, longest = bytes+k.b.Bytes, requests+k.b.Requests, max(longest, k.b.Drain)
		}
	}
	return bytes, requests, longest
}

func (g *backlogGauges) register(meter metric.Meter) error {
	gauge := func(name, unit, text string, value func() int64) error {
		_, err := meter.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(text),
			metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
				o.Observe(value())
				return nil
			}))
		return err
	}
	return errors.Join(
		gauge("landfall_uploader_backlog_bytes", "By", "Stored bytes that are received and not applied.", func() int64 { b, _, _ := g.sums(); return b }),
		gauge("landfall_uploader_backlog_requests", "{request}", "Page requests that applying them will take.", func() int64 { _, r, _ := g.sums(); return r }),
		gauge("landfall_uploader_backlog_seconds", "s", "Time that applying the largest backlog of one VM will take: its RTO debt.",
			func() int64 { _, _, d := g.sums(); return int64(d / time.Second) }),
	)
}
