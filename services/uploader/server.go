package uploader

import (
	"context"
	"maps"
	"slices"

	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// GetStatus implements UploaderService.
func (s *Service) GetStatus(context.Context, *uploaderv1.GetStatusRequest) (*uploaderv1.GetStatusResponse, error) {
	out := &uploaderv1.GetStatusResponse{
		ShippedBytes: s.metrics.shippedTotal.Load(), AppliedBytes: s.metrics.appliedTotal.Load(),
	}
	for _, r := range s.config.Roles {
		out.Roles = append(out.Roles, string(r))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out.ActiveTasks = slices.Sorted(maps.Values(s.active))
	return out, nil
}

// begin lists a task as active until end is called.
func (s *Service) begin(what string) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks++
	id := s.tasks
	s.active[id] = what
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.active, id)
	}
}
