package hostprovider

import (
	"context"
	"encoding/base64"
	"slices"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Page sizes of ListMachines.
const (
	defaultPage = 100
	maxPage     = 1000
)

// server decodes, asks the driver and encodes.
type server struct {
	hostproviderv1.UnimplementedHostServiceServer
	driver Driver
	now    func() time.Time
}

func (s *server) ListMachines(ctx context.Context, r *hostproviderv1.ListMachinesRequest) (*hostproviderv1.ListMachinesResponse, error) {
	machines, problems, err := s.driver.Machines(ctx)
	if err != nil {
		return nil, err
	}
	size := int(r.PageSize)
	switch {
	case size == 0:
		size = defaultPage
	case size > maxPage:
		size = maxPage
	}
	after, err := base64.RawURLEncoding.DecodeString(r.PageToken)
	if err != nil {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "page_token is not one of ours")
	}
	// Pages go by one order, whatever the driver's is: a token means everything up to its key.
	machines = slices.SortedFunc(slices.Values(machines), func(a, b *typesv1.Machine) int {
		return strings.Compare(pageKey(a), pageKey(b))
	})
	out := &hostproviderv1.ListMachinesResponse{}
	for _, m := range machines {
		if pageKey(m) <= string(after) {
			continue
		}
		if len(out.Machines) == size {
			out.NextPageToken = base64.RawURLEncoding.EncodeToString([]byte(pageKey(out.Machines[size-1])))
			return out, nil
		}
		out.Machines = append(out.Machines, m)
	}
	out.Problems = problems
	return out, nil
}

// pageKey sorts machines by display name, then id.
func pageKey(m *typesv1.Machine) string { return m.DisplayName + "\x00" + m.Id }

func (s *server) GetMachine(ctx context.Context, r *hostproviderv1.GetMachineRequest) (*hostproviderv1.GetMachineResponse, error) {
	m, err := s.driver.Machine(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.GetMachineResponse{Machine: m}, nil
}

func (s *server) CheckPrerequisites(ctx context.Context, r *hostproviderv1.CheckPrerequisitesRequest) (*hostproviderv1.CheckPrerequisitesResponse, error) {
	findings, m, err := s.driver.Check(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.CheckPrerequisitesResponse{Findings: findings, Machine: m}, nil
}

func (s *server) CreateReplicationRelationship(ctx context.Context, r *hostproviderv1.CreateReplicationRelationshipRequest) (*hostproviderv1.CreateReplicationRelationshipResponse, error) {
	m, err := s.driver.Machine(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	status, err := s.driver.Establish(ctx, m.Id, r.Lineage, r.Epoch)
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.CreateReplicationRelationshipResponse{Status: status, Machine: m}, nil
}

func (s *server) RemoveReplicationRelationship(ctx context.Context, r *hostproviderv1.RemoveReplicationRelationshipRequest) (*hostproviderv1.RemoveReplicationRelationshipResponse, error) {
	if err := s.driver.Dissolve(ctx, r.Vm, r.Lineage, r.Epoch); err != nil {
		return nil, err
	}
	return &hostproviderv1.RemoveReplicationRelationshipResponse{}, nil
}

func (s *server) CutPoint(ctx context.Context, r *hostproviderv1.CutPointRequest) (*hostproviderv1.CutPointResponse, error) {
	m, err := s.driver.Machine(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	if err := failpoint.Hit("host-provider/before-cut"); err != nil {
		return nil, err
	}
	cut, err := s.driver.Cut(ctx, Cut{VM: m.Id, Lineage: r.Lineage, Point: r.Point, Epoch: r.Epoch, Consistency: r.Consistency})
	if err != nil {
		return nil, err
	}
	if err := failpoint.Hit("host-provider/after-cut"); err != nil {
		return nil, err
	}
	return &hostproviderv1.CutPointResponse{
		Point: cut.Point, Consistency: cut.Consistency, Machine: m, Degraded: errcat.Detail(cut.Degraded, s.now()),
	}, nil
}

func (s *server) SettlePoint(ctx context.Context, r *hostproviderv1.SettlePointRequest) (*hostproviderv1.SettlePointResponse, error) {
	if err := failpoint.Hit("host-provider/before-settle"); err != nil {
		return nil, err
	}
	status, err := s.driver.Settle(ctx, Settle{VM: r.Vm, Lineage: r.Lineage, Point: r.Point, Epoch: r.Epoch, Outcome: r.Outcome})
	if err != nil {
		return nil, err
	}
	if err := failpoint.Hit("host-provider/after-settle"); err != nil {
		return nil, err
	}
	return &hostproviderv1.SettlePointResponse{Status: status}, nil
}

func (s *server) ListPoints(ctx context.Context, r *hostproviderv1.ListPointsRequest) (*hostproviderv1.ListPointsResponse, error) {
	status, err := s.driver.Points(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.ListPointsResponse{Status: status}, nil
}

func (s *server) BeginPass(ctx context.Context, r *hostproviderv1.BeginPassRequest) (*hostproviderv1.BeginPassResponse, error) {
	p, err := s.driver.BeginPass(ctx, Pass{VM: r.Vm, Lineage: r.Lineage, Pass: r.Pass, Epoch: r.Epoch, Scope: r.Scope})
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.BeginPassResponse{Pass: p}, nil
}

func (s *server) SettlePass(ctx context.Context, r *hostproviderv1.SettlePassRequest) (*hostproviderv1.SettlePassResponse, error) {
	status, err := s.driver.SettlePass(ctx, Settle{VM: r.Vm, Lineage: r.Lineage, Point: r.Pass, Epoch: r.Epoch, Outcome: r.Outcome})
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.SettlePassResponse{Status: status}, nil
}

func (s *server) StopMachine(ctx context.Context, r *hostproviderv1.StopMachineRequest) (*hostproviderv1.StopMachineResponse, error) {
	state, err := s.driver.Stop(ctx, Fence{VM: r.Vm, Lineage: r.Lineage, Epoch: r.Epoch, Failover: r.Failover})
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.StopMachineResponse{PowerState: state}, nil
}

func (s *server) ReleaseMachine(ctx context.Context, r *hostproviderv1.ReleaseMachineRequest) (*hostproviderv1.ReleaseMachineResponse, error) {
	if err := s.driver.Release(ctx, Fence{VM: r.Vm, Lineage: r.Lineage, Epoch: r.Epoch, Failover: r.Failover}); err != nil {
		return nil, err
	}
	return &hostproviderv1.ReleaseMachineResponse{}, nil
}

func (s *server) StartMachine(ctx context.Context, r *hostproviderv1.StartMachineRequest) (*hostproviderv1.StartMachineResponse, error) {
	state, err := s.driver.Start(ctx, Fence{VM: r.Vm, Lineage: r.Lineage, Epoch: r.Epoch, Failover: r.Failover})
	if err != nil {
		return nil, err
	}
	return &hostproviderv1.StartMachineResponse{PowerState: state}, nil
}
