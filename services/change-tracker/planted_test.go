package changetracker

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
)

// script drives a world step by step: the smallest history in which a bug shows.
type script struct {
	t *testing.T
	w *world
	k *Tracker
}

func newScript(t *testing.T, bug func(*Tracker)) *script {
	s := &script{t: t, w: newWorld(1, false, bug)}
	s.boot()
	_, err := s.k.Start("vm", simLineage, 1)
	require.NoError(t, err)
	s.pass(Full)
	s.point()
	return s
}

func (s *script) boot() {
	s.k = s.w.tracker()
	_, err := s.k.Attach(s.w.spec())
	require.NoError(s.t, err)
}

func (s *script) machine() *machine {
	m, err := s.k.machine("vm")
	require.NoError(s.t, err)
	return m
}

// crash ends the process; if power, every unsynced sector falls back.
func (s *script) crash(power bool) {
	s.machine().wg.Wait()
	s.w.fs.kill()
	_ = s.k.Close() // dead
	if power {
		for _, f := range s.w.fs.files {
			for sector, versions := range f.synced {
				copy(f.cur[sector*simSector:], versions[0])
			}
			clear(f.synced)
		}
	}
	s.w.fs.reboot(false)
	s.boot()
}

func (s *script) write(off int64, with byte) {
	d, err := s.k.disk("vm/os")
	require.NoError(s.t, err)
	require.NoError(s.t, d.WriteAt(bytes.Repeat([]byte{with}, 4096), off, false))
}

func (s *script) begin(scope Scope) uint64 {
	ordinal := s.w.next
	s.w.next++
	_, err := s.k.BeginPass("vm", simLineage, ordinal, 1, scope)
	require.NoError(s.t, err)
	return ordinal
}

func (s *script) ship(pass uint64) {
	for _, d := range s.w.disks {
		var got []Chunk
		require.NoError(s.t, s.k.ReadRanges(context.Background(), "vm", simLineage, pass, d, extent.Range{}, nil, collect(&got)))
		s.w.apply(d, got)
	}
}

func (s *script) pass(scope Scope) {
	n := s.begin(scope)
	s.ship(n)
	_, err := s.k.SettlePass("vm", simLineage, n, 1, Committed)
	require.NoError(s.t, err)
	s.w.state = n
}

func (s *script) cut() uint64 {
	n := s.w.next
	s.w.next++
	_, err := s.k.Cut("vm", simLineage, n, 1)
	require.NoError(s.t, err)
	return n
}

// point makes a whole cycle, with a pass before it if one is required, and returns the disk that differs, or "".
func (s *script) point() string {
	st, err := s.k.Status("vm")
	require.NoError(s.t, err)
	if st.PassRequired {
		s.pass(DirtyOnly)
	}
	n := s.cut()
	for _, d := range s.w.disks {
		var got []Chunk
		require.NoError(s.t, s.k.ReadChanges(context.Background(), "vm", simLineage, n, d, 0, collect(&got)))
		s.w.apply(d, got)
	}
	_, err = s.k.Settle("vm", simLineage, n, 1, Committed)
	require.NoError(s.t, err)
	s.w.state = n
	for _, d := range s.w.disks {
		if firstDifference(s.w.replica[d], s.w.cuts[0][d]) >= 0 {
			return d
		}
	}
	return ""
}

// withAndWithout runs a history as the program is, which must come out right, and with the bug, which must be caught.
func withAndWithout(t *testing.T, bug func(*Tracker), history func(s *script) string) {
	t.Run("without", func(t *testing.T) { require.Empty(t, history(newScript(t, none))) })
	t.Run("planted", func(t *testing.T) { require.Equal(t, "os", history(newScript(t, bug))) })
}

// Rule 1: a write committed but not flushed; power loss brings the old content back and nothing marks it.
func TestExtentCooledByASealIsCaught(t *testing.T) {
	withAndWithout(t, func(t *Tracker) { t.bugs.coolOnSeal = true }, func(s *script) string {
		s.write(4096, 1)
		require.Empty(s.t, s.point())
		s.crash(true)
		return s.point()
	})
}

// Rule 2: old log data replayed over a newer live copy.
func TestOldLogDataOverNewerCopyIsCaught(t *testing.T) {
	withAndWithout(t, func(t *Tracker) { t.bugs.keepChainAcrossGap = true }, func(s *script) string {
		s.write(4096, 1)
		n := s.cut()
		s.write(4096, 2)
		s.crash(false)
		_, err := s.k.Settle("vm", simLineage, n, 1, Abandoned)
		require.NoError(s.t, err)
		return s.point()
	})
}

// I-5: the marks of a pass go before its outcome is durable.
func TestPassClearedEarlyIsCaught(t *testing.T) {
	withAndWithout(t, func(t *Tracker) { t.bugs.clearPassEarly = true }, func(s *script) string {
		s.w.fs.full = true
		s.write(4096, 1)
		s.w.fs.full = false
		n := s.begin(DirtyOnly)
		for _, d := range s.machine().disks {
			require.NoError(s.t, d.cool()) // only the pass remembers now
		}
		s.w.fs.noReplace = true
		_, err := s.k.SettlePass("vm", simLineage, n, 1, Committed)
		require.ErrorIs(s.t, err, errDead)
		s.w.fs.noReplace = false
		s.crash(false)
		// The partials of the first attempt never arrived: the pass is shipped again.
		s.ship(n)
		_, err = s.k.SettlePass("vm", simLineage, n, 1, Committed)
		require.NoError(s.t, err)
		return s.point()
	})
}

// Nothing that the tracker cannot store fails a guest write, and what it gave up is caught up by a pass (I-10).
func TestGuestWritesSurviveLostStorage(t *testing.T) {
	t.Run("log", func(t *testing.T) {
		s := newScript(t, none)
		s.w.fs.full = true
		s.write(0, 1)
		_, err := s.k.Cut("vm", simLineage, s.w.next, 1)
		require.ErrorIs(t, err, ErrPassRequired)
		s.w.fs.full = false
		require.Empty(t, s.point())
	})
	t.Run("sidecar", func(t *testing.T) {
		s := newScript(t, none)
		s.w.fs.noMarks = true
		s.write(3<<20, 1)
		s.w.fs.noMarks = false
		st, err := s.k.Status("vm")
		require.NoError(t, err)
		require.Equal(t, TrackingBroken, st.Reason)
		s.crash(false)
		_, err = s.k.Cut("vm", simLineage, s.w.next, 1)
		require.ErrorIs(t, err, ErrResyncRequired)
		_, err = s.k.BeginPass("vm", simLineage, s.w.next, 1, DirtyOnly)
		require.ErrorIs(t, err, ErrResyncRequired)
		s.pass(Full)
		require.Empty(t, s.point())
	})
	t.Run("too many entries", func(t *testing.T) {
		s := newScript(t, none)
		s.k.maxEntries = 3
		for i := range 6 {
			s.write(int64(i)*8192, byte(i))
		}
		_, err := s.k.Cut("vm", simLineage, s.w.next, 1)
		require.ErrorIs(t, err, ErrPassRequired)
		require.Empty(t, s.point())
	})
	t.Run("half of the disk", func(t *testing.T) {
		s := newScript(t, none)
		s.k.limitLogs = true
		for i := range 900 {
			s.write(int64(i%100)*4096, byte(i))
		}
		_, err := s.k.Cut("vm", simLineage, s.w.next, 1)
		require.ErrorIs(t, err, ErrPassRequired)
		require.Empty(t, s.point())
	})
}

func TestAnswersAreIdempotentAndFirstSettleWins(t *testing.T) {
	s := newScript(t, none)
	s.write(0, 1)
	n := s.w.next
	first, err := s.k.Cut("vm", simLineage, n, 3)
	require.NoError(t, err)
	again, err := s.k.Cut("vm", simLineage, n, 3)
	require.NoError(t, err)
	require.Equal(t, first, again)
	_, err = s.k.Cut("vm", simLineage, n+1, 3)
	require.ErrorIs(t, err, ErrOpen)
	_, err = s.k.BeginPass("vm", simLineage, n+1, 3, DirtyOnly)
	require.ErrorIs(t, err, ErrOpen)
	_, err = s.k.Settle("vm", simLineage, n, 2, Committed)
	require.ErrorIs(t, err, ErrStaleEpoch)
	_, err = s.k.Settle("vm", "ffffffffffffffffffffffffffffffff", n, 3, Committed)
	require.ErrorIs(t, err, ErrLineage)
	s.crash(false)
	again, err = s.k.Cut("vm", simLineage, n, 3)
	require.NoError(t, err)
	require.Equal(t, first, again)
	_, err = s.k.Settle("vm", simLineage, n, 2, Abandoned)
	require.ErrorIs(t, err, ErrStaleEpoch, "the epoch survives a crash")
	for range 2 {
		st, err := s.k.Settle("vm", simLineage, n, 3, Committed)
		require.NoError(t, err)
		require.Equal(t, n, st.Base)
	}
	_, err = s.k.Settle("vm", simLineage, n, 3, Abandoned)
	require.ErrorIs(t, err, ErrSettled)
	_, err = s.k.Cut("vm", simLineage, n, 3)
	require.ErrorIs(t, err, ErrSettled)
	err = s.k.ReadChanges(context.Background(), "vm", simLineage, n, "os", 0, func(Chunk) error { return nil })
	require.ErrorIs(t, err, ErrSettled)
	_, err = s.k.Settle("vm", simLineage, n+5, 3, Committed)
	require.ErrorIs(t, err, ErrNotCut)
	_, err = s.k.Cut("vm", simLineage, n+5, 3)
	require.ErrorIs(t, err, ErrSettled, "a settle before the cut forbids it")
}

// An abandoned point's logs belong to the next one; nothing is read again.
func TestAbandonedLogsBelongToTheNextPoint(t *testing.T) {
	s := newScript(t, none)
	s.write(0, 1)
	n := s.cut()
	s.write(512, 2)
	_, err := s.k.Settle("vm", simLineage, n, 1, Abandoned)
	require.NoError(t, err)
	st, err := s.k.Status("vm")
	require.NoError(t, err)
	require.False(t, st.PassRequired)
	require.Empty(t, s.point())
}

func TestCleanRestartGoesOnAndOfflineEditIsSeen(t *testing.T) {
	s := newScript(t, none)
	s.write(0, 1)
	n := s.cut()
	s.write(4096, 2)
	require.NoError(t, s.k.Close())
	s.boot()
	st, err := s.k.Status("vm")
	require.NoError(t, err)
	require.False(t, st.PassRequired, "nothing is read again after a clean end")
	_, err = s.k.Settle("vm", simLineage, n, 1, Abandoned)
	require.NoError(t, err)
	s.write(8192, 3)
	require.NoError(t, s.k.Close())
	s.boot()
	require.Empty(t, s.point())

	require.NoError(t, s.k.Close())
	s.w.fs.files[s.w.path("os")].put([]byte{9}, 77)
	s.boot()
	st, err = s.k.Status("vm")
	require.NoError(t, err)
	require.Equal(t, ChangedOffline, st.Reason)
	_, err = s.k.Cut("vm", simLineage, s.w.next, 1)
	require.ErrorIs(t, err, ErrResyncRequired)
	n = s.begin(Compare)
	for _, d := range s.w.disks {
		var got []Chunk
		all := []extent.Range{{Len: simSize}}
		require.NoError(t, s.k.ReadRanges(context.Background(), "vm", simLineage, n, d, extent.Range{}, all, collect(&got)))
		s.w.apply(d, got)
	}
	_, err = s.k.SettlePass("vm", simLineage, n, 1, Committed)
	require.NoError(t, err)
	require.Empty(t, s.point())
}

// A call that waited while the machine was closed must not change what the record calls clean.
func TestCallsAfterTheEndChangeNothing(t *testing.T) {
	s := newScript(t, none)
	s.write(0, 1)
	m := s.machine()
	require.NoError(t, s.k.Close())
	_, err := m.cut(simLineage, s.w.next, 1)
	require.ErrorIs(t, err, ErrUnavailable)
	_, err = m.beginPass(simLineage, s.w.next, 1, DirtyOnly)
	require.ErrorIs(t, err, ErrUnavailable)
	require.ErrorIs(t, m.settle(simLineage, s.w.next, 1, Abandoned), ErrUnavailable)
	s.boot()
	require.Empty(t, s.point())
}
