package qemu

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// statusOutcomes is how many settled points a status has.
const statusOutcomes = 16

var phaseProto = map[phase]typesv1.PointPhase{
	open:      typesv1.PointPhase_POINT_PHASE_OPEN,
	committed: typesv1.PointPhase_POINT_PHASE_COMMITTED,
	abandoned: typesv1.PointPhase_POINT_PHASE_ABANDONED,
}

// reasonProto has no entry for initial: that nothing was copied yet is told by base 0 and pass_required.
var reasonProto = map[reason]typesv1.ResyncReason{
	lost: typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST,
	gap:  typesv1.ResyncReason_RESYNC_REASON_TRACKING_GAP,
}

func (p point) proto() *typesv1.HostPoint {
	out := &typesv1.HostPoint{
		Ordinal: p.Ordinal, Phase: phaseProto[p.Phase], Pass: p.pass(), Scope: p.Scope, Base: p.Base, Epoch: p.Epoch,
	}
	if !p.Cut.IsZero() {
		out.CutTime, out.Pause = timestamppb.New(p.Cut), durationpb.New(p.Pause)
	}
	for _, d := range p.Disks {
		out.Disks = append(out.Disks, &typesv1.DiskChange{Disk: d.Disk, SizeBytes: d.Size, ChangeBytes: d.Change})
	}
	return out
}

// status is what the record says, without asking QEMU.
func (h *held) status() *typesv1.TrackingStatus {
	r := h.rec
	out := &typesv1.TrackingStatus{
		Tracking: r.Lineage != "", Lineage: r.Lineage, Epoch: r.Epoch, Base: r.Base, HighestOrdinal: r.Highest,
		ResyncReason: reasonProto[r.Reason], PassRequired: r.Lineage != "" && r.Reason != none,
	}
	if out.ResyncReason != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
		out.ResyncDetail = r.Detail
	}
	for _, p := range r.Outcomes[max(0, len(r.Outcomes)-statusOutcomes):] {
		out.Points = append(out.Points, p.proto())
	}
	if o := r.Open; o != nil && o.Phase == open {
		out.Points = append(out.Points, o.proto())
		out.HighestOrdinal = max(out.HighestOrdinal, o.Ordinal)
	}
	slices.SortFunc(out.Points, func(a, b *typesv1.HostPoint) int { return cmp.Compare(a.Ordinal, b.Ordinal) })
	for _, d := range r.Disks {
		t := &typesv1.DiskTracking{Disk: d.ID, SizeBytes: d.Size}
		out.Disks = append(out.Disks, t)
	}
	return out
}
