package cli

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func table(t *testing.T, rows func(w io.Writer)) string {
	t.Helper()
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	rows(w)
	require.NoError(t, w.Flush())
	return b.String()
}

func TestPolicyTableShowsWhatHolds(t *testing.T) {
	got := table(t, func(w io.Writer) {
		policyRows(w, &schedulerv1.Policy{Name: "policies/default", CopyInterval: durationpb.New(30 * time.Second)},
			&schedulerv1.Policy{
				Name: "policies/gold", CopyInterval: durationpb.New(time.Second), KeepAll: durationpb.New(12 * time.Hour), KeepHourly: durationpb.New(90 * time.Hour),
				Retention: durationpb.New(240 * time.Hour), WriteOnce: durationpb.New(48 * time.Hour), SuspicionFactor: 1, ApplyDelay: durationpb.New(90 * time.Second),
				ParallelUploads: 2,
			})
	})
	require.Equal(t, `POLICY   COPY INTERVAL  APPLICATION-CONSISTENT  KEEP ALL  KEEP HOURLY  RETENTION  WRITE-ONCE  SUSPICION  APPLY DELAY    PARALLEL UPLOADS
default  30s            -                       4h*       24h*         24h*       -           5x*        by the store*  4*
gold     1s             -                       12h       90h          240h       48h         off        1m30s          2
* default
`, got)
}

// The sample in the operators' page is a policy.
func TestSamplePolicy(t *testing.T) {
	page, err := os.ReadFile("../../docs/operations/retention.md")
	require.NoError(t, err)
	var sample []string
	for line := range strings.Lines(string(page)) {
		if text, ok := strings.CutPrefix(line, "    "); ok && (strings.HasPrefix(text, "name: gold") || len(sample) > 0) {
			sample = append(sample, text)
		} else if len(sample) > 0 {
			break
		}
	}
	require.Len(t, sample, 8)
	a := &app{in: strings.NewReader(strings.Join(sample, ""))}
	p, err := a.readPolicy("-")
	require.NoError(t, err)
	require.Equal(t, "policies/gold", p.GetName())
	require.Equal(t, 7*24*time.Hour, p.GetKeepHourly().AsDuration())
	require.Equal(t, 7*24*time.Hour, p.GetWriteOnce().AsDuration())
	require.Equal(t, 2*time.Minute, p.GetApplyDelay().AsDuration())
	require.InDelta(t, 5, p.GetSuspicionFactor(), 0)
}

func TestPointTable(t *testing.T) {
	cut := timestamppb.New(time.Date(2026, 11, 23, 4, 0, 0, 0, time.Local))
	got := table(t, func(w io.Writer) {
		pointRows(w, &schedulerv1.RecoveryPoint{
			Ordinal: 9, CutTime: cut, Kind: typesv1.PointKind_POINT_KIND_POINT, Consistency: typesv1.Consistency_CONSISTENCY_CRASH, StoredBytes: 3 << 20, Suspected: true,
		}, &schedulerv1.RecoveryPoint{
			Ordinal: 8, CutTime: cut, Kind: typesv1.PointKind_POINT_KIND_BASE, Consistency: typesv1.Consistency_CONSISTENCY_APPLICATION, StoredBytes: 100,
			Processed: true, Checkpointed: true, Tier: "hourly", Pins: []*schedulerv1.PointPin{{Owner: "suspect/9"}, {Owner: "hold/case-17"}, {Owner: "hold/case-17"}},
		})
	})
	require.Equal(t, `POINT  TIME                     KIND   CONSISTENCY  STORED   PROCESSED  CHECKPOINT  TIER    KEPT BY                 SUSPECTED
9      2026-11-23 04:00:00.000  point  crash        3.0 MiB  -          -           -       -                       yes
8      2026-11-23 04:00:00.000  base   application  100 B    yes        yes         hourly  hold/case-17,suspect/9  -
`, got)
}

func TestUsageTable(t *testing.T) {
	got := table(t, func(w io.Writer) {
		usageRows(w, &schedulerv1.GetStorageUsageResponse{
			Usage: []*schedulerv1.StorageUsage{
				{Kind: "journal", Objects: 1200, Bytes: 20 << 30, HiddenBytes: 1 << 30, MonthlyCost: 0.368},
				{Kind: "replica", Objects: 2, Bytes: 1 << 40, MonthlyCost: 46.08},
			},
			MonthlyRequests: 5_088_000, MonthlyRequestCost: 25.44, MonthlyCost: 71.888, Currency: "USD", PriceTable: "Azure list, 2026-11",
			Points: map[string]int64{"hourly": 44, "all": 480, "pinned": 1},
		})
	})
	require.Equal(t, `KIND      OBJECTS  BYTES     HIDDEN   A MONTH
journal   1200     20.0 GiB  1.0 GiB  0.37 USD
replica   2        1.0 TiB   0 B      46.08 USD
requests  5088000  -         -        25.44 USD
total     1202     1.0 TiB   1.0 GiB  71.89 USD

Points:  480 all, 44 hourly, 1 pinned
Prices:  Azure list, 2026-11
`, got)
}

func TestBacklog(t *testing.T) {
	for want, b := range map[string]*typesv1.ApplyBacklog{
		"-":                nil,
		"none":             {Bytes: 0},
		"1.5 GiB":          {Bytes: 3 << 29, Manifests: 2},
		"1.5 GiB, 2.5 min": {Bytes: 3 << 29, Manifests: 2, Estimate: durationpb.New(150 * time.Second)},
	} {
		require.Equal(t, want, backlog(b))
	}
}
