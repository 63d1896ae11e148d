package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// runsEnv sets how many kills the robustness test does.
const runsEnv = "LANDFALL_ROBUSTNESS_RUNS"

const (
	shortRuns    = 16
	runsPerFleet = 50
	// hitWithin is how long an armed failpoint may wait to be reached, above an applier's lease; then the program is
	// killed where it is.
	hitWithin = 20 * time.Second
	// recoverWithin bounds the time from a restart to the next received point: an applier's lease is not on that way,
	// but a task of a dead worker, a scheduler's lease and a few retries are.
	recoverWithin = 60 * time.Second
)

// failpoints are where each program is killed. Those of package replica are reached in the uploader. The uploader's own
// around a checkpoint are not here: nobody asks for checkpoints beside the protocol's yet, which are package replica's.
var failpoints = map[string][]string{
	uploaderName: {
		"uploader/before-segment", "uploader/after-segment", "uploader/before-manifest", "uploader/after-manifest",
		"uploader/before-publish", "uploader/after-publish", "uploader/before-ack",
		"uploader/before-page-write", "uploader/after-page-write",
		"replica/before-segment", "replica/after-segment", "replica/before-manifest", "replica/after-manifest",
		"replica/before-sequence", "replica/after-sequence", "replica/before-page-write", "replica/after-page-write",
		"replica/before-checkpoint", "replica/after-checkpoint",
	},
	tracker: {
		"change-tracker/before-cut", "change-tracker/after-cut", "change-tracker/before-seal", "change-tracker/after-seal",
		"change-tracker/before-rename", "change-tracker/after-rename", "change-tracker/before-settle", "change-tracker/after-settle",
		"change-tracker/before-begin", "change-tracker/after-begin", "change-tracker/before-hot", "change-tracker/after-hot",
	},
	host: {"host-provider/before-cut", "host-provider/after-cut", "host-provider/before-settle", "host-provider/after-settle"},
	scheduler: {
		"scheduler/after-record", "scheduler/before-cut", "scheduler/after-cut", "scheduler/before-publish", "scheduler/after-publish",
		"scheduler/before-settle", "scheduler/after-settle",
	},
	resync: {
		"resync-engine/before-segment", "resync-engine/after-segment", "resync-engine/before-manifest", "resync-engine/after-manifest",
		"resync-engine/before-publish", "resync-engine/after-publish", "resync-engine/before-ack", "replica/after-manifest",
	},
	orchestrator: {
		"failover-orchestrator/before-check-target", "failover-orchestrator/after-check-target",
		"failover-orchestrator/before-claim-target", "failover-orchestrator/after-claim-target",
		"failover-orchestrator/before-materialise-disks", "failover-orchestrator/after-materialise-disks",
		"failover-orchestrator/before-describe-machine", "failover-orchestrator/after-describe-machine",
		"failover-orchestrator/before-remove-copy", "failover-orchestrator/after-remove-copy",
	},
}

// everything is the target of a kill of all programs at once.
const everything = "everything"

// kill is one attack.
type kill struct {
	target    string
	failpoint string // empty: at any moment
	hit       int    // at which hit of the failpoint
	after     time.Duration
	pause     time.Duration // instead of killing it, stop it for so long: it believes that nothing happened
}

func (k kill) String() string {
	switch {
	case k.pause > 0:
		return fmt.Sprintf("%s paused after %s for %s", k.target, k.after, k.pause)
	case k.failpoint == "":
		return fmt.Sprintf("%s after %s", k.target, k.after)
	}
	return fmt.Sprintf("%s at %s (hit %d)", k.target, k.failpoint, k.hit)
}

// plan draws n kills: all targets come, in an order of their own, the busier ones more often.
func plan(r *rand.Rand, n int) []kill {
	decks := map[string][]string{}
	draw := func(target string) string {
		if len(decks[target]) == 0 {
			decks[target] = append([]string(nil), failpoints[target]...)
			r.Shuffle(len(decks[target]), func(i, j int) { decks[target][i], decks[target][j] = decks[target][j], decks[target][i] })
		}
		name := decks[target][0]
		decks[target] = decks[target][1:]
		return name
	}
	weights := []string{
		uploaderName, uploaderName, uploaderName, uploaderName, tracker, tracker, tracker, scheduler, scheduler, host, resync, orchestrator,
		tracker, uploaderName, natsServer, everything,
	}
	var out []kill
	for len(out) < n {
		for _, i := range r.Perm(len(weights)) {
			k := kill{target: weights[i], after: time.Duration(r.IntN(1500)) * time.Millisecond, hit: 1 + r.IntN(3)}
			if len(failpoints[k.target]) > 0 && (r.IntN(3) > 0 || k.target == resync || k.target == orchestrator) {
				k.failpoint = draw(k.target)
			}
			if k.target == orchestrator || k.target == resync || strings.HasSuffix(k.failpoint, "-begin") || strings.HasSuffix(k.failpoint, "-checkpoint") {
				k.hit = 1 // rare: once per job, per crash, per checkpoint
			}
			if k.failpoint == "" && k.target != everything && r.IntN(2) == 0 {
				k.pause = time.Duration(2500+r.IntN(4000)) * time.Millisecond // more than an ack wait and a lease of a scheduler
				if k.target == uploaderName && r.IntN(3) == 0 {
					k.pause = 18 * time.Second // more than an applier's lease
				}
			}
			out = append(out, k)
		}
	}
	return out[:n]
}

// TestRobustAgainstKills kills one program after another, at named moments and at any, and everything at once.
func TestRobustAgainstKills(t *testing.T) {
	runs := shortRuns
	if text := os.Getenv(runsEnv); text != "" {
		n, err := strconv.Atoi(text)
		require.NoError(t, err, runsEnv)
		runs = n
	} else if testing.Short() {
		t.Skip("the kills take a minute")
	}
	seed := uint64(20261122)
	if os.Getenv(testkit.SeedEnv) != "" {
		seed = testkit.Seed(t)
	}
	for first := 0; first < runs; first += runsPerFleet {
		n := min(runsPerFleet, runs-first)
		fleetSeed := seed + uint64(first/runsPerFleet)
		t.Run(fmt.Sprintf("seed-%d", fleetSeed), func(t *testing.T) { attack(t, fleetSeed, n) })
		if t.Failed() {
			return
		}
	}
}

// TestRobustInitialReplication kills programs while a machine is copied for the first time: the copy is taken up where it
// stood, by the same full pass. One fleet copies again and again, each time as a new lineage.
func TestRobustInitialReplication(t *testing.T) {
	runs := initialRuns
	if text := os.Getenv(runsEnv); text != "" {
		n, err := strconv.Atoi(text)
		require.NoError(t, err, runsEnv)
		runs = max(n/8, initialRuns)
	} else if testing.Short() {
		t.Skip("the kills take a minute")
	}
	seed := uint64(20261123)
	if os.Getenv(testkit.SeedEnv) != "" {
		seed = testkit.Seed(t)
	}
	r := testkit.RandOf(seed)
	p := newFleet(t, either(seed/2, onDir, onAzurite), seed%2 == 1)
	a := &attacked{t: t, machine: newMachine(p, seed, 24*mib, 16*mib)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat with %s=%d; kills:\n%s", testkit.SeedEnv, seed, strings.Join(a.done, "\n"))
		}
	})
	p.startAll()
	a.write(5 * time.Millisecond)
	require.NoError(t, a.clients())
	points := []kill{
		{uploaderName, "uploader/after-segment", 2, 0, 0}, {tracker, "change-tracker/after-begin", 1, 0, 0}, {scheduler, "scheduler/after-publish", 2, 0, 0},
		{uploaderName, "uploader/after-manifest", 1, 0, 0}, {tracker, "change-tracker/before-settle", 1, 0, 0}, {tracker, "change-tracker/after-rename", 1, 0, 0},
		{scheduler, "scheduler/before-settle", 1, 0, 0}, {uploaderName, "uploader/before-ack", 2, 0, 0}, {host, "host-provider/after-cut", 1, 0, 0},
		{scheduler, "scheduler/after-record", 3, 0, 0}, {tracker, "change-tracker/before-begin", 1, 0, 0}, {tracker, "change-tracker/after-settle", 1, 0, 0},
		{tracker, "", 0, 0, 0}, {everything, "", 0, 0, 0}, {natsServer, "", 0, 0, 0}, {uploaderName, "", 0, 0, 0}, {scheduler, "", 0, 0, 0}, {host, "", 0, 0, 0},
	}
	for i := range runs {
		if i%len(points) == 0 {
			r.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
		}
		k := points[i%len(points)]
		k.after = time.Duration(r.IntN(800)) * time.Millisecond
		a.done = append(a.done, fmt.Sprintf("%3d  %s  %s", i+1, time.Now().Format("15:04:05.000"), k))
		a.copyUnder(k, i)
		if testing.Verbose() {
			t.Log(a.done[i])
		}
	}
}

// initialRuns is how many initial replications are interrupted by default.
const initialRuns = 4

// copyUnder protects the machine, kills something meanwhile, verifies the first points and ends protection.
func (a *attacked) copyUnder(k kill, i int) {
	t := a.t
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	a.chain, a.seen, a.verified = nil, nil, map[replica.Ordinal]uint64{}
	start := time.Now()
	if i == 0 {
		file := filepath.Join(a.p.dir, "policy.yaml")
		require.NoError(t, os.WriteFile(file, []byte("name: e2e\ncopy_interval: 1s\n"), 0o600))
		require.NoError(t, a.p.landfall(ctx, nil, "policy", "apply", "-f", file))
	}
	id, job := uuid.NewString(), ""
	enable := func() {
		a.p.wait(recoverWithin, "protection starts", func(ctx context.Context) error {
			r, err := a.p.api.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: vmName, Policy: "policies/e2e", RequestId: id})
			job = r.GetJob().GetName()
			return err
		})
	}
	if k.failpoint == "" {
		enable()
		a.strike(k)
	} else {
		q := a.p.programs[k.target]
		if standby := a.p.programs[scheduler2]; standby != nil && k.target == scheduler {
			require.NoError(t, standby.interrupt(30*time.Second))
			defer func() { require.NoError(t, standby.start("")) }()
		}
		require.NoError(t, q.interrupt(30*time.Second))
		require.NoError(t, q.start(fmt.Sprintf("%s=%d*kill", k.failpoint, k.hit)))
		a.p.wait(recoverWithin, "protection starts", func(ctx context.Context) error {
			r, err := a.p.api.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{Vm: vmName, Policy: "policies/e2e", RequestId: id})
			job = r.GetJob().GetName()
			return a.orGone(q, err)
		})
		select {
		case <-q.exited():
		case <-time.After(hitWithin):
			a.unreached++
			a.done[i] += "  (not reached)"
			q.kill()
		}
		require.NoError(t, q.start(""))
		if job == "" {
			enable()
		}
	}
	a.succeeds(job)
	a.since(start, 3, recoverWithin)
	a.p.wait(30*time.Second, "one full pass", func(ctx context.Context) error { return a.only(ctx, 1, 0) })
	require.NoError(t, a.verifyNew(ctx, 0), "after %s", k)
	require.NoError(t, a.p.landfall(ctx, nil, "unprotect", machineName, "--wait"))
}

// attacked is one fleet under attack.
type attacked struct {
	*machine
	t         *testing.T
	done      []string // kills so far
	resyncs   int64
	failovers failoverv1.FailoverServiceClient
	unreached int
}

func attack(t *testing.T, seed uint64, n int) {
	r := testkit.RandOf(seed)
	p := newFleet(t, either(seed/2, onAzurite, onDir), seed%2 == 1)
	a := &attacked{t: t, machine: newMachine(p, seed, 24*mib, 16*mib)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat with %s=%d %s=%d; kills:\n%s", testkit.SeedEnv, seed, runsEnv, n, strings.Join(a.done, "\n"))
		}
	})
	p.startAll()
	a.write(12 * time.Millisecond)
	setUp, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	p.protect(setUp)
	a.since(time.Now(), 1, 30*time.Second)
	require.NoError(t, a.clients())

	for i, k := range plan(r, n) {
		began := time.Now()
		a.done = append(a.done, fmt.Sprintf("%3d  %s  %s", i+1, began.Format("15:04:05.000"), k))
		reached := a.strike(k)
		restarted := time.Now()
		a.since(restarted, 1, recoverWithin)
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		p.wait(30*time.Second, "a delta follows, not a full copy", func(ctx context.Context) error { return a.only(ctx, 1, a.resyncs) })
		require.NoError(t, a.verifyNew(ctx, 4), "after %s", k)
		cancel()
		if !reached {
			a.unreached++
		}
		a.done[i] += fmt.Sprintf("  (reached %t, back after %s)", reached, time.Since(restarted).Round(time.Millisecond))
		if testing.Verbose() {
			t.Log(a.done[i])
		}
	}
	a.finish()
}

// finish lets the guest rest, and verifies every point of the whole history, the applied disks and a last failover.
func (a *attacked) finish() {
	t := a.t
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	points := a.since(time.Now(), 1, recoverWithin)
	last := points[len(points)-1]
	a.failover(ctx, last.Ordinal)
	a.rest()
	require.NoError(t, a.verifyNew(ctx, 0))
	a.p.wait(60*time.Second, "the replica's disks follow", func(ctx context.Context) error {
		points, err := a.look(ctx)
		if err != nil {
			return err
		}
		for _, q := range points {
			if q.Ordinal == last.Ordinal && q.Processed {
				return nil
			}
		}
		return errNotYet
	})
	t.Logf("%d kills (%d failpoints not reached), %d points verified, %d of them from a checkpoint", len(a.done), a.unreached, len(a.verified), a.based)
}

func (a *attacked) clients() error {
	var c struct{ Endpoints map[string]string }
	if err := readYAML(filepath.Join(a.p.state, "client.yaml"), &c); err != nil {
		return err
	}
	conn, err := a.p.dialer.Conn(c.Endpoints[orchestrator])
	a.failovers = failoverv1.NewFailoverServiceClient(conn)
	return err
}

// strike does one kill and starts the program again; reached is false when the failpoint was not hit in time.
func (a *attacked) strike(k kill) (reached bool) {
	t := a.t
	t.Helper()
	switch {
	case k.target == everything:
		wait(t, k.after)
		a.p.killAll()
		for _, name := range a.p.order {
			require.NoError(t, a.p.programs[name].start(""))
		}
		return true
	case k.pause > 0:
		wait(t, k.after)
		require.NoError(t, a.p.programs[k.target].suspend())
		wait(t, k.pause)
		require.NoError(t, a.p.programs[k.target].resume())
		return true
	case k.failpoint == "":
		wait(t, k.after)
		q := a.p.programs[k.target]
		q.kill()
		require.NoError(t, q.start(""))
		return true
	}
	q := a.p.programs[k.target]
	if standby := a.p.programs[scheduler2]; standby != nil && k.target == scheduler {
		require.NoError(t, standby.interrupt(30*time.Second)) // or it would be the one that works
		defer func() { require.NoError(t, standby.start("")) }()
	}
	crash := k.target == tracker && strings.HasSuffix(k.failpoint, "-begin") // only a crash makes a pass necessary
	if crash {
		q.kill()
	} else {
		require.NoError(t, q.interrupt(30*time.Second)) // politely: an applier gives its leases back
	}
	require.NoError(t, q.start(fmt.Sprintf("%s=%d*kill", k.failpoint, k.hit)))
	if k.target == uploaderName && strings.HasSuffix(k.failpoint, "-checkpoint") { // a pass ends with one
		a.p.programs[tracker].kill()
		require.NoError(t, a.p.programs[tracker].start(""))
	}
	work := a.occupy(k.target, q)
	select {
	case <-q.exited():
		reached = true
	case <-time.After(hitWithin):
		q.kill()
	}
	require.NoError(t, q.start(""))
	work()
	return reached
}

// occupy gives the programs that rest otherwise something to do; the result waits for its end and checks it.
func (a *attacked) occupy(target string, q *process) (finish func()) {
	ctx := a.t.Context()
	switch target {
	case resync:
		a.resyncs++
		id := uuid.NewString()
		var job string
		a.p.wait(recoverWithin, "resync starts", func(ctx context.Context) error {
			r, err := a.p.api.Resynchronize(ctx, &schedulerv1.ResynchronizeRequest{Vm: vmName, RequestId: id})
			job = r.GetJob().GetName()
			return err
		})
		return func() { a.succeeds(job) }
	case orchestrator:
		points, err := a.look(ctx)
		require.NoError(a.t, err)
		ordinal := points[len(points)-1].Ordinal
		out := filepath.Join(a.p.dir, "drill-"+strconv.Itoa(len(a.done)))
		start, clean := uuid.NewString(), uuid.NewString()
		copyIt := func() string {
			var job string
			a.p.wait(recoverWithin, "test failover starts", func(ctx context.Context) error {
				r, err := a.failovers.StartTestFailover(ctx, &failoverv1.StartTestFailoverRequest{
					Vm: vmName, Point: &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Ordinal{Ordinal: uint64(ordinal)}},
					Target: failoverv1.TargetKind_TARGET_KIND_VHD, OutDir: out, RequestId: start,
				})
				job = r.GetJob().GetName()
				return a.orGone(q, err)
			})
			return job
		}
		remove := func() string {
			var job string
			a.p.wait(recoverWithin, "clean-up starts", func(ctx context.Context) error {
				r, err := a.failovers.CleanUpTestFailover(ctx, &failoverv1.CleanUpTestFailoverRequest{Vm: vmName, RequestId: clean})
				job = r.GetJob().GetName()
				return a.orGone(q, err)
			})
			return job
		}
		removed := false
		copyIt()
		if strings.HasSuffix(a.failpoint(), "remove-copy") {
			a.succeeds(copyIt())
			a.verifyCopy(ctx, out, ordinal)
			remove()
			removed = true
		}
		return func() {
			if !removed {
				a.succeeds(copyIt()) // the same request: the same job
				a.verifyCopy(ctx, out, ordinal)
			}
			a.succeeds(remove())
			require.NoDirExists(a.t, out)
		}
	}
	return func() {}
}

// failpoint is what the present kill names.
func (a *attacked) failpoint() string {
	_, name, _ := strings.Cut(a.done[len(a.done)-1], " at ")
	name, _, _ = strings.Cut(name, " ")
	return name
}

// orGone takes an error of a call for success when the program died of its failpoint meanwhile: the same request is
// made again after its restart.
func (a *attacked) orGone(q *process, err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-q.exited():
		return nil
	default:
		return err
	}
}

// succeeds waits for the end of a job.
func (a *attacked) succeeds(job string) {
	a.t.Helper()
	require.NotEmpty(a.t, job)
	var failed error
	a.p.wait(90*time.Second, "job "+job+" ends", func(ctx context.Context) error {
		r, err := a.p.jobs.GetJob(ctx, &schedulerv1.GetJobRequest{Name: job})
		if err != nil {
			if errcat.Reason(err) == typesv1.ErrorReason_ERROR_REASON_JOB_NOT_FOUND {
				failed = err
				return nil
			}
			return err
		}
		switch s := r.GetJob().GetState(); s {
		case typesv1.JobState_JOB_STATE_SUCCEEDED:
			return nil
		case typesv1.JobState_JOB_STATE_FAILED, typesv1.JobState_JOB_STATE_CANCELLED:
			failed = errors.New(r.GetJob().String())
			return nil
		default:
			return fmt.Errorf("%s: %s", s, r.GetJob())
		}
	})
	require.NoError(a.t, failed)
}

// wait lets time pass: the moment of a kill is random, there is nothing to wait for.
func wait(t *testing.T, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}
