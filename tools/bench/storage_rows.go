package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
)

const checkedPages = "page blob against the source"

// lineageOf names the protection of machine i.
func lineageOf(i int) replica.Lineage {
	return replica.Lineage(fmt.Sprintf("0123456789abcdef0123456789ab%04x", i))
}

func (d disk) machine(i int) siteMachine {
	return siteMachine{VM: fmt.Sprintf("vm-%d", i), Lineage: lineageOf(i), Image: d.path, Size: d.size}
}

// samePages proves what was applied for machine i.
func (t *storageTarget) sameReplica(ctx context.Context, d disk, i int) error {
	footer, err := shipping.Footer(lineageOf(i), benchDisk, d.size)
	if err != nil {
		return err
	}
	return t.samePages(ctx, lineageOf(i).ReplicaContainer(), replica.DiskBlobName(benchDisk, 1), d, footer)
}

// storageRow copies the reference disk into one kind of storage: the product's two halves, each a process of its own, and
// azcopy.
func storageRow(k kindOf) func(context.Context, *Options) ([]subject, error) {
	return func(ctx context.Context, o *Options) ([]subject, error) {
		path := filepath.Join(o.Work, "reference-"+k.short()+".raw")
		d, err := makeDisk(path, o.Size, o.Seed)
		if err != nil {
			return nil, err
		}
		var ours usage
		product := func(compression string, segments int) subject {
			name := "landfall, compression " + compression
			if segments > 0 {
				name += fmt.Sprintf(", segments of %d MiB", segments/mib)
			}
			return subject{name: name, check: checkedPages, run: func(ctx context.Context, folder string) (sample, error) {
				s, err := copyIntoJournal(ctx, o, k, d, folder, compression, segments)
				if ours.wall == 0 || s.wall < ours.wall {
					ours = s.usage
				}
				return s, err
			}}
		}
		peer := subject{name: "azcopy --blob-type PageBlob", check: checkedPages}
		tool, err := exec.LookPath("azcopy")
		if err != nil {
			tool = azcopyPath(o.Root)
			if _, err := os.Stat(tool); err != nil {
				peer.missing = "azcopy is neither on PATH nor installed in tools/bench/azcopy (npm ci --ignore-scripts)"
			}
		}
		peer.run = func(ctx context.Context, folder string) (sample, error) {
			s, err := azcopyPages(ctx, k, d, folder, tool)
			if err == nil && ours.wall > 0 {
				s.figures = append(s.figures, figure{name: "IR-RATIO (landfall received / azcopy)", unit: "x", value: ours.wall.Seconds() / s.wall.Seconds(), most: 0.4})
			}
			return s, err
		}
		list := []subject{product("auto", 0), product("none", 0)}
		if k.name == cappedSink.name { // what smaller segments would do for the sender's memory
			list = append(list, product("none", 8*mib))
		}
		list = append(list, peer)
		if k.sink == nil {
			if _, err := exec.LookPath("node"); err != nil {
				for i := range list {
					list[i].missing = "Azurite needs Node"
				}
			}
		}
		return list, nil
	}
}

func (k kindOf) short() string {
	switch {
	case k.sink == nil:
		return "azurite"
	case k.unlimited:
		return "open"
	}
	return "capped"
}

// copyIntoJournal is the product: shipping until the base is received, then applying into the page blob.
func copyIntoJournal(ctx context.Context, o *Options, k kindOf, d disk, folder, compression string, segments int) (s sample, err error) {
	t, err := startTarget(ctx, k)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	served := t.cpu()
	var shipped siteResult
	u, err := runWorker(ctx, workerSite, siteTask{Account: t.account(), Folder: folder, Unsynced: o.small(), Machines: []siteMachine{d.machine(0)}, Compression: compression, SegmentBytes: segments}, &shipped)
	if err != nil {
		return s, err
	}
	u.wall = time.Duration(shipped.Seconds * float64(time.Second))
	journal, err := t.stats(ctx)
	if err != nil {
		return s, err
	}
	shipServed := t.cpu() - served
	if err := t.reset(ctx); err != nil {
		return s, err
	}
	var applied applyResult
	a, err := runWorker(ctx, workerApply, applyTask{Account: t.account(), Lineages: []replica.Lineage{lineageOf(0)}}, &applied)
	if err != nil {
		return s, err
	}
	pages, err := t.stats(ctx)
	if err != nil {
		return s, err
	}
	data := float64(d.data)
	figures := []figure{
		{name: "IR-BYTES journal (stored / data)", unit: "x", value: float64(shipped.Stored) / data, most: 1.02},
		{name: "IR-CPU sender", unit: "s/GiB", value: u.cpu.Seconds() / data * gib, most: 1.2},
		{name: "IR-MEM sender, peak resident", unit: "MiB", value: float64(u.peak) / mib, most: 104},
		{name: "CPU of the server meanwhile", unit: "s/GiB", value: shipServed.Seconds() / data * gib},
		{name: "processed: wall of applying alone", unit: "s", value: applied.Seconds},
		{name: "processed: CPU of the applier", unit: "s/GiB", value: a.cpu.Seconds() / data * gib},
		{name: "processed: peak memory of the applier", unit: "MiB", value: float64(a.peak) / mib},
		{name: "processed: page requests", unit: "requests", value: float64(applied.Requests)},
		{name: "IR-BYTES pages (written / data)", unit: "x", value: float64(applied.Written) / data, most: 1.02},
	}
	if t.control != "" {
		figures = append(figures,
			figure{name: "bodies sent to block blobs", unit: "x data", value: float64(journal.blocks) / data},
			figure{name: "bodies sent to the page blob", unit: "x data", value: float64(pages.pages) / data, most: 1.02},
			figure{name: "requests until received", unit: "requests", value: float64(journal.requests)})
	}
	if k.name == cappedSink.name {
		figures = append(figures,
			figure{name: "IR-CAP received: wall / (data / cap)", unit: "x", value: shipped.Seconds / (data / linkRate), most: 1.05},
			figure{name: "wall / (stored / cap)", unit: "x", value: shipped.Seconds / (float64(shipped.Stored) / linkRate)},
			// The sink's cap is shared by all bodies, and the applier reads the journal through it too.
			figure{name: "IR-CAP pages: wall of applying / ((stored + data) / cap)", unit: "x", value: applied.Seconds / ((float64(shipped.Stored) + data) / linkRate), most: 1.05})
	}
	s = sample{usage: u, in: d.data, out: shipped.Stored, figures: figures}
	return s, t.sameReplica(ctx, d, 0)
}

// azcopyPages is the peer.
func azcopyPages(ctx context.Context, k kindOf, d disk, folder, tool string) (s sample, err error) {
	t, err := startTarget(ctx, k)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	const container, name = "peer", "disk.raw"
	if err := t.store.CreateContainer(ctx, container); err != nil {
		return s, err
	}
	query, err := sas(t.conn)
	if err != nil {
		return s, err
	}
	served := t.cpu()
	cmd := exec.CommandContext(ctx, tool, "copy", d.path, part(t.conn, "BlobEndpoint")+"/"+container+"/"+name+"?"+query,
		"--blob-type", "PageBlob", "--from-to", "LocalBlob", "--log-level", "ERROR", "--skip-version-check")
	cmd.Env = append(os.Environ(), "AZCOPY_LOG_LOCATION="+folder, "AZCOPY_JOB_PLAN_LOCATION="+folder, "AZCOPY_DISABLE_SYSLOG=true")
	p, err := start(cmd)
	if err != nil {
		return s, err
	}
	u, err := p.wait()
	if err != nil {
		return s, err
	}
	m, err := t.stats(ctx)
	if err != nil {
		return s, err
	}
	data := float64(d.data)
	s = sample{usage: u, in: d.data, out: m.pages, figures: []figure{
		{name: "IR-CPU sender", unit: "s/GiB", value: u.cpu.Seconds() / data * gib},
		{name: "IR-MEM sender, peak resident", unit: "MiB", value: float64(u.peak) / mib},
		{name: "CPU of the server meanwhile", unit: "s/GiB", value: (t.cpu() - served).Seconds() / data * gib},
	}}
	if t.control != "" {
		s.figures = append(s.figures, figure{name: "IR-BYTES (bodies sent / data)", unit: "x", value: float64(m.pages) / data},
			figure{name: "requests", unit: "requests", value: float64(m.requests)})
	}
	if k.name == cappedSink.name {
		s.figures = append(s.figures, figure{name: "IR-CAP: wall / (data / cap)", unit: "x", value: u.wall.Seconds() / (data / linkRate)})
	}
	return s, t.samePages(ctx, container, name, d, nil)
}

// small says that the suite is tested, not used.
func (o *Options) small() bool { return o.Size < 256*mib }

// churnDisk is the largest disk of the rows that write as a guest.
const churnDisk = gib

// siteChurn runs a guest's writes against the strict sink, and reads the replica back at the end.
func siteChurn(ctx context.Context, o *Options, k kindOf, folder string, size int64, c churnTask) (u usage, out siteResult, err error) {
	d, err := makeDisk(filepath.Join(folder, "source.raw"), size, o.Seed)
	if err != nil {
		return u, out, err
	}
	t, err := startTarget(ctx, k)
	if err != nil {
		return u, out, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	c.Control, c.Seed = t.control, o.Seed
	if u, err = runWorker(ctx, workerSite, siteTask{Account: t.account(), Folder: folder, Unsynced: o.small(), Machines: []siteMachine{d.machine(0)}, Apply: true, Churn: &c}, &out); err != nil {
		return u, out, err
	}
	return u, out, t.sameReplica(ctx, d, 0)
}

// cycleOf the row dl-iops; the product's shortest is 30 s, which would make the row three times as long.
const cycleOf = 10 * time.Second

func sustainedChurn(_ context.Context, o *Options) ([]subject, error) {
	rates, cycles := []float64{8e6, 16e6}, 4
	if o.small() {
		rates, cycles = []float64{2e6}, 2
	}
	return []subject{{name: "change-tracker and uploader, " + strictOpen.name, check: checkedPages, once: true, run: func(ctx context.Context, folder string) (sample, error) {
		cycle := cycleOf
		if o.small() {
			cycle = time.Second
		}
		u, out, err := siteChurn(ctx, o, strictOpen, folder, min(o.Size, churnDisk), churnTask{Rates: rates, Block: 8 * kib, Cycle: cycle, Cycles: cycles})
		if err != nil {
			return sample{}, err
		}
		s := sample{usage: u}
		var best float64
		for i, r := range out.Churn.Rates {
			at := fmt.Sprintf("at %.0f MB/s: ", rates[i]/1e6)
			T := cycle.Seconds()
			bound := T + rates[i]*T/linkRate + 2
			if r.AgeP99 <= 2*T && r.Wrote >= 0.9*rates[i] {
				best = max(best, r.Wrote/1e6)
			}
			s.out += r.Stored
			s.figures = append(s.figures,
				figure{name: at + "written", unit: "MB/s", value: r.Wrote / 1e6},
				figure{name: at + "DL-RPO, p99 age of the newest durable point", unit: "s", value: r.AgeP99, most: bound},
				figure{name: at + "most from cut to received", unit: "s", value: r.Receive},
				figure{name: at + "urgent drain afterwards (backlog)", unit: "s", value: r.Drain, most: 2 * T},
				figure{name: at + "page requests", unit: "requests", value: float64(r.Moved.PageOps)},
				figure{name: at + "bytes to the page blob", unit: "MB", value: float64(r.Moved.Pages) / 1e6},
				figure{name: at + "answers 503", unit: "requests", value: float64(r.Moved.Refused)})
		}
		s.figures = append([]figure{{name: "DL-IOPS, highest rate with RPO <= 2 cycles", unit: "MB/s", value: best, least: 8}}, s.figures...)
		return s, nil
	}}}, nil
}

func scatteredPoint(_ context.Context, o *Options) ([]subject, error) {
	total := int64(64 * mib)
	if o.small() {
		total = o.Size / 64
	}
	bursts := []burst{{total, 64 * kib}, {total, 4 * kib}}
	return []subject{{name: "change-tracker and uploader, " + strictSink.name, check: checkedPages, once: true, run: func(ctx context.Context, folder string) (sample, error) {
		u, out, err := siteChurn(ctx, o, strictSink, folder, min(o.Size, churnDisk), churnTask{Bursts: bursts})
		if err != nil {
			return sample{}, err
		}
		s := sample{usage: u, in: total * int64(len(bursts))}
		for i, b := range out.Churn.Bursts {
			what := fmt.Sprintf("%.0f MiB in blocks of %d KiB: ", float64(total)/mib, bursts[i].Block/kib)
			s.out += b.Stored
			s.figures = append(s.figures,
				figure{name: what + "requests to received", unit: "requests", value: float64(b.ToReceived.Requests)},
				figure{name: what + "cut to received", unit: "s", value: b.Received},
				figure{name: what + "requests to processed", unit: "requests", value: float64(b.All.Requests)},
				figure{name: what + "of them to pages", unit: "requests", value: float64(b.All.PageOps)},
				figure{name: what + "cut to processed, urgent", unit: "s", value: b.Processed},
				figure{name: what + "stored", unit: "MiB", value: float64(b.Stored) / mib},
				figure{name: what + "bytes to the page blob", unit: "MiB", value: float64(b.All.Pages) / mib},
				figure{name: what + "answers 503", unit: "requests", value: float64(b.All.Refused)})
		}
		return s, nil
	}}}, nil
}

// restoreParallel are the reads in flight of the row rst; the first is the one stream, the second the product's default.
var restoreParallel = []int{1, 4, 16, 32}

func restoreRow(_ context.Context, o *Options) ([]subject, error) {
	return []subject{{name: "materialise, " + distantSink.name, check: "file against the source", once: true, run: func(ctx context.Context, folder string) (s sample, err error) {
		d, err := makeDisk(filepath.Join(folder, "source.raw"), o.Size, o.Seed)
		if err != nil {
			return s, err
		}
		t, err := startTarget(ctx, distantSink)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		var shipped siteResult
		if _, err = runWorker(ctx, workerSite, siteTask{Account: t.account(), Folder: folder, Unsynced: o.small(), Machines: []siteMachine{d.machine(0)}}, &shipped); err != nil {
			return s, err
		}
		s.in = shipped.Stored
		restore := func(from string) error {
			var first float64
			for _, n := range restoreParallel {
				file := filepath.Join(folder, "restored")
				if err := t.reset(ctx); err != nil {
					return err
				}
				var got restoreResult
				u, err := runWorker(ctx, workerRestore, restoreTask{Account: t.account(), Lineage: lineageOf(0), Point: 2, File: file, Parallel: n}, &got)
				if err != nil {
					return err
				}
				m, err := t.stats(ctx)
				if err != nil {
					return err
				}
				if err := errors.Join(d.sameFile(file), os.Remove(file)); err != nil {
					return err
				}
				what := fmt.Sprintf("from the %s, %d in flight: ", from, n)
				s.usage, s.out = s.plus(u), s.out+got.Bytes
				s.figures = append(s.figures,
					figure{name: what + "wall", unit: "s", value: got.Seconds},
					figure{name: what + "CPU", unit: "s", value: u.cpu.Seconds()},
					figure{name: what + "peak memory", unit: "MiB", value: float64(u.peak) / mib},
					figure{name: what + "requests", unit: "requests", value: float64(m.requests)})
				if n == 1 {
					first = got.Seconds
					continue
				}
				f := figure{name: what + "RST, times faster than one stream", unit: "x", value: first / got.Seconds}
				if n == restoreParallel[len(restoreParallel)-1] {
					f.least = 8
				}
				s.figures = append(s.figures, f)
			}
			return nil
		}
		if err := restore("journal"); err != nil {
			return s, err
		}
		if _, err := runWorker(ctx, workerApply, applyTask{Account: t.account(), Lineages: []replica.Lineage{lineageOf(0)}}, &applyResult{}); err != nil {
			return s, err
		}
		return s, restore("checkpoint")
	}}}, nil
}

// togetherDisks is how many disks the row sc-conc moves at once.
const togetherDisks = 16

func togetherRow(_ context.Context, o *Options) ([]subject, error) {
	size := max(o.Size/togetherDisks, mib)
	// Blobs may take as much as the whole link: one disk alone must be able to fill it.
	k := strictSink
	k.sink = append([]string{"-blob-bandwidth", "63e6"}, k.sink...)
	k.name = "sink, 63 MB/s in all and for a blob, 500 requests/s a blob, 20 ms"
	wide := siteTask{Concurrency: togetherDisks, Buffers: 2 * togetherDisks, SegmentBytes: 2 * mib}
	type setting struct {
		name  string
		disks int
		size  int64
		task  siteTask
	}
	var list []subject
	var alone float64
	for _, c := range []setting{
		{"1 disk of as much, default uploader", 1, o.Size, siteTask{}},
		{"16 disks, default uploader (4 tasks at once)", togetherDisks, size, siteTask{}},
		{"16 disks, 16 tasks at once, segments of 2 MiB", togetherDisks, size, wide},
	} {
		list = append(list, subject{name: c.name + ", " + k.name, check: checkedPages, once: true, run: func(ctx context.Context, folder string) (s sample, err error) {
			task := c.task
			task.Folder, task.Compression, task.Unsynced = folder, "none", o.small()
			disks := make([]disk, c.disks)
			lineages := make([]replica.Lineage, c.disks)
			var data int64
			for i := range disks {
				if disks[i], err = makeEqualDisk(filepath.Join(folder, fmt.Sprintf("source-%d.raw", i)), c.size, o.Seed+uint64(i)); err != nil {
					return s, err
				}
				task.Machines = append(task.Machines, disks[i].machine(i))
				lineages[i], data = lineageOf(i), data+disks[i].data
			}
			t, err := startTarget(ctx, k)
			if err != nil {
				return s, err
			}
			defer func() { err = errors.Join(err, t.close()) }()
			task.Account = t.account()
			var shipped siteResult
			if s.usage, err = runWorker(ctx, workerSite, task, &shipped); err != nil {
				return s, err
			}
			s.wall = time.Duration(shipped.Seconds * float64(time.Second))
			var applied applyResult
			a, err := runWorker(ctx, workerApply, applyTask{Account: t.account(), Lineages: lineages}, &applied)
			if err != nil {
				return s, err
			}
			s.in, s.out = data, shipped.Stored
			rate := float64(shipped.Stored) / shipped.Seconds
			apply := float64(applied.Written+shipped.Stored) / applied.Seconds // it reads the journal by the same link
			s.figures = []figure{
				{name: "SC-CONC ship: aggregate / link", unit: "x", value: rate / linkRate, least: 0.95},
				{name: "SC-CONC ship: fairness, slowest / fastest disk", unit: "x", value: fairness(shipped.Each), least: 0.8},
				{name: "SC-CONC apply: aggregate, read and written / link", unit: "x", value: apply / linkRate, least: 0.95},
				{name: "SC-CONC apply: fairness, slowest / fastest disk", unit: "x", value: fairness(applied.Each), least: 0.8},
				{name: "peak memory of the applier", unit: "MiB", value: float64(a.peak) / mib},
				{name: "CPU of the applier", unit: "s", value: a.cpu.Seconds()},
			}
			if c.disks == 1 {
				alone = rate
			} else if alone > 0 {
				s.figures = append(s.figures, figure{name: "ship: aggregate against one disk", unit: "x", value: rate / alone})
			}
			for i, d := range disks {
				if err := t.sameReplica(ctx, d, i); err != nil {
					return s, err
				}
			}
			return s, nil
		}})
	}
	return list, nil
}

// fairness of disks of equal data that began together, by when each was done.
func fairness(seconds []float64) float64 {
	least, most := seconds[0], seconds[0]
	for _, s := range seconds {
		least, most = min(least, s), max(most, s)
	}
	return least / most
}

// makeEqualDisk is a disk of which the first 60 % are random: disks that are compared must have equally much data.
func makeEqualDisk(path string, size int64, seed uint64) (disk, error) {
	f, err := os.Create(path)
	if err != nil {
		return disk{}, fmt.Errorf("make disk: %w", err)
	}
	d := disk{path: path, size: size}
	r, p := rand.New(rand.NewPCG(seed, 8)), make([]byte, mib)
	err = f.Truncate(size)
	for off := int64(0); off < max(size*6/10/mib, 1)*mib && err == nil; off += mib {
		random(r, p)
		_, err = f.WriteAt(p, off)
		d.data += mib
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return disk{}, fmt.Errorf("make disk: %w", err)
	}
	return d, nil
}
