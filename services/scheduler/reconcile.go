package scheduler

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Failpoints, in the order of a cycle.
var (
	fpAfterRecord   = failpoint.Register("scheduler/after-record")
	fpBeforeCut     = failpoint.Register("scheduler/before-cut")
	fpAfterCut      = failpoint.Register("scheduler/after-cut")
	fpBeforePublish = failpoint.Register("scheduler/before-publish")
	fpAfterPublish  = failpoint.Register("scheduler/after-publish")
	fpBeforeSettle  = failpoint.Register("scheduler/before-settle")
	fpAfterSettle   = failpoint.Register("scheduler/after-settle")
	fpBeforeStop    = failpoint.Register("scheduler/before-stop")
	fpAfterStop     = failpoint.Register("scheduler/after-stop")
	fpAfterRetain   = failpoint.Register("scheduler/after-retain")
)

const (
	// maxSteps bounds how long one VM keeps a worker.
	maxSteps = 32
	// lookAgain is the longest a VM is left alone: health and RPO change by the clock.
	lookAgain = time.Minute
	// infraDelay is how long a VM waits when its own record could not be read or written.
	infraDelay = 250 * time.Millisecond
)

// Hosts finds the services that run on a host, named by its id: *rpc.Hosts.
type Hosts interface {
	Conn(ctx context.Context, host, service string) (grpc.ClientConnInterface, error)
}

// reconciler brings every VM one step further. It lives as long as one term of the lease.
type reconciler struct {
	cfg    Config
	bus    *bus.Bus
	store  *store
	blobs  blobstore.Store
	hosts  Hosts
	now    func() time.Time
	log    *slog.Logger
	tracer trace.Tracer
	views  *views
	jobs   *jobBook
	queue  *workQueue
	// followed is what the bucket of failovers says.
	followed *failovers

	mu      sync.Mutex
	mem     map[string]*memory
	written map[string]uint64 // newest revision that this process wrote
}

// memory is what is known of one VM beyond its record. All of it can be lost at any time.
type memory struct {
	mu      sync.Mutex // held while the VM is worked on
	lineage string     // that everything below is about

	// reconciled: record, host and chain were compared in this term and since the last surprise; status is what the
	// host said last.
	reconciled   bool
	adoptedEpoch uint64 // at another one, somebody decided something since
	status       *typesv1.TrackingStatus

	chain *replica.Replica

	root        trace.Span // of the cycle or pass rootOrdinal, if it began in this process
	rootOrdinal uint64

	cutHere     uint64 // ordinal that this process cut: nobody can have shipped it before
	published   uint64 // ordinal whose task this process has put into the queue
	publishedAt time.Time
	attempt     int       // of that task, for its id
	nextPoll    time.Time // when to ask storage next
	quiet       int       // refusals in a row that did not climb the ladder
	badExports  int       // reports in a row that the exports of the pass in hand are not what they must be

	fenceAt    time.Time // when to ask the host next about the machine that was failed over
	fenceTries int
	watchAt    time.Time // when to look next whether a fenced machine is still off
	fencePoll  time.Time // when to ask storage next whether the failover has closed the lineage
	released   string    // failover whose machine this process has released

	retainKnown  bool      // retainedAt says something
	retainedAt   int64     // points received when the last step of retention was asked for
	checkpointed bool      // a checkpoint was made since
	checkpoint   uint64    // newest one that was heard of
	pinFor       uint64    // suspected point whose last good one is to be pinned
	pinAt        time.Time // when to put that pin next

	hints  hints // what events said; has its own lock
	cycles cycleLog
	job    *typesv1.Job
	jobRev uint64
	jobAt  time.Time
}

// restart forgets everything but what events said.
func (m *memory) restart(lineage string) {
	m.endRoot(nil)
	m.lineage, m.reconciled, m.adoptedEpoch, m.status, m.chain = lineage, false, 0, nil, nil
	m.cutHere, m.published, m.publishedAt, m.attempt, m.nextPoll, m.quiet = 0, 0, time.Time{}, 0, time.Time{}, 0
	m.badExports, m.fenceAt, m.fenceTries, m.fencePoll, m.watchAt, m.released = 0, time.Time{}, 0, time.Time{}, time.Time{}, ""
	m.retainKnown, m.retainedAt, m.checkpointed, m.checkpoint, m.pinFor, m.pinAt = false, 0, false, 0, 0, time.Time{}
	m.cycles, m.job, m.jobRev, m.jobAt = cycleLog{}, nil, 0, time.Time{}
}

// next says when a VM wants to be looked at again.
type next struct {
	now bool
	in  time.Duration // 0: lookAgain
}

var atOnce = next{now: true}

func later(d time.Duration) next { return next{in: max(d, time.Millisecond)} }

func (r *reconciler) memoryOf(key string) *memory {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.mem[key]
	if m == nil {
		m = &memory{}
		r.mem[key] = m
	}
	return m
}

func (r *reconciler) forget(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.mem, key)
	delete(r.written, key)
	r.views.forget(key)
}

// wrote notes a write of ours, so that its echo does not wake anybody up.
func (r *reconciler) wrote(key string, rev uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written[key] = rev
}

// changed is called for every change of a record that the watch sees.
func (r *reconciler) changed(key string, rev uint64) {
	r.mu.Lock()
	ours := rev != 0 && rev <= r.written[key]
	r.mu.Unlock()
	if !ours {
		r.queue.add(key)
	}
}

// with runs do on the VM while nobody else works on it, again if somebody else wrote its record meanwhile, and has the
// VM looked at afterwards. A VM without a record is none of our business.
func (r *reconciler) with(ctx context.Context, key string, do func(v *vmRun) error) error {
	m := r.memoryOf(key)
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		v, err := r.load(ctx, key, m)
		if errors.Is(err, bus.ErrNotFound) {
			r.forget(key)
			return nil
		}
		if err == nil {
			err = do(v)
		}
		if !errors.Is(err, bus.ErrRevision) || ctx.Err() != nil {
			r.queue.add(key)
			return err
		}
	}
}

// worker takes VMs from the queue until ctx ends.
func (r *reconciler) worker(ctx context.Context) error {
	if !r.followed.await(ctx) {
		return nil
	}
	for {
		key, ok := r.queue.get(ctx)
		if !ok {
			return nil
		}
		wait := r.reconcile(ctx, key)
		r.queue.done(key)
		if ctx.Err() != nil {
			return nil
		}
		if wait > 0 {
			r.queue.addAfter(key, wait)
		}
	}
}

// reconcile brings one VM as far as it goes now and returns when to look again; 0 when there is no such VM.
func (r *reconciler) reconcile(ctx context.Context, key string) time.Duration {
	m := r.memoryOf(key)
	m.mu.Lock()
	defer m.mu.Unlock()
	for range maxSteps {
		if ctx.Err() != nil {
			return infraDelay
		}
		v, err := r.load(ctx, key, m)
		if errors.Is(err, bus.ErrNotFound) {
			m.endRoot(nil)
			r.forget(key)
			return 0
		}
		n := next{in: infraDelay}
		if err == nil {
			n, err = v.once(ctx)
		}
		switch {
		case err == nil:
		case errors.Is(err, bus.ErrRevision):
			n = atOnce // somebody decided meanwhile: decide again
		case ctx.Err() != nil:
			return infraDelay
		default:
			r.log.WarnContext(ctx, "step not finished, trying again", "vm", key, "error", err)
			return infraDelay
		}
		if !n.now {
			if n.in <= 0 || n.in > lookAgain {
				n.in = lookAgain
			}
			return n.in
		}
	}
	return time.Millisecond // let others have the worker
}

// vmRun is one VM in hand: its record as read or as written last.
type vmRun struct {
	*reconciler
	key    string
	m      *memory
	rec    *schedulerv1.ProtectedVm
	rev    uint64
	policy *schedulerv1.Policy
}

func (r *reconciler) load(ctx context.Context, key string, m *memory) (*vmRun, error) {
	rec, rev, err := r.store.vms.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	if m.lineage != rec.GetLineage() { // another protection of the same VM: nothing of the old one holds
		m.restart(rec.GetLineage())
	}
	v := &vmRun{reconciler: r, key: key, m: m, rec: rec, rev: rev}
	v.policy, err = r.store.policy(ctx, rec.GetPolicy())
	if err != nil {
		return nil, err
	}
	return v, nil
}

// once carries out one step, and keeps job and health in line with the record.
func (v *vmRun) once(ctx context.Context) (next, error) {
	ended, jobWait, err := v.syncJob(ctx)
	if err != nil || ended {
		return atOnce, err
	}
	n, err := v.step(ctx)
	if err != nil || n.now {
		return n, err
	}
	v.views.show(v.key, v.rec)
	changed, err := v.syncHealth(ctx)
	if err != nil || changed {
		return atOnce, err
	}
	pointsWait, changed, err := v.syncPoints(ctx)
	if err != nil || changed {
		return atOnce, err
	}
	for _, wait := range []time.Duration{jobWait, pointsWait} {
		if wait > 0 && (n.in <= 0 || wait < n.in) {
			n.in = wait
		}
	}
	return n, nil
}

// step is the decision: what the state asks for next.
func (v *vmRun) step(ctx context.Context) (next, error) {
	if n, took, err := v.followFailover(ctx); took || err != nil {
		return n, err
	}
	if wait := v.retryWait(); wait > 0 {
		return later(wait), nil // between two rungs of the ladder
	}
	switch v.rec.GetState() {
	case EnablingProtection:
		return v.enable(ctx)
	case ReadyForInitialReplication:
		return v.awaitStart(ctx)
	case InitialReplicating:
		return v.replicate(ctx)
	case FinalizingProtection:
		return atOnce, v.move(ctx, EvFinalized, func(rec *schedulerv1.ProtectedVm) {
			rec.NextCycleTime = timestamppb.New(v.now())
		})
	case Protected:
		return v.replicate(ctx)
	case Paused: // a cycle that was in hand comes to its end
		if v.rec.GetCycle() != nil {
			return v.cycle(ctx)
		}
	case ResyncRequired:
		if v.cfg.Resync.Auto == AutoResyncImmediate && v.rec.GetCurrentJob() == "" {
			return v.startResync(ctx)
		}
	case Resynchronizing:
		return v.replicate(ctx)
	case Disabling:
		return v.disable(ctx)
	}
	return next{}, nil
}

// save changes the record by compare-and-set. On a conflict nothing has happened, and the error is bus.ErrRevision.
func (v *vmRun) save(ctx context.Context, change func(rec *schedulerv1.ProtectedVm)) error {
	rec := proto.Clone(v.rec).(*schedulerv1.ProtectedVm)
	change(rec)
	rec.UpdateTime = timestamppb.New(v.now())
	rev, err := v.store.vms.Update(ctx, v.key, rec, v.rev)
	if err != nil {
		return err
	}
	v.rec, v.rev = rec, rev
	v.wrote(v.key, rev)
	return failpoint.Hit(fpAfterRecord)
}

// move is save with an event of the state machine.
func (v *vmRun) move(ctx context.Context, e Event, change func(rec *schedulerv1.ProtectedVm)) error {
	from := v.rec.GetState()
	to, _, err := Next(from, e)
	if err != nil {
		return err
	}
	job := v.rec.GetCurrentJob()
	err = v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.State = to
		if change != nil {
			change(rec)
		}
	})
	if v.rec.GetState() == to && to != from {
		v.log.InfoContext(ctx, "protection state changed", "vm", v.rec.GetName(), "from", StateName(from), "to", StateName(to), "cause", string(e))
		v.jobs.announceState(ctx, v.rec, v.rev, from, e, job)
	}
	return err
}

// climb records a failure and waits for the next rung.
func (v *vmRun) climb(ctx context.Context, cause error) (next, error) {
	if errors.Is(cause, failpoint.ErrInjected) || ctx.Err() != nil {
		return next{}, cause
	}
	now := v.now()
	v.log.WarnContext(ctx, "replication step failed", "vm", v.rec.GetName(), "state", StateName(v.rec.GetState()), "attempt", v.rec.GetRetry().GetAttempt()+1, "error", cause)
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) { v.climbed(rec, detailOf(cause, now)) })
	return later(v.retryWait()), err
}

// hostClient is the host-provider of the VM's host.
func (v *vmRun) hostClient(ctx context.Context) (hostproviderv1.HostServiceClient, error) {
	conn, err := v.hosts.Conn(ctx, lastPart(v.rec.GetHost()), "host-provider")
	if err != nil {
		return nil, err
	}
	return hostproviderv1.NewHostServiceClient(conn), nil
}

// vmID is the GUID, as host calls name the VM.
func (v *vmRun) vmID() string { return lastPart(v.rec.GetName()) }

func (v *vmRun) site() string { return siteOf(v.rec.GetName()) }

// call bounds one call to a host.
func (v *vmRun) call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, v.cfg.CallTimeout)
}

// syncHealth writes health when it changed.
func (v *vmRun) syncHealth(ctx context.Context) (changed bool, err error) {
	now := v.now()
	health, reasons := Assess(v.rec, v.policy, v.m.cycles.recent(now), now)
	was := v.rec.GetHealth()
	if health == was && sameReasons(reasons, v.rec.GetHealthReasons()) {
		return false, nil
	}
	err = v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Health, rec.HealthReasons = health, reasons
	})
	if err == nil && health != was {
		v.jobs.announce(ctx, v.rec.GetName(), "health.changed", bus.EventID(v.rec.GetLineage(), "health", revText(v.rev)),
			&eventsv1.HealthChanged{Vm: v.rec.GetName(), From: was, To: health, Reasons: reasons})
	}
	return err == nil, err
}

// sameReasons compares what is wrong, not since when or how much.
func sameReasons(a, b []*typesv1.ErrorDetail) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].GetReason() != b[i].GetReason() || a[i].GetReason() == HealthSuspected && a[i].GetWhat() != b[i].GetWhat() {
			return false
		}
	}
	return true
}
