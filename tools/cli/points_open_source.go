package cli

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	failoverorchestrator "github.com/landfall-dr/landfall/services/failover-orchestrator"
	"github.com/landfall-dr/landfall/tools/recovery"
)

// openedPoint describes a point that can be read.
type openedPoint struct {
	VM      string    `json:"vm"`
	Session string    `json:"session,omitempty"`
	Point   uint64    `json:"point"`
	CutTime time.Time `json:"cut_time"`
	// Pinned: retention cannot take the point away while it is open.
	Pinned bool         `json:"pinned"`
	Disks  []openedDisk `json:"disks"`
}

type openedDisk struct {
	ID   string `json:"id"`
	Size int64  `json:"size_bytes"`
	URI  string `json:"uri"`
}

// pointReader reads an opened point: by the API or straight from storage. It is safe for concurrent use.
type pointReader interface {
	// read fills p, at most MaxPointRead bytes; zero says that all of them are zero, and p is not touched.
	read(ctx context.Context, disk string, off int64, p []byte) (zero bool, err error)
	// mapped says where a range may hold data, up to next.
	mapped(ctx context.Context, disk string, r extent.Range) (parts []extent.Range, next int64, err error)
	// renew keeps the point for another while.
	renew(ctx context.Context) error
	close(ctx context.Context) error
}

// apiPoint is a session of PointService.
type apiPoint struct {
	client  failoverv1.PointServiceClient
	request *failoverv1.OpenPointRequest
}

func openByAPI(ctx context.Context, client failoverv1.PointServiceClient, vm, point string) (*openedPoint, *apiPoint, error) {
	p := &apiPoint{client: client, request: &failoverv1.OpenPointRequest{Vm: vm, Point: point, Session: uuid.NewString()}}
	r, err := client.OpenPoint(ctx, p.request)
	if err != nil {
		return nil, nil, err
	}
	p.request.Point = ordinalText(r.Point) // renewed as the same, whatever is the latest then
	out := &openedPoint{VM: vm, Session: r.Session, Point: r.Point, CutTime: r.CutTime.AsTime(), Pinned: true}
	for _, d := range r.Disks {
		out.Disks = append(out.Disks, openedDisk{ID: d.Id, Size: d.SizeBytes})
	}
	return out, p, nil
}

func (p *apiPoint) read(ctx context.Context, disk string, off int64, b []byte) (bool, error) {
	r, err := p.client.ReadPoint(ctx, &failoverv1.ReadPointRequest{Session: p.request.Session, Disk: disk, Offset: off, Length: int64(len(b))})
	switch {
	case err != nil:
		return false, err
	case r.Zero:
		return true, nil
	case len(r.Data) != len(b):
		return false, errcat.New(typesv1.ErrorReason_ERROR_REASON_INTERNAL, "%d bytes in the answer to a read of %d", len(r.Data), len(b))
	}
	copy(b, r.Data)
	return false, nil
}

func (p *apiPoint) mapped(ctx context.Context, disk string, at extent.Range) (parts []extent.Range, next int64, err error) {
	r, err := p.client.MapPoint(ctx, &failoverv1.MapPointRequest{Session: p.request.Session, Disk: disk, Offset: at.Off, Length: at.Len})
	if err != nil {
		return nil, 0, err
	}
	for _, e := range r.Extents {
		parts = append(parts, extent.Range{Off: e.Offset, Len: e.Length})
	}
	if r.NextOffset <= at.Off {
		return nil, 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_INTERNAL, "a map of [%d, +%d) that ends at %d", at.Off, at.Len, r.NextOffset)
	}
	return parts, r.NextOffset, nil
}

func (p *apiPoint) renew(ctx context.Context) error {
	_, err := p.client.OpenPoint(ctx, p.request)
	return err
}

func (p *apiPoint) close(ctx context.Context) error {
	_, err := p.client.ClosePoint(ctx, &failoverv1.ClosePointRequest{Session: p.request.Session})
	return err
}

// storagePoint reads storage itself, with rights to read only: nothing is pinned.
type storagePoint struct {
	reader *failoverorchestrator.PointReader
	rep    *replica.Replica
	seq    replica.Seq
}

func openFromStorage(ctx context.Context, store blobstore.Store, vm string, point *failoverv1.PointSelector) (out *openedPoint, p *storagePoint, note string, err error) {
	found, note, err := recovery.New(recovery.Options{Store: store}).Find(ctx, vm, "")
	if err != nil {
		return nil, nil, "", err
	}
	rep, err := replica.Open(ctx, store, replica.Lineage(found.Lineage))
	if err != nil {
		return nil, nil, "", failoverorchestrator.ChainError(err, "open the replica of %s", found.Title())
	}
	points, err := rep.Points(ctx)
	if err != nil {
		return nil, nil, "", failoverorchestrator.ChainError(err, "list the recovery points of %s", found.Title())
	}
	chosen, err := failoverorchestrator.ChoosePoint(points, point)
	if err != nil {
		return nil, nil, "", err
	}
	m, err := rep.Manifest(ctx, chosen.Seq)
	if err != nil {
		return nil, nil, "", failoverorchestrator.ChainError(err, "read manifest %d of %s", chosen.Seq, found.Title())
	}
	name := found.VM
	if name == "" {
		name = found.Title()
	}
	out = &openedPoint{VM: name, Point: uint64(m.Point), CutTime: m.CutTime.UTC()}
	for _, d := range m.Disks {
		out.Disks = append(out.Disks, openedDisk{ID: d.ID, Size: d.Size})
	}
	return out, &storagePoint{reader: failoverorchestrator.NewPointReader(), rep: rep, seq: chosen.Seq}, note, nil
}

func (p *storagePoint) read(ctx context.Context, disk string, off int64, b []byte) (bool, error) {
	return false, p.reader.Read(ctx, p.rep, p.seq, disk, b, off)
}

func (p *storagePoint) mapped(ctx context.Context, disk string, at extent.Range) ([]extent.Range, int64, error) {
	return p.reader.Map(ctx, p.rep, p.seq, disk, at)
}

func (p *storagePoint) renew(context.Context) error { return nil }
func (p *storagePoint) close(context.Context) error { return nil }

// passing says whether a call may work later.
func passing(err error) bool {
	if errcat.Recoverable(err) || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted:
		return true
	}
	return false
}
