package uploader

import (
	"context"
	"slices"

	"google.golang.org/protobuf/types/known/durationpb"

	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// GetStatus implements UploaderService.
func (s *Service) GetStatus(context.Context, *uploaderv1.GetStatusRequest) (*uploaderv1.GetStatusResponse, error) {
	out := &uploaderv1.GetStatusResponse{
		ShippedBytes: s.metrics.shippedTotal.Load(), AppliedBytes: s.metrics.appliedTotal.Load(),
		RetiredObjects: s.metrics.retiredTotal.Load(), BandwidthBytesPerSecond: s.limiter.Rate(),
	}
	for _, r := range s.config.Roles {
		out.Roles = append(out.Roles, string(r))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.active {
		out.ActiveTasks = append(out.ActiveTasks, a.text)
	}
	slices.Sort(out.ActiveTasks)
	return out, nil
}

// work names what one task does: two tasks with the same work need only one worker.
type work struct {
	role        Role
	lineage     string
	ordinal     uint64
	index       int32
	epoch, open uint64
}

func workOf(t *uploaderv1.ShipTask) work {
	return work{
		role: RoleShip, lineage: t.GetLineage(), ordinal: t.GetPoint().GetOrdinal() + t.GetPass().GetOrdinal(),
		index: t.GetPass().GetIndex(), epoch: t.GetEpoch(), open: t.GetOpen(),
	}
}

// active is a work in progress.
type active struct {
	text string
	// wish is what apply tasks that came meanwhile want; nil when none came.
	wish *uploaderv1.ApplyTask
}

// begin lists a work as active until end is called; false: it is in progress here already.
func (s *Service) begin(w work, text string) (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.beginLocked(w, text)
}

func (s *Service) beginLocked(w work, text string) (end func(), ok bool) {
	if _, busy := s.active[w]; busy {
		return nil, false
	}
	mine := &active{text: text}
	s.active[w] = mine
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.active[w] == mine { // again may have ended it, and another task have begun
			delete(s.active, w)
		}
	}, true
}

// beginApply is begin for apply tasks; false: the worker in progress has taken the wish over.
func (s *Service) beginApply(w work, t *uploaderv1.ApplyTask) (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, busy := s.active[w]; busy {
		if a.wish == nil {
			a.wish = &uploaderv1.ApplyTask{}
		}
		a.wish.CheckpointAge = younger(a.wish.GetCheckpointAge(), t.GetCheckpointAge())
		a.wish.Delay = younger(a.wish.GetDelay(), t.GetDelay())
		if t.GetUrgent() {
			a.wish.Urgent = true
			s.urgent.poke()
		}
		return nil, false
	}
	return s.beginLocked(w, "apply "+t.GetVm())
}

// again takes what other apply tasks wished into t; false: nothing, and the work is no longer active.
func (s *Service) again(w work, t *uploaderv1.ApplyTask) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.active[w]
	if a.wish == nil {
		delete(s.active, w)
		return false
	}
	t.Sequence, t.CheckpointAge = 0, younger(t.GetCheckpointAge(), a.wish.GetCheckpointAge()) // to the head, whatever it is
	t.Delay, t.Urgent = a.wish.GetDelay(), t.GetUrgent() || a.wish.GetUrgent()
	a.wish = nil
	return true
}

// hurried reports whether an urgent task was merged into the work.
func (s *Service) hurried(w work) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.active[w]
	return a != nil && a.wish.GetUrgent()
}

// younger is the shorter of two ages; nil is none.
func younger(a, b *durationpb.Duration) *durationpb.Duration {
	if a == nil || b != nil && b.AsDuration() < a.AsDuration() {
		return b
	}
	return a
}
