//go:build !race

package uploader_test

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/services/uploader"
)

// peakMemory samples what the Go runtime holds of the system, in bytes, until stop.
func peakMemory() (stop func() uint64) {
	var peak atomic.Uint64
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
		for {
			metrics.Read(s)
			peak.Store(max(peak.Load(), s[0].Value.Uint64()-s[1].Value.Uint64()))
			select {
			case <-time.After(2 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() uint64 {
		cancel()
		<-done
		return peak.Load()
	}
}

// A 20 GiB sparse disk with 512 MiB of content goes through the default buffers; host, bus and store are in the same
// process and count too.
func TestBigSparseDiskInLittleMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("moves half a GiB")
	}
	s := hosttest.NewSite(t, folder(t))
	var content []extent.Range
	for i := range int64(16) {
		content = append(content, extent.Range{Off: i * 1279 << 20, Len: 32 << 20})
	}
	s.Host.AddDisk("os", hosttest.NewGenerated(20<<30, 7, content...))
	s.Host.ChunkBytes = 1 << 20
	c := uploader.Default()
	c.Site, c.Apply.SoleApplier = hosttest.SiteID, true
	runtime.GC()
	debug.FreeOSMemory()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(c.MemoryLimitBytes)) // as the program's main does
	stop := peakMemory()
	run(t, s, c)
	s.Host.StartPass(1, full, false)
	tasks := s.PassTasks(1, 0, 1, full, 512<<20)
	for _, task := range tasks {
		s.Publish(bus.KindShip, task)
	}
	testkit.Eventually(t, time.Minute, func() bool {
		return len(hosttest.Events(s, "pass-task.shipped", shipped)) == len(tasks)
	}, "all tasks are shipped")
	s.Host.EndPass(1, committed)
	ship(t, s, 2, base)
	shipping := stop()
	stop = peakMemory()
	s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage})
	hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 2 })
	applying := stop()
	t.Logf("peak of the Go runtime: %d MiB while shipping, %d MiB while applying", shipping>>20, applying>>20)
	require.Less(t, shipping, uint64(240<<20))
	require.Less(t, applying, uint64(240<<20))
	requireNoFailure(t, s)
}
