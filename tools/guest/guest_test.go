package guest_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/tools/guest"
)

func TestReportTravels(t *testing.T) {
	r := guest.Report{OK: true, Ledger: "ab", Intent: 8, Commit: 7, Files: 3, Bad: []string{}, JournalReplayed: guest.PerDisk[bool]{Data: true}}
	line, err := r.Line()
	require.NoError(t, err)
	require.Contains(t, line, `LANDFALL-VERIFY {"ok":true,`)
	require.Contains(t, line, `"journal_replayed":{"os":false,"data":true}`)
	got, ok := guest.ParseReport(line)
	require.True(t, ok)
	require.Empty(t, cmp.Diff(r, got))

	newer := r
	newer.Commit = 8
	second, err := newer.Line()
	require.NoError(t, err)
	console := "boot\r\n" + line + "\r\nLANDFALL-READY\r\n" + second + "\r\n" + guest.VerifyPrefix + `{"ok":tr`
	got, ok = guest.LastReport(console)
	require.True(t, ok)
	require.EqualValues(t, 8, got.Commit, "the newest whole line")
	_, ok = guest.LastReport("nothing")
	require.False(t, ok)
}

func TestBadIsBounded(t *testing.T) {
	var r guest.Report
	for range 100 {
		r.AddBad("x")
	}
	require.Len(t, r.Bad, guest.MaxBad)
}

func TestParseAck(t *testing.T) {
	for line, want := range map[string]uint64{"ACK 12": 12, "LANDFALL-ACK 13\r": 13} {
		n, ok := guest.ParseAck(line)
		require.True(t, ok, line)
		require.Equal(t, want, n)
	}
	for _, line := range []string{"", "ACK", "ACK x", "NAK 1", "ACK -1"} {
		_, ok := guest.ParseAck(line)
		require.False(t, ok, line)
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"50MB": 50e6, "2MiB": 2 << 20, "4KiB": 4096, "7": 7, "1GB": 1e9} {
		n, err := guest.ParseSize(s)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	for _, s := range []string{"", "MB", "-1", "0", "5TB", "99999999999"} {
		_, err := guest.ParseSize(s)
		require.Error(t, err, s)
	}
}
