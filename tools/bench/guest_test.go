package bench

import (
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// guestRows are the names of the rows that boot the lab guest.
func guestRows() (list []string) {
	for _, name := range Names() {
		if strings.HasPrefix(name, "guest-") {
			list = append(list, name)
		}
	}
	return list
}

func TestGuestRowsSayWhatIsMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	require.Len(t, guestRows(), 6)
	report, err := Run(t.Context(), Options{Work: filepath.Join(t.TempDir(), "work"), Size: mib, Set: "test", Runs: 1, Rows: guestRows(), Progress: io.Discard})
	require.NoError(t, err)
	require.Empty(t, report.Failed())
	require.NotEmpty(t, report.Rows)
	for _, row := range report.Rows {
		require.Zero(t, row.Runs, row.Name)
		require.NotEmpty(t, row.Missing, "%s: %s", row.Name, row.Subject)
		require.NotContains(t, row.Missing, "\n")
	}
	require.Contains(t, report.Rows[0].Missing, "qemu-system-x86_64")
}

func TestSplitOfAFailover(t *testing.T) {
	began := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	when := func(ms int) *timestamppb.Timestamp {
		return timestamppb.New(began.Add(time.Duration(ms) * time.Millisecond))
	}
	f := failoverResult{Boot: &typesv1.BootEvidence{Seconds: 5}, Job: &typesv1.Job{CreateTime: when(100), Steps: []*typesv1.JobStep{
		{Id: "check", StartTime: when(200), EndTime: when(400)},
		{Id: "boot", StartTime: when(1000), EndTime: when(7000)},
		{Id: "drain", StartTime: when(500), EndTime: when(900)}, // listed last, ran before
		{Id: "never"},
	}}}
	got := map[string]float64{}
	var order []string
	for _, x := range split(f, began, began.Add(7500*time.Millisecond)) {
		got[x.name] = x.value
		order = append(order, x.name)
	}
	for name, want := range map[string]float64{
		"RTO: command to its return": 7.5, "RTO minus guest boot": 2.5, "command to job": 0.1, "step check": 0.2, "step drain": 0.4, "step boot": 6,
		"waits between steps": 0.3, "last step to the command's return": 0.5,
	} {
		require.InDelta(t, want, got[name], 1e-9, name)
	}
	require.NotContains(t, got, "step never")
	require.Less(t, index(order, "step drain"), index(order, "step boot"))
}

func index(list []string, want string) int {
	for i, s := range list {
		if s == want {
			return i
		}
	}
	return -1
}

func TestQuantilesAreRanks(t *testing.T) {
	var list []time.Duration
	for n := 100; n > 0; n-- {
		list = append(list, time.Duration(n)*time.Millisecond)
	}
	for share, want := range map[float64]int{0.5: 50, 0.99: 99, 1: 100, 0: 1} {
		require.Equal(t, time.Duration(want)*time.Millisecond, at(list, share))
	}
	require.Zero(t, at(nil, 0.5))
	require.Equal(t, 100*time.Millisecond, list[0], "the list stays as it was")
}

func TestMediansOfRounds(t *testing.T) {
	round := func(n int64) sample {
		return sample{usage: usage{wall: time.Duration(n) * time.Second, cpu: time.Duration(n)}, in: n, out: 2 * n, figures: []figure{{name: "n", value: float64(n), most: 1}}}
	}
	rounds := []sample{round(9), round(1), round(2)}
	got := medians(rounds)
	require.Equal(t, round(2), got)
	require.InDelta(t, 9, rounds[0].figures[0].value, 0, "the rounds stay as they were")
}

func TestShippedOverWritten(t *testing.T) {
	got := shippedOver(received{Stored: 60, Changed: 80}, 50, 40)
	require.InDelta(t, 1.2, got[0].value, 1e-9)
	require.InDelta(t, 1.5, got[1].value, 1e-9)
	require.InDelta(t, 2, got[2].value, 1e-9)
}
