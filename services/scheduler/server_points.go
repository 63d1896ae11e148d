package scheduler

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/pricing"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// holdPrefix is what owners of holds begin with.
const holdPrefix = "hold/"

func isSuspect(p replica.Pin) bool { return strings.HasPrefix(p.Owner, suspectPrefix) }

func notProtectedAnyMore(name string) error {
	return reasonError(typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED, name, "%s is not protected any more", name)
}

// ListRecoveryPoints reads the chain from storage, newest first.
func (s *protectionServer) ListRecoveryPoints(ctx context.Context, r *schedulerv1.ListRecoveryPointsRequest) (*schedulerv1.ListRecoveryPointsResponse, error) {
	_, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.StorageTimeout)
	defer cancel()
	chain, err := s.openChain(ctx, rec)
	if errors.Is(err, replica.ErrNoLineage) && rec.GetLastPoint() == 0 {
		return &schedulerv1.ListRecoveryPointsResponse{}, nil // its storage is not made yet
	}
	if err != nil {
		return nil, err
	}
	points, err := chain.Points(ctx)
	if err != nil {
		return nil, storageError(err, "read the points of %s", rec.GetName())
	}
	slices.Reverse(points)
	out, token, err := page(points, func(p replica.Point) string { return ordinalText(uint64(p.Ordinal)) }, descending, r.GetPageSize(), r.GetPageToken())
	if err != nil {
		return nil, err
	}
	resp := &schedulerv1.ListRecoveryPointsResponse{NextPageToken: token}
	for _, p := range out {
		resp.Points = append(resp.Points, presentPoint(rec, p))
	}
	return resp, nil
}

// ordinalText sorts as text as ordinals do as numbers.
func ordinalText(o uint64) string { return fmt.Sprintf("%020d", o) }

// openChain reads the chain of a protection as storage has it now.
func (s *Service) openChain(ctx context.Context, rec *schedulerv1.ProtectedVm) (*replica.Replica, error) {
	chain, err := replica.Open(ctx, s.deps.Store, replica.Lineage(rec.GetLineage()))
	if err != nil {
		return nil, storageError(err, "open the chain of %s", rec.GetName())
	}
	return chain, nil
}

func presentPoint(rec *schedulerv1.ProtectedVm, p replica.Point) *schedulerv1.RecoveryPoint {
	out := &schedulerv1.RecoveryPoint{
		Name: fmt.Sprintf("%s/recoveryPoints/%d", rec.GetName(), p.Ordinal), Ordinal: uint64(p.Ordinal), Sequence: uint64(p.Seq),
		Kind: typesv1.PointKind_POINT_KIND_POINT, Consistency: typesv1.Consistency_CONSISTENCY_CRASH,
		Processed: p.Processed, Checkpointed: p.Checkpointed, StoredBytes: p.Bytes, Tier: string(p.Tier),
		Signals:   signalsOf(p),
		Suspected: rec.GetSuspicion() != nil && uint64(p.Ordinal) >= rec.GetSuspicion().GetPoint(),
	}
	if p.Kind == replica.KindBase {
		out.Kind = typesv1.PointKind_POINT_KIND_BASE
	}
	if p.Consistency == replica.ConsistencyApp {
		out.Consistency = typesv1.Consistency_CONSISTENCY_APPLICATION
	}
	if !p.CutTime.IsZero() {
		out.CutTime = timestamppb.New(p.CutTime)
	}
	for _, pin := range p.Pins {
		shown := &schedulerv1.PointPin{Owner: pin.Owner, Reason: pin.Reason}
		if !pin.Until.IsZero() {
			shown.Until = timestamppb.New(pin.Until)
		}
		out.Pins = append(out.Pins, shown)
	}
	return out
}

// HoldRecoveryPoint keeps a point until the hold is released.
func (s *protectionServer) HoldRecoveryPoint(ctx context.Context, r *schedulerv1.HoldRecoveryPointRequest) (*schedulerv1.HoldRecoveryPointResponse, error) {
	_, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.StorageTimeout)
	defer cancel()
	chain, err := s.openChain(ctx, rec)
	if err != nil {
		return nil, err
	}
	p, err := s.findPoint(ctx, chain, rec, r.GetPoint())
	if err != nil {
		return nil, err
	}
	by, owner := caller(ctx), holdPrefix+r.GetHold()
	reason := heldBy(by, r.GetReason())
	held := slices.ContainsFunc(p.Pins, func(pin replica.Pin) bool { return pin.Owner == owner && pin.Reason == reason })
	if !held {
		if err := chain.Pin(ctx, replica.Pin{Seq: p.Seq, Owner: owner, Reason: reason}); err != nil {
			return nil, storageError(err, "hold point %d of %s", p.Ordinal, rec.GetName())
		}
		s.log.InfoContext(ctx, "point held", "vm", rec.GetName(), "point", uint64(p.Ordinal), "hold", r.GetHold(), "by", by)
		s.tellHold(ctx, rec, true, p.Ordinal, r.GetHold(), by)
		if p, err = s.findPoint(ctx, chain, rec, r.GetPoint()); err != nil {
			return nil, err
		}
	}
	return &schedulerv1.HoldRecoveryPointResponse{Point: presentPoint(rec, p)}, nil
}

// heldBy is the reason of a hold's pin: who asked for it, and why.
func heldBy(by, reason string) string {
	switch {
	case by == "":
		return reason
	case reason == "":
		return "by " + by
	}
	return "by " + by + ": " + reason
}

func (s *Service) findPoint(ctx context.Context, chain *replica.Replica, rec *schedulerv1.ProtectedVm, ordinal uint64) (replica.Point, error) {
	points, err := chain.Points(ctx)
	if err != nil {
		return replica.Point{}, storageError(err, "read the points of %s", rec.GetName())
	}
	for _, p := range points {
		if uint64(p.Ordinal) == ordinal {
			return p, nil
		}
	}
	state, err := chain.Refresh(ctx)
	if err != nil {
		return replica.Point{}, storageError(err, "read the points of %s", rec.GetName())
	}
	if state.Floor > 0 && len(points) > 0 && ordinal < uint64(points[0].Ordinal) {
		return replica.Point{}, reasonError(typesv1.ErrorReason_ERROR_REASON_RETIRED, rec.GetName(),
			"point %d of %s is not kept any more; the oldest one is %d", ordinal, rec.GetName(), points[0].Ordinal)
	}
	return replica.Point{}, reasonError(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND, rec.GetName(), "%s has no recovery point %d", rec.GetName(), ordinal)
}

func (s *Service) tellHold(ctx context.Context, rec *schedulerv1.ProtectedVm, held bool, point replica.Ordinal, hold, by string) {
	id := bus.EventID(rec.GetLineage(), strconv.FormatBool(held), hold, strconv.FormatUint(uint64(point), 10), strconv.FormatInt(s.now().UnixNano(), 10))
	if held {
		s.jobs.announce(ctx, rec.GetName(), "recovery-point.held", id, &eventsv1.RecoveryPointHeld{Vm: rec.GetName(), Point: uint64(point), Hold: hold, RequestedBy: by})
		return
	}
	s.jobs.announce(ctx, rec.GetName(), "recovery-point.released", id, &eventsv1.RecoveryPointHeld{Vm: rec.GetName(), Point: uint64(point), Hold: hold, RequestedBy: by})
}

// ReleaseRecoveryPoint ends a hold.
func (s *protectionServer) ReleaseRecoveryPoint(ctx context.Context, r *schedulerv1.ReleaseRecoveryPointRequest) (*schedulerv1.ReleaseRecoveryPointResponse, error) {
	_, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	owner := holdPrefix + r.GetHold()
	points, err := s.unpin(ctx, rec, func(p replica.Pin) bool { return p.Owner == owner })
	if err != nil {
		return nil, err
	}
	out := &schedulerv1.ReleaseRecoveryPointResponse{}
	by := caller(ctx)
	for _, p := range points {
		s.log.InfoContext(ctx, "point released", "vm", rec.GetName(), "point", uint64(p), "hold", r.GetHold(), "by", by)
		s.tellHold(ctx, rec, false, p, r.GetHold(), by)
		out.Points = append(out.Points, uint64(p))
	}
	return out, nil
}

// unpin removes the pins that match, and returns the points that they were at, ascending.
func (s *Service) unpin(ctx context.Context, rec *schedulerv1.ProtectedVm, match func(replica.Pin) bool) ([]replica.Ordinal, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.StorageTimeout)
	defer cancel()
	chain, err := s.openChain(ctx, rec)
	if errors.Is(err, replica.ErrNoLineage) && rec.GetLastPoint() == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pins, err := chain.Pins(ctx)
	if err != nil {
		return nil, storageError(err, "read the pins of %s", rec.GetName())
	}
	pins = slices.DeleteFunc(pins, func(p replica.Pin) bool { return !match(p) })
	if len(pins) == 0 {
		return nil, nil
	}
	points, err := chain.Points(ctx)
	if err != nil {
		return nil, storageError(err, "read the points of %s", rec.GetName())
	}
	var out []replica.Ordinal
	for _, pin := range pins {
		if err := chain.Unpin(ctx, pin.Owner, pin.Seq); err != nil {
			return nil, storageError(err, "end %s of %s", pin.Owner, rec.GetName())
		}
		if i := slices.IndexFunc(points, func(p replica.Point) bool { return p.Seq == pin.Seq }); i >= 0 {
			out = append(out, points[i].Ordinal)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// usageMedia says what each kind of usage is kept in, in the order in which they are shown.
var usageMedia = []struct {
	kind  replica.UsageKind
	media pricing.Media
}{
	{replica.UsageJournal, pricing.Blocks}, {replica.UsageStaging, pricing.Blocks}, {replica.UsageReplica, pricing.Pages},
	{replica.UsageSnapshots, pricing.Pages}, {replica.UsageOrphans, pricing.Blocks},
}

// GetStorageUsage counts what a lineage takes and what that costs a month.
func (s *protectionServer) GetStorageUsage(ctx context.Context, r *schedulerv1.GetStorageUsageRequest) (*schedulerv1.GetStorageUsageResponse, error) {
	_, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.UsageTimeout)
	defer cancel()
	usage := replica.Usage{}
	chain, err := s.openChain(ctx, rec)
	if err == nil {
		if usage, err = chain.Usage(ctx); err != nil {
			err = storageError(err, "count what %s takes in storage", rec.GetName())
		}
	}
	if err != nil && (rec.GetLastPoint() != 0 || !errors.Is(err, replica.ErrNoLineage)) {
		return nil, err
	}
	return presentUsage(usage, s.cfg.Prices), nil
}

// presentUsage prices a usage.
func presentUsage(usage replica.Usage, prices pricing.Table) *schedulerv1.GetStorageUsageResponse {
	out := &schedulerv1.GetStorageUsageResponse{Currency: prices.Currency, PriceTable: prices.String(), Points: map[string]int64{}}
	for _, m := range usageMedia {
		sum := usage.Kinds[m.kind]
		cost := prices.Storage(m.media, sum.Bytes)
		out.Usage = append(out.Usage, &schedulerv1.StorageUsage{
			Kind: string(m.kind), Objects: sum.Objects, Bytes: sum.Bytes, HiddenBytes: sum.HiddenBytes, MonthlyCost: cost,
		})
		out.MonthlyCost += cost
	}
	out.MonthlyRequests = prices.Requests(usage.DayPuts, usage.DayBytes)
	out.MonthlyRequestCost = prices.RequestCost(out.MonthlyRequests)
	out.MonthlyCost += out.MonthlyRequestCost
	for tier, n := range usage.Points {
		name := string(tier)
		if tier == replica.TierNone {
			name = "retiring"
		}
		out.Points[name] = int64(n)
	}
	return out
}
