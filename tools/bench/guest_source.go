package bench

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// ownCPU is what this program has used.
func ownCPU() time.Duration {
	all, _, _ := cpuOf(os.Getpid()) // 0 where it is not measured
	return all
}

// guestSource reads the data disk of a stopped guest, with 100 MB of random bytes on it, as the change-tracker gives it to
// an uploader, and as nbdcopy reads the same live export.
func guestSource(o *Options) []subject {
	return []subject{
		{
			name: "change-tracker, pass over the live export", check: "SHA-256 of the disk, the same for both",
			run: func(ctx context.Context, folder string) (sample, error) {
				return readSource(ctx, o, folder, func(ctx context.Context, h *hostRig, g *labGuest) (sample, string, error) {
					return h.reading(ctx, g, func(read func(chunk) error) error { return h.ranges(ctx, read) })
				})
			},
		},
		{
			name: "nbdcopy of the live export to null:", check: "SHA-256 of the disk, the same for both", missing: onPath("nbdcopy"),
			run: func(ctx context.Context, folder string) (sample, error) {
				return readSource(ctx, o, folder, copyExport)
			},
		},
		{
			name: "change-tracker, point of 50 MB written", check: "length of the changes: at least what was written",
			run: func(ctx context.Context, folder string) (sample, error) { return readPoint(ctx, o, folder) },
		},
	}
}

func onPath(tool string) string {
	if _, err := exec.LookPath(tool); err != nil {
		return tool + " is not on PATH"
	}
	return ""
}

// chunk is a piece of a disk, of either stream.
type chunk interface {
	GetOffset() int64
	GetLength() int64
	GetZero() bool
	GetData() []byte
}

// ranges streams a pass over the data disk.
func (h *hostRig) ranges(ctx context.Context, each func(chunk) error) error {
	stream, err := h.reader.ReadRanges(ctx, &changetrackerv1.ReadRangesRequest{Vm: machineID, Lineage: benchLineage, Disk: deltaDisk, Pass: h.last})
	if err != nil {
		return err
	}
	return drain(stream.Recv, each)
}

// changes streams the open point's changes of the data disk.
func (h *hostRig) changes(ctx context.Context, each func(chunk) error) error {
	stream, err := h.reader.ReadChanges(ctx, &changetrackerv1.ReadChangesRequest{Vm: machineID, Lineage: benchLineage, Disk: deltaDisk, Point: h.last})
	if err != nil {
		return err
	}
	return drain(stream.Recv, each)
}

func drain[T chunk](recv func() (T, error), each func(chunk) error) error {
	for {
		c, err := recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = each(c)
		}
		if err != nil {
			return err
		}
	}
}

// readings is how often a source is read for one figure: processor time is counted in ticks of 10 ms.
const readings = 4

// taken measures f, on average of several readings: its wall time, and the processor time of this program, or of another
// whose time f returns, and of QEMU.
func taken(g *labGuest, f func() (other time.Duration, err error)) (s sample, err error) {
	began, self, hypervisor := time.Now(), ownCPU(), g.cpu()
	var program time.Duration
	for range readings {
		other, failed := f()
		if failed != nil {
			return s, failed
		}
		program += other
	}
	s.wall = time.Since(began) / readings
	if program == 0 {
		program = ownCPU() - self
	}
	program /= readings
	server := (g.cpu() - hypervisor) / readings
	s.cpu = program + server
	s.figures = []figure{
		{name: "CPU of the reader", unit: "s", value: program.Seconds()},
		{name: "CPU of QEMU", unit: "s", value: server.Seconds()},
	}
	return s, nil
}

// perByte adds throughput over n bytes of the disk.
func perByte(s sample, n int64) sample {
	s.in = n
	s.figures = append([]figure{
		{name: "throughput", unit: "MB/s", value: float64(n) / 1e6 / s.wall.Seconds()},
		{name: "CPU per GiB, QEMU included", unit: "s/GiB", value: s.cpu.Seconds() / float64(n) * gib},
	}, s.figures...)
	return s
}

// readSource opens a pass over a stopped guest and has f read it several times.
func readSource(ctx context.Context, o *Options, folder string, f func(context.Context, *hostRig, *labGuest) (sample, string, error)) (s sample, err error) {
	g, h, end, err := guestOnHost(ctx, o, folder)
	if err != nil {
		return s, err
	}
	defer end(&err)
	for range 2 {
		if _, err := g.vm.WriteLoad(ctx, deltaSize, deltaDisk); err != nil {
			return s, err
		}
	}
	if err := g.quiet(ctx); err != nil {
		return s, err
	}
	if err := h.begin(ctx); err != nil {
		return s, err
	}
	if err := g.vm.QMP(ctx, "stop", nil, nil); err != nil {
		return s, err
	}
	want, err := imageSum(ctx, g, folder)
	if err != nil {
		return s, err
	}
	var rounds []sample
	for range deltaRounds {
		one, sum, err := f(ctx, h, g)
		if err != nil {
			return s, err
		}
		if sum != want {
			return s, fmt.Errorf("the disk read has SHA-256 %s, the image %s", sum, want)
		}
		rounds = append(rounds, one)
	}
	return medians(rounds), nil
}

// imageSum is the SHA-256 of the stopped guest's data disk, by qemu-img.
func imageSum(ctx context.Context, g *labGuest, folder string) (string, error) {
	raw := filepath.Join(folder, "data.check")
	defer os.Remove(raw)
	if _, err := run(ctx, "qemu-img", "convert", "-U", "-f", string(g.config.Data.Format), "-O", "raw", g.config.Data.Path, raw); err != nil {
		return "", err
	}
	return fileSum(raw)
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// reading takes a stream twice: once measured, once to know its content.
func (h *hostRig) reading(ctx context.Context, g *labGuest, read func(func(chunk) error) error) (s sample, sum string, err error) {
	s, err = taken(g, func() (time.Duration, error) {
		return 0, read(func(chunk) error { return nil })
	})
	if err != nil {
		return s, "", err
	}
	hash, next, zero := sha256.New(), int64(0), make([]byte, mib)
	zeros := func(n int64) {
		for n > 0 {
			k := min(n, mib)
			hash.Write(zero[:k])
			n -= k
		}
	}
	err = read(func(c chunk) error {
		if c.GetOffset() < next {
			return fmt.Errorf("chunk at %d comes after %d", c.GetOffset(), next)
		}
		zeros(c.GetOffset() - next)
		if c.GetZero() {
			zeros(c.GetLength())
		} else {
			hash.Write(c.GetData())
		}
		next = c.GetOffset() + c.GetLength()
		return nil
	})
	if err != nil {
		return s, "", err
	}
	zeros(guestDiskBytes - next)
	return perByte(s, guestDiskBytes), hex.EncodeToString(hash.Sum(nil)), nil
}

// guestDiskBytes is the size of each of the lab guest's disks (image.Default).
const guestDiskBytes = 256 * mib

// copyExport is the peer: the measured copy goes nowhere, another one is compared.
func copyExport(ctx context.Context, h *hostRig, g *labGuest) (s sample, sum string, err error) {
	uri := h.source.uri(deltaDisk)
	s, err = taken(g, func() (time.Duration, error) {
		u, err := run(ctx, "nbdcopy", uri, "null:")
		return u.cpu, err
	})
	if err != nil {
		return s, "", err
	}
	to := filepath.Join(g.config.Dir, "copied")
	defer os.Remove(to)
	if _, err := run(ctx, "nbdcopy", uri, to); err != nil {
		return s, "", err
	}
	sum, err = fileSum(to)
	return perByte(s, guestDiskBytes), sum, err
}

// readPoint reads the changes of points of 50 MB.
func readPoint(ctx context.Context, o *Options, folder string) (s sample, err error) {
	g, h, end, err := guestOnHost(ctx, o, folder)
	if err != nil {
		return s, err
	}
	defer end(&err)
	if err := g.quiet(ctx); err != nil {
		return s, err
	}
	var rounds []sample
	for range deltaRounds {
		if _, err := g.vm.WriteLoad(ctx, deltaSize, deltaDisk); err != nil {
			return s, err
		}
		if _, err := h.cut(ctx, typesv1.Consistency_CONSISTENCY_CRASH); err != nil {
			return s, err
		}
		var n int64
		one, err := taken(g, func() (time.Duration, error) {
			n = 0
			return 0, h.changes(ctx, func(c chunk) error { n += c.GetLength(); return nil })
		})
		if err == nil && n < deltaBytes {
			err = fmt.Errorf("%d bytes of changes, %d were written", n, int64(deltaBytes))
		}
		if err = errors.Join(err, h.settle(ctx)); err != nil {
			return s, err
		}
		rounds = append(rounds, perByte(one, n))
	}
	return medians(rounds), nil
}
