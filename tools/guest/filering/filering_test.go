package filering_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/tools/guest/filering"
)

var ring = filering.Ring{Seed: 42, Disk: 1}

const steps = 2*filering.Files + 10

func filled(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for m := uint64(1); m <= steps; m++ {
		require.NoError(t, ring.Apply(dir, m))
	}
	return dir
}

func verify(t *testing.T, dir string, done uint64, inFlight bool) (int, []string) {
	t.Helper()
	n, bad, err := ring.Verify(dir, done, inFlight)
	require.NoError(t, err)
	return n, bad
}

// find returns the newest operation up to steps, other than the last, that deletes or does not.
func find(t *testing.T, deletes bool) filering.Op {
	t.Helper()
	for m := uint64(steps - 1); m > steps-filering.Files+1; m-- {
		if op := ring.Op(m); op.Delete == deletes {
			return op
		}
	}
	t.Fatal("no such operation")
	return filering.Op{}
}

func TestHistory(t *testing.T) {
	dir := filled(t)
	n, bad := verify(t, dir, steps, false)
	require.Empty(t, bad)
	require.Positive(t, n)
	require.Less(t, n, filering.Files, "some are deleted")

	// Doing the last one again changes nothing; the next one is allowed only while it is in flight.
	require.NoError(t, ring.Apply(dir, steps))
	_, bad = verify(t, dir, steps, false)
	require.Empty(t, bad)
	_, bad = verify(t, dir, steps, true)
	require.Empty(t, bad, "it may not have happened yet")
	require.NoError(t, ring.Apply(dir, steps+1))
	_, bad = verify(t, dir, steps, true)
	require.Empty(t, bad)
	_, bad = verify(t, dir, steps, false)
	require.NotEmpty(t, bad)

	_, bad, err := filering.Ring{Seed: 43, Disk: 1}.Verify(dir, steps+1, false)
	require.NoError(t, err)
	require.NotEmpty(t, bad, "another ledger's files")
}

func TestDamageIsFound(t *testing.T) {
	written := func(t *testing.T, dir string) string {
		return filepath.Join(dir, filering.Name(find(t, false).Slot))
	}
	for name, c := range map[string]struct {
		damage func(t *testing.T, dir string)
		want   string
	}{
		"a flipped bit": {func(t *testing.T, dir string) {
			change(t, written(t, dir), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
		}, "SHA-256 differs"},
		"cut off": {func(t *testing.T, dir string) {
			change(t, written(t, dir), func(b []byte) []byte { return b[:len(b)-1] })
		}, "header says"},
		"empty": {func(t *testing.T, dir string) {
			change(t, written(t, dir), func([]byte) []byte { return nil })
		}, "shorter than a header"},
		"zeros": {func(t *testing.T, dir string) {
			change(t, written(t, dir), func(b []byte) []byte { clear(b); return b })
		}, "no header"},
		"lost": {func(t *testing.T, dir string) {
			require.NoError(t, os.Remove(written(t, dir)))
		}, "is missing"},
		"stale": {func(t *testing.T, dir string) {
			op := find(t, false)
			_, err := filering.Write(filepath.Join(dir, filering.Name(op.Slot)), op.M-filering.Files, 1, 10)
			require.NoError(t, err)
		}, "after 106 operations it must be of"},
		"resurrected": {func(t *testing.T, dir string) {
			op := find(t, true)
			_, err := filering.Write(filepath.Join(dir, filering.Name(op.Slot)), op.M-filering.Files, 1, 10)
			require.NoError(t, err)
		}, "is of operation"},
		"unknown": {func(t *testing.T, dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "stray"), nil, 0o600))
		}, "unknown file stray"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filled(t)
			c.damage(t, dir)
			_, bad := verify(t, dir, steps, false)
			require.Len(t, bad, 1)
			require.Contains(t, bad[0], c.want)
		})
	}
}

func TestHalfWrittenFilesDoNotCount(t *testing.T) {
	dir := filled(t)
	tmp := filepath.Join(dir, ".tmp-"+filering.Name(3))
	require.NoError(t, os.WriteFile(tmp, []byte("half"), 0o600))
	_, bad := verify(t, dir, steps, false)
	require.Empty(t, bad)
	require.NoError(t, filering.RemoveTemporary(dir))
	require.NoFileExists(t, tmp)
}

func TestLooseFiles(t *testing.T) {
	dir := t.TempDir()
	_, err := filering.Write(filepath.Join(dir, "load-1"), 7, 7, 3<<20+5)
	require.NoError(t, err)
	n, bad, err := filering.VerifyLoose(dir)
	require.NoError(t, err)
	require.Empty(t, bad)
	require.Equal(t, 1, n)
	change(t, filepath.Join(dir, "load-1"), func(b []byte) []byte { b[2<<20] ^= 8; return b })
	_, bad, err = filering.VerifyLoose(dir)
	require.NoError(t, err)
	require.Len(t, bad, 1)
	require.True(t, strings.HasPrefix(bad[0], "load-1: damaged file"))
	n, bad, err = filering.VerifyLoose(filepath.Join(dir, "none"))
	require.NoError(t, err)
	require.Empty(t, bad)
	require.Zero(t, n)
}

func change(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, f(b), 0o600))
}
