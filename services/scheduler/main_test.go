package scheduler_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	scheduler "github.com/landfall-dr/landfall/services/scheduler"
	"github.com/landfall-dr/landfall/services/scheduler/schedulertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	guid   = "6f1c2d3e-0000-4000-8000-00000000000a"
	patien = 20 * time.Second
)

// quick is a configuration for tests: everything that is minutes is milliseconds.
func quick() scheduler.Config {
	c := scheduler.Default()
	c.LeaseTTL, c.CallTimeout, c.Poll = time.Second, 5*time.Second, 250*time.Millisecond
	c.RetryUnit, c.WindowBytes, c.Workers = 20*time.Millisecond, 2*schedulertest.BlockSize, 4
	c.StopPoll, c.FenceRetry, c.FenceRetryMax = 20*time.Millisecond, 50*time.Millisecond, 100*time.Millisecond
	return c
}

// lab is a world with one host and a client of the API.
type lab struct {
	*schedulertest.World
	t      *testing.T
	host   *schedulertest.Host
	tracer trace.TracerProvider

	protection schedulerv1.ProtectionServiceClient
	policies   schedulerv1.PolicyServiceClient
	sites      schedulerv1.SiteServiceClient
	jobs       schedulerv1.JobServiceClient
	events     schedulerv1.EventServiceClient
	stop       func()
	service    *scheduler.Service
}

func newLab(t *testing.T, hosts ...*schedulertest.Host) *lab { return tracedLab(t, nil, hosts...) }

func tracedLab(t *testing.T, tracer trace.TracerProvider, hosts ...*schedulertest.Host) *lab {
	if len(hosts) == 0 {
		hosts = []*schedulertest.Host{schedulertest.NewHost(schedulertest.Site, "host1", guid, "web01")}
	}
	l := &lab{World: schedulertest.NewWorld(t, tracer, hosts...), t: t, host: hosts[0], tracer: tracer}
	l.policy("policies/fast", 100*time.Millisecond)
	return l
}

// policy writes a policy past the API, which refuses intervals as short as tests want.
func (l *lab) policy(name string, interval time.Duration) {
	kv, err := bus.OpenKV[*schedulerv1.Policy](testkit.Context(l.t), l.Bus, bus.BucketPolicies)
	require.NoError(l.t, err)
	_, _, err = kv.MutateOrCreate(testkit.Context(l.t), bus.Key(name[len("policies/"):]), func(p *schedulerv1.Policy) error {
		p.Name, p.CopyInterval, p.ParallelUploads = name, durationpb.New(interval), 3
		return nil
	})
	require.NoError(l.t, err)
}

// start runs a scheduler and connects the clients to it; what it returns stops it.
func (l *lab) start(cfg scheduler.Config) (stop func()) {
	l.t.Helper()
	name := "scheduler"
	dialer := rpc.NewDialer(rpc.DialerOptions{
		Identity: rpc.Identity{Peer: pki.ServiceIdentity("scheduler")}, Network: l.Network, TracerProvider: l.tracer,
	})
	service, err := scheduler.New(testkit.Context(l.t), cfg, scheduler.Deps{
		Bus: l.Bus, Store: l.Store, Hosts: l.HostsOf(dialer), Logger: testkit.Logger(l.t), TracerProvider: l.tracer,
	})
	require.NoError(l.t, err)
	srv, err := rpc.NewServer(rpc.ServerOptions{Name: name, Identity: rpc.Identity{Peer: pki.ServiceIdentity("scheduler")}, TracerProvider: l.tracer})
	require.NoError(l.t, err)
	service.Register(srv)
	ctx, cancel := context.WithCancel(context.Background())
	var lis interface{ Close() error }
	testkit.Eventually(l.t, patien, func() error {
		listener, err := l.Network.Listen(ctx, "mem:"+name)
		if err != nil {
			return err
		}
		lis = listener
		go func() { _ = srv.Serve(listener) }()
		return nil
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = service.Run(ctx)
	}()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		<-done
		end, ecancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer ecancel()
		_ = srv.Stop(end)
		_ = lis.Close()
		_ = dialer.Close()
	}
	l.t.Cleanup(stop)
	l.stop, l.service = stop, service
	if l.protection == nil {
		conn, err := l.Dialer(pki.UserIdentity("ada", pki.RoleAdmin)).Conn("mem:" + name)
		require.NoError(l.t, err)
		l.protection, l.policies = schedulerv1.NewProtectionServiceClient(conn), schedulerv1.NewPolicyServiceClient(conn)
		l.sites = schedulerv1.NewSiteServiceClient(conn)
		l.jobs, l.events = schedulerv1.NewJobServiceClient(conn), schedulerv1.NewEventServiceClient(conn)
	}
	_, err = l.policies.ListPolicies(testkit.Context(l.t), &schedulerv1.ListPoliciesRequest{}, grpc.WaitForReady(true))
	require.NoError(l.t, err) // the connection is up again after a restart
	return stop
}

// protect enables protection of the first host's machine.
func (l *lab) protect() *typesv1.Job {
	l.t.Helper()
	resp, err := l.protection.EnableProtection(testkit.Context(l.t), &schedulerv1.EnableProtectionRequest{
		Vm: "sites/lab/vms/web01", Policy: "policies/fast", RequestId: "r1",
	})
	require.NoError(l.t, err)
	return resp.GetJob()
}

func (l *lab) vm() *schedulerv1.ProtectedVm { return l.Record(l.host) }

// await waits until the record is as wanted and returns it.
func (l *lab) await(what string, ok func(vm *schedulerv1.ProtectedVm) bool) *schedulerv1.ProtectedVm {
	l.t.Helper()
	var vm *schedulerv1.ProtectedVm
	testkit.Eventually(l.t, patien, func() error {
		if vm = l.vm(); vm != nil && ok(vm) {
			return nil
		}
		return fmt.Errorf("%s: not there, the record is %v", what, vm)
	})
	return vm
}

func (l *lab) awaitState(s scheduler.State) *schedulerv1.ProtectedVm {
	l.t.Helper()
	return l.await(scheduler.StateName(s), func(vm *schedulerv1.ProtectedVm) bool { return vm.GetState() == s })
}

// awaitPoints waits for n more points and returns the record.
func (l *lab) awaitPoints(n int64) *schedulerv1.ProtectedVm {
	l.t.Helper()
	from := int64(0)
	if vm := l.vm(); vm != nil {
		from = vm.GetCounters().GetPoints()
	}
	return l.await("more points", func(vm *schedulerv1.ProtectedVm) bool { return vm.GetCounters().GetPoints() >= from+n })
}

func block(disk string, i int64) schedulertest.Block {
	return schedulertest.Block{Disk: disk, Index: i}
}

// guest writes until stop is called.
func (l *lab) guest() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(3 * time.Millisecond)
		defer tick.Stop()
		for n := int64(0); ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				l.host.Write(block("os", n%7), block("data", (n*3)%8))
			}
		}
	}()
	stop = func() { cancel(); <-done }
	l.t.Cleanup(stop)
	return stop
}

var schedulerIdentity = pki.ServiceIdentity("scheduler")
