package failoverorchestrator_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// Short names of the phases that tests wait for.
const (
	phaseStarting     = failoverv1.FailoverPhase_FAILOVER_PHASE_STARTING
	phaseUp           = failoverv1.FailoverPhase_FAILOVER_PHASE_WAITING_COMMIT
	phaseCommitting   = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTING
	phaseCommitted    = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTED
	phaseCancelling   = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLING
	phaseCancelled    = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLED
	phaseFailed       = failoverv1.FailoverPhase_FAILOVER_PHASE_FAILED
	phaseCancelFailed = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCEL_FAILED
)

// machines is a hypervisor: what runs on it outlives orchestrators.
type machines struct {
	mu       sync.Mutex
	running  map[string]int // starts of what runs, by folder
	dead     bool           // guests end while they are waited for
	silent   bool           // guests run and show no sign of life
	stops    int
	stubborn bool // what runs cannot be stopped
}

// bootTarget is a target that boots, in place of target qemu: the folder of target vhd, and machines.
type bootTarget struct {
	vhdtarget.Target
	on *machines
}

var _ target.Target = bootTarget{}

func (bootTarget) Kind() failoverv1.TargetKind { return failoverv1.TargetKind_TARGET_KIND_QEMU }
func (bootTarget) Boots() bool                 { return true }

func (b bootTarget) Boot(ctx context.Context, p target.Plan, progress func(string)) (*typesv1.BootEvidence, error) {
	if owner, err := b.Owner(p); err != nil || owner != p.Failover {
		return nil, errors.Join(err, errors.New("the folder is not ours"))
	}
	b.on.mu.Lock()
	defer b.on.mu.Unlock()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if b.on.running[p.Dir] == 0 {
		b.on.running[p.Dir]++
	}
	progress("waiting for the guest agent")
	e := &typesv1.BootEvidence{Proof: "guest-agent", Seconds: 1.5, ConsoleTail: "login:"}
	if b.on.dead || b.on.silent {
		e.Proof, e.ConsoleTail, e.ConsoleFile, e.ScreenshotFile = "", "loading", "console.log", "screen.png"
		if b.on.dead {
			delete(b.on.running, p.Dir)
		}
		return e, errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT, "nothing but a cursor")
	}
	return e, nil
}

func (b bootTarget) Running(_ context.Context, p target.Plan) (bool, error) {
	return b.on.runs(p.Dir), nil
}

func (b bootTarget) Shutdown(_ context.Context, p target.Plan) error {
	b.on.mu.Lock()
	defer b.on.mu.Unlock()
	if b.on.stubborn {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE, "it does not listen")
	}
	delete(b.on.running, p.Dir)
	b.on.stops++
	return nil
}

func (b bootTarget) Remove(ctx context.Context, p target.Plan, existed bool) (string, error) {
	b.on.mu.Lock()
	delete(b.on.running, p.Dir)
	b.on.mu.Unlock()
	return b.Target.Remove(ctx, p, existed)
}

func (m *machines) runs(dir string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.running[dir] > 0
}

func (m *machines) setDead(dead bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dead = dead
}

func (m *machines) setSilent(silent bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.silent = silent
}

// lose is the end of a hypervisor, of which nothing is known any more.
func (m *machines) lose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.running)
}

// bootRig is a rig whose orchestrators have a target that boots.
func bootRig(t *testing.T) (*rig, *machines) {
	t.Helper()
	m := &machines{running: map[string]int{}}
	g := newRig(t)
	g.targets = []target.Target{bootTarget{on: m}}
	return g, m
}

// takeOver is a request for a failover to the target that boots; planned when point is nil.
func takeOver(out string, point *failoverv1.PointSelector) *failoverv1.StartFailoverRequest {
	r := &failoverv1.StartFailoverRequest{
		Vm: vmName, Kind: failoverv1.FailoverKind_FAILOVER_KIND_PLANNED, Target: failoverv1.TargetKind_TARGET_KIND_QEMU, OutDir: out,
	}
	if point != nil {
		r.Kind, r.Point, r.AcceptUnfenced = failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED, point, true
	}
	return r
}

func (g *rig) failOver(r *failoverv1.StartFailoverRequest) *typesv1.Job {
	g.t.Helper()
	out, err := g.client.StartFailover(testkit.Context(g.t), r)
	require.NoError(g.t, err)
	require.NotNil(g.t, out.Job)
	return out.Job
}

func (g *rig) commitFailover() *typesv1.Job {
	g.t.Helper()
	out, err := g.client.CommitFailover(testkit.Context(g.t), &failoverv1.CommitFailoverRequest{Vm: vmName})
	require.NoError(g.t, err)
	return out.Job
}

func (g *rig) forceCancel() *typesv1.Job {
	g.t.Helper()
	out, err := g.client.CancelFailover(testkit.Context(g.t), &failoverv1.CancelFailoverRequest{Vm: vmName, Force: true})
	require.NoError(g.t, err)
	return out.Job
}

func (g *rig) cancelFailover() *typesv1.Job {
	g.t.Helper()
	out, err := g.client.CancelFailover(testkit.Context(g.t), &failoverv1.CancelFailoverRequest{Vm: vmName})
	require.NoError(g.t, err)
	return out.Job
}

// refusedFailover requires that a failover is refused with a reason.
func (g *rig) refusedFailover(r *failoverv1.StartFailoverRequest, reason typesv1.ErrorReason) {
	g.t.Helper()
	_, err := g.client.StartFailover(testkit.Context(g.t), r)
	require.Truef(g.t, errcat.Is(err, reason), "want %s, have %v", reason, err)
}

// awaitPhase waits for the newest failover to rest in a phase.
func (g *rig) awaitPhase(phase failoverv1.FailoverPhase) *failoverv1.Failover {
	g.t.Helper()
	var f *failoverv1.Failover
	testkit.Eventually(g.t, 20*time.Second, func() error {
		if f = g.failover(); f.Phase != phase {
			return fmt.Errorf("failover is %s: %v", f.Phase, f.Error)
		}
		return nil
	})
	return f
}

// chain is the state of the chain.
func (g *rig) chain() *replica.State {
	g.t.Helper()
	r, err := replica.Open(testkit.Context(g.t), g.store, lineage)
	require.NoError(g.t, err)
	s, err := r.Refresh(testkit.Context(g.t))
	require.NoError(g.t, err)
	return s
}

// source is the source's side of failovers as the scheduler plays it: it follows the failovers' records, stops the source
// of a planned one, sends its last point, and says so in the VM's record.
type source struct {
	g *rig

	mu      sync.Mutex
	running bool
	hold    schedulerv1.FailoverStage // not left until it is changed
	refuse  *typesv1.ErrorDetail
	follows string // the newest failover that was begun
}

// replaced says whether the source follows another failover than the named one.
func (s *source) replaced(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.follows != "" && s.follows != name
}

// follow plays the scheduler until the test ends.
func (g *rig) follow() *source {
	g.t.Helper()
	s := &source{g: g, running: true}
	kv, err := bus.OpenKV[*failoverv1.Failover](testkit.Context(g.t), g.bus, bus.BucketFailovers)
	require.NoError(g.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for u, err := range kv.Watch(ctx, "") {
			if err != nil {
				return
			}
			if u.Value != nil {
				s.look(ctx, u.Value)
			}
		}
	}()
	g.t.Cleanup(func() { cancel(); <-done })
	return s
}

func (s *source) set(change func(*source)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *source) isRunning() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running
}

func (s *source) look(ctx context.Context, f *failoverv1.Failover) {
	state := map[failoverv1.FailoverPhase]typesv1.ProtectionState{
		phaseUp:         typesv1.ProtectionState_PROTECTION_STATE_FAILED_OVER,
		phaseCommitting: typesv1.ProtectionState_PROTECTION_STATE_COMMITTING,
		phaseCommitted:  typesv1.ProtectionState_PROTECTION_STATE_COMMITTED,
		phaseCancelling: typesv1.ProtectionState_PROTECTION_STATE_CANCELLING_FAILOVER,
		phaseCancelled:  typesv1.ProtectionState_PROTECTION_STATE_PROTECTED,
		phaseFailed:     typesv1.ProtectionState_PROTECTION_STATE_FAILOVER_FAILED,
	}[f.Phase]
	planned := f.Kind == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED
	if f.Phase == phaseStarting {
		s.set(func(s *source) { s.follows = f.Name })
	} else if s.replaced(f.Name) {
		return
	}
	if f.Phase == phaseStarting {
		state = typesv1.ProtectionState_PROTECTION_STATE_UNPLANNED_FAILOVER_IN_PROGRESS
		if planned {
			s.stop(ctx, f)
			return
		}
	}
	if state == 0 {
		return
	}
	if f.Phase == phaseCancelled {
		s.set(func(s *source) { s.running = true })
	}
	s.record(ctx, func(vm *schedulerv1.ProtectedVm) {
		vm.State = state
		if f.Phase == phaseCancelled {
			vm.Failover = nil
		}
	})
}

// record changes the VM's record, unless the test is over.
func (s *source) record(ctx context.Context, change func(*schedulerv1.ProtectedVm)) {
	_, _, err := s.g.vms.MutateOrCreate(ctx, bus.Key("lab", vmID), func(vm *schedulerv1.ProtectedVm) error {
		change(vm)
		return nil
	})
	if err != nil && ctx.Err() == nil {
		s.g.t.Errorf("write the VM's record: %v", err)
	}
}

// stop brings the source of a planned failover to its last point, stage by stage; what was done before is not repeated.
func (s *source) stop(ctx context.Context, f *failoverv1.Failover) {
	vm, _, err := s.g.vms.Get(ctx, bus.Key("lab", vmID))
	if err != nil || vm.GetFailover().GetFailover() == f.Name && vm.Failover.Stage >= schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE {
		return
	}
	for _, stage := range []schedulerv1.FailoverStage{
		schedulerv1.FailoverStage_FAILOVER_STAGE_QUIESCING, schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE,
		schedulerv1.FailoverStage_FAILOVER_STAGE_SENDING_LAST_POINT, schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE,
	} {
		s.mu.Lock()
		hold, refuse := s.hold, s.refuse
		s.mu.Unlock()
		p := &schedulerv1.FailoverProgress{Failover: f.Name, Stage: stage}
		if refuse != nil {
			p.Stage, p.Error = schedulerv1.FailoverStage_FAILOVER_STAGE_REFUSED, refuse
		}
		if p.Stage == schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE {
			s.set(func(s *source) { s.running = false })
		}
		if p.Stage == schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE {
			p.FinalPoint, p.SourceFenced = s.lastPoint(), true
		}
		s.record(ctx, func(vm *schedulerv1.ProtectedVm) {
			vm.Failover = p
			if refuse == nil {
				vm.State = typesv1.ProtectionState_PROTECTION_STATE_PLANNED_FAILOVER_IN_PROGRESS
			}
		})
		if refuse != nil || stage == hold {
			return
		}
	}
}

// lastPoint commits what the source wrote last, unless nothing may be committed any more.
func (s *source) lastPoint() uint64 {
	g := s.g
	state := g.chain()
	if state.Closed() {
		return uint64(state.StateOrdinal)
	}
	r, err := replica.Open(context.Background(), g.store, lineage)
	require.NoError(g.t, err)
	o := state.Highest + 1
	testkit.Fill(g.now["os"][1*mib:1*mib+4096], uint64(o))
	g.ship(r, o, state, change{"os", 1 * mib, 4096})
	return uint64(o)
}

// ship commits a point of the model under the chain's epoch.
func (g *rig) ship(r *replica.Replica, o replica.Ordinal, state *replica.State, changes ...change) {
	g.epoch, g.open = state.Epoch, state.Open
	g.commit(r, g.config, replica.KindPoint, o, state.StateOrdinal, g.now, changes...)
}

// requireUp checks a failover that is up at a point: its copy, its machine, and the chain.
func (g *rig) requireUp(f *failoverv1.Failover, m *machines, point uint64) {
	g.t.Helper()
	require.Equal(g.t, point, f.Point)
	g.requirePoint(f.OutDir, point)
	require.Equal(g.t, []string{"os.vhd", "data.vhd", "vm.json"}, f.Files)
	require.Nil(g.t, f.Error)
	require.NotNil(g.t, f.ReadyTime)
	if m != nil {
		require.True(g.t, m.runs(f.OutDir), "the machine runs")
		require.Equal(g.t, "guest-agent", f.Boot.GetProof())
	}
	state := g.chain()
	require.True(g.t, state.Closed())
	require.Equal(g.t, filepath.Base(f.Name), state.Fence.Failover)
	require.EqualValues(g.t, state.Fence.Seq, f.CloseSequence)
	require.EqualValues(g.t, point, state.StateOrdinal, "the chain's state is the point's")
}

// requireBack checks a failover that was cancelled: nothing of it is left, and the chain goes on from its newest point.
func (g *rig) requireBack(f *failoverv1.Failover, m *machines, newest uint64) {
	g.t.Helper()
	require.NoDirExists(g.t, f.OutDir)
	require.Empty(g.t, f.Files)
	if m != nil {
		require.False(g.t, m.runs(f.OutDir))
	}
	state := g.chain()
	require.False(g.t, state.Closed())
	require.EqualValues(g.t, newest, state.StateOrdinal)
	if closed, opened := state.FenceSeqs(filepath.Base(f.Name)); closed != 0 {
		require.Greater(g.t, opened, closed)
		require.EqualValues(g.t, opened, f.OpenSequence)
	}
}

// steps are the steps of a job with how they ended.
func (g *rig) steps(name string) (out []string) {
	g.t.Helper()
	for _, s := range g.job(name).Steps {
		out = append(out, s.Id+" "+s.State.String()[len("JOB_STATE_"):])
	}
	return out
}

// vm is the VM's record.
func (g *rig) vm() *schedulerv1.ProtectedVm {
	g.t.Helper()
	vm, _, err := g.vms.Get(testkit.Context(g.t), bus.Key("lab", vmID))
	require.NoError(g.t, err)
	return vm
}
