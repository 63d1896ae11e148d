package resyncengine

import (
	"context"
	"fmt"
	"maps"
	"slices"

	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
)

// GetStatus implements ResyncService.
func (s *Service) GetStatus(context.Context, *resyncenginev1.GetStatusRequest) (*resyncenginev1.GetStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &resyncenginev1.GetStatusResponse{
		ActiveTasks: slices.Sorted(maps.Values(s.active)), ComparedBytes: s.metrics.comparedTotal.Load(),
		DifferingBytes: s.metrics.differingTotal.Load(),
	}, nil
}

// work names a pass in work.
type work struct {
	lineage     string
	pass, epoch uint64
}

// begin lists a task as active until end is called; false: the same pass is in work here.
func (s *Service) begin(t *resyncenginev1.CompareTask) (end func(), ok bool) {
	key := work{t.GetLineage(), t.GetPass(), t.GetEpoch()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, busy := s.active[key]; busy {
		return nil, false
	}
	s.active[key] = describe(t)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.active, key)
	}, true
}

// describe names a task for people.
func describe(t *resyncenginev1.CompareTask) string {
	return fmt.Sprintf("pass %d of %s", t.GetPass(), t.GetVm())
}
