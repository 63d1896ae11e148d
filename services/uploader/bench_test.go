//go:build unix

package uploader_test

import (
	"context"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/hosttest"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
	"github.com/landfall-dr/landfall/services/uploader"
)

// cpu is the processor time of this process.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// model fills a disk as the reference disk of the measurements: 40 % hole, 30 % random, 30 % word-like text, in runs of
// 1 MiB.
func model(image *hosttest.Image) {
	rng := rand.New(rand.NewPCG(1, 2))
	words := make([][]byte, 2000)
	for i := range words {
		for range 2 + rng.IntN(9) {
			words[i] = append(words[i], 'a'+byte(rng.IntN(26)))
		}
		words[i] = append(words[i], ' ')
	}
	common := rand.NewZipf(rng, 1.1, 4, uint64(len(words)-1))
	p := make([]byte, 1<<20)
	for off := int64(0); off < image.Size(); off += 1 << 20 {
		switch r := rng.IntN(10); {
		case r < 4:
			continue
		case r < 7:
			testkit.Fill(p, uint64(off))
		default:
			for q := p; len(q) > 0; {
				q = q[copy(q, words[common.Uint64()]):]
			}
		}
		image.WriteAt(p, off)
	}
}

// BenchmarkInitialReplication ships the 256 MiB model into a folder and applies it. The host is in the same process: its
// reads, checksums and gRPC are in the processor time.
func BenchmarkInitialReplication(b *testing.B) {
	const size = 256 << 20
	image := hosttest.NewImage(size)
	model(image)
	for b.Loop() {
		b.StopTimer()
		s := hosttest.NewSite(b, folder(b))
		s.Host.ChunkBytes = 1 << 20
		s.Host.AddDisk("os", image.Freeze())
		c := uploader.Default()
		c.Site, c.Apply.SoleApplier = hosttest.SiteID, true
		service, err := uploader.New(c, uploader.Deps{Bus: s.Connect("uploader"), Store: s.Store, Hosts: s.Hosts("uploader")})
		require.NoError(b, err)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- service.Run(ctx) }()
		s.Host.StartPass(1, full, false)
		task := s.PassTasks(1, 0, 1, full, size)[0]
		before := cpu(b)
		b.StartTimer()
		s.Publish(bus.KindShip, task)
		e := hosttest.Await(s, "pass-task.shipped", shipped, func(*eventsv1.PassTaskShipped) bool { return true })
		b.StopTimer()
		shipCPU := cpu(b) - before
		s.Host.EndPass(1, committed)
		s.Publish(bus.KindShip, s.PointTask(2, s.Host.Cut(2), 1, base))
		awaitPoint(s, 2)
		before, started := cpu(b), time.Now()
		s.Publish(bus.KindApply, &uploaderv1.ApplyTask{Vm: hosttest.VMName, Lineage: hosttest.Lineage})
		hosttest.Await(s, "recovery-point.processed", processed, func(e *eventsv1.RecoveryPointProcessed) bool { return e.GetPoint() == 2 })
		data := float64(image.Allocated().Bytes())
		b.ReportMetric(float64(e.GetStoredBytes())/data, "stored/data")
		b.ReportMetric(shipCPU.Seconds(), "ship-cpu-s")
		b.ReportMetric(shipCPU.Seconds()/data*(1<<30), "ship-cpu-s/GiB")
		b.ReportMetric((cpu(b) - before).Seconds(), "apply-cpu-s")
		b.ReportMetric(time.Since(started).Seconds(), "apply-s")
		cancel()
		require.NoError(b, <-done)
		b.StartTimer()
	}
	b.SetBytes(image.Allocated().Bytes())
}
