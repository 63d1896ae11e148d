package policy_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/policy"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

func TestTiers(t *testing.T) {
	d := func(h float64) *durationpb.Duration { return durationpb.New(time.Duration(h * float64(time.Hour))) }
	for name, c := range map[string]struct {
		p                    *schedulerv1.Policy
		all, hourly, nothing time.Duration
	}{
		"nothing said":         {&schedulerv1.Policy{}, 4 * time.Hour, 24 * time.Hour, 24 * time.Hour},
		"a week":               {&schedulerv1.Policy{Retention: d(168)}, 4 * time.Hour, 48 * time.Hour, 168 * time.Hour},
		"an hour":              {&schedulerv1.Policy{Retention: d(1)}, time.Hour, time.Hour, time.Hour},
		"all said":             {&schedulerv1.Policy{Retention: d(240), KeepAll: d(12), KeepHourly: d(72)}, 12 * time.Hour, 72 * time.Hour, 240 * time.Hour},
		"all above the hourly": {&schedulerv1.Policy{Retention: d(240), KeepAll: d(100)}, 100 * time.Hour, 100 * time.Hour, 240 * time.Hour},
		"zero is the default":  {&schedulerv1.Policy{Retention: d(0), KeepAll: d(0)}, 4 * time.Hour, 24 * time.Hour, 24 * time.Hour},
	} {
		require.Equal(t, c.all, policy.KeepAll(c.p), name)
		require.Equal(t, c.hourly, policy.KeepHourly(c.p), name)
		require.Equal(t, c.nothing, policy.Retention(c.p), name)
	}
}

func TestOtherDefaults(t *testing.T) {
	p := &schedulerv1.Policy{CopyInterval: durationpb.New(30 * time.Second)}
	require.Equal(t, 15*time.Minute, policy.AlertThreshold(p))
	require.InDelta(t, 5, policy.SuspicionFactor(p), 0)
	require.Equal(t, 4, policy.ParallelUploads(p))
	p = &schedulerv1.Policy{CopyInterval: durationpb.New(5 * time.Minute), SuspicionFactor: 1, ParallelUploads: 2}
	require.Equal(t, 25*time.Minute, policy.AlertThreshold(p))
	require.InDelta(t, policy.SuspicionOff, policy.SuspicionFactor(p), 0)
	require.Equal(t, 2, policy.ParallelUploads(p))
}

// TestShortening: a policy that keeps less takes effect for points after a day, and can be taken back until then.
func TestShortening(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	days := func(n time.Duration) *durationpb.Duration { return durationpb.New(n * 24 * time.Hour) }
	long := &schedulerv1.Policy{Retention: days(30)}
	policy.Replace(nil, long, now)
	require.Nil(t, long.KeptBefore)

	slip := &schedulerv1.Policy{Retention: durationpb.New(time.Hour)}
	policy.Replace(long, slip, now)
	require.True(t, proto.Equal(policy.Tiers(long), policy.TiersAt(slip, now.Add(23*time.Hour))))
	require.True(t, proto.Equal(policy.Tiers(slip), policy.TiersAt(slip, now.Add(24*time.Hour))))

	again := proto.CloneOf(slip) // another value changes: the day goes on
	again.CopyInterval = durationpb.New(time.Minute)
	policy.Replace(slip, again, now.Add(12*time.Hour))
	require.Equal(t, now, again.ShortenedTime.AsTime())

	back := &schedulerv1.Policy{Retention: days(30)}
	policy.Replace(slip, back, now.Add(time.Hour))
	require.Nil(t, back.KeptBefore)

	less := &schedulerv1.Policy{Retention: days(2)} // a second shortening still goes by the longest
	policy.Replace(slip, less, now.Add(time.Hour))
	require.True(t, proto.Equal(policy.Tiers(long), policy.TiersAt(less, now.Add(20*time.Hour))))
	require.True(t, proto.Equal(policy.Tiers(less), policy.TiersAt(less, now.Add(26*time.Hour))))
}
