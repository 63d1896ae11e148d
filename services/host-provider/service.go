package hostprovider

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
)

// Deps is what the service is given. Clock and Logger have defaults: the system's clock, and none.
type Deps struct {
	Clock   func() time.Time
	Logger  *slog.Logger
	Bus     *bus.Bus
	Driver  Driver
	Version string
}

// Service is the host-provider. Make it with New, Register it on a server, Run it.
type Service struct {
	config Config
	deps   Deps
	log    *slog.Logger
	hosts  *bus.KV[*hostproviderv1.Host]
}

// New checks the configuration and opens the host records.
func New(ctx context.Context, c Config, d Deps) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("host-provider: %w", err)
	}
	if d.Bus == nil || d.Driver == nil {
		return nil, errors.New("host-provider: Bus and Driver must be given")
	}
	if d.Clock == nil {
		d.Clock = time.Now
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	hosts, err := bus.OpenKV[*hostproviderv1.Host](ctx, d.Bus, bus.BucketHosts)
	if err != nil {
		return nil, fmt.Errorf("open host records: %w", err)
	}
	return &Service{config: c, deps: d, log: d.Logger, hosts: hosts}, nil
}

// Register adds the service's handlers.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	hostproviderv1.RegisterHostServiceServer(r, &server{driver: s.deps.Driver, now: s.deps.Clock})
}

// Run looks for machines and keeps the host record fresh, until ctx ends. Failures are logged once per change and
// tried again: a host that cannot reach the bus still serves its guests. A look that hangs does not stop the heartbeat.
func (s *Service) Run(ctx context.Context) error {
	var scanned, registered quiet
	s.refresh(ctx, &scanned) // the first record says at once what the host holds
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		every(ctx, s.config.ScanInterval, func() { s.refresh(ctx, &scanned) })
		return nil
	})
	group.Go(func() error {
		s.heartbeat(ctx, &registered)
		every(ctx, s.config.Heartbeat, func() { s.heartbeat(ctx, &registered) })
		return nil
	})
	return group.Wait()
}

func every(ctx context.Context, interval time.Duration, do func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			do()
		}
	}
}

func (s *Service) refresh(ctx context.Context, q *quiet) {
	call, cancel := context.WithTimeout(ctx, s.config.ScanInterval+20*time.Second)
	defer cancel()
	q.report(ctx, s.log, "look for machines", s.deps.Driver.Refresh(call))
}

func (s *Service) heartbeat(ctx context.Context, q *quiet) {
	call, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	q.report(ctx, s.log, "register host", s.register(call))
}

// register writes the host record. It is this service's alone, so the last writer is the present process. While the
// driver cannot say what the host holds, the record keeps what was known: the host is alive, and its machines are not
// gone.
func (s *Service) register(ctx context.Context) error {
	machines, _, unknown := s.deps.Driver.Machines(ctx)
	record := &hostproviderv1.Host{
		Name: "sites/" + s.config.Site + "/hosts/" + s.config.Host, Driver: s.deps.Driver.Name(), Version: s.deps.Version,
		HostProviderAddress: s.config.Address, ChangeTrackerAddress: s.config.ChangeTrackerAddress,
		HeartbeatTime: timestamppb.New(s.deps.Clock()),
	}
	for _, m := range machines {
		record.Vms = append(record.Vms, m.Id)
	}
	_, _, err := s.hosts.MutateOrCreate(ctx, bus.Key(s.config.Site, s.config.Host), func(h *hostproviderv1.Host) error {
		vms := h.Vms
		proto.Reset(h)
		proto.Merge(h, record)
		if unknown != nil {
			h.Vms = vms
		}
		return nil
	})
	return err
}

// quiet logs a failure when it begins and its end, not every repetition.
type quiet struct{ failing string }

func (q *quiet) report(ctx context.Context, log *slog.Logger, what string, err error) {
	if err != nil && (ctx.Err() != nil || errors.Is(err, context.Canceled)) {
		return
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text == q.failing {
		return
	}
	q.failing = text
	if err != nil {
		log.WarnContext(ctx, what+" failed and will be tried again", "error", err)
		return
	}
	log.InfoContext(ctx, what+" works again")
}
