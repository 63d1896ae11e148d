package qemu

import (
	"sort"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkCut cuts and settles points of two disks while the guest writes to both without pause. It reports the whole call,
// how long writes were held, and the settle.
func BenchmarkCut(b *testing.B) {
	l := newLab(b, booted, formats("raw", "vhdx"))
	require.NoError(b, l.second.Execute(l.ctx(), "cont", nil, nil))
	l.establish()
	p := l.next()
	_, err := l.begin(p, full)
	require.NoError(b, err)
	_, err = l.settlePass(p, commit)
	require.NoError(b, err)
	var cuts, pauses, settles []time.Duration
	for b.Loop() {
		p = l.next()
		start := time.Now()
		r, err := l.cut(p)
		cuts = append(cuts, time.Since(start))
		require.NoError(b, err)
		pauses = append(pauses, r.Point.Pause.AsDuration())
		start = time.Now()
		_, err = l.settle(p, commit)
		settles = append(settles, time.Since(start))
		require.NoError(b, err)
	}
	for name, all := range map[string][]time.Duration{"cut": cuts, "pause": pauses, "settle": settles} {
		sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
		b.ReportMetric(float64(all[0].Microseconds())/1000, name+"-best-ms")
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, name+"-median-ms")
		b.ReportMetric(float64(all[len(all)*9/10].Microseconds())/1000, name+"-p90-ms")
	}
}
