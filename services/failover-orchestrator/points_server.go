package failoverorchestrator

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// pointServer is PointService.
type pointServer struct {
	failoverv1.UnimplementedPointServiceServer
	s *Service
}

func (h *pointServer) OpenPoint(ctx context.Context, r *failoverv1.OpenPointRequest) (*failoverv1.OpenPointResponse, error) {
	vm, err := h.s.findVM(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	lineage, err := replica.ParseLineage(vm.Lineage)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED, err, "%s has no lineage", vm.DisplayName)
	}
	p, err := h.s.points.begin(ctx, lineage, vm.DisplayName, r.Point, r.Session)
	if err != nil {
		return nil, err
	}
	h.s.log.InfoContext(ctx, "point opened for reading", "vm", vm.Name, "point", p.m.Point, "session", p.id, "by", caller(ctx))
	out := &failoverv1.OpenPointResponse{
		Session: p.id, Point: uint64(p.m.Point), CutTime: timestamppb.New(p.m.CutTime),
		ExpireTime: timestamppb.New(h.s.deps.Clock().Add(p.left(h.s.deps.Clock()))),
	}
	for _, d := range p.m.Disks {
		out.Disks = append(out.Disks, &failoverv1.PointDisk{Id: d.ID, SizeBytes: d.Size})
	}
	return out, nil
}

func (h *pointServer) ReadPoint(ctx context.Context, r *failoverv1.ReadPointRequest) (*failoverv1.ReadPointResponse, error) {
	if r.Length > MaxPointRead {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "length is %d, at most %d are read at once", r.Length, MaxPointRead)
	}
	p, err := h.disk(ctx, r.Session, r.Disk, r.Offset, r.Length)
	if err != nil {
		return nil, err
	}
	data := make([]byte, r.Length)
	if err := h.s.points.reader.Read(ctx, p.rep, p.m.Seq, r.Disk, data, r.Offset); err != nil {
		return nil, err
	}
	if vdisk.IsZero(data) {
		return &failoverv1.ReadPointResponse{Zero: true}, nil
	}
	return &failoverv1.ReadPointResponse{Data: data}, nil
}

func (h *pointServer) MapPoint(ctx context.Context, r *failoverv1.MapPointRequest) (*failoverv1.MapPointResponse, error) {
	p, err := h.disk(ctx, r.Session, r.Disk, r.Offset, r.Length)
	if err != nil {
		return nil, err
	}
	parts, next, err := h.s.points.reader.Map(ctx, p.rep, p.m.Seq, r.Disk, extent.Range{Off: r.Offset, Len: r.Length})
	if err != nil {
		return nil, err
	}
	out := &failoverv1.MapPointResponse{NextOffset: next}
	for _, e := range parts {
		out.Extents = append(out.Extents, &failoverv1.PointExtent{Offset: e.Off, Length: e.Len})
	}
	return out, nil
}

// disk finds a session, and checks that it has the range.
func (h *pointServer) disk(ctx context.Context, session, disk string, off, length int64) (*openPoint, error) {
	p, err := h.s.points.find(ctx, session)
	if err != nil {
		return nil, err
	}
	d, err := pointDisk(p.m, disk)
	if err != nil {
		return nil, err
	}
	return p, within(replica.DiskState{ID: d.ID, Size: d.Size}, off, length)
}

func (h *pointServer) ClosePoint(ctx context.Context, r *failoverv1.ClosePointRequest) (*failoverv1.ClosePointResponse, error) {
	if err := h.s.points.end(ctx, r.Session); err != nil {
		return nil, err
	}
	h.s.log.InfoContext(ctx, "point closed", "session", r.Session, "by", caller(ctx))
	return &failoverv1.ClosePointResponse{}, nil
}
