package bandwidth_test

import (
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/bandwidth"
)

func demand(worker string, delta, bulk, resync int) bandwidth.Demand {
	return bandwidth.Demand{Worker: worker, Streams: [bandwidth.Classes]int{delta, bulk, resync}}
}

func TestShare(t *testing.T) {
	for name, c := range map[string]struct {
		demands []bandwidth.Demand
		want    bandwidth.Part
	}{
		"alone":                       {[]bandwidth.Demand{demand("a", 0, 1, 0)}, bandwidth.Part{0, 9000, 0}},
		"two copies":                  {[]bandwidth.Demand{demand("a", 0, 1, 0), demand("b", 0, 2, 0)}, bandwidth.Part{0, 3000, 0}},
		"copy beside another's":       {[]bandwidth.Demand{demand("a", 0, 1, 0), demand("b", 1, 0, 0)}, bandwidth.Part{0, 1000, 0}},
		"delta before copy":           {[]bandwidth.Demand{demand("a", 1, 3, 0)}, bandwidth.Part{8000, 1000, 0}},
		"all":                         {[]bandwidth.Demand{demand("a", 1, 1, 1)}, bandwidth.Part{7200, 900, 900}},
		"resync beside a copy":        {[]bandwidth.Demand{demand("a", 0, 0, 1), demand("b", 0, 5, 0)}, bandwidth.Part{0, 0, 4500}},
		"nothing":                     {[]bandwidth.Demand{demand("a", 0, 0, 0), demand("b", 0, 5, 0)}, bandwidth.Part{}},
		"not there":                   {[]bandwidth.Demand{demand("b", 0, 5, 0)}, bandwidth.Part{}},
		"named twice":                 {[]bandwidth.Demand{demand("a", 1, 0, 0), demand("a", 1, 0, 0)}, bandwidth.Part{9000, 0, 0}},
		"nonsense is not believed":    {[]bandwidth.Demand{demand("a", 1, 0, 0), demand("b", -7, 0, 0)}, bandwidth.Part{9000, 0, 0}},
		"a worker that says too much": {[]bandwidth.Demand{demand("a", 10000, 0, 0), demand("b", 1<<30, 0, 0)}, bandwidth.Part{4500, 0, 0}},
	} {
		require.Equal(t, c.want, bandwidth.Share(9000, c.demands, "a"), name)
	}
	require.Empty(t, bandwidth.Shares(0, []bandwidth.Demand{demand("a", 1, 0, 0)}))
}

func TestSharesAreFair(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		rate := rapid.Int64Range(bandwidth.MinLimit, bandwidth.MaxLimit).Draw(r, "rate")
		var demands []bandwidth.Demand
		var sums [bandwidth.Classes]int
		for i := range rapid.IntRange(1, 40).Draw(r, "workers") {
			n := rapid.IntRange(0, 20)
			d := demand(strconv.Itoa(i), n.Draw(r, "delta"), n.Draw(r, "copy"), n.Draw(r, "resync"))
			for c := range sums {
				sums[c] += d.Streams[c]
			}
			demands = append(demands, d)
		}
		parts := bandwidth.Shares(rate, demands)
		var total int64
		var classes [bandwidth.Classes]int64
		for _, d := range demands {
			p := parts[d.Worker]
			if p != bandwidth.Share(rate, rapid.Permutation(demands).Draw(r, "order"), d.Worker) {
				r.Fatal("who is named first matters")
			}
			total += p.Total()
			for c := range classes {
				classes[c] += p[c]
				if (d.Streams[c] > 0) != (p[c] > 0) {
					r.Fatalf("%v has %v", d, p)
				}
			}
		}
		if total > rate {
			r.Fatalf("%d of %d", total, rate)
		}
		slack := int64(len(demands)) // of rounding
		anybody := false
		for c := range classes {
			anybody = anybody || sums[c] > 0
			if sums[c] > 0 && classes[c] < rate/10-slack {
				r.Fatalf("class %d has %d of %d", c, classes[c], rate)
			}
		}
		if anybody && total < rate-slack*bandwidth.Classes {
			r.Fatalf("only %d of %d", total, rate)
		}
		if sums[0] > 0 && classes[0] < rate*7/10 {
			r.Fatal("deltas are not before others")
		}
	})
}
