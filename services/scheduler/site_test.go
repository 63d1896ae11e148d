package scheduler_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/testkit"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestSiteBandwidth(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.start(quick())
	ctx := testkit.Context(t)
	get := func(site string) *schedulerv1.GetBandwidthResponse {
		t.Helper()
		r, err := l.sites.GetBandwidth(ctx, &schedulerv1.GetBandwidthRequest{Name: site})
		require.NoError(t, err)
		return r
	}
	set := func(b *schedulerv1.SiteBandwidth, dry bool) (*schedulerv1.SiteBandwidth, error) {
		r, err := l.sites.SetBandwidth(ctx, &schedulerv1.SetBandwidthRequest{Bandwidth: b, ValidateOnly: dry})
		return r.GetBandwidth(), err
	}
	none := get("sites/lab")
	require.Empty(t, cmp.Diff(&schedulerv1.GetBandwidthResponse{Bandwidth: &schedulerv1.SiteBandwidth{Name: "sites/lab"}}, none, protocmp.Transform()))

	const mib = 1 << 20
	want := &schedulerv1.SiteBandwidth{
		Name: "sites/lab", TimeZone: "Europe/Berlin", DefaultBytesPerSecond: 5 * mib,
		Windows: []*schedulerv1.BandwidthWindow{{Start: durationpb.New(0), End: durationpb.New(24 * time.Hour), BytesPerSecond: 20 * mib}},
	}
	dry, err := set(want, true)
	require.NoError(t, err)
	require.Zero(t, dry.GetRevision())
	require.Zero(t, get("sites/lab").GetCurrentBytesPerSecond(), "checked only")

	first, err := set(want, false)
	require.NoError(t, err)
	require.Positive(t, first.GetRevision())
	got := get("sites/lab")
	require.Empty(t, cmp.Diff(first, got.GetBandwidth(), protocmp.Transform()))
	require.EqualValues(t, 20*mib, got.GetCurrentBytesPerSecond())
	require.Zero(t, get("sites/other").GetCurrentBytesPerSecond())
	again, err := set(want, false)
	require.NoError(t, err)
	require.Equal(t, first.GetRevision(), again.GetRevision(), "the same again is no change")

	_, err = l.sites.GetBandwidth(ctx, &schedulerv1.GetBandwidthRequest{Name: "lab"})
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "sites/SITE")
	changed := &schedulerv1.SiteBandwidth{Name: "sites/lab", DefaultBytesPerSecond: mib, Revision: first.GetRevision() + 1}
	_, err = set(changed, false)
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION)
	_, err = set(&schedulerv1.SiteBandwidth{Name: "sites/new", Revision: 7}, false)
	refused(t, err, typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION)
	changed.Revision = first.GetRevision()
	second, err := set(changed, false)
	require.NoError(t, err)
	require.Greater(t, second.GetRevision(), first.GetRevision())
	require.EqualValues(t, mib, get("sites/lab").GetCurrentBytesPerSecond())
	_, err = set(&schedulerv1.SiteBandwidth{Name: "sites/lab"}, false)
	require.NoError(t, err)
	require.Zero(t, get("sites/lab").GetCurrentBytesPerSecond(), "cleared")

	_, err = set(&schedulerv1.SiteBandwidth{
		Name: "sites/Lab", TimeZone: "Nowhere", DefaultBytesPerSecond: 1,
		Windows: []*schedulerv1.BandwidthWindow{{End: durationpb.New(time.Hour), BytesPerSecond: mib}},
	}, false)
	e := refused(t, err, typesv1.ErrorReason_ERROR_REASON_BANDWIDTH_INVALID, "sites/Lab", "Nowhere", "default_bytes_per_second", "windows[0].start: is missing")
	require.Len(t, e.Fields, 4, "all of it at once")
}
