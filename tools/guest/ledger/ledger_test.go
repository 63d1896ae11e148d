package ledger_test

import (
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/tools/guest/ledger"
)

// memory is a disk.
type memory []byte

func (m memory) WriteAt(b []byte, off int64) (int, error) { return copy(m[off:], b), nil }

func (m memory) ReadAt(b []byte, off int64) (int, error) {
	n := copy(b, m[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

var id = ledger.ID{1, 2, 3}

func formatted(t *testing.T, side ledger.Side, upTo uint64) memory {
	t.Helper()
	m, buf := make(memory, ledger.Size), make([]byte, ledger.RecordSize)
	require.NoError(t, ledger.Format(m, buf, side, id))
	for n := uint64(1); n <= upTo; n++ {
		require.NoError(t, ledger.Put(m, buf, side, id, n))
	}
	return m
}

func read(t *testing.T, m memory, side ledger.Side) ledger.State {
	t.Helper()
	s, err := ledger.Read(m, side)
	require.NoError(t, err)
	return s
}

func TestReadEveryLength(t *testing.T) {
	m, buf := formatted(t, ledger.Intent, 0), make([]byte, ledger.RecordSize)
	for n := range uint64(2*ledger.Slots + 3) {
		if n > 0 {
			require.NoError(t, ledger.Put(m, buf, ledger.Intent, id, n))
		}
		if n > 5 && n < ledger.Slots-5 {
			continue
		}
		s := read(t, m, ledger.Intent)
		require.Empty(t, s.Bad, "step %d", n)
		require.Equal(t, n, s.Top)
		require.Equal(t, id, s.ID)
	}
}

func TestTornNextRecordIsNormal(t *testing.T) {
	for _, top := range []uint64{0, 1, 300} {
		m := formatted(t, ledger.Commit, top)
		m[(top+1)%ledger.Slots*ledger.RecordSize+700] ^= 1
		s := read(t, m, ledger.Commit)
		require.Empty(t, s.Bad)
		require.Equal(t, top, s.Top)
	}
}

func TestDamageIsFound(t *testing.T) {
	at := func(n uint64) uint64 { return n % ledger.Slots * ledger.RecordSize }
	for name, c := range map[string]struct {
		damage func(m memory)
		want   string
	}{
		"a flipped bit in an older record": {func(m memory) { m[at(290)+100] ^= 1 }, "damaged"},
		"an older record is zeros":         {func(m memory) { clear(m[at(250):][:ledger.RecordSize]) }, "damaged"},
		"a write was lost before the last": {func(m memory) {
			ledger.Encode(m[at(299):][:ledger.RecordSize], ledger.Intent, id, 299-ledger.Slots)
		}, "holds step 43, not 299"},
		"a record of the other side": {func(m memory) {
			ledger.Encode(m[at(280):][:ledger.RecordSize], ledger.Commit, id, 280)
		}, "damaged"},
		"a record of another ledger": {func(m memory) {
			ledger.Encode(m[at(280):][:ledger.RecordSize], ledger.Intent, ledger.ID{9}, 280)
		}, "of ledger"},
		"a step from the future": {func(m memory) {
			ledger.Encode(m[at(303):][:ledger.RecordSize], ledger.Intent, id, 303)
		}, "not 301"},
		"everything is zeros": {func(m memory) { clear(m) }, "no whole record"},
	} {
		t.Run(name, func(t *testing.T) {
			m := formatted(t, ledger.Intent, 300)
			require.Empty(t, read(t, m, ledger.Intent).Bad)
			c.damage(m)
			s := read(t, m, ledger.Intent)
			require.NotEmpty(t, s.Bad)
			require.Contains(t, s.Bad[0], c.want)
		})
	}
	s, err := ledger.Read(formatted(t, ledger.Intent, 3)[:ledger.Size-1], ledger.Intent)
	require.NoError(t, err)
	require.Contains(t, s.Bad[0], "bytes")
	_, err = ledger.Read(broken{}, ledger.Intent)
	require.ErrorIs(t, err, errBroken)
}

var errBroken = errors.New("medium error")

type broken struct{}

func (broken) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		intent, commit uint64
		want           string
	}{
		{0, 0, ""},
		{7, 7, ""},
		{8, 7, ""},
		{9, 7, "the data disk is older"},
		{7, 8, "the OS disk is older"},
	} {
		bad := ledger.Compare(ledger.State{ID: id, Top: c.intent}, ledger.State{ID: id, Top: c.commit})
		if c.want == "" {
			require.Empty(t, bad)
			continue
		}
		require.Len(t, bad, 1)
		require.Contains(t, bad[0], c.want)
	}
	require.NotEmpty(t, ledger.Compare(ledger.State{ID: id}, ledger.State{ID: ledger.ID{5}}))
}
