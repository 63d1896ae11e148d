package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/replica"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// takenOver is one failover under attack, driven by the command line: a command that fails because its server was
// killed is given again, a job that goes on is followed.
type takenOver struct {
	*attacked
	plan takeoverPlan
	out  string
	args []string // that start it

	low     replica.Ordinal // the oldest point that may be brought up
	exact   replica.Ordinal // the point that was named
	notes   []string
	watched *watcher
}

// failoverRow is a failover as `failover list -o json` shows it.
type failoverRow struct {
	Name, Kind, Phase, State, Point, Job string
	OutDir                               string `json:"out_dir"`
	CommitJob                            string `json:"commit_job"`
	CancelJob                            string `json:"cancel_job"`
	CleanupJob                           string `json:"cleanup_job"`
	Error                                *struct{ Reason, What string }
}

// standing is where it stands, in one word for tests and others.
func (r *failoverRow) standing() string {
	if r == nil {
		return "NONE"
	}
	if s := strings.TrimPrefix(r.Phase, "FAILOVER_PHASE_"); s != "UNSPECIFIED" {
		return s
	}
	return strings.TrimPrefix(r.State, "TEST_FAILOVER_STATE_")
}

func (f *takenOver) list(ctx context.Context) (rows []*failoverRow, err error) {
	var listed struct{ Failovers []*failoverRow }
	err = f.p.landfall(ctx, &listed, "failover", "list", machineName)
	return listed.Failovers, err
}

// row is the failover of this run; nil before it was stored.
func (f *takenOver) row(ctx context.Context) (*failoverRow, error) {
	rows, err := f.list(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range rows { // newest first
		if r.OutDir == f.out {
			return r, nil
		}
	}
	return nil, nil
}

func (f *takenOver) follow(ctx context.Context, job string) error {
	return errors.Join(errNotYet, f.p.landfall(ctx, nil, "jobs", "show", job, "--watch"))
}

func (f *takenOver) note(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(f.notes, n) {
		f.notes = append(f.notes, n)
	}
}

// begin asks for the failover until it is stored.
func (f *takenOver) begin() {
	f.p.t.Helper()
	f.p.wait(endsWithin, "the failover begins", func(ctx context.Context) error {
		if r, err := f.row(ctx); err != nil || r != nil {
			return err
		}
		return errors.Join(errNotYet, f.p.landfall(ctx, nil, f.args...))
	})
}

// bringUp drives the failover until the copy is up.
func (f *takenOver) bringUp() *failoverRow {
	f.p.t.Helper()
	var up *failoverRow
	f.p.wait(endsWithin, "the failover ends well", func(ctx context.Context) error {
		r, err := f.row(ctx)
		if err != nil {
			return err
		}
		switch up = r; r.standing() {
		case "WAITING_COMMIT", "WAITING_CLEANUP":
			return nil
		case "STARTING":
			return f.follow(ctx, r.Job)
		case "FAILED":
			f.note("FAILED: %+v", r.Error)
			err := f.p.landfall(ctx, nil, append(slices.Clone(f.args), "--wait")...)
			if err != nil { // the source's side may have to be taken back first
				err = errors.Join(err, f.p.landfall(ctx, nil, "failover", f.plan.giveUp(), machineName, "--wait"))
			}
			return errors.Join(errNotYet, err)
		case "CANCELLING", "CLEANING_UP":
			return f.follow(ctx, r.CancelJob+r.CleanupJob)
		}
		return errors.Join(fmt.Errorf("stands at %s", r.standing()), f.p.landfall(ctx, nil, append(slices.Clone(f.args), "--wait")...))
	})
	return up
}

func (p takeoverPlan) giveUp() string {
	if p.kind == takeDrill {
		return endCleanUp
	}
	return endCancel
}

// finish drives the end until it is reached.
func (f *takenOver) finish() {
	f.p.t.Helper()
	f.watched.end()
	f.p.wait(endsWithin, "the "+f.plan.end+" ends well", func(ctx context.Context) error {
		r, err := f.row(ctx)
		if err != nil {
			return err
		}
		switch s := r.standing(); {
		case s == "CANCELLED" && f.plan.end == endCancel, s == "COMMITTED" && f.plan.end == endCommit, s == "NONE" && f.plan.end == endCleanUp:
			return nil
		case s == "CANCELLING", s == "COMMITTING", s == "CLEANING_UP":
			return f.follow(ctx, map[string]string{endCancel: r.CancelJob, endCommit: r.CommitJob, endCleanUp: r.CleanupJob}[f.plan.end])
		case s == "FAILED", s == "CANCEL_FAILED", s == "CLEANUP_FAILED":
			f.note("%s: %+v", s, r.Error)
		}
		return errors.Join(fmt.Errorf("stands at %s", r.standing()), f.p.landfall(ctx, nil, "failover", f.plan.end, machineName, "--wait"))
	})
}

// requireBroughtUp holds what was brought up against the guest's record and the bounds of the point that was asked for.
func (f *takenOver) requireBroughtUp(ctx context.Context, up *failoverRow) {
	t := f.p.t
	t.Helper()
	n, err := strconv.ParseUint(up.Point, 10, 64)
	require.NoError(t, err)
	got := replica.Ordinal(n)
	points, err := f.look(ctx)
	require.NoError(t, err)
	newest := points[len(points)-1].Ordinal
	require.GreaterOrEqual(t, got, f.low, "a point older than what was asked for")
	switch f.plan.kind {
	case takePlanned:
		f.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_FAILED_OVER)
		require.Equal(t, newest, got, "the last point is brought up")
		acked, _ := f.record.Acked()
		f.requireCopy(ctx, f.out, acked, acked+1) // the write under way may or may not have been
		f.requireSources(f.out)
	case takeLatest:
		require.Equal(t, newest, got, "the newest point is brought up")
	case takeOlder:
		require.Equal(t, f.exact, got)
	}
	f.verifyCopy(ctx, f.out, got)
}

// requireFenced waits until the host has said that the source is off.
func (f *takenOver) requireFenced() {
	f.p.t.Helper()
	f.p.wait(recoverWithin, "the source is fenced", func(ctx context.Context) error {
		vm, err := f.p.vm(ctx)
		if err == nil && !vm.GetFailover().GetSourceFenced() {
			err = fmt.Errorf("%w: %s", errNotYet, vm.GetFailover())
		}
		return err
	})
}

// requireBack checks that a failover that was taken back left nothing behind.
func (f *takenOver) requireBack(ctx context.Context) {
	t := f.p.t
	t.Helper()
	require.NoDirExists(t, f.out, "what was made is removed")
	f.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_PROTECTED)
	before, _ := f.record.Acked()
	f.p.wait(recoverWithin, "the guest writes again", func(context.Context) error {
		if n, _ := f.record.Acked(); n <= before+2 {
			return errors.Join(errNotYet, f.healthy())
		}
		return nil
	})
	f.since(time.Now(), 1, recoverWithin)
	f.p.wait(recoverWithin, "deltas go on", func(ctx context.Context) error { return f.only(ctx, 1, 0) })
	require.NoError(t, f.verifyNew(ctx, 4))
	require.NoDirExists(t, f.out, "what was removed stays away")
}

// requireOver checks that a committed failover is final, across a kill of everything.
func (f *takenOver) requireOver(ctx context.Context) {
	t := f.p.t
	t.Helper()
	f.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_COMMITTED)
	f.requireFenced()
	state, err := f.chain.Refresh(ctx)
	require.NoError(t, err)
	require.True(t, state.Closed(), "the lineage stays closed")
	head := state.Head
	require.Error(t, f.p.landfall(ctx, nil, "failover", "cancel", machineName, "--wait"), "a committed failover is final")
	acked, _ := f.record.Acked()
	f.p.killAll()
	f.p.startAll()
	wait(f.t, 3*time.Second) // for what must not happen
	again, _ := f.record.Acked()
	require.LessOrEqual(t, again, acked+1, "nobody writes to a fenced machine, after a restart of everything neither")
	f.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_COMMITTED)
	state, err = f.chain.Refresh(ctx)
	require.NoError(t, err)
	require.Equal(t, head, state.Head, "nothing follows a close")
	require.DirExists(t, f.out, "what was recovered is the machine from now on")
}

// requireAtRest waits until no job runs and no other failover stands in the way.
func (f *takenOver) requireAtRest() {
	f.p.t.Helper()
	f.p.wait(recoverWithin, "nothing is stuck", func(ctx context.Context) error {
		r, err := f.p.jobs.ListJobs(ctx, &schedulerv1.ListJobsRequest{PageSize: 1000})
		if err != nil {
			return err
		}
		for _, j := range r.Jobs {
			switch j.State {
			case typesv1.JobState_JOB_STATE_SUCCEEDED, typesv1.JobState_JOB_STATE_FAILED, typesv1.JobState_JOB_STATE_CANCELLED:
			default:
				return fmt.Errorf("job runs still: %s", j)
			}
		}
		rows, err := f.list(ctx)
		if err != nil {
			return err
		}
		for _, r := range rows {
			if s := r.standing(); s != "CANCELLED" && s != "COMMITTED" && s != "NONE" {
				return fmt.Errorf("failover %s stands at %s", r.Name, s)
			}
		}
		return nil
	})
}

// watcher looks without pause whether the source writes while it must not: from the moment when it is said to be fenced
// until somebody asks for the end, and after that as long as the copy is there.
type watcher struct {
	stop context.CancelFunc
	done chan struct{}

	mu     sync.Mutex
	asked  bool
	fenced *uint64 // newest acknowledged write when it was first said to be fenced
	broken error
}

func watchSource(m *machine, out string, commit bool) *watcher {
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				w.look(ctx, m, out, commit)
			}
		}
	}()
	return w
}

func (w *watcher) look(ctx context.Context, m *machine, out string, commit bool) {
	if w.fenced == nil {
		call, stop := context.WithTimeout(ctx, time.Second)
		vm, err := m.p.vm(call)
		stop()
		p := vm.GetFailover()
		if err != nil || !p.GetSourceFenced() && p.GetStage() != schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE {
			return
		}
		n, _ := m.record.Acked()
		w.mu.Lock()
		if !w.asked || commit {
			w.fenced = &n
		}
		w.mu.Unlock()
		return
	}
	n, _ := m.record.Acked()
	if n <= *w.fenced+1 { // one answer may have been on its way
		return
	}
	_, err := os.Stat(filepath.Join(out, "os.vhd"))
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.broken != nil:
	case !w.asked || commit:
		w.broken = fmt.Errorf("TWO WRITERS: the source was fenced after write %d, and wrote %d", *w.fenced, n)
	case err == nil:
		w.broken = fmt.Errorf("TWO WRITERS: the source wrote %d after its fence at %d, and the copy is still there", n, *w.fenced)
	}
}

// end says that from now on the source may be started.
func (w *watcher) end() {
	w.mu.Lock()
	w.asked = true
	w.mu.Unlock()
}

func (w *watcher) verdict() error {
	w.stop()
	<-w.done
	return w.broken
}
