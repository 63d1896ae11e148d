package uploader

import (
	"math"
	"slices"
	"time"

	"github.com/landfall-dr/landfall/libs/replica"
)

// What makes a point suspicious. design.md, "Ransomware", says why, and what is not caught.
const (
	// defaultFactor is how many times the usual churn is a jump, when the policy does not say.
	defaultFactor = 5
	// leastFactor: less would be noise.
	leastFactor = 2
	// suspectWindows is how many windows before a point say what is usual, minWindows how many there must be.
	suspectWindows, minWindows = 20, 5
	// windowTime: points that follow each other faster are judged together, at most maxWindow of them. A point of a second
	// says little.
	windowTime = time.Minute
	maxWindow  = 60
	// highShare of the bytes that are not zero must be incompressible, and clearShare more than usual.
	highShare, clearShare = 0.8, 0.25
	// opaque: where the share is always high (the guest encrypts its disk), only churn can tell, and it has to jump so much
	// further, with so much more of it.
	opaqueTimes = 4
	// leastBytes of incompressible churn in a window are needed, or 1/200 of the disks, but never more than mostBytes.
	leastBytes, leastShare, mostBytes = 64 << 20, 200, 256 << 20
	// shareBytes: a window with less churn says nothing about its share.
	shareBytes = 256 << 10
	// Bounds of what a window counts for a longer or shorter one. Churn does not grow with time for ever, since it is
	// unique, and bursts do not get smaller.
	scaleLeast, scaleMost = 0.5, 16
)

// suspicion is what the shipper thinks of a point.
type suspicion struct {
	// suspected: the point begins an episode. The points that follow do not say it again.
	suspected bool
	// usual churn without zeros in the time the window took, in bytes; 0 when it is not known yet.
	usual int64
	// lastGood is the newest point before the jump; nil when none is known.
	lastGood *replica.Point
}

// window is a number of points in a row, ending with one.
type window struct {
	span               float64 // seconds
	data, incompressed float64 // bytes that are not zero, and those of them that do not shrink
}

func (w window) share() float64 { return w.incompressed / max(w.data, 1) }

// judge says whether the last of points begins an episode. points are in order, without a gap since the base or as far back
// as is wanted (historyOf); the first one only gives its time. factor is the policy's; disks the bytes of all disks. It
// depends on its arguments alone, so every worker comes to the same answer, however often it is asked.
func judge(points []replica.Point, factor float64, disks int64) suspicion {
	factor, on := factorOf(factor)
	if !on || len(points) == 0 || points[len(points)-1].Kind != replica.KindPoint {
		return suspicion{}
	}
	j := newJudgement(points, factor, disks)
	last := len(j.at) - 1
	if last < 0 || j.at[last] != len(points)-1 {
		return suspicion{} // it has no signals
	}
	out := suspicion{}
	jump, usual, bound := j.jumps(last)
	out.usual = int64(usual)
	if !jump {
		return out
	}
	for k := last - 1; k >= max(0, last-suspectWindows*j.group); k-- {
		if earlier, _, _ := j.jumps(k); earlier {
			return out // it goes on
		}
	}
	out.suspected = true
	// The jump may have begun before this point, too little of it to be seen.
	good := last - 1
	for ; good >= 0 && good >= last-j.group-2; good-- {
		s := j.single(good)
		if s.share() < highShare || s.data < bound*s.span {
			break
		}
	}
	if good >= 0 {
		out.lastGood = &points[j.at[good]]
	} else {
		out.lastGood = &points[max(j.at[0]-1, 0)]
	}
	return out
}

// factorOf is the factor in effect; false when the policy turned it off.
func factorOf(f float64) (float64, bool) {
	switch {
	case f == 0:
		return defaultFactor, true
	case f <= 1 || math.IsNaN(f):
		return 0, false
	}
	return max(f, leastFactor), true
}

// groupOf is how many points are judged together, given when they were cut.
func groupOf(points []replica.Point) int {
	var spans []float64
	for i := 1; i < len(points); i++ {
		if s := spanOf(points, i); points[i].Seq == points[i-1].Seq+1 {
			spans = append(spans, s)
		}
	}
	if len(spans) == 0 {
		return 1
	}
	return int(min(max(math.Ceil(windowTime.Seconds()/median(spans)-0.05), 1), maxWindow))
}

// historyOf is how many points judge wants to see at most, in groups of that many.
func historyOf(group int) int { return (2*suspectWindows+2)*group + 2 }

// spanOf is the seconds that point i took, at least a tenth.
func spanOf(points []replica.Point, i int) float64 {
	return max(points[i].CutTime.Sub(points[i-1].CutTime).Seconds(), 0.1)
}

func median(v []float64) float64 {
	slices.Sort(v)
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}

// judgement has the samples of a history as prefix sums.
type judgement struct {
	at       []int // index into points of each sample
	sums     []window
	group    int
	factor   float64
	minBytes float64
}

func newJudgement(points []replica.Point, factor float64, disks int64) *judgement {
	j := &judgement{
		factor: factor, group: groupOf(points), sums: []window{{}},
		minBytes: float64(min(max(disks/leastShare, leastBytes), mostBytes)),
	}
	for i := 1; i < len(points); i++ {
		s := points[i].Signals
		// Behind a gap that retention left, churn is known but not the time it took. The newest is judged all the same.
		if s == nil || points[i].Kind != replica.KindPoint || points[i].Seq != points[i-1].Seq+1 && i != len(points)-1 {
			continue
		}
		sum := j.sums[len(j.sums)-1]
		sum.span += spanOf(points, i)
		sum.data += float64(s.Data())
		sum.incompressed += float64(min(s.Incompressible, s.Data()))
		j.sums, j.at = append(j.sums, sum), append(j.at, i)
	}
	return j
}

// window ends with sample k; false when there are not enough samples.
func (j *judgement) window(k, group int) (window, bool) {
	if k+1 < group {
		return window{}, false
	}
	a, b := j.sums[k+1-group], j.sums[k+1]
	return window{b.span - a.span, b.data - a.data, b.incompressed - a.incompressed}, true
}

func (j *judgement) single(k int) window {
	w, _ := j.window(k, 1)
	return w
}

// jumps tells whether the window that ends with sample k is a jump; usual is the churn without zeros that was to be expected of
// it, bound the bytes a second from which on churn is more than the factor allows.
func (j *judgement) jumps(k int) (jump bool, usual, bound float64) {
	w, ok := j.window(k, j.group)
	if !ok {
		return false, 0, 0
	}
	var before []window // newest first
	for end := k - j.group; len(before) < suspectWindows; end -= j.group {
		b, ok := j.window(end, j.group)
		if end < 0 || !ok {
			break
		}
		before = append(before, b)
	}
	if len(before) < minWindows {
		return false, 0, 0
	}
	var data, shares []float64
	for _, b := range before {
		data = append(data, b.data*min(max(w.span/b.span, scaleLeast), scaleMost))
		if b.data >= shareBytes {
			shares = append(shares, b.share())
		}
	}
	usual = median(data)
	usualShare := 0.0
	if len(shares) > 0 {
		usualShare = median(shares)
	}
	times, least := j.factor, j.minBytes
	if w.share()-usualShare < clearShare {
		times, least = times*opaqueTimes, least*opaqueTimes
	}
	bound = times * usual / w.span
	switch {
	case w.share() < highShare, w.incompressed < least, w.data < times*usual:
		return false, usual, bound
	}
	// What came like this before, not just now, is a habit: a compressed backup every hour. The newest window is left out,
	// because it may be the beginning of the same.
	habit := slices.ContainsFunc(before[1:], func(b window) bool { return b.share() >= highShare && b.data >= w.data/2 })
	return !habit, usual, bound
}
