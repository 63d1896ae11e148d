package failoverorchestrator_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// sample is some of what a test may try, another choice on every run: LANDFALL_SEED repeats one, LANDFALL_CRASH_RUNS=1
// tries all.
func sample[T any](t *testing.T, all []T, n int) []T {
	t.Helper()
	if everything() || n >= len(all) {
		return all
	}
	some := make([]T, 0, n)
	for _, i := range testkit.Rand(t).Perm(len(all))[:n] {
		some = append(some, all[i])
	}
	return some
}

func everything() bool { return os.Getenv("LANDFALL_CRASH_RUNS") != "" }

// firstOf is where a test begins that tries one of so many, and the stride.
func firstOf(t *testing.T, stride int64) (first, step int64) {
	t.Helper()
	if everything() {
		return 1, 1
	}
	return 1 + testkit.Rand(t).Int64N(stride), stride
}

var errKilled = errors.New("killed by the test")

// killAt ends an instance when it hits a failpoint: its context ends there, so that nothing after it is written. The
// result says when it was hit.
func killAt(t *testing.T, name string, i *instance) (hit <-chan struct{}) {
	t.Helper()
	ch := make(chan struct{})
	once := sync.OnceFunc(func() { close(ch) })
	t.Cleanup(failpoint.ArmFunc("failover-orchestrator/"+name, func() error {
		i.kill()
		once()
		return errKilled
	}))
	return ch
}

func wait(t *testing.T, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(20 * time.Second):
		t.Fatal("the failpoint was not hit")
	}
}

// requireSucceeded checks the job of a test that a kill interrupted.
func (g *rig) requireSucceeded(name string) {
	g.t.Helper()
	testkit.Eventually(g.t, 10*time.Second, func() bool { return g.job(name).EndTime != nil })
	j := g.job(name)
	require.Equal(g.t, typesv1.JobState_JOB_STATE_SUCCEEDED, j.State, "%v", j.Error)
	for _, s := range j.Steps {
		require.Equal(g.t, typesv1.JobState_JOB_STATE_SUCCEEDED, s.State, s.Id)
	}
}

// A process may die before and after every step: the next one finishes with the same result, and clean-up too.
func TestKillAtEveryStep(t *testing.T) {
	for _, existing := range []bool{false, true} {
		g := newRig(t)
		for _, step := range sample(t, []string{"check-target", "claim-target", "materialise-disks", "describe-machine"}, 2) {
			for _, when := range []string{"before-", "after-"} {
				what := fmt.Sprintf("%s%s, folder was there: %t", when, step, existing)
				out := filepath.Join(t.TempDir(), "drill")
				if existing {
					require.NoError(t, os.Mkdir(out, 0o750))
				}
				dying := g.start(g.store, true)
				hit := killAt(t, when+step, dying)
				job := g.test(request(out, ordinal(3)))
				wait(t, hit)
				dying.stop()
				require.Equal(t, starting, g.failover().State, what)
				failpoint.Disarm()

				next := g.start(g.store, true)
				g.await(ready)
				g.requirePoint(out, 3)
				g.requireSucceeded(job.Name)
				next.stop()

				for _, when := range []string{"before-", "after-"} {
					dying = g.start(g.store, true)
					hit = killAt(t, when+"remove-copy", dying)
					if when == "before-" {
						g.cleanUp()
					}
					wait(t, hit)
					dying.stop()
					failpoint.Disarm()
				}
				next = g.start(g.store, true)
				g.await(clean)
				g.requireSucceeded(g.failover().CleanupJob)
				if existing {
					require.Empty(t, names(t, out), what)
				} else {
					require.NoDirExists(t, out, what)
				}
				next.stop()
			}
		}
	}
}

// A process may die at every call to storage, before or after its effect (in turns). LANDFALL_CRASH_RUNS=1 tries every
// call.
func TestKillAtEveryStoreCall(t *testing.T) {
	g := newRig(t)
	first, stride := firstOf(t, 5)
	for n := first; ; n += stride {
		fault := blobstoretest.Crash
		if n%2 == 0 {
			fault = blobstoretest.CrashAfter
		}
		out := filepath.Join(t.TempDir(), "drill")
		store := blobstoretest.NewFaulty(g.store, nil)
		api := g.api(g.newService(g.store)) // answers, and does not work
		job := g.test(request(out, ordinal(4)))
		api()
		var calls atomic.Int64
		var dying *instance
		started := make(chan struct{})
		hit := make(chan struct{})
		store.SetHook(func(blobstoretest.Op, string, string) blobstoretest.Fault {
			<-started
			if calls.Add(1) != n {
				return blobstoretest.None
			}
			dying.kill()
			close(hit)
			return fault
		})
		dying = g.start(store, false)
		close(started)
		survived := false
		testkit.Eventually(t, 20*time.Second, func() bool {
			select {
			case <-hit:
				return true
			default:
			}
			survived = g.failover().State == ready
			return survived
		})
		dying.stop()
		next := g.start(g.store, true)
		g.await(ready)
		g.requirePoint(out, 4)
		g.requireSucceeded(job.Name)
		g.cleanUp()
		g.await(clean)
		require.NoDirExists(t, out)
		next.stop()
		if survived {
			require.Greater(t, n, int64(10), "calls to storage")
			break
		}
	}
}

// Storage that fails for a moment is no failure of the test.
func TestPassingFaults(t *testing.T) {
	g := newRig(t)
	store := blobstoretest.NewFaulty(g.store, nil)
	g.start(store, true)
	for n := int64(1); n < 12; n += 2 {
		out := filepath.Join(t.TempDir(), "drill")
		defer failpoint.ArmFunc("failover-orchestrator/before-check-target", func() error {
			var calls atomic.Int64
			store.SetHook(func(blobstoretest.Op, string, string) blobstoretest.Fault {
				if calls.Add(1) == n {
					return blobstoretest.After
				}
				return blobstoretest.None
			})
			return nil
		})()
		g.test(request(out, latest()))
		g.await(ready)
		g.requirePoint(out, 4)
		g.cleanUp()
		g.await(clean)
	}
}

// damage spoils, or removes, the segment of a point's disk.
func (g *rig) damage(point int, disk string, remove bool) {
	g.t.Helper()
	ctx := testkit.Context(g.t)
	c := g.store.Container(lineage.JournalContainer())
	for p, err := range c.List(ctx, "seg/", "") {
		require.NoError(g.t, err)
		if !strings.Contains(p.Name, fmt.Sprintf("%d-", point)) || !strings.Contains(p.Name, "/"+disk+"-") {
			continue
		}
		if remove {
			require.NoError(g.t, c.Delete(ctx, p.Name, blobstore.Conditions{}))
			return
		}
		junk := make([]byte, p.Size)
		testkit.Fill(junk, 99)
		_, err := c.Put(ctx, p.Name, bytes.NewReader(junk), p.Size, blobstore.Conditions{})
		require.NoError(g.t, err)
		return
	}
	g.t.Fatal("no such segment")
}

// A damaged segment fails the test with its reason and leaves the folder as it was, also when the process dies while it
// gives up; points below the damage stay usable, and so does the VM's next test.
func TestDamagedSegment(t *testing.T) {
	for _, remove := range []bool{false, true} {
		g := newRig(t)
		g.damage(4, "os", remove)
		for _, point := range []string{"", "after-give-up", "after-undo"} {
			for _, existing := range []bool{false, true} {
				out := filepath.Join(t.TempDir(), "drill")
				if existing {
					require.NoError(t, os.Mkdir(out, 0o750))
				}
				i := g.start(g.store, true)
				if point != "" {
					hit := killAt(t, point, i)
					g.test(request(out, latest()))
					wait(t, hit)
					i.stop()
					require.Equal(t, starting, g.failover().State)
					failpoint.Disarm()
					i = g.start(g.store, true)
				} else {
					g.test(request(out, latest()))
				}
				f := g.await(failed)
				require.Equal(t, "SEGMENT_CORRUPT", f.Error.Reason, "%v", f.Error)
				require.NotEmpty(t, f.Error.Action)
				require.Empty(t, f.Files)
				j := g.job(f.Job)
				require.Equal(t, typesv1.JobState_JOB_STATE_FAILED, j.State)
				require.Equal(t, "SEGMENT_CORRUPT", j.Error.Reason)
				require.Equal(t, typesv1.JobState_JOB_STATE_FAILED, j.Steps[2].State)
				require.Equal(t, "SEGMENT_CORRUPT", j.Steps[2].Error.Reason)
				require.Equal(t, typesv1.JobState_JOB_STATE_NOT_STARTED, j.Steps[3].State)
				if existing {
					require.Empty(t, names(t, out))
				} else {
					require.NoDirExists(t, out)
				}
				g.cleanUp() // a failed one may be cleaned up: there is nothing to do
				g.await(clean)
				i.stop()
			}
		}
		g.start(g.store, true)
		out := t.TempDir()
		g.test(request(out, ordinal(3)))
		g.await(ready)
		g.requirePoint(out, 3)
	}
}

// Files that cannot be removed make it a failed clean-up, which says so, blocks the next test, and can be repeated.
func TestUndoThatFails(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "drill")
	defer failpoint.ArmFunc("failover-orchestrator/before-materialise-disks", func() error {
		return os.MkdirAll(filepath.Join(out, "os.vhd", "stubborn"), 0o750)
	})()
	g.test(request(out, latest()))
	f := g.await(cleanupFailed)
	require.Equal(t, "TARGET_UNWRITABLE", f.Error.Reason)
	require.Contains(t, f.Error.What, "could not be cleaned")
	g.refused(request(filepath.Join(t.TempDir(), "next"), latest()), typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE)
	job := g.cleanUp()
	testkit.Eventually(t, 10*time.Second, func() bool { return g.job(job.Name).EndTime != nil })
	require.Equal(t, "TARGET_UNWRITABLE", g.job(job.Name).Error.Reason)
	g.await(cleanupFailed)
	require.NoError(t, os.Remove(filepath.Join(out, "os.vhd", "stubborn")))
	require.NotEqual(t, job.Name, g.cleanUp().Name, "a new attempt is a new job")
	g.await(clean)
	require.NoDirExists(t, out)
}

// A folder that was replaced while the test ran is not filled: nobody would ever clean it up.
func TestFolderReplaced(t *testing.T) {
	for _, step := range []string{"materialise-disks", "describe-machine"} {
		g := newRig(t)
		g.start(g.store, true)
		out := filepath.Join(t.TempDir(), "drill")
		disarm := failpoint.ArmFunc("failover-orchestrator/before-"+step, func() error {
			return errors.Join(os.RemoveAll(out), os.Mkdir(out, 0o750), os.WriteFile(filepath.Join(out, "thesis.doc"), []byte("mine"), 0o600))
		})
		g.test(request(out, latest()))
		f := g.await(failed)
		disarm()
		require.Equal(t, "TARGET_UNWRITABLE", f.Error.Reason)
		require.Equal(t, []string{"thesis.doc"}, names(t, out))
	}
}

// A folder that another failover took first is left to it.
func TestFolderTaken(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	out := filepath.Join(t.TempDir(), "drill")
	marker := filepath.Join(out, ".landfall-failover.json")
	defer failpoint.ArmFunc("failover-orchestrator/before-claim-target", func() error {
		return errors.Join(os.Mkdir(out, 0o750), os.WriteFile(marker, []byte(`{"v":1,"failover":"theirs","files":["os.vhd"]}`), 0o600))
	})()
	g.test(request(out, latest()))
	f := g.await(failed)
	require.Equal(t, "TARGET_NOT_EMPTY", f.Error.Reason)
	require.Equal(t, []string{".landfall-failover.json"}, names(t, out))
	_, err := g.client.CleanUpTestFailover(testkit.Context(t), &failoverv1.CleanUpTestFailoverRequest{Failover: f.Name})
	require.NoError(t, err)
	f = g.await(clean)
	require.Contains(t, g.job(f.CleanupJob).Steps[0].Detail, "theirs")
	require.FileExists(t, marker)
}
