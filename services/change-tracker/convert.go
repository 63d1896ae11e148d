package changetracker

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/rpc"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// bulk sends m with data as its bytes field. gRPC keeps the bytes until they are on the wire, so they get a buffer of
// their own.
func (t *Tracker) bulk(stream rpc.Sender, m proto.Message, field protowire.Number, data []byte) error {
	buf := chunkPool.Get().(*[chunkSize]byte)
	n := copy(buf[:], data)
	t.metrics.read(n)
	return rpc.SendBulk(stream, m, field, buf[:n], func() { chunkPool.Put(buf) })
}

func pointProto(p Point) *typesv1.HostPoint {
	out := &typesv1.HostPoint{
		Ordinal: p.Ordinal, Phase: phaseProto[p.Phase], Pass: p.IsPass(), Scope: scopeProto[p.Scope], Base: p.Base,
		Epoch: p.Epoch,
	}
	if !p.CutTime.IsZero() {
		out.CutTime, out.Pause = timestamppb.New(p.CutTime), durationpb.New(p.Pause)
	}
	for _, d := range p.Disks {
		out.Disks = append(out.Disks, &typesv1.DiskChange{Disk: d.Disk, SizeBytes: d.Size, ChangeBytes: d.Bytes})
	}
	return out
}

var phaseProto = map[Phase]typesv1.PointPhase{
	Open:      typesv1.PointPhase_POINT_PHASE_OPEN,
	Committed: typesv1.PointPhase_POINT_PHASE_COMMITTED,
	Abandoned: typesv1.PointPhase_POINT_PHASE_ABANDONED,
}

var scopeProto = map[Scope]typesv1.PassScope{
	Full:      typesv1.PassScope_PASS_SCOPE_FULL,
	DirtyOnly: typesv1.PassScope_PASS_SCOPE_DIRTY,
	Compare:   typesv1.PassScope_PASS_SCOPE_COMPARE,
}

// reasonProto has no entry for InitialReplication: that nothing was copied yet is told by base 0 and pass_required.
var reasonProto = map[Reason]typesv1.ResyncReason{
	ChangedOffline: typesv1.ResyncReason_RESYNC_REASON_DISK_CHANGED_OFFLINE,
	TrackingBroken: typesv1.ResyncReason_RESYNC_REASON_TRACKING_BROKEN,
	TrackingGap:    typesv1.ResyncReason_RESYNC_REASON_TRACKING_GAP,
	StateLost:      typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST,
}

func statusProto(s Status) *typesv1.TrackingStatus {
	out := &typesv1.TrackingStatus{
		Tracking: s.Lineage != "", Lineage: s.Lineage, Epoch: s.Epoch, Base: s.Base, HighestOrdinal: s.Highest,
		PassRequired: s.PassRequired, ResyncReason: reasonProto[s.Reason],
	}
	if out.ResyncReason != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
		out.ResyncDetail = s.Detail
	}
	for _, p := range s.Points {
		out.Points = append(out.Points, pointProto(p))
	}
	for _, d := range s.Disks {
		out.Disks = append(out.Disks, &typesv1.DiskTracking{
			Disk: d.ID, SizeBytes: d.Size, LogBytes: d.LogBytes, DirtyBytes: d.Dirty, HotBytes: d.Hot,
		})
	}
	return out
}
