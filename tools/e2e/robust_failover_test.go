package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
)

const (
	// The short set is one of each form, at once: `up` mostly waits for the lease of the program that was killed.
	shortUpTakeovers    = 2
	shortFleetTakeovers = 4
	takeoversPerProduct = 8
	// endsWithin bounds a failover, and its end, under attack.
	endsWithin = 2 * time.Minute
)

// TestRobustFailovers kills, stops and restarts programs while a machine is failed over in every way, and while that is
// taken back or made final. What comes up is what the guest had; never do two write; and afterwards it goes on as if
// nothing had been.
func TestRobustFailovers(t *testing.T) {
	seed := uint64(20261124)
	if os.Getenv(testkit.SeedEnv) != "" {
		seed = testkit.Seed(t)
	}
	run := func(seed uint64, fleet bool, n int, parallel bool) {
		t.Run(fmt.Sprintf("%s-seed-%d", map[bool]string{false: "up", true: "fleet"}[fleet], seed), func(t *testing.T) {
			if parallel {
				t.Parallel()
			}
			takeOvers(t, seed, fleet, n)
		})
	}
	text := os.Getenv(runsEnv)
	if text == "" {
		if testing.Short() {
			t.Skip("the kills take a minute")
		}
		run(seed, false, shortUpTakeovers, true)
		run(seed, true, shortFleetTakeovers, true)
		return
	}
	kills, err := strconv.Atoi(text)
	require.NoError(t, err, runsEnv)
	for left := max(kills/4, 1); left > 0 && !t.Failed(); left, seed = left-takeoversPerProduct, seed+1 {
		run(seed, seed%4 != 0, min(takeoversPerProduct, left), false)
	}
}

func takeOvers(t *testing.T, seed uint64, fleet bool, n int) {
	r := testkit.RandOf(seed)
	var p *product
	if fleet {
		p = newFleetOf(t, either(seed, onAzurite, onDir), true, driverImagedir, orchestrator2)
	} else {
		p = newUp(t, either(seed, onDir, onAzurite))
	}
	a := &attacked{t: t, machine: newMachine(p, seed, 16*mib, 8*mib)}
	t.Cleanup(func() {
		if t.Failed() {
			long := ""
			if os.Getenv(runsEnv) != "" {
				long = fmt.Sprintf(" %s=%d", runsEnv, 4*n)
			}
			t.Logf("repeat with %s=%d%s; failovers:\n%s", testkit.SeedEnv, seed, long, strings.Join(a.done, "\n"))
		}
	})
	p.startAll()
	a.write(8 * time.Millisecond)
	setUp, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	p.protect(setUp)
	a.since(time.Now(), 3, recoverWithin)
	for i, plan := range takeoverPlans(r, fleet, n) {
		began := time.Now()
		a.done = append(a.done, fmt.Sprintf("%3d  %s  %s", i+1, began.Format("15:04:05.000"), plan))
		notes := a.takeOver(plan, i)
		a.done[i] += fmt.Sprintf("  (%s)%s", time.Since(began).Round(100*time.Millisecond), notes)
		if testing.Verbose() {
			t.Log(a.done[i])
		}
	}
	a.rest()
	ctx, cancel := context.WithTimeout(t.Context(), endsWithin)
	defer cancel()
	require.NoError(t, a.verifyNew(ctx, 0))
	t.Logf("%d failovers (%d failpoints not reached), %d points verified", len(a.done), a.unreached, len(a.verified))
}

// takeOver is one run.
func (a *attacked) takeOver(plan takeoverPlan, i int) (notes string) {
	t := a.t
	ctx, cancel := context.WithTimeout(t.Context(), 3*endsWithin)
	defer cancel()
	f := &takenOver{attacked: a, plan: plan, out: filepath.Join(a.p.dir, "recovered-"+strconv.Itoa(i+1))}
	points, err := a.look(ctx)
	require.NoError(t, err)
	f.low = points[len(points)-1].Ordinal
	switch plan.kind {
	case takePlanned:
		f.args = []string{"failover", "planned", machineName}
	case takeDrill:
		f.args = []string{"failover", "test", machineName}
	case takeLatest:
		f.args = []string{"failover", "unplanned", machineName, "--accept-unfenced"}
	case takeOlder:
		f.exact = points[len(points)-1-i%3].Ordinal
		f.low = f.exact
		f.args = []string{"failover", "unplanned", machineName, "--accept-unfenced", "--point", strconv.FormatUint(uint64(f.exact), 10)}
	case takeProcessed:
		f.low = processed(points)
		f.args = []string{"failover", "unplanned", machineName, "--accept-unfenced", "--point", "latest-processed"}
	}
	f.args = append(f.args, "--out", f.out)
	f.watched = watchSource(a.machine, f.out, plan.end == endCommit)
	defer f.watched.verdict()

	a.under(plan.up, func() {
		if plan.early > 0 {
			f.begin()
			wait(t, plan.early)
			f.finish()
			return
		}
		f.requireBroughtUp(ctx, f.bringUp())
	})
	if plan.early == 0 && plan.kind != takeDrill && i%2 == 0 { // else it is ended before the source is known to be off
		f.requireFenced()
	}
	a.under(plan.down, f.finish)
	if plan.end == endCommit {
		f.requireOver(ctx)
		points, err := a.look(ctx)
		require.NoError(t, err)
		require.NotEmpty(t, points)
	} else {
		f.requireBack(ctx)
	}
	f.requireAtRest()
	require.NoError(t, f.watched.verdict())
	if len(f.notes) > 0 {
		notes = "\n       " + strings.Join(f.notes, "\n       ")
	}
	return notes
}

// processed is the newest point that was applied to the replica's disks.
func processed(points []replica.Point) (newest replica.Ordinal) {
	for _, q := range points {
		if q.Processed {
			newest = q.Ordinal
		}
	}
	return newest
}

// under does something while a program is killed or stopped. Afterwards all programs run.
func (a *attacked) under(k *kill, act func()) {
	if k == nil {
		act()
		return
	}
	standby := a.p.programs[map[string]string{scheduler: scheduler2, orchestrator: orchestrator2}[k.target]]
	if k.failpoint != "" {
		q := a.p.programs[k.target]
		if standby != nil {
			a.settleDown(standby) // or it would be the one that works
		}
		a.settleDown(q)
		require.NoError(a.t, q.start(fmt.Sprintf("%s=%d*kill", k.failpoint, k.hit)))
		_ = a.p.poll(5*time.Second, func(ctx context.Context) error { // ready, unless a cycle has passed the failpoint already
			_, err := a.p.vm(ctx)
			return err
		})
	}
	over, struck := make(chan struct{}), make(chan error, 1)
	go func() { struck <- a.hit(*k, standby, over) }()
	defer func() {
		close(over)
		if err := <-struck; err != nil {
			a.t.Errorf("attack %s: %v", k, err)
		}
	}()
	act()
}

// settleDown ends a program politely: it gives its leases back. One that was started a moment ago may not listen yet.
func (a *attacked) settleDown(q *process) {
	if err := q.interrupt(30 * time.Second); err != nil && !strings.HasSuffix(err.Error(), "signal: interrupt") {
		require.NoError(a.t, err)
	}
}

// hit does one attack. What is armed and was not reached when the work is over is killed then.
func (a *attacked) hit(k kill, standby *process, over <-chan struct{}) error {
	q := a.p.programs[k.target]
	if k.failpoint != "" {
		select {
		case <-q.exited():
		case <-over:
			a.unreached++
			q.kill()
		}
		if standby != nil { // it is the one that takes over
			if err := standby.start(""); err != nil {
				return err
			}
		}
		return q.start("")
	}
	timer := time.NewTimer(k.after)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-over:
	}
	if k.target == everything {
		a.p.killAll()
		for _, name := range a.p.order {
			if err := a.p.programs[name].start(""); err != nil {
				return err
			}
		}
		return nil
	}
	if k.pause == 0 {
		q.kill()
		return q.start("")
	}
	if err := q.suspend(); err != nil {
		return err
	}
	timer.Reset(k.pause)
	<-timer.C
	return q.resume()
}
