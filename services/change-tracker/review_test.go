package changetracker

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/services/change-tracker/internal/sidecar"
)

// Rule 2: a disk degraded while a point was open, so the point's logs have a gap behind them. A clean restart must not
// join them to the log that begins after it.
func TestGapBehindAnOpenPointSurvivesACleanRestart(t *testing.T) {
	s := newScript(t, none)
	s.write(4096, 1)
	n := s.cut()
	s.machine().disks[0].degrade("test")
	s.write(4096, 2) // only a Dirty mark
	require.NoError(t, s.k.Close())
	s.boot()
	_, err := s.k.Settle("vm", simLineage, n, 1, Abandoned)
	require.NoError(t, err)
	require.Empty(t, s.point())
}

// A host that lost its record begins tracking of the same lineage again, over a chain that holds data: what is zero on
// the disk now must be said.
func TestFullPassAfterLostRecordSendsZeros(t *testing.T) {
	s := newScript(t, none)
	d, err := s.k.disk("vm/os")
	require.NoError(t, err)
	require.NoError(t, d.Zero(extent.Range{Off: 1 << 20, Len: 1 << 20}, false, false))
	require.NoError(t, s.k.Close())
	delete(s.w.fs.whole, "/vm/state/tracking.json")
	s.boot()
	_, err = s.k.Start("vm", simLineage, 1)
	require.NoError(t, err)
	s.pass(Full)
	require.Empty(t, s.point())
}

// Rule 1: a disk degrades between the switch of a cut and its record, while the cooling of the point before is still
// under way. The extents of the logs in between must stay hot until the record is there.
func TestSlowCoolingDoesNotCoolACutThatIsNotRecorded(t *testing.T) {
	s := newScript(t, none)
	s.write(4096, 1)
	m := s.machine()
	os := m.disks[0]
	seal := make(chan struct{})
	goOn := make(chan struct{})
	s.w.fs.onReplace = func(path string) {
		if path == m.pointPath(s.w.next) {
			close(seal)
			<-goOn
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.k.Cut("vm", simLineage, s.w.next, 1)
		done <- err
	}()
	<-seal
	os.degrade("log is full") // by a guest write
	require.NoError(t, os.cool())
	require.True(t, os.table.Load().Bits(sidecar.Hot|sidecar.Dirty).Has(0), "neither hot nor dirty, and its log in no record")
	s.w.fs.kill()
	close(goOn)
	require.Error(t, <-done)
	s.w.fs.onReplace = nil
	_ = s.k.Close() // dead
	s.w.fs.reboot(false)
	s.boot()
	require.Empty(t, s.point())
}

// The kernel reports a failed flush once, and the next one succeeds although the data is gone. Such a flush must neither
// be believed for tracking nor told to the guest as success.
func TestFailedFlushIsNotForgotten(t *testing.T) {
	s := newScript(t, none)
	s.write(4096, 1)
	d, err := s.k.disk("vm/os")
	require.NoError(t, err)
	d.img = &failingSync{image: d.img, failures: 1}
	require.Error(t, d.Flush())
	require.Error(t, d.Flush(), "the write is not on stable storage and never will be")
}

type failingSync struct {
	image
	failures int
}

func (f *failingSync) Sync() error {
	if f.failures > 0 {
		f.failures--
		return errors.New("input/output error")
	}
	return f.image.Sync()
}

// A sidecar that failed in the background is not replaced by an empty one while its marks are all that is known.
func TestFailedSidecarIsNotReplacedUnderItsMarks(t *testing.T) {
	s := newScript(t, none)
	s.write(4096, 1)
	d := s.machine().disks[0]
	d.degrade("test") // the write is a Dirty mark now
	s.w.fs.noMarks = true
	require.Error(t, d.cool())
	s.w.fs.noMarks = false
	_, err := s.k.BeginPass("vm", simLineage, s.w.next, 1, DirtyOnly)
	require.ErrorIs(t, err, ErrResyncRequired)
	s.w.next++
	s.pass(Full)
	require.Empty(t, s.point())
}

// A failure that a guest write met is not forgotten by a shutdown, also while the reason for a resync stands and a pass
// is open.
func TestFailureDuringAPassSurvivesACleanEnd(t *testing.T) {
	s := newScript(t, none)
	n := s.begin(Compare)
	s.machine().fail(errors.New("a log could not be read"))
	require.NoError(t, s.k.Close())
	s.boot()
	_, err := s.k.SettlePass("vm", simLineage, n, 1, Committed)
	require.ErrorIs(t, err, ErrSettled)
	st, err := s.k.Status("vm")
	require.NoError(t, err)
	require.Equal(t, TrackingBroken, st.Reason)
}

// The scheduler plans windows by the sizes that BeginPass answers: a disk that degrades while the pass begins must not be
// answered as having nothing.
func TestPassSizesHoldWhatThePassHolds(t *testing.T) {
	s := newScript(t, none)
	m := s.machine()
	s.write(4096, 1)
	m.disks[0].degrade("test")
	data, err := s.k.disk("vm/data")
	require.NoError(t, err)
	s.w.fs.onLog = func() {
		s.w.fs.onLog = nil
		require.NoError(t, data.WriteAt(make([]byte, 4096), 0, false))
		data.degrade("log is full")
	}
	p, err := s.k.BeginPass("vm", simLineage, s.w.next, 1, DirtyOnly)
	require.NoError(t, err)
	for i, d := range m.disks {
		require.Equal(t, d.table.Load().Bytes(sidecar.Pass), p.Disks[i].Bytes, d.id)
		require.NotZero(t, p.Disks[i].Bytes, d.id)
	}
}
