package targettest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/replica"
)

// wholeLife: an absent folder is claimed, filled, booted and removed again without a trace. Every step is repeated.
func (s *suite) wholeLife(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	existed, err := made.Check(ctx, p)
	require.NoError(t, err)
	require.False(t, existed)
	require.NoDirExists(t, p.Dir)
	owner, err := made.Owner(p)
	require.NoError(t, err)
	require.Empty(t, owner)
	files, err := made.Claim(ctx, p, existed)
	require.NoError(t, err)
	again, err := made.Claim(ctx, p, true)
	require.NoError(t, err)
	require.Equal(t, files, again, "a repeat answers the same and does not make the folder somebody else's")
	require.Equal(t, []string{marker}, list(t, p.Dir))
	owner, err = made.Owner(p)
	require.NoError(t, err)
	require.Equal(t, p.Failover, owner)

	for which := stepDisks; which < steps; which++ {
		require.NoError(t, step(ctx, made, p, existed, which))
		if which != stepBoot {
			require.NoError(t, step(ctx, made, p, existed, which))
		}
		owned, err := made.Check(ctx, p)
		require.NoError(t, err)
		require.True(t, owned)
	}
	require.Subset(t, append(files, marker), list(t, p.Dir), "the marker names everything")
	requireCopy(t, made, p)
	running, err := made.Running(ctx, p)
	require.NoError(t, err)
	require.Equal(t, made.Boots(), running)

	detail, err := made.Remove(ctx, p, existed)
	require.NoError(t, err)
	require.NotEmpty(t, detail)
	s.requireGone(t, p)
	_, err = made.Remove(ctx, p, existed)
	require.NoError(t, err, "removing twice is harmless")
	require.NoError(t, made.Shutdown(ctx, p), "and so is ending what is gone")
	running, err = made.Running(ctx, p)
	require.NoError(t, err)
	require.False(t, running)
}

// leavesOthers: whatever we did not make stays, and so does a folder that was there before.
func (s *suite) leavesOthers(t *testing.T) {
	dir := t.TempDir()
	made, p, ctx := s.target(t), s.planFor(t, dir, "f1"), bounded(t)
	existed, err := made.Check(ctx, p)
	require.NoError(t, err)
	require.True(t, existed)
	for which := range stepBoot {
		require.NoError(t, step(ctx, made, p, existed, which))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("mine"), 0o600))
	detail, err := made.Remove(ctx, p, existed)
	require.NoError(t, err)
	require.Contains(t, detail, "notes.txt")
	require.Equal(t, []string{"notes.txt"}, list(t, dir))

	empty := t.TempDir()
	p = s.planFor(t, empty, "f1")
	_, err = made.Claim(ctx, p, true)
	require.NoError(t, err)
	_, err = made.Remove(ctx, p, true)
	require.NoError(t, err)
	require.DirExists(t, empty)
	require.Empty(t, list(t, empty))
}

func (s *suite) refusesFolders(t *testing.T) {
	made, ctx := s.target(t), bounded(t)
	occupied := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(occupied, "data"), nil, 0o600))
	p := s.planFor(t, occupied, "f1")
	_, err := made.Check(ctx, p)
	requireReason(t, "TARGET_NOT_EMPTY", err)
	_, err = made.Claim(ctx, p, true)
	requireReason(t, "TARGET_NOT_EMPTY", err)
	require.Equal(t, []string{"data"}, list(t, occupied), "nothing half-done is left")

	bad := []string{
		filepath.Join(t.TempDir(), "a", "b"),     // no parent
		filepath.Join(occupied, "data", "drill"), // a parent that is a file
	}
	if runtime.GOOS == "linux" {
		bad = append(bad, "/proc/landfall-drill") // a parent that takes no files, whoever asks
	}
	for _, dir := range bad {
		p := s.planFor(t, dir, "f1")
		_, err = made.Check(ctx, p)
		requireReason(t, "TARGET_UNWRITABLE", err)
		_, err = made.Claim(ctx, p, false)
		requireReason(t, "TARGET_UNWRITABLE", err)
		require.NoDirExists(t, dir)
	}
	p.Dir = "relative"
	_, err = made.Check(ctx, p)
	requireReason(t, "INVALID_ARGUMENT", err)

	ended, cancel := context.WithCancel(ctx)
	cancel()
	p = s.plan(t)
	_, err = made.Claim(ended, p, false)
	require.Error(t, err)
	require.NoDirExists(t, p.Dir)
}

// foreignMarker: another failover's folder is never touched.
func (s *suite) foreignMarker(t *testing.T) {
	made, theirs, ctx := s.target(t), s.plan(t), bounded(t)
	s.make(t, theirs, steps)
	before := list(t, theirs.Dir)
	ours := s.planFor(t, theirs.Dir, "f2")
	_, err := made.Check(ctx, ours)
	requireReason(t, "TARGET_NOT_EMPTY", err)
	for which := range steps {
		if which == stepBoot && !made.Boots() {
			continue
		}
		require.Error(t, step(ctx, made, ours, true, which))
	}
	require.NoError(t, made.Shutdown(ctx, ours))
	detail, err := made.Remove(ctx, ours, false)
	require.NoError(t, err)
	require.Contains(t, detail, theirs.Failover)
	require.Equal(t, before, list(t, theirs.Dir))
	requireCopy(t, made, theirs)
	running, err := made.Running(ctx, theirs)
	require.NoError(t, err)
	require.Equal(t, made.Boots(), running)
}

// lostMarker: without the marker nothing is made any more, and nothing is removed.
func (s *suite) lostMarker(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	s.make(t, p, stepBoot)
	require.NoError(t, os.Remove(filepath.Join(p.Dir, marker)))
	before := list(t, p.Dir)
	for which := stepDisks; which < steps; which++ {
		if which == stepBoot && !made.Boots() {
			continue
		}
		requireReason(t, "TARGET_UNWRITABLE", step(ctx, made, p, false, which))
	}
	detail, err := made.Remove(ctx, p, false)
	require.NoError(t, err)
	require.Contains(t, detail, "no marker")
	require.Equal(t, before, list(t, p.Dir))
	require.NoError(t, os.RemoveAll(p.Dir))
	for which := stepDisks; which < steps; which++ {
		if which == stepBoot && !made.Boots() {
			continue
		}
		require.Error(t, step(ctx, made, p, false, which), "nor in a folder that is gone")
	}
	require.NoDirExists(t, p.Dir)
}

// markerCannotEscape: a marker that a hostile or broken program wrote cannot make us remove files elsewhere.
func (s *suite) markerCannotEscape(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	outside := filepath.Join(filepath.Dir(p.Dir), "outside")
	require.NoError(t, os.WriteFile(outside, nil, 0o600))
	require.NoError(t, os.Mkdir(p.Dir, 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(p.Dir, marker), []byte(`{"v":1,"failover":"f1","files":["../outside"]}`), 0o600))
	_, err := made.Remove(ctx, p, false)
	require.Error(t, err)
	require.FileExists(t, outside)
	require.NoError(t, os.WriteFile(filepath.Join(p.Dir, marker), []byte(`{"v":9,"failover":"f1","files":[]}`), 0o600))
	_, err = made.Remove(ctx, p, false)
	require.Error(t, err, "a marker of another version is left alone")
	require.FileExists(t, filepath.Join(p.Dir, marker))
}

// racingClaims: of several failovers that claim one folder at once exactly one gets it, the others leave nothing in it.
func (s *suite) racingClaims(t *testing.T) {
	made, ctx := s.target(t), bounded(t)
	for range 20 {
		dir := filepath.Join(t.TempDir(), "drill")
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			p := s.planFor(t, dir, fmt.Sprint("f", i))
			wg.Go(func() { _, errs[i] = made.Claim(ctx, p, false) })
		}
		wg.Wait()
		owner, err := made.Owner(s.planFor(t, dir, "f0"))
		require.NoError(t, err)
		for i, err := range errs {
			if fmt.Sprint("f", i) == owner {
				require.NoError(t, err)
			} else {
				require.Error(t, err, i)
			}
		}
		if owner != "" { // all may have seen each other and given way
			require.Equal(t, []string{marker}, list(t, dir))
			_, err = made.Remove(ctx, s.planFor(t, dir, owner), false)
			require.NoError(t, err)
		}
		require.NoDirExists(t, dir)
	}
}

// staleAttempts: an orchestrator that lost its lease without noticing cannot give an unfinished disk its final name, nor
// change a finished one.
func (s *suite) staleAttempts(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	s.make(t, p, stepDisks)
	d := replica.DiskState{ID: osDisk, Gen: 1, Size: osSize}
	stale, err := made.Sink(ctx, p)
	require.NoError(t, err)
	defer stale.Close()
	old, err := stale.Disk(ctx, d)
	require.NoError(t, err)
	require.NotContains(t, list(t, p.Dir), made.DiskFile(osDisk), "an unfinished disk has no final name")
	require.NoError(t, disks(ctx, made, p))
	require.NoError(t, made.Describe(ctx, p, []byte(described)))
	_ = old.WriteAt(ctx, []byte("stale"), 0)
	require.Error(t, old.Finish(ctx))
	requireCopy(t, made, p)

	ended, cancel := context.WithCancel(ctx)
	fresh, err := made.Sink(ctx, p)
	require.NoError(t, err)
	defer fresh.Close()
	k, err := fresh.Disk(ended, d)
	require.NoError(t, err)
	cancel()
	require.Error(t, k.Finish(ended))
	_, err = fresh.Disk(ended, d)
	require.ErrorIs(t, err, context.Canceled)
	requireCopy(t, made, p)
	_, err = made.Remove(ctx, p, false)
	require.NoError(t, err)
	s.requireGone(t, p)
}

// leftovers: a killed check's probe does not make a folder occupied; unfinished files are ours to remove.
func (s *suite) leftovers(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	require.NoError(t, os.Mkdir(p.Dir, 0o750))
	require.NoError(t, os.WriteFile(filepath.Join(p.Dir, ".landfall-probe-1"), nil, 0o600))
	existed, err := made.Check(ctx, p)
	require.NoError(t, err)
	require.True(t, existed)
	_, err = made.Claim(ctx, p, false)
	require.NoError(t, err)
	for _, name := range []string{marker + ".f1", ".vm.json.partial", "." + made.DiskFile(osDisk) + ".partial-X"} {
		require.NoError(t, os.WriteFile(filepath.Join(p.Dir, name), nil, 0o600))
	}
	_, err = made.Remove(ctx, p, false)
	require.NoError(t, err)
	s.requireGone(t, p)
}

// halfRemoved: a process may die between the marker's removal and the folder's.
func (s *suite) halfRemoved(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	require.NoError(t, os.Mkdir(p.Dir, 0o750))
	_, err := made.Remove(ctx, p, true)
	require.NoError(t, err)
	require.DirExists(t, p.Dir, "it was there before, or that is not known")
	_, err = made.Remove(ctx, p, false)
	require.NoError(t, err)
	s.requireGone(t, p)
}
