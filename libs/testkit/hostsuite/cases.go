package hostsuite

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (h *harness) first() string  { return h.Disks()[0].Id }
func (h *harness) second() string { return h.Disks()[1].Id }

// copyAndDeltas: S1 over a copy with writes under it, and over deltas (rule 12).
func copyAndDeltas(t *testing.T, h *harness) {
	h.write(h.first(), 0, 1, mib)
	h.write(h.second(), 5*mib, 2, 3*mib)
	h.protect()
	pass := h.next()
	_, err := h.beginPass(pass, full)
	require.NoError(t, err)
	h.write(h.first(), 8*mib, 3, 2*mib) // may or may not be seen by the pass
	for i, d := range h.Disks() {
		for off := int64(0); off < d.SizeBytes; off += window {
			h.shipWindow(pass, full, d, off)
			h.write(d.Id, off, uint64(10+i), 12<<10) // behind the copy: only the cut can bring it
		}
	}
	h.zero(h.second(), 6*mib, mib)
	_, err = h.settlePass(pass, committed)
	require.NoError(t, err)
	h.point()
	for i := range 3 {
		h.write(h.first(), int64(i)*mib+4096, uint64(20+i), 5120)
		h.write(h.second(), 9*mib+int64(i)*512, uint64(30+i), 512)
		h.zero(h.first(), int64(i)*2*mib, 128<<10)
		require.Less(t, h.point(), int64(4*mib), "a delta is what changed, not the disk")
	}
	require.LessOrEqual(t, h.point(), int64(0), "nothing changed, nothing is in the point")
}

// frozenAtTheCut: a point is one instant.
func frozenAtTheCut(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	h.write(h.first(), 0, 1, mib)
	p, want := h.cutNow()
	h.write(h.first(), 512<<10, 2, mib)
	h.zero(h.first(), 0, 64<<10)
	h.write(h.second(), 0, 3, mib)
	h.changes(p.Ordinal, h.replica)
	requireEqual(t, want, h.replica, "point")
	_, err := h.settle(p.Ordinal, committed)
	require.NoError(t, err)
	h.point()
}

// abandoned: S5.
func abandoned(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	base := h.status().Base
	h.write(h.first(), mib, 1, mib)
	p, _ := h.cutNow()
	require.Equal(t, base, p.Base)
	h.write(h.second(), mib, 2, mib)
	st, err := h.settle(p.Ordinal, givenUp)
	require.NoError(t, err)
	require.Equal(t, base, st.Base, "an abandoned point is no base")
	h.write(h.first(), mib+4096, 3, 4096)
	h.point()
}

// repeats: rule 4.
func repeats(t *testing.T, h *harness) {
	h.protect()
	h.protect()
	pass := h.next()
	first, err := h.beginPass(pass, full)
	require.NoError(t, err)
	h.write(h.first(), 0, 1, mib)
	again, err := h.beginPass(pass, full)
	require.NoError(t, err)
	require.Equal(t, first.Ordinal, again.Ordinal)
	require.Equal(t, first.Scope, again.Scope)
	h.ship(pass, full)
	for range 2 {
		_, err = h.settlePass(pass, committed)
		require.NoError(t, err)
	}
	p, want := h.cutNow()
	h.write(h.first(), 0, 2, mib) // a repeated cut is not a later one
	q, err := h.cut(p.Ordinal)
	require.NoError(t, err)
	require.Equal(t, p.Base, q.Base)
	require.Equal(t, p.CutTime.AsTime(), q.CutTime.AsTime())
	h.changes(p.Ordinal, h.replica)
	requireEqual(t, want, h.replica, "point")
	h.changes(p.Ordinal, h.replica) // read twice, by two workers
	for range 2 {
		_, err = h.settle(p.Ordinal, committed)
		require.NoError(t, err)
	}
	h.point()
}

// firstSettle: rule 4.
func firstSettle(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	p, _ := h.cutNow()
	_, err := h.settle(p.Ordinal, givenUp)
	require.NoError(t, err)
	_, err = h.settle(p.Ordinal, committed)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)
	_, err = h.cut(p.Ordinal)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)

	never := h.next()
	_, err = h.settle(never, givenUp)
	require.NoError(t, err)
	h.Restart()
	_, err = h.cut(never)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED)
	unknown := h.next()
	_, err = h.settle(unknown, committed)
	require.Error(t, err, "what was never cut cannot be the base")
	h.write(h.first(), 0, 1, mib)
	h.point()
}

// epochs: rule 4.
func epochs(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	h.epoch = 5
	h.point()
	h.Restart()
	require.EqualValues(t, 5, h.status().Epoch)
	h.epoch = 4
	_, err := h.cut(h.next())
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)
	_, err = h.beginPass(h.next(), compare)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)
	_, err = h.settle(h.ordinal, givenUp)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH)
	h.epoch = 5
	h.point()
}

// lineages: a host serves one protection.
func lineages(t *testing.T, h *harness) {
	h.protect()
	_, err := h.Host().CreateReplicationRelationship(h.call(), &hostproviderv1.CreateReplicationRelationshipRequest{Vm: h.VM(), Lineage: otherLineage, Epoch: 9})
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH)
	_, err = h.Host().CutPoint(h.call(), &hostproviderv1.CutPointRequest{
		Vm: h.VM(), Lineage: otherLineage, Point: 1, Epoch: 9, Consistency: typesv1.Consistency_CONSISTENCY_CRASH,
	})
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH)
	h.copyAll()
}

// oneAtATime: the seam knows one open thing.
func oneAtATime(t *testing.T, h *harness) {
	h.protect()
	pass := h.next()
	_, err := h.beginPass(pass, full)
	require.NoError(t, err)
	_, err = h.cut(h.next())
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_POINT_OPEN, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED)
	h.ship(pass, full)
	_, err = h.settlePass(pass, committed)
	require.NoError(t, err)
	h.ordinal++
	p, _ := h.cutNow()
	_, err = h.cut(p.Ordinal + 1)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_POINT_OPEN)
	_, err = h.beginPass(p.Ordinal+2, compare)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_POINT_OPEN)
	h.ordinal = p.Ordinal + 2
	_, err = h.settle(p.Ordinal, givenUp)
	require.NoError(t, err)
	_, rerr := h.Tracker().ReadChanges(h.call(), &changetrackerv1.ReadChangesRequest{Vm: h.VM(), Lineage: lineage, Point: p.Ordinal, Disk: h.first()})
	require.NoError(t, rerr) // the stream says it
	h.point()
}

// copyFirst: a point needs a base.
func copyFirst(t *testing.T, h *harness) {
	h.protect()
	_, err := h.cut(h.next())
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
	pass := h.next()
	_, err = h.beginPass(pass, full)
	require.NoError(t, err)
	_, err = h.settlePass(pass, givenUp)
	require.NoError(t, err)
	_, err = h.cut(h.next())
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
	h.copyAll()
}

// comparing: rules 13 and 14, the host's part.
func comparing(t *testing.T, h *harness) {
	h.write(h.first(), 3*mib, 1, 2*mib)
	h.protect()
	h.copyAll()
	h.write(h.second(), mib, 2, mib)
	h.replica[h.first()][0] = 1 // the replica went wrong
	pass := h.next()
	_, err := h.beginPass(pass, compare)
	require.NoError(t, err)
	for _, d := range h.Disks() {
		h.requireHashes(d)
		var differ []*typesv1.ByteRange
		for off := int64(0); off < d.SizeBytes; off += chunk {
			n := min(chunk, d.SizeBytes-off)
			if string(h.guest[d.Id][off:off+n]) != string(h.replica[d.Id][off:off+n]) {
				differ = append(differ, &typesv1.ByteRange{Offset: off, Length: n})
			}
		}
		require.NotEmpty(t, differ)
		stream, err := h.Tracker().ReadRanges(h.call(), &changetrackerv1.ReadRangesRequest{Vm: h.VM(), Lineage: lineage, Disk: d.Id, Pass: pass, Ranges: differ})
		covered, _ := drain(t, stream, err, h.replica[d.Id], [2]int64{0, d.SizeBytes}, 0)
		require.EqualValues(t, len(differ)*chunk, covered)
	}
	h.write(h.second(), 9*mib, 3, 4096) // after the look: in the cut
	_, err = h.settlePass(pass, committed)
	require.NoError(t, err)
	h.point()
}

// resumed: resume_offset reads what the first reading had not reached.
func resumed(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	h.write(h.first(), 0, 1, 5*mib)
	h.write(h.first(), 9*mib, 2, 2*mib)
	p, want := h.cutNow()
	into := h.replica[h.first()]
	size := h.Disks()[0].SizeBytes
	stream, err := h.Tracker().ReadChanges(h.call(), &changetrackerv1.ReadChangesRequest{Vm: h.VM(), Lineage: lineage, Point: p.Ordinal, Disk: h.first()})
	_, end := drain(t, stream, err, into, [2]int64{0, size}, 2)
	require.Less(t, end, size)
	stream, err = h.Tracker().ReadChanges(h.call(), &changetrackerv1.ReadChangesRequest{Vm: h.VM(), Lineage: lineage, Point: p.Ordinal, Disk: h.first(), ResumeOffset: end})
	drain(t, stream, err, into, [2]int64{end, size}, 0)
	requireEqual(t, map[string]image{h.first(): want[h.first()]}, h.replica, "resumed")
}

// restarts: rule 4, I-n of the driver's design: every step is durable when it is answered.
func restarts(t *testing.T, h *harness) {
	h.write(h.first(), 0, 1, mib)
	h.protect()
	h.Restart()
	pass := h.next()
	_, err := h.beginPass(pass, full)
	require.NoError(t, err)
	h.write(h.second(), 0, 2, mib)
	h.Restart()
	h.write(h.first(), 2*mib, 3, mib)
	_, err = h.beginPass(pass, full)
	require.NoError(t, err)
	h.ship(pass, full)
	h.write(h.first(), 0, 4, 4096)
	h.Restart()
	_, err = h.settlePass(pass, committed)
	require.NoError(t, err)
	h.Restart()
	h.write(h.second(), 4*mib, 5, 64<<10)
	h.point()

	h.write(h.first(), 7*mib, 6, mib)
	p, want := h.cutNow()
	h.write(h.first(), 7*mib, 7, mib)
	h.Restart()
	h.changes(p.Ordinal, h.replica)
	requireEqual(t, want, h.replica, "a point that outlived a restart")
	_, err = h.settle(p.Ordinal, committed)
	require.NoError(t, err)
	h.Restart()
	h.point()

	h.write(h.second(), 3*mib, 8, mib)
	p, _ = h.cutNow()
	h.Restart()
	_, err = h.settle(p.Ordinal, givenUp)
	require.NoError(t, err)
	h.Restart()
	h.write(h.second(), 5*mib, 9, 4096)
	h.point()
}

// oneInstant: a writer puts intent n on one disk and then commit n on the other, without pause, while points are cut.
func oneInstant(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	const slots = 64
	at := func(n uint64) int64 { return int64(n%slots) * 4096 }
	var stop atomic.Bool
	var wg sync.WaitGroup
	var failed error
	wg.Go(func() {
		p := make([]byte, 4096)
		for n := uint64(1); !stop.Load(); n++ {
			testkit.Fill(p, n)
			copy(p, fmt.Sprintf("%016d", n))
			for _, disk := range []string{h.first(), h.second()} {
				if err := h.Write(disk, at(n), p); err != nil {
					failed = err
					return
				}
			}
		}
	})
	newest := func(disk string) (n uint64) {
		for s := range uint64(slots) {
			var v uint64
			_, _ = fmt.Sscanf(string(h.replica[disk][at(s):at(s)+16]), "%d", &v)
			n = max(n, v)
		}
		return n
	}
	var last uint64
	for range 8 {
		p, err := h.cut(h.next())
		if !assertNoError(t, err, &stop, &wg) {
			return
		}
		h.changes(p.Ordinal, h.replica)
		intent, commit := newest(h.first()), newest(h.second())
		require.LessOrEqual(t, commit, intent, "commit without its intent")
		require.LessOrEqual(t, intent, commit+1, "an older instant of the second disk")
		require.GreaterOrEqual(t, commit, last)
		last = commit
		_, err = h.settle(p.Ordinal, committed)
		require.NoError(t, err)
	}
	stop.Store(true)
	wg.Wait()
	require.NoError(t, failed, "the guest could not write")
	require.Positive(t, last, "the writer was not seen at all")
}

func assertNoError(t *testing.T, err error, stop *atomic.Bool, wg *sync.WaitGroup) bool {
	t.Helper()
	if err == nil {
		return true
	}
	stop.Store(true)
	wg.Wait()
	require.NoError(t, err)
	return false
}

// fenced: planned failover (design section 8), the host's part.
func fenced(t *testing.T, h *harness) {
	const mine, others = "failovers/0198b0a5-0000-7000-8000-000000000001", "failovers/0198b0a5-0000-7000-8000-000000000002"
	h.protect()
	h.copyAll()
	h.write(h.first(), 0, 1, mib)
	stop := func(failover string) (typesv1.PowerState, error) {
		r, err := h.Host().StopMachine(h.call(), &hostproviderv1.StopMachineRequest{Vm: h.VM(), Lineage: lineage, Epoch: h.epoch, Failover: failover})
		return r.GetPowerState(), err
	}
	testkit.Eventually(t, patience, func() error {
		state, err := stop(mine)
		if err == nil && state != typesv1.PowerState_POWER_STATE_OFF {
			err = fmt.Errorf("machine is %s", state)
		}
		return err
	})
	require.Error(t, h.Write(h.first(), 0, make([]byte, 4096)), "a fenced machine cannot write")
	_, err := stop(others)
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED)
	h.point() // the last one
	h.Restart()
	require.Error(t, h.Write(h.first(), 0, make([]byte, 4096)), "the fence outlives a restart")
	start := func(failover string) error {
		_, err := h.Host().StartMachine(h.call(), &hostproviderv1.StartMachineRequest{Vm: h.VM(), Lineage: lineage, Epoch: h.epoch, Failover: failover})
		return err
	}
	h.requireReason(start(others), typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED)
	for range 2 {
		_, err = h.Host().ReleaseMachine(h.call(), &hostproviderv1.ReleaseMachineRequest{Vm: h.VM(), Lineage: lineage, Epoch: h.epoch, Failover: mine})
		require.NoError(t, err)
	}
	require.NoError(t, start(mine))
	require.NoError(t, start(mine))
}

// forgetful: nothing is guessed.
func forgetful(t *testing.T, h *harness) {
	rig, ok := h.Rig.(Losing)
	if !ok {
		t.Skip("this hypervisor keeps its changes itself")
	}
	h.protect()
	h.copyAll()
	h.write(h.first(), 0, 1, mib)
	rig.KillHypervisor()
	h.write(h.second(), 0, 2, mib) // nobody records it
	testkit.Eventually(t, patience, func() error {
		r, err := h.Host().ListPoints(h.call(), &hostproviderv1.ListPointsRequest{Vm: h.VM()})
		if err == nil && r.Status.ResyncReason != rig.Lost() {
			err = fmt.Errorf("resync reason is %s", r.Status.ResyncReason)
		}
		return err
	})
	require.NotEmpty(t, h.status().ResyncDetail)
	_, err := h.cut(h.next())
	h.requireReason(err, typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED)
	pass := h.next()
	_, err = h.beginPass(pass, compare)
	require.NoError(t, err)
	for _, d := range h.Disks() {
		h.requireHashes(d)
		copy(h.replica[d.Id], h.guest[d.Id]) // what an engine would send
	}
	st, err := h.settlePass(pass, committed)
	require.NoError(t, err)
	require.Equal(t, typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED, st.ResyncReason)
	h.write(h.first(), 4*mib, 3, mib)
	h.point()
}

// ended: nothing is left, and another protection may begin.
func ended(t *testing.T, h *harness) {
	h.protect()
	h.copyAll()
	h.write(h.first(), 0, 1, mib)
	_, _ = h.cutNow() // in the middle of something
	for range 2 {
		_, err := h.Host().RemoveReplicationRelationship(h.call(), &hostproviderv1.RemoveReplicationRelationshipRequest{Vm: h.VM(), Lineage: lineage, Epoch: h.epoch})
		require.NoError(t, err)
	}
	h.write(h.first(), mib, 2, mib)
	r, err := h.Host().CreateReplicationRelationship(h.call(), &hostproviderv1.CreateReplicationRelationshipRequest{Vm: h.VM(), Lineage: otherLineage, Epoch: 1})
	require.NoError(t, err)
	require.Zero(t, r.Status.Base)
	require.Equal(t, otherLineage, r.Status.Lineage)
}

// anyOrder: S1 and S5 over seeded sequences.
func anyOrder(t *testing.T, h *harness) {
	rng := testkit.Rand(t)
	steps := 60
	if testing.Short() {
		steps = 20
	}
	h.protect()
	h.copyAll()
	for range steps {
		d := h.Disks()[rng.IntN(len(h.Disks()))]
		off := rng.Int64N(d.SizeBytes/4096-512) * 4096
		switch rng.IntN(10) {
		case 0, 1, 2, 3:
			h.write(d.Id, off, rng.Uint64(), (1+rng.Int64N(64))*4096)
		case 4:
			h.zero(d.Id, off, (1+rng.Int64N(256))*4096)
		case 5, 6:
			h.point()
		case 7:
			p, _ := h.cutNow()
			h.write(d.Id, off, rng.Uint64(), 8192)
			if rng.IntN(2) == 0 {
				h.changes(p.Ordinal, map[string]image{h.first(): make(image, len(h.guest[h.first()])), h.second(): make(image, len(h.guest[h.second()]))})
			}
			_, err := h.settle(p.Ordinal, givenUp)
			require.NoError(t, err)
		case 8:
			h.Restart()
		case 9:
			p, want := h.cutNow()
			h.Restart()
			h.write(d.Id, off, rng.Uint64(), 8192)
			h.changes(p.Ordinal, h.replica)
			requireEqual(t, want, h.replica, "point over a restart")
			_, err := h.settle(p.Ordinal, committed)
			require.NoError(t, err)
		}
	}
	h.point()
}
