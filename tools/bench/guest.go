package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/guestvm"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

// Limits of the lab guest under software emulation on a busy machine.
const (
	buildTimeout = 5 * time.Minute
	bootTimeout  = 4 * time.Minute
	// runTimeout bounds one run of a guest row.
	runTimeout = 15 * time.Minute
)

// guestRow makes the subjects of a row that needs the lab guest; where it cannot run, all say why.
func guestRow(subjects func(o *Options) []subject) func(context.Context, *Options) ([]subject, error) {
	return func(ctx context.Context, o *Options) ([]subject, error) {
		list := subjects(o)
		missing := ""
		if err := image.Missing(true); err != nil {
			missing = strings.ReplaceAll(err.Error(), "\n", "; ")
		} else if err := buildGuest(ctx, o); err != nil {
			return nil, err
		}
		for i := range list {
			if list[i].missing == "" {
				list[i].missing = missing
			}
			run := list[i].run
			list[i].run = func(ctx context.Context, folder string) (sample, error) {
				ctx, cancel := context.WithTimeout(ctx, runTimeout)
				defer cancel()
				return run(ctx, folder)
			}
		}
		return list, nil
	}
}

// guestImage is where the suite's one guest is.
func guestImage(o *Options) image.Image {
	folder := filepath.Join(o.Work, "guest")
	return image.Image{OS: filepath.Join(folder, "os.raw"), Data: filepath.Join(folder, "data.raw")}
}

// buildGuest makes the guest's image at the first row that needs it.
func buildGuest(ctx context.Context, o *Options) error {
	img := guestImage(o)
	if _, err := os.Stat(img.OS); err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	options := image.Default()
	options.Out = filepath.Dir(img.OS)
	program, err := filepath.Abs(filepath.Join(o.Work, "landfall-guest"))
	if err != nil {
		return err
	}
	options.Program = program
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./tools/guest/cmd/landfall-guest")
	build.Dir = o.Root
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the guest's program: %w: %s", err, out)
	}
	fmt.Fprintf(o.Progress, "%s  building the lab guest\n", time.Now().Format("15:04:05"))
	_, err = image.Build(ctx, options)
	return err
}

// labGuest is the lab guest in a QEMU of its own, and what it acknowledged when.
type labGuest struct {
	config guestvm.Config
	vm     *guestvm.VM
	// machines is the folder that tells the product of the machine; sockets has short paths for it.
	machines, sockets string

	mu   sync.Mutex
	acks []ack
	quit context.CancelFunc
	all  sync.WaitGroup
}

type ack struct {
	at time.Time
	n  uint64
}

// startGuest boots the lab guest with disks of its own and waits until it writes.
func startGuest(ctx context.Context, o *Options, folder string, format image.Format) (*labGuest, error) {
	sockets, err := os.MkdirTemp("", "lfb")
	if err != nil {
		return nil, err
	}
	g := &labGuest{config: guestvm.Config{Name: machine, Dir: folder, Sockets: sockets, Mode: guestvm.BIOS}, machines: filepath.Join(folder, "machines"), sockets: sockets}
	if g.config.OS, g.config.Data, err = guestvm.MakeDisks(ctx, guestImage(o), folder, format); err == nil {
		err = os.MkdirAll(g.machines, 0o750)
	}
	if err == nil {
		definition := fmt.Sprintf("version: 1\nid: %s\nname: %s\nqmp: %s\nagent: %s\nfirmware: bios\ngeneration: 2\n", machineID, machine, g.config.QMPPath(), g.config.AgentPath())
		err = os.WriteFile(filepath.Join(g.machines, machine+".yaml"), []byte(definition), 0o600)
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, bootTimeout)
		defer cancel()
		if g.vm, err = guestvm.Start(ctx, g.config); err == nil {
			g.follow()
			err = g.vm.WaitReady(ctx)
		}
		if err == nil {
			err = g.vm.WaitAcked(ctx, 5)
		}
	}
	if err != nil {
		g.end()
		return nil, fmt.Errorf("lab guest: %w", err)
	}
	return g, nil
}

// follow records what is acknowledged when.
func (g *labGuest) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	g.quit = cancel
	g.all.Go(func() {
		t := time.NewTicker(5 * time.Millisecond)
		defer t.Stop()
		for {
			n := g.vm.Acked()
			g.mu.Lock()
			if k := len(g.acks); n > 0 && (k == 0 || g.acks[k-1].n != n) {
				g.acks = append(g.acks, ack{time.Now(), n})
			}
			g.mu.Unlock()
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
		}
	})
}

// ackedBefore is the newest step that was surely acknowledged before a moment.
func (g *labGuest) ackedBefore(at time.Time) (n uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, a := range g.acks {
		if a.at.Before(at) {
			n = a.n
		}
	}
	return n
}

// end ends the machine and what the lab holds of it.
func (g *labGuest) end() {
	if g.quit != nil {
		g.quit()
		g.all.Wait()
	}
	if g.vm != nil {
		g.vm.Close()
	}
	_ = os.RemoveAll(g.sockets)
}

// cpu is what the source's QEMU has used: its guest and what it does for copies.
func (g *labGuest) cpu() time.Duration {
	all, _, _ := cpuOf(g.vm.PID()) // 0 where it is not measured
	return all
}

// devicesWrote is how many bytes the guest has written to each disk's device since it started.
func (g *labGuest) devicesWrote(ctx context.Context) (total int64, err error) {
	var list []struct {
		Stats struct {
			Bytes int64 `json:"wr_bytes"`
		} `json:"stats"`
	}
	err = g.vm.QMP(ctx, "query-blockstats", nil, &list)
	for _, d := range list {
		total += d.Stats.Bytes
	}
	return total, err
}

// quiet stops the guest's writer and makes what it wrote durable.
func (g *labGuest) quiet(ctx context.Context) error {
	if err := g.vm.SetRate(ctx, -1); err != nil {
		return err
	}
	return g.shell(ctx, "sync")
}

// shell runs a command line in the guest.
func (g *labGuest) shell(ctx context.Context, line string) error {
	r, err := g.vm.Exec(ctx, "/bin/sh", "-c", line)
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", line, r.ExitCode, r.Stderr)
	}
	return err
}

// startGuestProduct starts `landfall up` for a guest and protects it.
func startGuestProduct(ctx context.Context, bin, folder string, g *labGuest, policy string) (*product, error) {
	p, err := launch(bin, folder, "--qemu", g.machines, "--qemu-sockets", filepath.Join(g.sockets, "s"))
	if err != nil {
		return nil, err
	}
	err = p.until(ctx, func() (bool, error) {
		err := p.cli(ctx, nil, "vms", "show", machine)
		return err == nil, err
	})
	if err == nil {
		err = p.apply(ctx, policy)
	}
	if err == nil {
		err = p.cli(ctx, nil, "protect", machine, "--policy", "bench", "--wait")
	}
	if err != nil {
		p.kill()
		return nil, fmt.Errorf("protect the lab guest: %w", err)
	}
	return p, nil
}

// recovered reads what a recovered machine found of itself: every file right, the ledger consistent across disks, and
// nothing missing that was acknowledged before the cut.
func (g *labGuest) recovered(out string, f failoverResult) error {
	console, err := os.ReadFile(filepath.Join(out, f.Boot.ConsoleFile))
	if err != nil {
		return err
	}
	r, ok := guest.LastReport(string(console))
	low := g.ackedBefore(f.CutTime)
	switch {
	case !ok:
		return errors.New("the recovered machine verified nothing")
	case !r.OK || r.Fresh || r.Files == 0:
		return fmt.Errorf("the recovered machine found %+v", r)
	case r.Commit > r.Intent || r.Intent > r.Commit+1:
		return fmt.Errorf("the ledger has commit %d and intent %d", r.Commit, r.Intent)
	case r.Commit < low:
		return fmt.Errorf("step %d was acknowledged before the cut, and the newest is %d", low, r.Commit)
	}
	return nil
}

// endRecovered ends the QEMU that a failover left running in out: by its process id, if it is what it should be.
func endRecovered(out string) error {
	files, err := filepath.Glob(filepath.Join(out, "*.pid"))
	if err != nil || len(files) == 0 {
		return err
	}
	raw, err := os.ReadFile(files[0])
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(line), out) {
		return fmt.Errorf("process %d is not the recovered machine: %w", pid, err)
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return process.Kill()
}
