// Package allinone is `landfall up`: the six services in one process. It is a
// composition root and holds no rule of its own: it starts an embedded event
// server, builds the services through the constructors that the fleet's
// programs use, and joins them by in-memory listeners through the same
// handlers and interceptors.
package allinone

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/lifecycle"
	"github.com/landfall-dr/landfall/libs/program"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
)

// Options of one run.
type Options struct {
	// State is the folder of everything that is kept: certificates, event server, store, host state.
	State string
	// Store is where lineages are kept; by default a folder in State.
	Store backend.Settings
	// Images is the folder of machine folders (driver imagedir); empty with driver qemu.
	Images string
	// QEMU is for driver qemu; it is used when Images is empty.
	QEMU QEMU
	// Listen is the one API address, on loopback unless somebody wants it otherwise.
	Listen string
	// NBDListen is where guests find their disks.
	NBDListen string
	// Site and Host are the names of this site and of this host.
	Site, Host string
	// Version of the program.
	Version string
	Logger  *slog.Logger
	Tracer  trace.TracerProvider
	Meter   metric.MeterProvider
	Clock   func() time.Time
	// AckWait is how long a work queue waits for a worker's sign of life; zero is the bus's default.
	AckWait time.Duration
	// RetryUnit is the unit of the scheduler's ladder; zero is its default, a minute.
	RetryUnit time.Duration
	// OnReady hears the API's address when everything runs.
	OnReady func(address string)
	// Signals replaces the process's signals, for tests; a channel that never delivers leaves the end to ctx.
	Signals <-chan os.Signal
	// DrainDelay is how long the API goes on serving after it has said that it will stop; zero is not at all, since
	// nobody balances load to one process.
	DrainDelay time.Duration
}

// QEMU says where driver qemu finds machines.
type QEMU struct {
	// Machines is the folder of definitions and monitor sockets.
	Machines string
	// Scratch is the folder of the frozen copies of points, and Sockets that of the sockets that they are read from (a short
	// path). Empty means folders in the state folder.
	Scratch, Sockets string
}

// Names of the services, also of their in-memory listeners and identities.
const (
	hostProvider  = "host-provider"
	changeTracker = "change-tracker"
	uploaderName  = "uploader"
	resyncEngine  = "resync-engine"
	schedulerName = "scheduler"
	orchestrator  = "failover-orchestrator"
)

var names = []string{changeTracker, hostProvider, uploaderName, resyncEngine, schedulerName, orchestrator}

// Folders inside the state folder.
const (
	pkiFolder   = "pki"
	serverCerts = "certificates/landfall"

	busFolder    = "events"
	storeFolder  = "store"
	hostFolder   = "host"
	qemuFolder   = "qemu"
	lockFile     = "lock"
	memoryPrefix = "mem:"
)

// parts are what a run has opened, in the order in which they must be closed last to first.
type parts struct {
	options  Options
	log      *slog.Logger
	identity rpc.Identity
	network  *rpc.Network
	server   *rpc.Server
	events   *bus.Server
	bus      *bus.Bus
	store    blobstore.Store
	services map[string]program.Service
	dialers  []*rpc.Dialer
	listener net.Listener
	closers  []func(context.Context) error
}

// Run runs everything until ctx ends or a signal comes. The state folder is locked meanwhile.
func Run(ctx context.Context, o Options) error {
	p := &parts{options: o, log: o.Logger, network: &rpc.Network{}, services: map[string]program.Service{}}
	defer p.close(context.WithoutCancel(ctx))
	if err := p.open(ctx); err != nil {
		return err
	}
	return p.run(ctx)
}

// open prepares everything up to the constructors of the services.
func (p *parts) open(ctx context.Context) error {
	o := p.options
	if err := os.MkdirAll(o.State, 0o700); err != nil {
		return fmt.Errorf("make state folder: %w", err)
	}
	unlock, err := lock(filepath.Join(o.State, lockFile))
	if err != nil {
		return err
	}
	p.closers = append(p.closers, func(context.Context) error { return unlock() })
	if err := p.certify(); err != nil {
		return err
	}
	if p.events, err = bus.StartEmbedded(ctx, bus.ServerOptions{StoreDir: filepath.Join(o.State, busFolder), Logger: p.log}); err != nil {
		return fmt.Errorf("start event server: %w", err)
	}
	p.closers = append(p.closers, p.events.Stop)
	if p.bus, err = bus.Connect(ctx, bus.Options{Server: p.events, Name: "landfall", AckWait: o.AckWait, Logger: p.log, TracerProvider: o.Tracer, MeterProvider: o.Meter}); err != nil {
		return fmt.Errorf("connect to the event server: %w", err)
	}
	p.closers = append(p.closers, p.bus.Close)
	if err := p.bus.Declare(ctx, bus.Declaration{}); err != nil {
		return fmt.Errorf("declare streams: %w", err)
	}
	if !o.Store.IsSet() {
		o.Store.Dir = filepath.Join(o.State, storeFolder)
	}
	if p.store, err = backend.Open(ctx, o.Store, backend.Options{Dir: dir.Options{Clock: o.Clock}, Azure: azure.Options{Clock: o.Clock}, Later: true}); err != nil {
		return err
	}
	p.closers = append(p.closers, func(context.Context) error { return p.store.Close() })
	if p.server, err = rpc.NewServer(rpc.ServerOptions{Name: "landfall", Identity: p.identity, Logger: p.log, TracerProvider: o.Tracer, MeterProvider: o.Meter, StopTimeout: 5 * time.Second}); err != nil {
		return fmt.Errorf("build API server: %w", err)
	}
	if p.listener, err = p.network.Listen(ctx, o.Listen); err != nil {
		return fmt.Errorf("listen on %s: %w", o.Listen, err)
	}
	for _, name := range names {
		service, err := p.build(ctx, name)
		if err != nil {
			return fmt.Errorf("build %s: %w", name, err)
		}
		service.Register(p.server)
		p.services[name] = service
	}
	return nil
}

// certify makes the CA, the API's certificate and one for the command line.
func (p *parts) certify() error {
	o := p.options
	authority, err := pki.Open(filepath.Join(o.State, pkiFolder), o.Clock)
	if err != nil {
		return fmt.Errorf("open certificate authority: %w", err)
	}
	for folder, id := range map[string]pki.Identity{
		serverCerts:        pki.ServiceIdentity(schedulerName, hostProvider, changeTracker, uploaderName, resyncEngine, orchestrator),
		ClientCertificates: pki.UserIdentity("cli", pki.RoleAdmin),
	} {
		if _, err := authority.Ensure(filepath.Join(o.State, folder), pki.Request{Identity: id}); err != nil {
			return fmt.Errorf("issue certificate: %w", err)
		}
	}
	p.identity, err = rpc.LoadIdentity(filepath.Join(o.State, serverCerts), o.Clock)
	if err != nil {
		return fmt.Errorf("load certificate: %w", err)
	}
	return nil
}

// env is what a service's constructor gets: its own identity on every connection, and the shared parts.
func (p *parts) env(ctx context.Context, name string) (*program.Env, error) {
	o := p.options
	id := pki.ServiceIdentity(name)
	if name == hostProvider || name == changeTracker {
		id = id.On(o.Host)
	}
	dialer := rpc.NewDialer(rpc.DialerOptions{Identity: rpc.Identity{Peer: id}, Network: p.network, TracerProvider: o.Tracer})
	p.dialers = append(p.dialers, dialer)
	e := &program.Env{
		Name: name, Site: o.Site, Holder: "landfall-up", Version: o.Version, Clock: o.Clock,
		Logger: o.Logger.With("service", name), Tracer: o.Tracer, Meter: o.Meter,
		Bus: p.bus.As(name), Store: p.store, Dialer: dialer, Peers: map[string]string{},
	}
	for _, peer := range names {
		e.Peers[peer] = memoryPrefix + peer
	}
	resolve, err := program.HostAddresses(ctx, p.bus, o.Site)
	if err != nil {
		return nil, err
	}
	e.Hosts = rpc.NewHosts(dialer, resolve, o.Clock)
	return e, nil
}

// run serves the listeners and runs the services: the host's first, so that guests get their disks back before
// anything else, and last to stop.
func (p *parts) run(ctx context.Context) error {
	o := p.options
	api := lifecycle.Component{Name: "api", Run: func(ctx context.Context) error { return p.serve(ctx) }}
	components := []lifecycle.Component{api}
	needs := []string{"api"}
	for _, name := range names {
		service := p.services[name]
		components = append(components, lifecycle.Component{Name: name, Needs: append([]string(nil), needs...), Run: service.Run})
		if name == changeTracker || name == hostProvider {
			needs = append(needs, name)
		}
	}
	drain := o.DrainDelay
	if drain == 0 {
		drain = -1 // lifecycle's zero is the fleet's default
	}
	var once sync.Once
	return lifecycle.Run(ctx, lifecycle.Options{
		DrainDelay: drain, Logger: o.Logger, Signals: o.Signals,
		OnReady: func() {
			once.Do(func() {
				if o.OnReady != nil {
					o.OnReady(p.listener.Addr().String())
				}
			})
		},
	}, components...)
}

func (p *parts) serve(ctx context.Context) error {
	listeners := []net.Listener{p.listener}
	for _, name := range names {
		l, err := p.network.Listen(ctx, memoryPrefix+name)
		if err != nil {
			return fmt.Errorf("listen for %s: %w", name, err)
		}
		listeners = append(listeners, l)
	}
	return p.server.Run(ctx, listeners...)
}

// close closes what was opened, last first, within a bound.
func (p *parts) close(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for _, d := range p.dialers {
		_ = d.Close()
	}
	var problems []error
	for i := len(p.closers) - 1; i >= 0; i-- {
		problems = append(problems, p.closers[i](ctx))
	}
	if err := errors.Join(problems...); err != nil {
		p.log.WarnContext(ctx, "close", "error", err)
	}
}

// ClientCertificates is the folder, in the state folder, of the command line's certificate.
const ClientCertificates = "certificates/cli"
