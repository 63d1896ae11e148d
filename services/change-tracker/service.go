package changetracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/extent"
	nbd "github.com/landfall-dr/landfall/libs/nbd/server"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
)

// Deps is what the service is given. Clock and Logger are required.
type Deps struct {
	// Clock gives the time of cuts.
	Clock func() time.Time
	// Logger tells the story.
	Logger *slog.Logger
	// MeterProvider takes metrics; nil takes none.
	MeterProvider metric.MeterProvider
}

// Service is the change-tracker. Make it with New, Register it on a server, Run it.
type Service struct {
	tracker *Tracker
	nbd     *nbd.Server
	lis     net.Listener
	unix    string // socket path, or empty
}

// New checks the configuration, listens for NBD clients and attaches the machines that were attached before, so that
// calls can be answered when it returns; the disks are served by Run. Whoever does not Run it, Closes it.
func New(_ context.Context, c Config, d Deps) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("change-tracker: %w", err)
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("change-tracker: make state folder: %w", err)
	}
	m, err := newMetrics(d.MeterProvider)
	if err != nil {
		return nil, err
	}
	s := &Service{tracker: newTracker(osFiles{now: d.Clock}, c.StateDir, d.Logger, d.Clock, m)}
	s.tracker.maxEntries = c.MaxLogEntries
	s.nbd = nbd.New(exports{s.tracker}, d.Logger, nbd.Options{})
	network, address := c.nbd()
	if network == "unix" {
		s.unix = address
		// A socket that a killed process left would refuse the listener.
		if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("change-tracker: remove stale socket: %w", err)
		}
	}
	if s.lis, err = net.Listen(network, address); err != nil {
		return nil, fmt.Errorf("change-tracker: listen for NBD clients: %w", err)
	}
	if err := s.tracker.Restore(); err != nil {
		return nil, errors.Join(fmt.Errorf("change-tracker: %w", err), s.lis.Close())
	}
	return s, nil
}

// Register adds the service's handlers.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	changetrackerv1.RegisterChangeTrackerServiceServer(r, &server{service: s, tracker: s.tracker})
}

// Run exports the disks until ctx ends; then it answers the requests in flight, flushes the images and closes the
// tracking in good order.
func (s *Service) Run(ctx context.Context) error {
	return errors.Join(s.nbd.Serve(ctx, s.lis), s.tracker.Close())
}

// Close ends a service that was never Run.
func (s *Service) Close() error { return errors.Join(s.lis.Close(), s.tracker.Close()) }

// URI is where a guest finds an export, for qemu, libnbd and fio.
func (s *Service) URI(export string) string {
	if s.unix != "" {
		return (&url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + url.QueryEscape(s.unix)}).String()
	}
	return (&url.URL{Scheme: "nbd", Host: s.lis.Addr().String(), Path: "/" + export}).String()
}

// drain ends the exports of a machine.
func (s *Service) drain(id string) {
	s.nbd.CloseExports(func(name string) bool { return strings.HasPrefix(name, id+"/") })
}

type exports struct{ *Tracker }

// Open finds an export.
func (e exports) Open(name string) (nbd.Disk, error) {
	d, err := e.export(name)
	if errors.Is(err, ErrFenced) {
		return nil, fmt.Errorf("%w: %w", nbd.ErrForbidden, err)
	}
	if err != nil {
		return nil, err
	}
	return guestDisk{d}, nil
}

// guestDisk is a disk as guests find it. A guest that goes away ends nothing: the image is at hand.
type guestDisk struct{ *disk }

func (g guestDisk) ReadAt(_ context.Context, p []byte, off int64) error {
	n, err := g.disk.ReadAt(p, off)
	if n == len(p) {
		return nil // io.EOF may come with the last bytes
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (g guestDisk) Allocated(_ context.Context, r extent.Range) (*extent.Set, error) {
	return g.disk.Allocated(r)
}
