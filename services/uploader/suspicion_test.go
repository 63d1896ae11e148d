package uploader

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/replica"
)

const (
	mib     = 1 << 20
	gib     = 1 << 30
	testVM  = 128 * gib // least: 640 MiB, so mostBytes counts
	smallVM = 8 * gib   // leastBytes counts
)

// story makes chains of points.
type story struct {
	rng    *rand.Rand
	points []replica.Point
	every  time.Duration
}

func newStory(seed uint64, every time.Duration) *story {
	s := &story{rng: rand.New(rand.NewPCG(seed, 7)), every: every}
	s.add(replica.KindBase, 0, 0, 0)
	return s
}

func (s *story) add(kind replica.Kind, data, incompressible, zero int64) *story {
	cut := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	if n := len(s.points); n > 0 {
		cut = s.points[n-1].CutTime.Add(s.every)
	}
	n := uint64(len(s.points)) + 1
	s.points = append(s.points, replica.Point{Ordinal: replica.Ordinal(n), Seq: replica.Seq(n), Kind: kind, CutTime: cut,
		Signals: &replica.Signals{Changed: data + zero, Zero: zero, Incompressible: min(incompressible, data)}})
	return s
}

func (s *story) point(data int64, share float64) *story {
	return s.add(replica.KindPoint, data, int64(float64(data)*share), 0)
}

// usual adds n points around data bytes, by a factor of up to spread.
func (s *story) usual(n int, data int64, share, spread float64) *story {
	for range n {
		f := 1.0
		if spread > 1 {
			f = 1/spread + s.rng.Float64()*(spread-1/spread)
		}
		s.point(int64(float64(data)*f), min(1, max(0, share+0.1*(s.rng.Float64()-0.5))))
	}
	return s
}

func (s *story) judge(factor float64, disks int64) suspicion { return judge(s.points, factor, disks) }

// TestSuspicion is the table of what raises an alarm and what does not.
func TestSuspicion(t *testing.T) {
	five := 5 * time.Minute
	plain := func() *story { return newStory(1, five).usual(30, 40*mib, 0.2, 1.5) }
	opaque := func() *story { return newStory(1, five).usual(30, 40*mib, 0.97, 1.5) }
	for _, c := range []struct {
		name   string
		story  *story
		factor float64
		disks  int64
		want   bool
	}{
		{"an ordinary point", plain(), 0, testVM, false},
		{"encryption at ten times", plain().point(520*mib, 0.95), 0, testVM, true},
		{"encryption at fifty times", plain().point(2*gib, 0.99), 0, testVM, true},
		{"backup of compressible data", plain().point(20*gib, 0.3), 0, testVM, false},
		{"an update: compressed packages, unpacked beside them", plain().point(3*gib, 0.55), 0, testVM, false},
		{"the file system is trimmed", plain().add(replica.KindPoint, 30*mib, 28*mib, 60*gib), 0, testVM, false},
		{"encryption that trims what it replaced", plain().add(replica.KindPoint, 800*mib, 790*mib, 800*mib), 0, testVM, true},
		{"below the factor", plain().point(150*mib, 0.95), 0, smallVM, false},
		{"below a higher factor of the policy", plain().point(520*mib, 0.95), 40, testVM, false},
		{"above a lower one", plain().point(150*mib, 0.95), 2, smallVM, true},
		{"turned off", plain().point(10*gib, 0.99), 1, testVM, false},
		{"too little for a large machine", plain().point(240*mib, 0.95), 0, testVM, false},
		{"enough for a small one", plain().point(240*mib, 0.95), 0, smallVM, true},
		{"a machine that does nearly nothing", newStory(1, five).usual(30, 1000, 0.2, 1.5).point(30*mib, 1), 0, smallVM, false},
		{"the same, and real damage", newStory(1, five).usual(30, 1000, 0.2, 1.5).point(90*mib, 1), 0, smallVM, true},
		{"no history yet", newStory(1, five).usual(4, 40*mib, 0.2, 1.5).point(2*gib, 0.99), 0, testVM, false},
		{"just enough history", newStory(1, five).usual(5, 40*mib, 0.2, 1.5).point(2*gib, 0.99), 0, testVM, true},
		{"the guest encrypts: an ordinary point", opaque(), 0, testVM, false},
		{"the guest encrypts: a busy hour", opaque().point(600*mib, 0.98), 0, smallVM, false},
		{"the guest encrypts: thirty times and much", opaque().point(3*gib, 0.99), 0, testVM, true},
		{"the guest encrypts: thirty times, not much", newStory(1, five).usual(30, 2*mib, 0.97, 1.5).point(100*mib, 0.99), 0, smallVM, false},
		{"a base", plain().add(replica.KindBase, 10*gib, 10*gib, 0), 0, testVM, false},
		{"after a base there is no history", plain().add(replica.KindBase, 0, 0, 0).point(2*gib, 0.99), 0, testVM, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			// History is never asked for across a base.
			points := c.story.points
			for i := len(points) - 1; i > 0; i-- {
				if points[i].Kind == replica.KindBase {
					points = points[i:]
					break
				}
			}
			got := judge(points, c.factor, c.disks)
			require.Equal(t, c.want, got.suspected)
			if c.want {
				require.Equal(t, points[len(points)-2].Ordinal, got.lastGood.Ordinal)
				require.Positive(t, got.usual)
			}
		})
	}
}

// A point that waited for an outage to end has a right to more churn, but not to any.
func TestSuspicionKnowsTime(t *testing.T) {
	s := newStory(1, 5*time.Minute).usual(30, 40*mib, 0.2, 1.2)
	s.every = time.Hour
	require.False(t, s.point(2*gib, 0.95).judge(0, testVM).suspected, "twelve intervals, four times the churn")

	s = newStory(1, 5*time.Minute).usual(30, 40*mib, 0.2, 1.2)
	s.every = 72 * time.Hour
	require.True(t, s.point(20*gib, 0.95).judge(0, testVM).suspected, "an outage of days does not excuse everything")

	s = newStory(1, 5*time.Minute).usual(30, 400*mib, 0.2, 1.2)
	s.every = 10 * time.Second
	require.False(t, s.point(600*mib, 0.9).judge(0, smallVM).suspected, "a burst just after a cut")
}

// Points of seconds are judged together: encryption at 30 MiB/s is little per point and much per minute.
func TestSuspicionOfShortIntervals(t *testing.T) {
	s := newStory(1, time.Second).usual(900, 400<<10, 0.2, 1.5)
	attack := s.points[len(s.points)-1].Ordinal
	alarms := 0
	for i := range 120 {
		if got := s.point(30*mib, 0.97).judge(0, testVM); got.suspected {
			alarms++
			require.Less(t, i, 30, "seen within half a minute")
			require.Equal(t, attack, got.lastGood.Ordinal)
		}
	}
	require.Equal(t, 1, alarms)
}

// An episode is told once; a habit is told once.
func TestEpisodes(t *testing.T) {
	s := newStory(1, 5*time.Minute).usual(30, 40*mib, 0.2, 1.5)
	var alarms []int
	for i := range 60 { // five hours of encryption, with pauses
		if i%9 == 4 {
			s.usual(1, 40*mib, 0.2, 1.5)
		} else {
			s.point(int64(1+s.rng.IntN(3))*gib, 0.97)
		}
		if got := s.judge(0, testVM); got.suspected {
			alarms = append(alarms, i)
			require.EqualValues(t, 31, got.lastGood.Ordinal)
		}
	}
	require.Equal(t, []int{0}, alarms)

	s = newStory(1, 5*time.Minute).usual(30, 40*mib, 0.2, 1.5)
	alarms = nil
	for i := range 100 { // a compressed backup every hour
		if i%12 == 0 {
			s.point(2*gib, 0.99)
		} else {
			s.usual(1, 40*mib, 0.2, 1.5)
		}
		if s.judge(0, testVM).suspected {
			alarms = append(alarms, i)
		}
	}
	require.Equal(t, []int{0}, alarms)
}

// The beginning of an attack that was too small to be seen is not called good.
func TestLastGoodIsBeforeTheBeginning(t *testing.T) {
	s := newStory(1, 5*time.Minute).usual(30, mib, 0.1, 1.2)
	good := s.points[len(s.points)-1].Ordinal
	require.False(t, s.point(60*mib, 0.97).judge(0, smallVM).suspected, "too little")
	got := s.point(2*gib, 0.97).judge(0, smallVM)
	require.True(t, got.suspected)
	require.Equal(t, good, got.lastGood.Ordinal)
}

// Slow encryption is not caught, and this says so.
func TestSlowEncryptionIsNotCaught(t *testing.T) {
	s := newStory(1, 5*time.Minute).usual(30, 40*mib, 0.2, 1.5)
	for range 200 {
		require.False(t, s.point(120*mib, 0.95).judge(0, testVM).suspected)
	}
}

// Chains of old manifests have no signals, and retention leaves gaps.
func TestSuspicionOfGaps(t *testing.T) {
	s := newStory(1, 5*time.Minute).usual(40, 40*mib, 0.2, 1.5)
	for i := range s.points[:20] {
		s.points[i].Signals = nil
	}
	s.point(2*gib, 0.97)
	require.True(t, s.judge(0, testVM).suspected)
	s.points[len(s.points)-1].Signals = nil
	require.False(t, s.judge(0, testVM).suspected)
	require.False(t, judge(nil, 0, testVM).suspected)
	require.False(t, judge(s.points[:1], 0, testVM).suspected)
}

// Nothing that compresses raises an alarm, whatever its volume and rhythm; nor does stationary churn of any kind.
func TestNoFalseAlarms(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		every := time.Duration(rapid.IntRange(1, 900).Draw(t, "interval")) * time.Second
		s := newStory(rapid.Uint64().Draw(t, "seed"), every)
		volume := int64(1) << rapid.IntRange(10, 34).Draw(t, "volume")
		opaque := rapid.Bool().Draw(t, "opaque")
		for range rapid.IntRange(1, 80).Draw(t, "points") {
			if opaque { // within three times of the usual, up or down
				s.usual(1, volume, 0.97, 3)
			} else { // anything, as long as it compresses
				s.add(replica.KindPoint, volume, int64(float64(volume)*0.79*s.rng.Float64()), volume*s.rng.Int64N(50))
				volume = max(1024, min(1<<40, volume*(1+s.rng.Int64N(64))/(1+s.rng.Int64N(64))))
			}
			require.False(t, s.judge(0, testVM).suspected)
		}
	})
}

// Encryption in place at ten to fifty times the usual rate is seen in the first whole interval, wherever in an interval it
// begins, if it is not too little; and whoever asks again is told the same.
func TestEncryptionIsSeen(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		every := time.Duration(rapid.IntRange(30, 900).Draw(t, "interval")) * time.Second
		usual := int64(rapid.IntRange(1, 256).Draw(t, "MiB")) * mib
		s := newStory(rapid.Uint64().Draw(t, "seed"), every)
		s.usual(rapid.IntRange(12, 40).Draw(t, "before"), usual, 0.3*rapid.Float64Range(0, 1).Draw(t, "share"), 1.5)
		rate := int64(rapid.IntRange(10, 50).Draw(t, "times")) * usual
		rate = max(rate, mostBytes*5/4) // clearly more than what may be too little
		begins := rapid.Float64Range(0, 1).Draw(t, "begins")
		before := len(s.points)
		alarms, last := 0, replica.Ordinal(0)
		for i := range 8 {
			n := rate
			if i == 0 {
				n = int64(float64(rate) * begins)
			}
			s.point(n+usual, 0.97*float64(n)/float64(n+usual))
			got := s.judge(0, testVM)
			require.Equal(t, got, s.judge(0, testVM))
			if got.suspected {
				alarms++
				last = got.lastGood.Ordinal
				require.LessOrEqual(t, i, 2)
			}
		}
		require.Equal(t, 1, alarms)
		require.LessOrEqual(t, int(last), before+1, "at most the point in which it began is taken for good")
	})
}
