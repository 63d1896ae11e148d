package uploader_test

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/services/uploader"
)

// A bit flips in the shipper's memory after the run was received: the task reads it again and the point is right. When it
// flips every time the task fails, and nothing is committed.
func TestDamageInTheShipperIsReadAgain(t *testing.T) {
	s := newSite(t, memory(t))
	var flips atomic.Int32
	service, err := uploader.New(config(), uploader.Deps{
		Bus: s.Connect("uploader"), Store: s.Store, Hosts: s.Hosts("uploader"), Logger: testkit.Logger(t),
	})
	require.NoError(t, err)
	service.DamageRuns(func(r shipping.Run) {
		if r.Data != nil && flips.Load() > 0 && flips.Add(-1) >= 0 {
			r.Data[len(r.Data)/2] ^= 2
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
	replicate(t, s)
	s.Host.Write("os", 0, random(1<<20, 5))
	flips.Store(1)
	ship(t, s, 3, point)
	requireNoFailure(t, s)
	s.RequirePoint(3)
	require.LessOrEqual(t, flips.Load(), int32(0))

	s.Host.Write("os", 0, random(1<<20, 6))
	flips.Store(1 << 20)
	task := s.PointTask(4, s.Host.Cut(4), 1, point)
	s.Publish(bus.KindShip, task)
	e := hosttest.Await(s, "ship.failed", failed, anyFailure)
	require.Equal(t, "HOST_UNREACHABLE", e.GetError().GetReason(), e.GetError().GetWhat())
	require.Contains(t, e.GetError().GetWhat(), "checksum")
	awaitIdle(t, s, bus.KindShip)
	require.Equal(t, "point 3", chain(t, s)[len(chain(t, s))-1])
	flips.Store(0)
	s.Publish(bus.KindShip, task)
	awaitPoint(s, 4)
	s.RequirePoint(4)
}

// A segment that is missing, or has a flipped bit, is named with what to do about it; nothing of the point reaches the disks.
// When the object is back, the next task applies it.
func TestDamagedSegmentIsNamed(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"missing":     nil,
		"flipped bit": func(b []byte) []byte { b[len(b)/2] ^= 8; return b },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, memory(t))
			run(t, s, config())
			replicate(t, s)
			apply := func(seq uint64) {
				s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage, Sequence: seq, Urgent: true})
			}
			st, err := s.Replica().Refresh(testkit.Context(t))
			require.NoError(t, err)
			apply(uint64(st.Head))
			hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 2 })

			s.Host.Write("os", 0, random(100<<10, 5))
			e := ship(t, s, 3, point)
			m, err := s.Replica().Find(testkit.Context(t), 3)
			require.NoError(t, err)
			victim := m.Disks[0].Segments[0].Name
			journal := s.Store.Container(replica.Lineage(hosttest.Lineage).JournalContainer())
			rc, _, err := journal.Get(t.Context(), victim, 0, -1)
			require.NoError(t, err)
			good, err := io.ReadAll(rc)
			require.NoError(t, err)
			require.NoError(t, rc.Close())
			put := func(b []byte) {
				_, err := journal.Put(t.Context(), victim, bytes.NewReader(b), int64(len(b)), blobstore.Conditions{})
				require.NoError(t, err)
			}
			require.NoError(t, journal.Delete(t.Context(), victim, blobstore.Conditions{}))
			if damage != nil {
				put(damage(bytes.Clone(good)))
			}
			apply(e.GetSequence())
			f := hosttest.Await(s, "ship.failed", failed, anyFailure)
			require.Equal(t, "SEGMENT_CORRUPT", f.GetError().GetReason(), f.GetError().GetWhat())
			require.Contains(t, f.GetError().GetWhat(), journal.Name()+"/"+victim)
			require.Contains(t, f.GetError().GetAction(), "Restore the object")
			awaitIdle(t, s, bus.KindApply)
			s.RequireReplicaDisks(2)

			put(good)
			apply(e.GetSequence())
			hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 3 })
			s.RequireReplicaDisks(3)
		})
	}
}
