package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/tools/nbdclient"
	"github.com/landfall-dr/landfall/tools/workload"
)

// What somebody with too many rights does to a lineage: containers and leases taken away, segments damaged or deleted, and a
// replica disk written to.
func TestStorageDamage(t *testing.T) {
	t.Parallel()
	a := newAccount(t)
	a.up()
	a.applyNow("quick", "1s", "")
	a.applyNow("lazy", "1s", "")
	a.protect("quick")
	ctx, store, text := testkit.Context(t), a.owner(), ""
	disk := replica.DiskBlobName("os", 1)

	// A container is gone. Replication stops until a person has it back; nothing is made anew.
	journal := a.container("j")
	before := a.points()
	restore := a.srv.TakeContainer(journal)
	a.write()
	text += "# the journal's container was deleted\n" + a.says("STORAGE_CONTAINER_MISSING") + a.fails("STORAGE_CONTAINER_MISSING", "points", "web-01")
	require.False(t, a.srv.HasContainer(journal), "it was made again")
	text += a.fails("STORAGE_CONTAINER_MISSING", "failover", "test", "web-01", "--out", filepath.Join(a.root, "out"), "--wait")
	restore()
	a.ok("resume", "web-01")
	a.whole(before)

	replicas := a.container("r")
	before = a.points()
	restore = a.srv.TakeContainer(replicas)
	a.write()
	text += "# the replica's container was deleted\n" + a.says("STORAGE_CONTAINER_MISSING")
	require.False(t, a.srv.HasContainer(replicas), "it was made again")
	restore()
	if a.full("web-01").State != "PROTECTION_STATE_PROTECTED" {
		a.ok("resume", "web-01")
	}
	a.whole(before)

	// Somebody breaks the lease of the applier at its work, and takes it.
	var stolen atomic.Bool
	heal := a.intercept(func(r *http.Request) azurefake.Fault {
		if in(r, "r") && strings.Contains(r.URL.RawQuery, "comp=page") && r.Method == http.MethodPut && stolen.CompareAndSwap(false, true) {
			c := store.Container(replicas)
			if err := c.BreakLease(ctx, disk); err != nil {
				return azurefake.Fault{}
			}
			_ = c.AcquireLease(ctx, disk, blobstore.LeaseID(uuid.NewString()), 15*time.Second)
		}
		return azurefake.Fault{}
	})
	before = a.points()
	a.write()
	testkit.Eventually(t, patience, stolen.Load, "the lease is stolen")
	heal()
	a.whole(before)
	a.awaitPoint("web-01", a.status("web-01").LastPoint)

	// A flipped bit and a missing segment, met by a test failover and by the applier: both stop before anything of it is used.
	for _, how := range []string{"a bit of a segment flipped", "a segment was deleted"} {
		denied := a.intercept(func(r *http.Request) azurefake.Fault { // no applier meanwhile
			if in(r, "r") && r.Method == http.MethodPut && strings.Contains(r.URL.RawQuery, "comp=lease") {
				return azurefake.Fault{Status: 403, Code: "AuthorizationPermissionMismatch"}
			}
			return azurefake.Fault{}
		})
		before = a.points()
		good := a.status("web-01").Processed
		a.write()
		last := a.status("web-01").LastPoint
		testkit.Eventually(t, patience, func() bool { return a.status("web-01").LastPoint >= last+2 }, "it is received")
		name := a.segments(store)[0]
		c := store.Container(journal)
		data := read(ctx, t, c, name)
		flip := func() {
			require.True(t, a.srv.Tamper(journal, name, int64(len(data)/3), func(b byte) byte { return b ^ 4 }))
		}
		repair := flip
		if strings.Contains(how, "deleted") {
			require.NoError(t, c.Delete(ctx, name, blobstore.Conditions{}))
			repair = func() {
				_, err := c.Put(ctx, name, bytes.NewReader(data), int64(len(data)), blobstore.Conditions{})
				require.NoError(t, err)
			}
		} else {
			flip()
		}
		denied()
		text += "# " + how + "\n" + a.says("SEGMENT_CORRUPT")
		text += a.fails("SEGMENT_CORRUPT", "failover", "test", "web-01", "--out", filepath.Join(a.root, "out"), "--wait")
		if f := a.run("failover", "cleanup", "web-01", "--wait"); f.code != 0 {
			t.Log("nothing to clean up: ", f.err)
		}
		require.LessOrEqual(t, a.status("web-01").Processed, a.status("web-01").LastPoint)
		out := filepath.Join(a.root, "older")
		a.ok("failover", "test", "web-01", "--point", fmt.Sprint(good), "--out", out, "--wait")
		a.ok("failover", "cleanup", "web-01", "--wait")
		repair()
		a.whole(before)
	}

	// Somebody else writes to the replica disk while nobody applies.
	before = a.points()
	a.awaitPoint("web-01", a.status("web-01").LastPoint)
	testkit.Eventually(t, patience, func() bool {
		_, err := store.Container(replicas).WritePages(ctx, disk, 8*mib, bytes.Repeat([]byte{0xee}, 4096), blobstore.Conditions{})
		return err == nil
	}, "no applier holds the lease")
	a.write()
	text += "# somebody wrote to the replica disk\n" + a.says("REPLICA_TAMPERED")
	last := a.status("web-01").LastPoint
	testkit.Eventually(t, patience, func() bool { return a.status("web-01").LastPoint >= last+2 }, "points go on to be received")
	a.same("web-01", "os", filepath.Join(a.images, "web-01", "os.raw"))
	require.Subset(t, a.points(), before)
	lineage := a.status("web-01").Lineage
	a.ok("unprotect", "web-01", "--wait")
	a.protect("quick")
	require.NotEqual(t, lineage, a.status("web-01").Lineage)
	require.True(t, a.srv.HasContainer("lfj-"+lineage), "the old points are kept")
	a.whole(nil)
	a.awaitPoint("web-01", a.status("web-01").LastPoint)
	require.NotContains(t, text, "INTERNAL")
	golden(t, "storage-damage.golden", text)
}

// While answers get lost at random a guest writes on. Every point that is received is the machine as it was between two of its
// writes, byte for byte.
func TestStorageLosesAnswers(t *testing.T) {
	t.Parallel()
	a := newAccount(t)
	a.store.Azure.RetryFor = 20 * time.Second
	a.up()
	a.applyNow("quick", "1s", "")
	a.protect("quick")
	initial := make([]byte, 16*mib)
	testkit.Fill(initial[:4*mib], 16*mib)
	guest, record := workload.Guest{Seed: 7, Disks: []workload.Disk{{ID: "os", Size: 16 * mib}}}, &workload.Record{}
	uri := a.export("web-01", "os")
	ctx, cancel := context.WithCancel(testkit.Context(t))
	written := make(chan error, 1)
	go func() {
		written <- guest.Run(ctx, record, func(ctx context.Context, _ int) (workload.Target, error) { return nbdclient.Dial(ctx, uri) },
			workload.Options{Pause: 3 * time.Millisecond, FlushEvery: 40})
	}()
	var n, lost atomic.Int64
	heal := a.intercept(func(*http.Request) azurefake.Fault {
		i := uint64(n.Add(1)) * 0x9e3779b97f4a7c15 >> 32
		switch {
		case i%8 == 0:
			lost.Add(1)
			return azurefake.Fault{ResetAfter: true}
		case i%29 == 0:
			return azurefake.Fault{ResetBefore: true}
		}
		return azurefake.Fault{}
	})
	first := a.status("web-01").LastPoint
	testkit.Eventually(t, patience, func() bool { return a.status("web-01").LastPoint >= first+5 }, "points are received all the same")
	heal()
	cancel()
	require.NoError(t, <-written)
	require.Greater(t, lost.Load(), int64(10))

	read, chain := testkit.Context(t), (*replica.Replica)(nil)
	chain, err := replica.Open(read, a.owner(), replica.Lineage(a.status("web-01").Lineage))
	require.NoError(t, err)
	points, err := chain.Points(read)
	require.NoError(t, err)
	acked, _ := record.Acked()
	var newest uint64
	for _, p := range points {
		require.NoError(t, a.pointIs(read, chain, p.Seq, func(got []byte) error {
			at, err := guest.Verify(read, []io.ReaderAt{bytes.NewReader(got)}, func(_ int, b []byte, off int64) { copy(b, initial[off:]) }, newest, acked+1)
			if err == nil && at < newest {
				return errors.New("it is older than the point before it")
			}
			newest = at
			return err
		}), "point %d", p.Ordinal)
	}
	require.Positive(t, newest)
	a.awaitPoint("web-01", a.status("web-01").LastPoint)
	a.whole(nil)
}
