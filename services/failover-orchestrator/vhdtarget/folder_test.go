package vhdtarget_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

func folder(t *testing.T, dir, failover string) *vhdtarget.Folder {
	t.Helper()
	f, err := vhdtarget.New(dir, failover)
	require.NoError(t, err)
	return f
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// A whole life: an absent folder is claimed, filled and removed again without a trace.
func TestMakeAndRemove(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "drill")
	f := folder(t, dir, "f1")
	existed, err := f.Check()
	require.NoError(t, err)
	require.False(t, existed)
	require.NoError(t, f.Claim(existed, []string{"os.vhd", vhdtarget.MachineFile}))
	require.NoError(t, f.Claim(existed, nil), "a second claim by the same failover changes nothing")

	const size = 3 << 20
	want := bytes.Repeat([]byte("landfall"), 512)
	for attempt := range 2 { // the second begins anew, as after a kill
		sink := f.Sink()
		d, err := sink.Disk(ctx, replica.DiskState{ID: "os", Gen: 1, Size: size})
		require.NoError(t, err)
		require.NoError(t, d.WriteAt(ctx, want, 1<<20))
		if attempt == 0 {
			require.NoError(t, sink.Close())
			require.NotContains(t, list(t, dir), "os.vhd", "an unfinished disk has no final name")
			continue
		}
		require.NoError(t, d.Finish(ctx))
		require.NoError(t, sink.Close())
	}
	require.NoError(t, f.WriteMachine([]byte("{}")))
	require.ElementsMatch(t, []string{vhdtarget.MarkerFile, "os.vhd", "vm.json"}, list(t, dir))

	image, err := vdisk.Open(filepath.Join(dir, "os.vhd"), vdisk.FormatVHD, true)
	require.NoError(t, err)
	got := make([]byte, size)
	_, err = image.ReadAt(got, 0)
	require.NoError(t, err)
	require.NoError(t, image.Close())
	expect := make([]byte, size)
	copy(expect[1<<20:], want)
	require.True(t, bytes.Equal(expect, got))
	if qemu, err := exec.LookPath("qemu-img"); err == nil {
		out, err := exec.Command(qemu, "info", "-f", "vpc", filepath.Join(dir, "os.vhd")).CombinedOutput()
		require.NoError(t, err, string(out))
		require.Contains(t, string(out), "3 MiB (3145728 bytes)")
	}

	kept, err := f.Remove()
	require.NoError(t, err)
	require.Empty(t, kept)
	require.NoDirExists(t, dir)
	kept, err = f.Remove()
	require.NoError(t, err, "removing twice is harmless")
	require.Empty(t, kept)
}

// Whatever we did not make stays, and so does a folder that was there before.
func TestRemoveLeavesWhatIsNotOurs(t *testing.T) {
	dir := t.TempDir()
	f := folder(t, dir, "f1")
	existed, err := f.Check()
	require.NoError(t, err)
	require.True(t, existed)
	require.NoError(t, f.Claim(existed, []string{"os.vhd"}))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "os.vhd"), nil, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("mine"), 0o600))
	kept, err := f.Remove()
	require.NoError(t, err)
	require.Equal(t, []string{"notes.txt"}, kept)
	require.Equal(t, []string{"notes.txt"}, list(t, dir))
}

func TestRefusals(t *testing.T) {
	occupied := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(occupied, "data"), nil, 0o600))
	_, err := folder(t, occupied, "f1").Check()
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY), "%v", err)
	require.Error(t, folder(t, occupied, "f1").Claim(true, nil))
	require.Equal(t, []string{"data"}, list(t, occupied), "nothing half-done is left")

	other := t.TempDir()
	require.NoError(t, folder(t, other, "f1").Claim(true, nil))
	_, err = folder(t, other, "f2").Check()
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY), "%v", err)
	_, err = folder(t, other, "f2").Remove()
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_NOT_EMPTY), "another failover's folder is left alone: %v", err)
	require.Contains(t, list(t, other), vhdtarget.MarkerFile)

	_, err = folder(t, filepath.Join(t.TempDir(), "a", "b"), "f1").Check()
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE), "%v", err)
	_, err = vhdtarget.New("relative", "f1")
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), "%v", err)
}

// A marker that a hostile or broken program wrote cannot make us remove files elsewhere.
func TestMarkerCannotEscape(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, vhdtarget.MarkerFile), []byte(`{"v":1,"failover":"f1","files":["../../etc/passwd"]}`), 0o600))
	_, err := folder(t, dir, "f1").Remove()
	require.Error(t, err)
}

// Of several failovers that claim one folder at once exactly one gets it, and the others leave nothing in it.
func TestRacingClaims(t *testing.T) {
	for range 30 {
		dir := filepath.Join(t.TempDir(), "drill")
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			wg.Go(func() { errs[i] = folder(t, dir, fmt.Sprint("f", i)).Claim(false, []string{"os.vhd"}) })
		}
		wg.Wait()
		owner, err := folder(t, dir, "f0").Owner()
		require.NoError(t, err)
		for i, err := range errs {
			if id := fmt.Sprint("f", i); id == owner {
				require.NoError(t, err)
			} else {
				require.Error(t, err, id)
			}
		}
		if owner != "" { // all may have seen each other and given way
			require.Equal(t, []string{vhdtarget.MarkerFile}, list(t, dir))
			_, err = folder(t, dir, owner).Remove()
			require.NoError(t, err)
		}
		require.NoDirExists(t, dir)
	}
}

// What a killed process left, at any moment, is ours to remove; an orchestrator that lost its lease without noticing
// cannot give an unfinished disk its final name.
func TestLeftovers(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "drill")
	f := folder(t, dir, "f1")
	require.NoError(t, f.Claim(false, []string{"os.vhd", vhdtarget.MachineFile}))
	stale, fresh := f.Sink(), f.Sink()
	old, err := stale.Disk(ctx, replica.DiskState{ID: "os", Gen: 1, Size: 1 << 20})
	require.NoError(t, err)
	_, err = fresh.Disk(ctx, replica.DiskState{ID: "os", Gen: 1, Size: 1 << 20})
	require.NoError(t, err)
	require.Error(t, old.Finish(ctx))
	require.NotContains(t, list(t, dir), "os.vhd")
	require.NoError(t, stale.Close())
	require.NoError(t, fresh.Close())
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err = fresh.Disk(ended, replica.DiskState{ID: "os", Gen: 1, Size: 1 << 20})
	require.ErrorIs(t, err, context.Canceled)

	for _, name := range []string{".landfall-probe-1", vhdtarget.MarkerFile + ".f1", ".vm.json.partial"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	kept, err := f.Remove()
	require.NoError(t, err)
	require.Empty(t, kept)
	require.NoDirExists(t, dir)

	// A probe alone does not make a folder occupied; without a marker nothing is written.
	empty := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(empty, ".landfall-probe-1"), nil, 0o600))
	_, err = folder(t, empty, "f1").Check()
	require.NoError(t, err)
	require.True(t, errcat.Is(folder(t, empty, "f1").Require(), typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE))
}
