package qemu

import (
	"math/rand/v2"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// killer ends the driver at the n-th effect: from then on nothing is done, as after kill -9.
type killer struct {
	at, seen int
	names    []string
}

func (k *killer) step(name string) error {
	k.seen++
	k.names = append(k.names, name)
	if k.seen >= k.at {
		return errKilled
	}
	return nil
}

func (k *killer) killed() bool { return k.seen >= k.at }

// moment is where the driver died, for messages.
func (k *killer) moment() string {
	if len(k.names) < k.at {
		return "nowhere"
	}
	return k.names[k.at-1]
}

// TestKilledAtEveryStep kills the driver before and after everything that it does to QEMU, to its record, to files and to the
// change-tracker, in every call, while the guest goes on writing; and kills the recovery too. LANDFALL_EVERY_STEP takes all
// steps; otherwise every seventh, other ones each time.
func TestKilledAtEveryStep(t *testing.T) {
	stride := 7
	if os.Getenv("LANDFALL_EVERY_STEP") != "" {
		stride = 1
	}
	for _, op := range []string{"pass", "settle-pass", "cut", "commit", "abandon"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.establish()
			l.copyAll(full)
			l.point()
			first := 1 + rand.IntN(stride)
			for at := first; ; at += stride {
				k := &killer{at: at}
				l.killed(op, k)
				if !k.killed() {
					require.Greater(t, k.seen, 3)
					t.Logf("%s: %d effects", op, k.seen)
					return
				}
			}
		})
	}
}

// killed runs op with a killer, recovers, ends what is open in the way that is right for what it finds, and requires that
// the next point is right.
func (l *lab) killed(op string, k *killer) {
	t := l.t
	t.Helper()
	l.write("d0", (k.at%8)*mib+1000, 3000, byte(k.at))
	n := l.next()
	var want map[string][]byte
	switch op {
	case "cut", "pass":
	case "settle-pass":
		_, err := l.begin(n, compare)
		require.NoError(t, err)
		l.write("d1", 7*mib, 9000, byte(k.at))
		l.ship(n)
	default:
		_, err := l.cut(n)
		require.NoError(t, err)
		want = l.snapshot()
		l.write("d0", 2*mib, 80000, byte(k.at))
		l.ship(n)
		l.same(want, "before the kill")
	}
	want = l.snapshot()
	run := func() error {
		var err error
		switch op {
		case "cut":
			_, err = l.cut(n)
		case "pass":
			_, err = l.begin(n, compare)
		case "settle-pass":
			_, err = l.settlePass(n, commit)
		case "commit":
			_, err = l.settle(n, commit)
		case "abandon":
			_, err = l.settle(n, giveUp)
		}
		return err
	}
	l.driver.step = k.step
	err := run()
	if !k.killed() {
		require.NoError(t, err)
		l.driver.step = nil
	} else {
		l.write("d1", (k.at%8)*mib+5000, 200000, byte(k.at+1)) // the driver is dead, the guest is not
		l.stopDriver()
		// The recovery is killed too, somewhere.
		second := &killer{at: 1 + k.at%7}
		l.startDriverWith(second.step)
		l.write("d0", (k.at%8)*mib+9000, 66000, byte(k.at+2))
		l.restartDriver()
	}
	// What the scheduler does: look, repeat, ship, settle.
	status := l.points()
	require.NotEqual(t, typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST, status.ResyncReason, "%s: %s", k.moment(), status.ResyncDetail)
	opened := false
	for _, p := range status.Points {
		opened = opened || (p.Ordinal == n && p.Phase == typesv1.PointPhase_POINT_PHASE_OPEN)
	}
	switch op {
	case "cut":
		if !opened {
			want = l.snapshot()
		}
		_, err := l.cut(n) // repeats, or cuts for the first time
		require.NoError(t, err, k.moment())
		l.ship(n)
		l.same(want, "after a kill at "+k.moment())
		outcome := commit
		if k.at%4 == 1 {
			outcome = giveUp
		}
		_, err = l.settle(n, outcome)
		require.NoError(t, err)
	case "pass":
		_, err := l.begin(n, compare)
		require.NoError(t, err, k.moment())
		l.write("d1", 3*mib, 4096, byte(k.at))
		l.ship(n)
		_, err = l.settlePass(n, commit)
		require.NoError(t, err)
	default:
		require.NoError(t, run(), k.moment()) // the same answer, or the first
	}
	l.point()
	l.tidy(1)
	l.driver.step = nil
}

func (l *lab) startDriverWith(step func(string) error) {
	l.t.Helper()
	l.build()
	l.driver.step = step
	_ = l.driver.Refresh(l.ctx())
	l.stopDriver()
}
