package changetracker

import (
	"context"
	"errors"
	"hash/crc32"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// server is ChangeTrackerService: decode, call the tracker, encode.
type server struct {
	changetrackerv1.UnimplementedChangeTrackerServiceServer
	service *Service
	tracker *Tracker
}

// reasons maps the domain's sentinels, most specific first.
var reasons = []struct {
	err    error
	reason typesv1.ErrorReason
}{
	{ErrMachineNotFound, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND},
	{ErrUnavailable, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE},
	{ErrDiskNotFound, typesv1.ErrorReason_ERROR_REASON_DISK_NOT_FOUND},
	{ErrDiskDuplicate, typesv1.ErrorReason_ERROR_REASON_DISK_DUPLICATE},
	{ErrDiskInUse, typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE},
	{ErrDiskMissing, typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING},
	{ErrDiskTruncated, typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED},
	{ErrFormat, typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED},
	{ErrNotTracking, typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED},
	{ErrLineage, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH},
	{ErrStaleEpoch, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH},
	{ErrSettled, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED},
	{ErrOpen, typesv1.ErrorReason_ERROR_REASON_POINT_OPEN},
	{ErrNotCut, typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT},
	{ErrPassRequired, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED},
	{ErrPassNotOpen, typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN},
	{ErrResyncRequired, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED},
	{ErrFenced, typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED},
	{ErrSourceLost, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE},
	{ErrExportInvalid, typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID},
	{ErrSnapshotBroken, typesv1.ErrorReason_ERROR_REASON_SNAPSHOT_BROKEN},
	{ErrSpace, typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE},
	{ErrBroken, typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN},
	{ErrInvalidState, typesv1.ErrorReason_ERROR_REASON_INVALID_STATE},
}

// reasoned gives an error of the domain its reason.
func reasoned(err error, operation string) error {
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return errcat.Wrap(r.reason, err, "%s", operation)
		}
	}
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "%s", operation)
}

func (s *server) AttachMachine(_ context.Context, r *changetrackerv1.AttachMachineRequest) (*changetrackerv1.AttachMachineResponse, error) {
	spec := MachineSpec{ID: r.Vm, Dir: r.StateDir}
	for _, d := range r.Disks {
		spec.Disks = append(spec.Disks, DiskSpec{ID: d.Id, Path: d.Path, Format: formats[d.Format]})
	}
	attached, err := s.tracker.Attach(spec)
	if err != nil {
		return nil, reasoned(err, "attach machine "+r.Vm)
	}
	out := &changetrackerv1.AttachMachineResponse{}
	for i, a := range attached {
		out.Disks = append(out.Disks, &typesv1.Disk{
			Id: a.ID, SizeBytes: a.Size, Path: a.Path, Format: r.Disks[i].Format, OsDisk: r.Disks[i].OsDisk,
			ExportUri: s.service.URI(a.Export),
		})
	}
	return out, nil
}

var formats = map[typesv1.DiskFormat]Format{
	typesv1.DiskFormat_DISK_FORMAT_RAW: Raw, typesv1.DiskFormat_DISK_FORMAT_VHD: VHD,
}

func (s *server) DetachMachine(_ context.Context, r *changetrackerv1.DetachMachineRequest) (*changetrackerv1.DetachMachineResponse, error) {
	if err := s.tracker.Detach(r.Vm, func() { s.service.drain(r.Vm) }); err != nil {
		return nil, reasoned(err, "detach machine "+r.Vm)
	}
	return &changetrackerv1.DetachMachineResponse{}, nil
}

func (s *server) StartTracking(_ context.Context, r *changetrackerv1.StartTrackingRequest) (*changetrackerv1.StartTrackingResponse, error) {
	if len(r.Disks) > 0 {
		before, err := s.tracker.Status(r.Vm)
		if err != nil {
			return nil, reasoned(err, "start tracking")
		}
		if len(r.Disks) != len(before.Disks) {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT,
				"start tracking: a part of a machine's disks cannot be tracked yet; leave disks empty")
		}
	}
	st, err := s.tracker.Start(r.Vm, r.Lineage, r.Epoch)
	if err != nil {
		return nil, reasoned(err, "start tracking of machine "+r.Vm)
	}
	return &changetrackerv1.StartTrackingResponse{Status: statusProto(st)}, nil
}

func (s *server) StopTracking(_ context.Context, r *changetrackerv1.StopTrackingRequest) (*changetrackerv1.StopTrackingResponse, error) {
	if err := s.tracker.Stop(r.Vm, r.Lineage, r.Epoch); err != nil {
		return nil, reasoned(err, "stop tracking of machine "+r.Vm)
	}
	return &changetrackerv1.StopTrackingResponse{}, nil
}

func (s *server) SwitchLogs(_ context.Context, r *changetrackerv1.SwitchLogsRequest) (*changetrackerv1.SwitchLogsResponse, error) {
	p, err := s.tracker.Cut(r.Vm, r.Lineage, r.Point, r.Epoch)
	if err != nil {
		return nil, reasoned(err, "cut point")
	}
	return &changetrackerv1.SwitchLogsResponse{Point: pointProto(p)}, nil
}

func (s *server) SettleLogs(_ context.Context, r *changetrackerv1.SettleLogsRequest) (*changetrackerv1.SettleLogsResponse, error) {
	st, err := s.tracker.Settle(r.Vm, r.Lineage, r.Point, r.Epoch, outcomes[r.Outcome])
	if err != nil {
		return nil, reasoned(err, "settle point")
	}
	return &changetrackerv1.SettleLogsResponse{Status: statusProto(st)}, nil
}

var outcomes = map[typesv1.SettleOutcome]Phase{
	typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED: Committed,
	typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED: Abandoned,
}

func (s *server) GetTracking(_ context.Context, r *changetrackerv1.GetTrackingRequest) (*changetrackerv1.GetTrackingResponse, error) {
	st, err := s.tracker.Status(r.Vm)
	if err != nil {
		return nil, reasoned(err, "get tracking")
	}
	return &changetrackerv1.GetTrackingResponse{Status: statusProto(st), Fence: st.Fence}, nil
}

func (s *server) FenceMachine(_ context.Context, r *changetrackerv1.FenceMachineRequest) (*changetrackerv1.FenceMachineResponse, error) {
	if err := s.tracker.Fence(r.Vm, r.Lineage, r.Epoch, r.Failover, func() { s.service.drain(r.Vm) }); err != nil {
		return nil, reasoned(err, "fence machine "+r.Vm)
	}
	return &changetrackerv1.FenceMachineResponse{}, nil
}

func (s *server) UnfenceMachine(_ context.Context, r *changetrackerv1.UnfenceMachineRequest) (*changetrackerv1.UnfenceMachineResponse, error) {
	if err := s.tracker.Unfence(r.Vm, r.Lineage, r.Epoch, r.Failover); err != nil {
		return nil, reasoned(err, "lift the fence of machine "+r.Vm)
	}
	return &changetrackerv1.UnfenceMachineResponse{}, nil
}

func (s *server) BeginPass(_ context.Context, r *changetrackerv1.BeginPassRequest) (*changetrackerv1.BeginPassResponse, error) {
	p, err := s.tracker.BeginPass(r.Vm, r.Lineage, r.Pass, r.Epoch, scopes[r.Scope])
	if err != nil {
		return nil, reasoned(err, "begin pass")
	}
	return &changetrackerv1.BeginPassResponse{Pass: pointProto(p)}, nil
}

var scopes = map[typesv1.PassScope]Scope{
	typesv1.PassScope_PASS_SCOPE_FULL:    Full,
	typesv1.PassScope_PASS_SCOPE_DIRTY:   DirtyOnly,
	typesv1.PassScope_PASS_SCOPE_COMPARE: Compare,
}

func (s *server) SettlePass(_ context.Context, r *changetrackerv1.SettlePassRequest) (*changetrackerv1.SettlePassResponse, error) {
	st, err := s.tracker.SettlePass(r.Vm, r.Lineage, r.Pass, r.Epoch, outcomes[r.Outcome])
	if err != nil {
		return nil, reasoned(err, "settle pass")
	}
	return &changetrackerv1.SettlePassResponse{Status: statusProto(st)}, nil
}

func (s *server) AttachSource(ctx context.Context, r *changetrackerv1.AttachSourceRequest) (*changetrackerv1.AttachSourceResponse, error) {
	spec := SourceSpec{ID: r.Vm, Lineage: r.Lineage, Epoch: r.Epoch, Ordinal: r.Ordinal, Scope: scopes[r.Scope]}
	for _, d := range r.Disks {
		spec.Disks = append(spec.Disks, SourceDisk{
			ID: d.Disk, Size: d.SizeBytes, URI: d.Uri, Context: d.ChangeContext, Allocation: d.Allocation, ReadUnit: d.ReadUnitBytes,
		})
	}
	changes, err := s.tracker.AttachSource(ctx, spec)
	if err != nil {
		return nil, reasoned(err, "attach source of machine "+r.Vm)
	}
	out := &changetrackerv1.AttachSourceResponse{}
	for _, c := range changes {
		out.Disks = append(out.Disks, &typesv1.DiskChange{Disk: c.Disk, SizeBytes: c.Size, ChangeBytes: c.Bytes})
	}
	return out, nil
}

func (s *server) DetachSource(_ context.Context, r *changetrackerv1.DetachSourceRequest) (*changetrackerv1.DetachSourceResponse, error) {
	if err := s.tracker.DetachSource(r.Vm, r.Lineage, r.Ordinal); err != nil {
		return nil, reasoned(err, "detach source of machine "+r.Vm)
	}
	return &changetrackerv1.DetachSourceResponse{}, nil
}

// dataField is the field of ReadChangesResponse and ReadRangesResponse that holds the bytes.
const dataField protowire.Number = 5

func (s *server) ReadChanges(r *changetrackerv1.ReadChangesRequest, stream changetrackerv1.ChangeTrackerService_ReadChangesServer) error {
	err := s.tracker.ReadChanges(stream.Context(), r.Vm, r.Lineage, r.Point, r.Disk, r.ResumeOffset, func(c Chunk) error {
		m := &changetrackerv1.ReadChangesResponse{Offset: c.Off, Length: c.Len, Zero: c.Data == nil}
		if c.Data == nil {
			return stream.Send(m)
		}
		m.Crc32C = crc32.Checksum(c.Data, castagnoli)
		return s.tracker.bulk(stream, m, dataField, c.Data)
	})
	if err != nil {
		return reasoned(err, "read changes")
	}
	return nil
}

func (s *server) ReadRanges(r *changetrackerv1.ReadRangesRequest, stream changetrackerv1.ChangeTrackerService_ReadRangesServer) error {
	window := extent.Range{Off: r.Window.GetOffset(), Len: r.Window.GetLength()}
	if !window.Valid() {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "read ranges: window is not a range")
	}
	var ranges []extent.Range
	for _, b := range r.Ranges {
		at := extent.Range{Off: b.Offset, Len: b.Length}
		if !at.Valid() {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "read ranges: [%d, +%d) is not a range", at.Off, at.Len)
		}
		ranges = append(ranges, at)
	}
	err := s.tracker.ReadRanges(stream.Context(), r.Vm, r.Lineage, r.Pass, r.Disk, window, ranges, func(c Chunk) error {
		m := &changetrackerv1.ReadRangesResponse{Offset: c.Off, Length: c.Len, Zero: c.Data == nil}
		if c.Data == nil {
			return stream.Send(m)
		}
		m.Crc32C = crc32.Checksum(c.Data, castagnoli)
		return s.tracker.bulk(stream, m, dataField, c.Data)
	})
	if err != nil {
		return reasoned(err, "read ranges")
	}
	return nil
}

func (s *server) HashRanges(r *changetrackerv1.HashRangesRequest, stream changetrackerv1.ChangeTrackerService_HashRangesServer) error {
	window := extent.Range{Off: r.Window.GetOffset(), Len: r.Window.GetLength()}
	if !window.Valid() {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "hash ranges: window is not a range")
	}
	err := s.tracker.HashRanges(stream.Context(), r.Vm, r.Lineage, r.Disk, window, r.ChunkBytes, func(h Hashes) error {
		m := &changetrackerv1.HashRangesResponse{Offset: h.Off, Chunks: h.Chunks, Zero: len(h.Digests) == 0}
		m.Digests = h.Digests // encoded before Send returns
		return stream.Send(m)
	})
	if err != nil {
		return reasoned(err, "hash ranges")
	}
	return nil
}
