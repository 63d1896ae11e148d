package failoverorchestrator

import (
	"context"
	"errors"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/storagereason"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// isTest tells a drill from a failover; records from before there were others name no kind.
func isTest(f *failoverv1.Failover) bool {
	return f.Kind == failoverv1.FailoverKind_FAILOVER_KIND_UNSPECIFIED || f.Kind == failoverv1.FailoverKind_FAILOVER_KIND_TEST
}

// unfinished says whether there is work to do for a failover.
func unfinished(f *failoverv1.Failover) bool {
	if isTest(f) {
		return f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_STARTING || f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP
	}
	switch f.Phase {
	case starting, committing, cancelling:
		return true
	}
	return false
}

// run drives one failover to its next resting state. Whatever happens, the record says where it stands.
func (s *Service) run(ctx context.Context, key string) {
	f, _, err := s.failovers.Get(ctx, key)
	if errors.Is(err, bus.ErrNotFound) {
		return
	}
	if err != nil {
		s.log.WarnContext(ctx, "read failover record", "failover", key, "error", err)
		s.pause(ctx)
		return
	}
	if !unfinished(f) {
		return
	}
	ctx, span := s.tracer.Start(ctx, kindName(f)+" failover", trace.WithAttributes(attribute.String("vm", lastPart(f.Vm)), attribute.String("failover", lastPart(f.Name))))
	defer span.End()
	switch {
	case isTest(f):
		s.drive(ctx, f)
	case f.Phase == starting:
		s.start(ctx, f)
	case f.Phase == committing:
		s.commit(ctx, f)
	default:
		s.cancel(ctx, f)
	}
}

// attempts repeats work while what stops it may pass, a bounded number of times.
func (s *Service) attempts(ctx context.Context, f *failoverv1.Failover, work func(context.Context, *failoverv1.Failover) error) error {
	for attempt := 1; ; attempt++ {
		err := work(ctx, f)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if errors.As(err, &final{}) || !errcat.Recoverable(err) || attempt >= s.config.Attempts {
			s.log.ErrorContext(ctx, "failover failed", "failover", f.Name, "vm", f.Vm, "error", err)
			trace.SpanFromContext(ctx).RecordError(err)
			return err
		}
		s.log.WarnContext(ctx, "failover step will be tried again", "failover", f.Name, "attempt", attempt, "error", err)
		s.pause(ctx)
	}
}

// announce tells of a new state. An event that is lost is not repeated: the record is the truth.
func (s *Service) announce(ctx context.Context, f *failoverv1.Failover, state typesv1.TestFailoverState) {
	s.publish(ctx, "test-failover.changed", f.Vm, bus.EventID("test-failover", f.Name, state.String(), f.CleanupJob), &eventsv1.TestFailoverChanged{
		Vm: f.Vm, Failover: f.Name, State: state, Point: f.Point,
	})
}

// moved tells of a new phase of a failover for real.
func (s *Service) moved(ctx context.Context, f *failoverv1.Failover) {
	s.publish(ctx, "failover.changed", f.Vm, bus.EventID("failover", f.Name, f.Phase.String(), jobOf(f), f.Job), &eventsv1.FailoverChanged{
		Vm: f.Vm, Failover: f.Name, Kind: kindName(f), Phase: word(f.Phase.String(), "FAILOVER_PHASE_"), Point: f.Point, Error: f.Error,
	})
}

func (s *Service) publish(ctx context.Context, kind, vm, id string, payload proto.Message) {
	err := s.deps.Bus.PublishEvent(ctx, bus.Event{Type: kind, Site: s.config.Site, VM: lastPart(vm), ID: id, Payload: payload})
	if err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "publish event", "type", kind, "error", err)
	}
}

// kindName is what people call the kind of a failover.
func kindName(f *failoverv1.Failover) string {
	if isTest(f) {
		return "test"
	}
	return word(f.Kind.String(), "FAILOVER_KIND_")
}

// word is the value of an enum as people read it: lower case, with hyphens.
func word(name, prefix string) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, prefix), "_", "-"))
}

// article puts the one before a word that it needs.
func article(word string) string {
	if strings.ContainsRune("aeiou", rune(word[0])) {
		return "an " + word
	}
	return "a " + word
}

// storeError gives an error of the bus or the store its reason, unless it has one.
func storeError(err error) error {
	var known *errcat.Error
	if err == nil || errors.As(err, &known) || errors.Is(err, context.Canceled) {
		return err
	}
	reason, refused := storagereason.Refused(err)
	switch {
	case refused:
	case errors.Is(err, bus.ErrRevision):
		reason = typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION
	default:
		reason = typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
	}
	return errcat.Wrap(reason, err, "keep the failover's record")
}

// decideFailure stores why a failover is given up, before anything of it is removed, and reports whether to go on: not when
// the record could not be written (the next look finds it again), and not when it is no longer at the same work: another
// instance was faster, and what stands in the folder is its.
func (s *Service) decideFailure(ctx context.Context, f *failoverv1.Failover, cause error, same func(*failoverv1.Failover) bool) bool {
	detail := errcat.Detail(cause, s.deps.Clock())
	r, _, err := s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
		if !same(r) || r.Error != nil {
			return bus.NoChange
		}
		r.Error = detail
		return nil
	})
	if err == nil {
		err = failpoint.Hit("failover-orchestrator/after-give-up")
	}
	if errors.Is(err, bus.ErrNotFound) { // the handler withdrew it: a rival was first
		_ = s.endJob(ctx, f.Job, cause, func(*typesv1.Job) {})
		return false
	}
	if err != nil {
		if ctx.Err() == nil {
			s.log.WarnContext(ctx, "write failover record", "failover", f.Name, "error", err)
			s.pause(ctx)
		}
		return false
	}
	return same(r)
}
