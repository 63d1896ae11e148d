package uploader

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// firstLook is how many points say whether they come so fast that more have to be looked at.
const firstLook = 2*suspectWindows + 4

// suspect judges a point that is in the chain. It reads what this process knows of the chain, nothing else, so it cannot fail
// for storage's sake; a redelivered task judges the same points again.
func (s *shipper) suspect(ctx context.Context, t *uploaderv1.ShipTask, done *shipped) (suspicion, error) {
	m := done.manifest
	if _, on := factorOf(t.GetSuspicionFactor()); !on || m.Kind != replica.KindPoint || m.Signals == nil {
		return suspicion{}, nil
	}
	r, err := s.replicas.get(ctx, t.GetLineage())
	if err != nil {
		return suspicion{}, err
	}
	points, err := r.History(ctx, m.Seq, firstLook)
	if err != nil {
		return suspicion{}, err
	}
	if group := groupOf(points); group > 1 {
		if points, err = r.History(ctx, m.Seq, historyOf(group)); err != nil {
			return suspicion{}, err
		}
	}
	disks := int64(0)
	for _, d := range m.Disks {
		disks += d.Size
	}
	return judge(points, t.GetSuspicionFactor(), disks), nil
}

// suspectPoint says when a point begins to look like the work of ransomware. Its id depends on the point alone.
func (s *Service) suspectPoint(ctx context.Context, t *uploaderv1.ShipTask, done *shipped) error {
	if t.GetPoint() == nil {
		return nil
	}
	found, err := s.shipper.suspect(ctx, t, done)
	if err != nil {
		return fmt.Errorf("judge the point's churn: %w", err)
	}
	if !found.suspected {
		return nil
	}
	m := done.manifest
	var good replica.Point
	var goodTime *timestamppb.Timestamp
	if found.lastGood != nil {
		good, goodTime = *found.lastGood, timestamppb.New(found.lastGood.CutTime)
	}
	s.logger.WarnContext(ctx, "churn jumped and hardly compresses, as when something encrypts the machine", "vm", t.GetVm(), "point", uint64(m.Point),
		"last_good_point", uint64(good.Ordinal), "data_bytes", m.Signals.Data(), "incompressible_bytes", m.Signals.Incompressible, "usual_bytes", found.usual)
	e, err := event(t.GetVm(), "recovery-point.suspected", &eventsv1.RecoveryPointSuspected{
		Vm: t.GetVm(), Lineage: t.GetLineage(), Point: uint64(m.Point), Sequence: uint64(m.Seq), CutTime: timestamppb.New(m.CutTime),
		Signals: signalsProto(m.Signals), UsualBytes: found.usual,
		LastGoodPoint: uint64(good.Ordinal), LastGoodSequence: uint64(good.Seq), LastGoodTime: goodTime,
	}, t.GetLineage(), number(m.Point))
	if err != nil {
		return bus.Permanent(err)
	}
	if err := s.bus.PublishEvent(ctx, e); err != nil {
		return fmt.Errorf("publish %s: %w", e.Type, err)
	}
	return nil
}

// signalsProto is what events carry of a point's signals; nil for nil.
func signalsProto(s *replica.Signals) *typesv1.ChurnSignals {
	if s == nil {
		return nil
	}
	return &typesv1.ChurnSignals{ChangedBytes: s.Changed, ZeroBytes: s.Zero, StoredBytes: s.Stored, IncompressibleBytes: s.Incompressible}
}
