package scheduler

import (
	"context"
	"errors"
	"regexp"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// siteServer keeps what belongs to a whole site: the record of bucket "sites", which its shippers follow. It is not mirrored to
// storage: a recovery from storage alone has no site to send from.
type siteServer struct {
	schedulerv1.UnimplementedSiteServiceServer
	*Service
}

var sitePattern = regexp.MustCompile(`^sites/[a-z0-9]+(-+[a-z0-9]+)*$`)

// maxSiteName is what the bus takes.
const maxSiteName = len("sites/") + 64

// validateSite reports everything that is wrong with a schedule at once.
func validateSite(b *schedulerv1.SiteBandwidth) error {
	var fields []errcat.Field
	if name := b.GetName(); !sitePattern.MatchString(name) || len(name) > maxSiteName {
		fields = append(fields, errcat.Field{Path: "name", Message: "\"" + name + "\" is not sites/SITE with up to 64 of a-z, 0-9 and inner hyphens"})
	}
	fields = append(fields, bandwidth.Check(b)...)
	if len(fields) == 0 {
		return nil
	}
	texts := make([]string, len(fields))
	for i := range fields {
		texts[i] = fields[i].Path + ": " + fields[i].Message
		fields[i].Path = "bandwidth." + fields[i].Path
	}
	e := reasonError(typesv1.ErrorReason_ERROR_REASON_BANDWIDTH_INVALID, b.GetName(), "bandwidth of %s: %s", b.GetName(), strings.Join(texts, "; "))
	e.Fields = fields
	return e
}

// GetBandwidth reads the schedule and what holds now.
func (s *siteServer) GetBandwidth(ctx context.Context, r *schedulerv1.GetBandwidthRequest) (*schedulerv1.GetBandwidthResponse, error) {
	if !sitePattern.MatchString(r.GetName()) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "%q is not the name of a site: want sites/SITE", r.GetName())
	}
	b, rev, err := s.store.sites.Get(ctx, bus.Key(lastPart(r.GetName())))
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return &schedulerv1.GetBandwidthResponse{Bandwidth: &schedulerv1.SiteBandwidth{Name: r.GetName()}}, nil
	case err != nil:
		return nil, busError(err, "read the bandwidth of %s", r.GetName())
	}
	b.Revision = rev
	schedule, err := bandwidth.NewSchedule(b)
	if err != nil { // a newer scheduler wrote it
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_BANDWIDTH_INVALID, err, "read the bandwidth of %s", r.GetName())
	}
	return &schedulerv1.GetBandwidthResponse{Bandwidth: b, CurrentBytesPerSecond: schedule.Rate(s.now())}, nil
}

// SetBandwidth replaces the schedule. Setting the same again changes nothing.
func (s *siteServer) SetBandwidth(ctx context.Context, r *schedulerv1.SetBandwidthRequest) (*schedulerv1.SetBandwidthResponse, error) {
	want := clone(r.GetBandwidth())
	if err := validateSite(want); err != nil {
		return nil, err
	}
	expected := want.GetRevision()
	want.Revision = 0
	key := bus.Key(lastPart(want.GetName()))
	old, rev, err := s.store.sites.Get(ctx, key)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		if old, err = nil, nil; expected != 0 {
			return nil, stale(want.GetName(), expected, 0)
		}
	case err != nil:
		return nil, busError(err, "read the bandwidth of %s", want.GetName())
	case expected != 0 && expected != rev:
		return nil, stale(want.GetName(), expected, rev)
	}
	switch {
	case r.GetValidateOnly(), old != nil && proto.Equal(old, want):
	case old == nil:
		rev, err = s.store.sites.Create(ctx, key, want)
	default:
		rev, err = s.store.sites.Update(ctx, key, want, rev)
	}
	if err != nil {
		return nil, busError(err, "store the bandwidth of %s", want.GetName())
	}
	if !r.GetValidateOnly() {
		s.log.InfoContext(ctx, "bandwidth set", "site", want.GetName(), "windows", len(want.GetWindows()),
			"default_bytes_per_second", want.GetDefaultBytesPerSecond(), "by", caller(ctx))
	}
	want.Revision = rev
	return &schedulerv1.SetBandwidthResponse{Bandwidth: want}, nil
}
