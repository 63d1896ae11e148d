package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/tools/guest/image"
)

// The writes of the row guest-delta: one new file of random bytes on the data disk.
const (
	deltaBytes = 50e6
	deltaSize  = "50MB"
	deltaDisk  = "data"
	// deltaRounds are the increments of one run, whose medians are its figures.
	deltaRounds = 3
	// deltaGoal is the longest that an increment may take as a whole command, in seconds.
	deltaGoal = 1
)

// everySecond cuts as often as a policy may; rows pause it, so that they choose the moment.
const everySecond = "name: bench\ncopy_interval: 1s\n"

// guestDelta copies 50 MB that the guest has just written, as one command.
func guestDelta(o *Options) []subject {
	return []subject{
		{
			name: "landfall resume to recovery-point.received", check: "test failover boots: every file, the ledger across disks",
			run: func(ctx context.Context, folder string) (sample, error) { return productDelta(ctx, o, folder) },
		},
		{
			name: "QEMU blockdev-backup sync=incremental to qcow2", check: "increments committed to the full copy, qemu-img compare",
			run: func(ctx context.Context, folder string) (sample, error) { return pushDelta(ctx, o, folder) },
		},
		{
			name: "virtnbdbackup -l inc", check: "virtnbdrestore, qemu-img compare", missing: virtnbdMissing(),
			run: func(ctx context.Context, folder string) (sample, error) { return virtnbdDelta(ctx, o, folder) },
		},
	}
}

// received is the event of a point that is durable in the journal.
type received struct {
	at      time.Time
	Point   uint64    `json:"point,string"`
	CutTime time.Time `json:"cutTime"`
	Stored  int64     `json:"storedBytes,string"`
	Changed int64     `json:"changedBytes,string"`
}

// listener hears the product's events by its command line. It is started before what is measured.
type listener struct {
	cmd    *exec.Cmd
	events *json.Decoder
	stop   context.CancelFunc
}

// listen starts to hear events; the first one, of the past, shows that it does. Close it in any case.
func (p *product) listen(ctx context.Context) (*listener, error) {
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	l := &listener{cmd: exec.CommandContext(ctx, p.bin, "events", "--follow", "--vm", machine, "--state", p.state(), "-o", "json"), stop: cancel}
	out, err := l.cmd.StdoutPipe()
	if err == nil {
		err = l.cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("landfall events: %w", err)
	}
	l.events = json.NewDecoder(out)
	if _, _, err := l.next(); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *listener) close() {
	l.stop()
	_ = l.cmd.Wait() // it was killed
}

// next is the next event; ok says that it is of a received point.
func (l *listener) next() (r received, ok bool, err error) {
	var e struct {
		Type    string    `json:"type"`
		Time    time.Time `json:"time"`
		Payload string    `json:"payload"`
	}
	if err := l.events.Decode(&e); err != nil {
		return r, false, fmt.Errorf("landfall events: %w", err)
	}
	if !strings.HasSuffix(e.Type, "recovery-point.received") {
		return r, false, nil
	}
	r.at = e.Time
	if err := json.Unmarshal([]byte(e.Payload), &r); err != nil {
		return r, false, fmt.Errorf("event %s: %w", e.Type, err)
	}
	return r, true, nil
}

// receivedAfter waits for the first point that was cut after a moment.
func (l *listener) receivedAfter(after time.Time) (received, error) {
	for {
		r, ok, err := l.next()
		if err != nil {
			return r, err
		}
		if ok && r.CutTime.After(after) {
			return r, nil
		}
	}
}

// shipped waits until everything that was written so far is.
func (p *product) shipped(ctx context.Context) error {
	l, err := p.listen(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	_, err = l.receivedAfter(time.Now())
	return err
}

// pause stops the product's cycles; writes are tracked all the same.
func (p *product) pause(ctx context.Context) error {
	if err := p.cli(ctx, nil, "pause", machine); err != nil {
		return err
	}
	return p.until(ctx, func() (bool, error) {
		state, _, err := p.protectionState(ctx)
		return state == "PROTECTION_STATE_PAUSED", errors.Join(err, fmt.Errorf("state %s", state))
	})
}

// increment has the product take one point of what write writes, in a machine that is otherwise quiet. The writer of the
// policy's cycles is paused before and resumed after: resuming is the command that asks for a point.
func (p *product) increment(ctx context.Context, g *labGuest, write func() error) (s sample, r received, device int64, err error) {
	if err := p.pause(ctx); err != nil {
		return s, r, 0, err
	}
	before, err := g.devicesWrote(ctx)
	if err == nil {
		err = write()
	}
	if err != nil {
		return s, r, 0, err
	}
	after, err := g.devicesWrote(ctx)
	if err != nil {
		return s, r, 0, err
	}
	l, err := p.listen(ctx)
	if err != nil {
		return s, r, 0, err
	}
	defer l.close()
	begin, guest := p.mark(), g.cpu()
	if err := p.cli(ctx, nil, "resume", machine); err != nil {
		return s, r, 0, err
	}
	resumed := time.Since(begin.at)
	if r, err = l.receivedAfter(begin.at); err != nil {
		return s, r, 0, err
	}
	s.usage = p.since(begin)
	program := s.cpu
	s.cpu += g.cpu() - guest
	s.wall = r.at.Sub(begin.at)
	s.in, s.out = after-before, r.Stored
	s.figures = []figure{
		{name: "command to received", unit: "s", value: s.wall.Seconds()},
		{name: "of it: the command itself", unit: "s", value: resumed.Seconds()},
		{name: "of it: command to cut", unit: "s", value: r.CutTime.Sub(begin.at).Seconds()},
		{name: "of it: cut to received", unit: "s", value: r.at.Sub(r.CutTime).Seconds()},
		{name: "CPU of the program", unit: "s", value: program.Seconds()},
		{name: "CPU of the source's QEMU", unit: "s", value: (s.cpu - program).Seconds()},
	}
	return s, r, after - before, nil
}

func productDelta(ctx context.Context, o *Options, folder string) (s sample, err error) {
	g, p, err := quietProduct(ctx, o, folder)
	if err != nil {
		return s, err
	}
	defer g.end()
	defer p.kill()
	var rounds []sample
	for range deltaRounds {
		one, r, device, err := p.increment(ctx, g, func() error {
			_, err := g.vm.WriteLoad(ctx, deltaSize, deltaDisk)
			return err
		})
		if err != nil {
			return s, err
		}
		one.figures[0].most = deltaGoal
		one.figures = append(one.figures, shippedOver(r, deltaBytes, device)...)
		rounds = append(rounds, one)
	}
	s = medians(rounds)
	s.peak = p.proc.peakSoFar()
	return s, p.prove(ctx, g, folder)
}

// shippedOver are a point's bytes over what was written.
func shippedOver(r received, written, device int64) []figure {
	return []figure{
		{name: "shipped / written by the program", unit: "x", value: float64(r.Stored) / float64(written)},
		{name: "shipped / written to the devices", unit: "x", value: float64(r.Stored) / float64(device)},
		{name: "changed, before compression / written to the devices", unit: "x", value: float64(r.Changed) / float64(device)},
	}
}

// quietProduct is a protected guest whose own writer rests.
func quietProduct(ctx context.Context, o *Options, folder string) (*labGuest, *product, error) {
	g, err := startGuest(ctx, o, folder, image.QCOW2)
	if err != nil {
		return nil, nil, err
	}
	p, err := startGuestProduct(ctx, o.Bin, folder, g, everySecond)
	if err == nil {
		if err = g.quiet(ctx); err != nil {
			p.kill()
		}
	}
	if err != nil {
		g.end()
		return nil, nil, err
	}
	return g, p, nil
}

// prove boots the newest point and has it verify itself.
func (p *product) prove(ctx context.Context, g *labGuest, folder string) (err error) {
	out, err := filepath.Abs(filepath.Join(folder, "out"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, endRecovered(out)) }() // a clean-up left nothing to end
	f, err := p.failover(ctx, out, testFailover, machine, "--point", "latest")
	if err != nil {
		return err
	}
	if err := g.recovered(out, f); err != nil {
		return err
	}
	return p.cli(ctx, nil, "failover", "cleanup", machine, "--wait")
}

// medians makes one sample of the rounds of a run, figure by figure.
func medians(list []sample) sample {
	over := func(f func(s sample) float64) float64 {
		var v []float64
		for _, s := range list {
			v = append(v, f(s))
		}
		return spread(v).Median
	}
	out := list[0]
	out.wall = time.Duration(over(func(s sample) float64 { return float64(s.wall) }))
	out.cpu = time.Duration(over(func(s sample) float64 { return float64(s.cpu) }))
	out.system = time.Duration(over(func(s sample) float64 { return float64(s.system) }))
	out.in = int64(over(func(s sample) float64 { return float64(s.in) }))
	out.out = int64(over(func(s sample) float64 { return float64(s.out) }))
	out.figures = append([]figure(nil), out.figures...)
	for k := range out.figures {
		out.figures[k].value = over(func(s sample) float64 { return s.figures[k].value })
	}
	return out
}

// Scattered writes of the row guest-bytes: blocks of 4 KiB, each alone in its 64 KiB of a file that is full of random bytes.
const (
	scattered     = 64
	scatteredFile = "/data/landfall/.tmp-scattered"
	ledgerTime    = 5 * time.Second
)

// guestBytes ships what three known patterns write.
func guestBytes(o *Options) []subject {
	return []subject{{
		name: "landfall up", check: "test failover boots: every file, the ledger across disks", once: true,
		run: func(ctx context.Context, folder string) (s sample, err error) {
			g, p, err := quietProduct(ctx, o, folder)
			if err != nil {
				return s, err
			}
			defer g.end()
			defer p.kill()
			if err := g.shell(ctx, "dd if=/dev/urandom of="+scatteredFile+" bs=256k count=64 && sync"); err != nil {
				return s, err
			}
			if err := p.shipped(ctx); err != nil {
				return s, err
			}
			for _, pattern := range []struct {
				name    string
				written int64
				write   func() error
			}{
				{"a new file of 50 MB", deltaBytes, func() error {
					_, err := g.vm.WriteLoad(ctx, deltaSize, deltaDisk)
					return err
				}},
				{fmt.Sprintf("%d blocks of 4 KiB, scattered", scattered), scattered * page, func() error {
					return g.shell(ctx, fmt.Sprintf("i=0; while [ $i -lt %d ]; do dd if=/dev/urandom of=%s bs=4k count=1 seek=$((i*64)) conv=notrunc || exit 1; i=$((i+1)); done; sync", scattered, scatteredFile))
				}},
				{"ledger and files, 20 steps a second", 0, func() error {
					if err := g.vm.SetRate(ctx, 20); err != nil {
						return err
					}
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(ledgerTime):
					}
					return g.quiet(ctx)
				}},
			} {
				one, r, device, err := p.increment(ctx, g, pattern.write)
				if err != nil {
					return s, fmt.Errorf("%s: %w", pattern.name, err)
				}
				s.usage = s.plus(one.usage)
				s.in, s.out = s.in+one.in, s.out+one.out
				for _, f := range shippedOver(r, max(pattern.written, 1), device) {
					if pattern.written == 0 && strings.HasSuffix(f.name, "program") { // nobody counts them
						continue
					}
					f.name = pattern.name + ": " + f.name
					s.figures = append(s.figures, f)
				}
				s.figures = append(s.figures, figure{name: pattern.name + ": written to the devices", unit: "MB", value: float64(device) / 1e6})
			}
			return s, p.prove(ctx, g, folder)
		},
	}}
}

// sameAsSource compares a copy of a disk with the source's image, whose machine must be stopped.
func sameAsSource(ctx context.Context, g *labGuest, source, to string, format image.Format) error {
	if _, err := run(ctx, "qemu-img", "compare", "-U", "-f", string(g.config.Data.Format), "-F", string(format), source, to); err != nil {
		return fmt.Errorf("result differs from its source: %w", err)
	}
	return nil
}

// syncFolder makes the files of a folder durable and says how long it took and how much they are.
func syncFolder(folder string) (took time.Duration, size int64, err error) {
	files, err := os.ReadDir(folder)
	if err != nil {
		return 0, 0, err
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			return took, size, err
		}
		if !info.Mode().IsRegular() {
			continue
		}
		size += allocated(info)
		one, err := syncFile(filepath.Join(folder, f.Name()))
		took += one
		if err != nil {
			return took, size, err
		}
	}
	return took, size, nil
}
