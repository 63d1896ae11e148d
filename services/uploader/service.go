package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/shipping"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// Deps is what the service is given.
type Deps struct {
	// Bus carries tasks and events; its name is the source of events ("uploader").
	Bus *bus.Bus
	// Store holds the lineages.
	Store blobstore.Store
	// Hosts finds change trackers; needed for role ship.
	Hosts Hosts
	// Clock is the time; nil means the system's.
	Clock func() time.Time
	// Logger; nil discards.
	Logger *slog.Logger
	// MeterProvider; nil means none. Spans come from the bus and from the connections to hosts.
	MeterProvider metric.MeterProvider
}

// Service is one uploader.
type Service struct {
	uploaderv1.UnimplementedUploaderServiceServer

	config   Config
	bus      *bus.Bus
	shipper  *shipper
	applier  *applier
	retainer *retainer
	metrics  *metrics
	logger   *slog.Logger
	clock    func() time.Time

	// limiter and follower are role ship's share of the site's bandwidth; follower is nil without that role.
	limiter  *bandwidth.Limiter
	follower *bandwidth.Follower

	alarms  *alarms
	urgent  *urgents
	sleeper *sleeper

	mu     sync.Mutex
	active map[work]*active
}

// New builds an uploader; Run starts it.
func New(config Config, deps Deps) (*Service, error) {
	errs := []error{config.Validate()}
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what+" is needed"))
		}
	}
	need(deps.Bus != nil, "a bus")
	need(deps.Store != nil, "a store")
	need(deps.Hosts != nil || !slices.Contains(config.Roles, RoleShip), "a way to hosts for role ship")
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("build the uploader: %w", err)
	}
	if deps.Clock == nil {
		deps.Clock = time.Now
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	pool := shipping.NewPool(config.Ship.Buffers, config.Ship.SegmentBytes)
	m, err := newMetrics(deps.MeterProvider, pool, deps.Clock)
	if err != nil {
		return nil, fmt.Errorf("build the uploader: %w", err)
	}
	codec, err := newCodec(config.Ship.Compression, deps.Clock, deps.MeterProvider)
	if err != nil {
		return nil, fmt.Errorf("build the uploader: %w", err)
	}
	limiter, follower, err := newLink(config, deps)
	if err != nil {
		return nil, fmt.Errorf("build the uploader: %w", err)
	}
	known := newReplicas(bandwidth.Store(deps.Store, limiter))
	s := &Service{
		config: config, bus: deps.Bus, metrics: m, logger: deps.Logger, clock: deps.Clock, active: map[work]*active{},
		limiter: limiter, follower: follower,
		shipper: &shipper{
			config: config, replicas: known, hosts: deps.Hosts, pool: pool, codec: codec, limiter: limiter, metrics: m, logger: deps.Logger,
		},
		retainer: &retainer{config: config, replicas: known, metrics: m, logger: deps.Logger},
		applier:  &applier{config: config, replicas: known, clock: deps.Clock, metrics: m, logger: deps.Logger},
		alarms:   &alarms{bus: deps.Bus, config: config.Apply.Backlog, clock: deps.Clock, logger: deps.Logger},
		urgent:   newUrgents(),
	}
	s.sleeper = newSleeper(s)
	return s, nil
}

// newLink is the limiter of the process and, where it ships, what follows the site's bandwidth.
func newLink(config Config, deps Deps) (*bandwidth.Limiter, *bandwidth.Follower, error) {
	limiter := bandwidth.NewLimiter()
	if deps.MeterProvider != nil {
		if err := limiter.Observe(deps.MeterProvider.Meter("github.com/landfall-dr/landfall/services/uploader"), "landfall_uploader"); err != nil {
			return nil, nil, err
		}
	}
	if !slices.Contains(config.Roles, RoleShip) {
		return limiter, nil, nil
	}
	follower, err := bandwidth.NewFollower(bandwidth.FollowerOptions{
		Bus: deps.Bus, Site: config.Site, Service: "uploader", Limiter: limiter, Clock: deps.Clock, Logger: deps.Logger,
	})
	return limiter, follower, err
}

// Register offers UploaderService on a server.
func (s *Service) Register(r grpc.ServiceRegistrar) { uploaderv1.RegisterUploaderServiceServer(r, s) }

// Run takes tasks until ctx ends and the tasks in work have stopped. An error is a consumer that cannot be set up.
func (s *Service) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, q := range queues {
		role := q.role
		if !slices.Contains(s.config.Roles, role) {
			continue
		}
		consumer, handle, err := s.consumer(q)
		if err != nil {
			return fmt.Errorf("run role %s: %w", role, err)
		}
		group.Go(func() error {
			if role == RoleShip {
				select { // a limit that was set before holds for the first segment
				case <-s.follower.Ready():
				case <-ctx.Done():
					return nil
				}
			}
			if err := consumer.Run(ctx, handle); err != nil {
				return fmt.Errorf("run role %s: %w", role, err)
			}
			return nil
		})
	}
	group.Go(func() error {
		s.sleeper.run(ctx)
		return nil
	})
	if s.follower != nil {
		group.Go(func() error { return s.follower.Run(ctx) })
	}
	s.logger.InfoContext(ctx, "uploader runs", "roles", s.config.Roles, "site", s.config.Site)
	return group.Wait()
}

// queue is one that a role serves, by a durable consumer.
type queue struct {
	role    Role
	kind    bus.Kind
	durable string
}

// Points and tasks of passes have queues and workers of their own: copies never stand before points.
var queues = []queue{
	{RoleShip, bus.KindShip, durableShip}, {RoleShip, bus.KindCopy, durableCopy},
	{RoleApply, bus.KindApply, durableApply}, {RoleRetain, bus.KindRetain, durableRetain},
}

func (s *Service) consumer(q queue) (*bus.Consumer, func(context.Context, *bus.Task) error, error) {
	switch q.role {
	case RoleRetain:
		c, err := s.bus.Consumer(q.kind, bus.AllSites, q.durable, bus.ConsumerOptions{
			Concurrency: s.config.Retain.Concurrency,
			RetryDelay:  s.config.Retain.RetryDelay, RetryDelayMax: 10 * s.config.Retain.RetryDelay,
		})
		return c, s.handleRetain, err
	case RoleShip:
		c, err := s.bus.Consumer(q.kind, s.config.Site, q.durable, bus.ConsumerOptions{
			Concurrency: s.config.Ship.Concurrency,
			RetryDelay:  s.config.Ship.RetryDelay, RetryDelayMax: 10 * s.config.Ship.RetryDelay,
		})
		return c, s.handleShip, err
	}
	apply := s.config.Apply
	c, err := s.bus.Consumer(q.kind, bus.AllSites, q.durable, bus.ConsumerOptions{
		Concurrency: apply.Concurrency, MaxDeliver: apply.BusyDeliveries,
		RetryDelay: apply.BusyDelay, RetryDelayMax: 4 * apply.BusyDelay,
	})
	return c, s.handleApply, err
}
