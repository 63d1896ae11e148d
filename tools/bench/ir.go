package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// calm is a policy that cuts no point while a row is measured, but for those that the row asks for.
const calm = "name: bench\ncopy_interval: 5m\n"

const compared = "landfall disk compare with the source"

// initialReplication copies the reference disk as a whole.
func initialReplication(_ context.Context, o *Options) ([]subject, error) {
	d, err := makeDisk(filepath.Join(o.Work, "reference.raw"), o.Size, o.Seed)
	if err != nil {
		return nil, err
	}
	landfall := filepath.Join(o.Bin, "landfall")
	peer := func(name, tool string, copied func(ctx context.Context, folder, to string) (usage, error)) subject {
		s := subject{name: name, check: compared}
		if _, err := exec.LookPath(tool); err != nil {
			s.missing = tool + " is not on PATH"
		}
		s.run = func(ctx context.Context, folder string) (sample, error) {
			to := filepath.Join(folder, "copy")
			u, err := copied(ctx, folder, to)
			if err != nil {
				return sample{}, err
			}
			synced, err := syncFile(to)
			if err != nil {
				return sample{}, err
			}
			u.wall += synced
			info, err := os.Stat(to)
			if err != nil {
				return sample{}, err
			}
			out := allocated(info)
			return sample{usage: u, in: d.data, out: out, figures: perData(u, out, d.data)}, sameDisk(ctx, landfall, d.path, to)
		}
		return s
	}
	return []subject{
		{name: "landfall up, protect --wait", check: "test failover, " + compared, run: func(ctx context.Context, folder string) (sample, error) {
			return d.protect(ctx, o.Bin, folder)
		}},
		peer("nbdcopy to nbdkit file", "nbdkit", func(ctx context.Context, folder, to string) (usage, error) {
			return nbdcopy(ctx, d, folder, to)
		}),
		peer("qemu-img convert -O vpc fixed", "qemu-img", func(ctx context.Context, _, to string) (usage, error) {
			return run(ctx, "qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size=on", d.path, to)
		}),
		peer("cp --sparse=always", "cp", func(ctx context.Context, _, to string) (usage, error) {
			return run(ctx, "cp", "--sparse=always", "--reflink=never", d.path, to)
		}),
	}, nil
}

func perData(u usage, out, data int64) []figure {
	return []figure{
		{name: "bytes out / data", unit: "x", value: float64(out) / float64(data)},
		{name: "CPU per GiB of data", unit: "s/GiB", value: u.cpu.Seconds() / float64(data) * gib},
		{name: "of it outside the kernel", unit: "s/GiB", value: (u.cpu - u.system).Seconds() / float64(data) * gib},
	}
}

// nbdcopy copies to a server of its own, whose processor time counts.
func nbdcopy(ctx context.Context, d disk, folder, to string) (usage, error) {
	if _, err := exec.LookPath("nbdcopy"); err != nil {
		return usage{}, err
	}
	f, err := os.Create(to)
	if err != nil {
		return usage{}, err
	}
	if err := errors.Join(f.Truncate(d.size), f.Close()); err != nil {
		return usage{}, err
	}
	socket := filepath.Join(folder, "nbd")
	server, err := start(exec.CommandContext(ctx, "nbdkit", "-f", "-U", socket, "file", to))
	if err != nil {
		return usage{}, err
	}
	if err := waitFor(ctx, socket); err != nil {
		_, ended := server.end()
		return usage{}, errors.Join(err, ended)
	}
	copied, err := run(ctx, "nbdcopy", d.path, "nbd+unix:///?socket="+socket)
	served, ended := server.end()
	served.wall = 0
	return copied.plus(served), errors.Join(err, ended)
}

// waitFor waits until a file exists.
func waitFor(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", path, ctx.Err())
		case <-t.C:
		}
	}
}

// protect runs the product from an empty state to a protected machine, then proves the copy. Wall and CPU are those of
// `protect --wait`; the applying that goes on behind it is a figure of its own.
func (d disk) protect(ctx context.Context, bin, folder string) (sample, error) {
	p, err := startProduct(ctx, bin, folder, d.path, calm)
	if err != nil {
		return sample{}, err
	}
	defer p.kill()
	begin := p.mark()
	if err := p.cli(ctx, nil, "protect", machine, "--policy", "bench", "--wait"); err != nil {
		return sample{}, err
	}
	protected := p.since(begin)
	_, lineage, err := p.protectionState(ctx)
	if err != nil {
		return sample{}, err
	}
	if err := p.processed(ctx); err != nil {
		return sample{}, err
	}
	processed := p.since(begin)
	rto, err := p.drill(ctx, d.path)
	if err != nil {
		return sample{}, err
	}
	all, err := p.end()
	if err != nil {
		return sample{}, err
	}
	got, err := p.segments(ctx, lineage, 0)
	if err != nil {
		return sample{}, err
	}
	data := float64(d.data)
	s := sample{usage: protected, in: d.data, out: got.stored, figures: []figure{
		{name: "IR-BYTES (stored / data)", unit: "x", value: float64(got.stored) / data, most: 1.02},
		{name: "IR-BYTES before compression", unit: "x", value: float64(got.raw) / data, most: 1.02},
		{name: "IR-CPU (process, until protected)", unit: "s/GiB", value: protected.cpu.Seconds() / data * gib, most: 1.2},
		{name: "of it outside the kernel", unit: "s/GiB", value: (protected.cpu - protected.system).Seconds() / data * gib},
		{name: "CPU until processed", unit: "s/GiB", value: processed.cpu.Seconds() / data * gib},
		{name: "of it outside the kernel", unit: "s/GiB", value: (processed.cpu - processed.system).Seconds() / data * gib},
		{name: "wall until processed", unit: "s", value: processed.wall.Seconds()},
		{name: "test failover", unit: "s", value: rto.Seconds()},
		{name: "peak memory until protected", unit: "MiB", value: float64(protected.peak) / mib},
		{name: "peak memory (whole run)", unit: "MiB", value: float64(all.peak) / mib, most: 256},
		{name: "segments", unit: "", value: float64(got.segments)},
	}}
	s.peak = all.peak
	return s, nil
}
