package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// handleApply is the consumer of queue apply. Nil acknowledges: the chain is applied, or what is left of it was published
// as a task anew, or sleeps here to be published when it is due.
func (s *Service) handleApply(ctx context.Context, task *bus.Task) (err error) {
	var t uploaderv1.ApplyTask
	if err := decode(task, &t); err != nil {
		return err
	}
	key := work{role: RoleApply, lineage: t.GetLineage()}
	end, ok := s.beginApply(key, &t)
	if !ok { // the worker in progress goes on to the head; its own delivery is not acknowledged before that
		return nil
	}
	started, outcome := s.clock(), outcomeLost
	defer func() {
		end()
		s.metrics.task(ctx, RoleApply, outcome, s.clock().Sub(started))
	}()
	done, err := s.applyTurns(ctx, key, &t)
	switch {
	case ctx.Err() != nil, errors.Is(err, failpoint.ErrInjected):
		return err
	case errors.Is(err, replica.ErrBusy), errors.Is(err, replica.ErrLeaseLost):
		outcome = outcomeBusy
		s.logger.InfoContext(ctx, "another applier is at work, the task comes again", "vm", t.GetVm(), "error", err)
		return err
	case err != nil:
		outcome = outcomeFailed
		return s.reportFailure(ctx, task, RoleApply, t.GetVm(), t.GetLineage(), 0, 0, err)
	}
	outcome = outcomeDone
	if !done.due.IsZero() {
		outcome = outcomeDeferred
		s.logger.DebugContext(ctx, "received points wait to be merged", "vm", t.GetVm(), "bytes", done.backlog.Bytes, "until", done.due)
	}
	if done.point == 0 || !done.due.IsZero() {
		return failpoint.Hit(fpBeforeAck) // no point is new: there is nothing to say
	}
	e, err := event(t.GetVm(), "recovery-point.processed", &eventsv1.RecoveryPointProcessed{
		Vm: t.GetVm(), Lineage: t.GetLineage(), Point: uint64(done.point), Sequence: uint64(done.seq), Checkpoint: uint64(done.checkpoint),
		Backlog: done.looked,
	}, t.GetLineage(), number(done.seq), number(done.checkpoint))
	if err != nil {
		return bus.Permanent(err)
	}
	return s.publish(ctx, e)
}

// applyTurns works on one lineage until nobody wants more of it, its slice is over, or what is left may wait.
func (s *Service) applyTurns(ctx context.Context, key work, t *uploaderv1.ApplyTask) (done applied, err error) {
	if t.GetUrgent() {
		defer s.urgent.enter(t.GetLineage())()
	}
	started, held := s.clock(), s.config.Apply.UrgentHold
	hurry := func() bool { return t.GetUrgent() || s.hurried(key) }
	for {
		held -= s.urgent.standBack(ctx, t.GetLineage(), held, hurry)
		done, err = s.applier.apply(ctx, t, func() bool {
			return !hurry() && (held > 0 && s.urgent.others(t.GetLineage()) || s.clock().Sub(started) >= s.config.Apply.Slice)
		})
		if err != nil {
			return done, err
		}
		done.looked = s.alarms.look(ctx, t.GetVm(), t.GetLineage(), done.backlog)
		s.metrics.backlog.set(t.GetLineage(), done.backlog)
		if done.more && (hurry() || s.clock().Sub(started) < s.config.Apply.Slice) {
			continue
		}
		if s.again(key, t) {
			started = s.clock()
			continue
		}
		// Nobody here works on the lineage any more.
		if done.more {
			return done, s.publishAgain(ctx, t, "turn")
		}
		if !done.due.IsZero() && !s.sleeper.add(t, done.due) {
			return done, s.publishAgain(ctx, t, "full")
		}
		return done, nil
	}
}

// publishAgain puts what is left of a task at the end of the queue, to be done without delay.
func (s *Service) publishAgain(ctx context.Context, t *uploaderv1.ApplyTask, why string) error {
	machine, err := shipping.ParseMachine(t.GetVm())
	if err != nil {
		return err
	}
	next := proto.Clone(t).(*uploaderv1.ApplyTask)
	next.Delay = durationpb.New(0)
	id := fmt.Sprintf("apply/%s/%s/%d", t.GetLineage(), why, s.clock().UnixNano())
	if err := s.bus.PublishTask(ctx, bus.KindApply, machine.Site, id, next); err != nil {
		return fmt.Errorf("publish the rest of the task: %w", err)
	}
	return nil
}

// urgents are the lineages that a failover waits for and that are in work here.
type urgents struct {
	mu      sync.Mutex
	at      map[string]int
	changed chan struct{} // closed at every change
}

func newUrgents() *urgents { return &urgents{at: map[string]int{}, changed: make(chan struct{})} }

func (u *urgents) enter(lineage string) (leave func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.at[lineage]++
	return func() {
		u.mu.Lock()
		if u.at[lineage]--; u.at[lineage] == 0 {
			delete(u.at, lineage)
		}
		u.mu.Unlock()
		u.poke()
	}
}

// poke makes those who stand back look again.
func (u *urgents) poke() {
	u.mu.Lock()
	defer u.mu.Unlock()
	close(u.changed)
	u.changed = make(chan struct{})
}

// others reports whether another lineage is urgent.
func (u *urgents) others(lineage string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.othersLocked(lineage)
}

func (u *urgents) othersLocked(lineage string) bool {
	_, mine := u.at[lineage]
	return len(u.at) > 1 || len(u.at) == 1 && !mine
}

// standBack waits while another lineage is urgent, at most so long, and returns how long it was. hurry ends it.
func (u *urgents) standBack(ctx context.Context, lineage string, most time.Duration, hurry func() bool) time.Duration {
	started := time.Now() //nolint:forbidigo // a measurement
	timer := time.NewTimer(max(most, 0))
	defer timer.Stop()
	for {
		u.mu.Lock()
		wait, changed := u.othersLocked(lineage), u.changed
		u.mu.Unlock()
		if !wait || most <= 0 || hurry() {
			return time.Since(started) //nolint:forbidigo // a measurement
		}
		select {
		case <-changed:
		case <-timer.C:
			return most
		case <-ctx.Done():
			return time.Since(started) //nolint:forbidigo // a measurement
		}
	}
}

// sleeper keeps the tasks whose points wait to be merged, one per lineage, until they are due. It is memory: when the
// process dies, the next point of the VM, or a failover, asks again, and what waits is bounded (ApplyConfig.wait).
type sleeper struct {
	publish func(ctx context.Context, t *uploaderv1.ApplyTask, why string) error
	clock   func() time.Time
	logger  *slog.Logger

	mu   sync.Mutex
	at   map[string]sleeping // by lineage
	wake chan struct{}
}

type sleeping struct {
	due  time.Time
	task *uploaderv1.ApplyTask
}

// maxSleeping bounds the lineages that sleep in one process.
const maxSleeping = 4096

// sleeperFlush is how long the tasks that sleep may take to be published when the process stops.
const sleeperFlush = 3 * time.Second

func newSleeper(s *Service) *sleeper {
	return &sleeper{publish: s.publishAgain, clock: s.clock, logger: s.logger, at: map[string]sleeping{}, wake: make(chan struct{}, 1)}
}

// add lets a task sleep; false when there are too many.
func (s *sleeper) add(t *uploaderv1.ApplyTask, due time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.at[t.GetLineage()]; !ok && len(s.at) >= maxSleeping {
		return false
	}
	s.at[t.GetLineage()] = sleeping{due, proto.Clone(t).(*uploaderv1.ApplyTask)}
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return true
}

// next takes out what is due, and says when the next one is.
func (s *sleeper) next(all bool) (due []*uploaderv1.ApplyTask, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait = time.Hour
	now := s.clock()
	for l, t := range s.at {
		if left := t.due.Sub(now); left <= 0 || all {
			due = append(due, t.task)
			delete(s.at, l)
		} else {
			wait = min(wait, left)
		}
	}
	return due, wait
}

// run publishes tasks when they are due, and all that are left when ctx ends.
func (s *sleeper) run(ctx context.Context) {
	for {
		due, wait := s.next(false)
		s.send(ctx, due)
		timer := time.NewTimer(wait)
		select {
		case <-s.wake:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			due, _ := s.next(true)
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sleeperFlush)
			defer cancel()
			s.send(ctx, due)
			return
		}
		timer.Stop()
	}
}

func (s *sleeper) send(ctx context.Context, due []*uploaderv1.ApplyTask) {
	for _, t := range due {
		if err := s.publish(ctx, t, "due"); err != nil {
			s.logger.WarnContext(ctx, "points wait longer: their task was not published", "vm", t.GetVm(), "error", err)
			if ctx.Err() == nil { // the bus does not answer; once more, a little later
				s.add(t, s.clock().Add(10*time.Second))
			}
		}
	}
}
