package dir

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func box(t *testing.T) (*Store, *container, ref, *handle) {
	c := openClocked(t, Options{})
	ctx := t.Context()
	require.NoError(t, c.CreateContainer(ctx, "box"))
	k := c.Store.Container("box").(*container)
	_, err := k.CreatePages(ctx, "disk", 8192, nil, blobstore.Conditions{})
	require.NoError(t, err)
	r, err := k.begin(ctx, "disk")
	require.NoError(t, err)
	h, err := k.openPages(ctx, r)
	require.NoError(t, err)
	t.Cleanup(h.put)
	return c.Store, k, r, h
}

func mustWrite(t *testing.T, k *container, cond blobstore.Conditions) blobstore.Properties {
	t.Helper()
	p, err := k.WritePages(t.Context(), "disk", 0, bytes.Repeat([]byte{1}, 512), cond)
	require.NoError(t, err)
	return p
}

func snap(t *testing.T, k *container, etag blobstore.ETag) error {
	t.Helper()
	_, _, err := k.SnapshotPages(t.Context(), "disk", nil, blobstore.Conditions{IfMatch: etag})
	return err
}

// A writer dies between its two counts: the ETag read meanwhile never matches, the next one does.
func TestDeadWriter(t *testing.T) {
	_, k, _, h := box(t)
	mustWrite(t, k, blobstore.Conditions{})
	require.NoError(t, h.count.add(wordStarted))
	seen, err := k.Stat(t.Context(), "disk", "")
	require.NoError(t, err)
	require.ErrorIs(t, snap(t, k, seen.ETag), blobstore.ErrConditionFailed)
	now, err := k.Stat(t.Context(), "disk", "")
	require.NoError(t, err)
	require.NotEqual(t, seen.ETag, now.ETag)
	require.NoError(t, snap(t, k, now.ETag))
}

// After a power loss the counters may have gone back; ETags of the time before must not come back with them.
func TestPowerLoss(t *testing.T) {
	s, k, _, h := box(t)
	at, err := k.SetSequence(t.Context(), "disk", 1, blobstore.Conditions{})
	require.NoError(t, err)
	first := mustWrite(t, k, blobstore.Conditions{})
	second := mustWrite(t, k, blobstore.Conditions{})
	// What was durable: the state file as the first write left it, before its count.
	require.NoError(t, h.count.set(wordStarted, 0))
	require.NoError(t, h.count.set(wordFinished, 0))
	s.boot = [16]byte{42}
	require.ErrorIs(t, snap(t, k, at.ETag), blobstore.ErrConditionFailed, "a page write may have landed since")
	for range 4 {
		p := mustWrite(t, k, blobstore.Conditions{})
		require.NotContains(t, []blobstore.ETag{at.ETag, first.ETag, second.ETag}, p.ETag)
	}
	p, err := k.SetSequence(t.Context(), "disk", 2, blobstore.Conditions{})
	require.NoError(t, err)
	require.NoError(t, snap(t, k, p.ETag))
}

// The slot that was being written is torn: the one before it counts.
func TestTornSlot(t *testing.T) {
	_, k, _, h := box(t)
	ctx := t.Context()
	_, err := k.SetSequence(ctx, "disk", 1, blobstore.Conditions{})
	require.NoError(t, err)
	_, err = k.SetSequence(ctx, "disk", 2, blobstore.Conditions{})
	require.NoError(t, err)
	st, err := h.count.readState()
	require.NoError(t, err)
	_, err = h.state.WriteAt([]byte("torn"), int64(st.version%2)*slotBytes+100)
	require.NoError(t, err)
	p, err := k.Stat(ctx, "disk", "")
	require.NoError(t, err)
	require.EqualValues(t, 1, p.Sequence)
	p, err = k.SetSequence(ctx, "disk", 3, blobstore.Conditions{})
	require.NoError(t, err)
	require.EqualValues(t, 3, p.Sequence)
	_, err = h.state.WriteAt(make([]byte, 2*slotBytes), 0)
	require.NoError(t, err)
	_, err = k.Stat(ctx, "disk", "")
	require.ErrorIs(t, err, errDamaged)
}

// A process died in Delete, after the mark and before the rename: the blob is gone for everyone.
func TestDeadDelete(t *testing.T) {
	for _, finish := range []string{"create", "put", "delete"} {
		t.Run(finish, func(t *testing.T) {
			_, k, _, h := box(t)
			ctx := t.Context()
			require.NoError(t, h.count.set(wordDeleted, 1))
			_, err := k.Stat(ctx, "disk", "")
			require.ErrorIs(t, err, blobstore.ErrNotFound)
			for range k.List(ctx, "", "") {
				t.Fatal("listed")
			}
			_, err = k.WritePages(ctx, "disk", 0, make([]byte, 512), blobstore.Conditions{})
			require.ErrorIs(t, err, blobstore.ErrNotFound)
			switch finish {
			case "create":
				_, err = k.CreatePages(ctx, "disk", 512, nil, blobstore.Conditions{CreateOnly: true})
				require.NoError(t, err)
			case "put":
				_, err = k.Put(ctx, "disk", strings.NewReader("x"), 1, blobstore.Conditions{CreateOnly: true})
				require.NoError(t, err)
			case "delete":
				require.ErrorIs(t, k.Delete(ctx, "disk", blobstore.Conditions{}), blobstore.ErrNotFound)
			}
		})
	}
}

// Temporary files of dead sessions go at Open; a live session's stay, however old.
func TestSweep(t *testing.T) {
	root := t.TempDir()
	live, err := Open(root, Options{})
	require.NoError(t, err)
	defer live.Close()
	long := time.Now().Add(-1000 * time.Hour)
	mine := live.tempPath()
	require.NoError(t, os.WriteFile(mine, []byte("x"), 0o600))
	require.NoError(t, os.Chtimes(live.session, long, long))
	dead := filepath.Join(root, tmpDir, "00000000deadbeef")
	require.NoError(t, os.MkdirAll(filepath.Join(dead, "3", "snap"), 0o700))
	next, err := Open(root, Options{})
	require.NoError(t, err)
	require.NoError(t, next.Close())
	require.NoDirExists(t, dead)
	require.FileExists(t, mine)
}

// While a snapshot is copied a lease can be renewed, and page writes wait, as long as their context lasts.
func TestSnapshotLeavesLeasesAlone(t *testing.T) {
	s, k, _, _ := box(t)
	ctx := t.Context()
	id := blobstore.LeaseID("6f2b7b0e-8f0a-4d3c-9d53-0d1f6c2f7a10")
	require.NoError(t, k.AcquireLease(ctx, "disk", id, time.Minute))
	g, err := s.lockExclusive(ctx, "box", "disk")
	require.NoError(t, err)
	require.NoError(t, g.drop(lockState)) // what SnapshotPages holds during its copy
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_, err = k.WritePages(short, "disk", 0, make([]byte, 512), blobstore.Conditions{Lease: id})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = k.SetSequence(short, "disk", 1, blobstore.Conditions{Lease: id})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, k.RenewLease(ctx, "disk", id))
	_, err = k.Stat(ctx, "disk", "")
	require.NoError(t, err)
	g.release()
	_, err = k.WritePages(ctx, "disk", 0, make([]byte, 512), blobstore.Conditions{Lease: id})
	require.NoError(t, err)
}

// Two processes whose clocks agree to the tick overwrite one blob: its ETags and times still move on.
func TestStampsOfTwoStores(t *testing.T) {
	c := openClocked(t, Options{})
	other, err := Open(c.root, Options{Clock: c.opts.Clock})
	require.NoError(t, err)
	defer other.Close()
	ctx := t.Context()
	require.NoError(t, c.CreateContainer(ctx, "box"))
	var last blobstore.Properties
	seen := map[blobstore.ETag]bool{}
	for i := range 10 {
		s := []*Store{c.Store, other}[i%2]
		p, err := s.Container("box").Put(ctx, "x", strings.NewReader("x"), 1, blobstore.Conditions{})
		require.NoError(t, err)
		require.False(t, seen[p.ETag])
		require.True(t, p.LastModified.After(last.LastModified))
		seen[p.ETag], last = true, p
	}
}

func TestOpenRefuses(t *testing.T) {
	full := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(full, "letter.txt"), nil, 0o600))
	_, err := Open(full, Options{})
	require.ErrorIs(t, err, blobstore.ErrInvalid)
	require.NoDirExists(t, filepath.Join(full, tmpDir), "nothing is left behind")

	newer := t.TempDir()
	raw, err := json.Marshal(format{formatName, formatVersion + 1})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(newer, formatFile), raw, 0o600))
	_, err = Open(newer, Options{})
	require.ErrorIs(t, err, blobstore.ErrInvalid)

	s, err := Open(t.TempDir(), Options{})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.CreateContainer(t.Context(), "box"), ErrClosed)
	_, err = s.Container("box").Stat(t.Context(), "x", "")
	require.ErrorIs(t, err, ErrClosed)
}

func TestFullDisk(t *testing.T) {
	require.ErrorIs(t, storageErr(&os.PathError{Op: "write", Err: fullErrno}), blobstore.ErrFull)
	require.NotErrorIs(t, storageErr(errors.New("other")), blobstore.ErrFull)
	root := smallDisk(t)
	s, err := Open(root, Options{})
	require.NoError(t, err)
	defer s.Close()
	ctx := t.Context()
	require.NoError(t, s.CreateContainer(ctx, "box"))
	c := s.Container("box")
	_, err = c.CreatePages(ctx, "disk", 64<<20, nil, blobstore.Conditions{})
	require.NoError(t, err)
	_, err = c.Put(ctx, "big", bytes.NewReader(make([]byte, 8<<20)), 8<<20, blobstore.Conditions{})
	require.ErrorIs(t, err, blobstore.ErrFull)
	_, err = c.Stat(ctx, "big", "")
	require.ErrorIs(t, err, blobstore.ErrNotFound)
	var full error
	for at := int64(0); at < 64<<20 && full == nil; at += 1 << 20 {
		_, full = c.WritePages(ctx, "disk", at, bytes.Repeat([]byte{1}, 1<<20), blobstore.Conditions{})
	}
	require.ErrorIs(t, full, blobstore.ErrFull)
	_, _, err = c.SnapshotPages(ctx, "disk", nil, blobstore.Conditions{})
	require.ErrorIs(t, err, blobstore.ErrFull)
	_, err = c.ClearPages(ctx, "disk", 0, 64<<20, blobstore.Conditions{})
	require.NoError(t, err, "clearing frees space, so it must work on a full disk")
	_, err = c.SetSequence(ctx, "disk", 1, blobstore.Conditions{})
	require.NoError(t, err)
	_, err = c.Put(ctx, "small", strings.NewReader("fits again"), 10, blobstore.Conditions{})
	require.NoError(t, err)
}

func TestEncodeName(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[A-Za-z0-9._-]{0,20}[A-Za-z0-9_-](/[A-Za-z0-9._-]{0,20}[A-Za-z0-9_-]){0,3}`).Draw(t, "name")
		require.NoError(t, blobstore.CheckBlobName(name))
		enc, err := encodeName(name)
		require.NoError(t, err)
		require.Equal(t, strings.ToLower(enc), enc)
		var segs []string
		for s := range strings.SplitSeq(enc, string(filepath.Separator)) {
			dec, ok := decodeSegment(s)
			require.True(t, ok)
			segs = append(segs, dec)
		}
		require.Equal(t, name, strings.Join(segs, "/"))
	})
	_, err := encodeName(strings.Repeat("A", 200))
	require.ErrorIs(t, err, blobstore.ErrInvalid)
}

func FuzzDecodeSlot(f *testing.F) {
	f.Add(pageState{version: 3, gen: 2, sequence: 1 << 40, dirty: true, lease: "x"}.encode())
	f.Add(make([]byte, slotBytes))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != slotBytes {
			return
		}
		if p, ok := decodeSlot(b); ok {
			q, ok := decodeSlot(p.encode())
			require.True(t, ok)
			require.Equal(t, p, q)
		}
	})
}

var fullErrno = syscall.ENOSPC
