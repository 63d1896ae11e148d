// Package demo does Landfall's whole job once, on one machine and for real:
// it makes a machine whose disks are being written to, protects it through the
// command line, lets deltas run, takes test failovers of an older and of the
// latest point, and compares every byte with what the writer recorded.
package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/vdisk"
	"github.com/landfall-dr/landfall/tools/nbdclient"
	"github.com/landfall-dr/landfall/tools/workload"
)

// Options of a run.
type Options struct {
	// Landfall is the landfall program.
	Landfall string
	// Dir to work in; empty makes a temporary one, removed at the end.
	Dir string
	// Keep leaves everything running until interrupted.
	Keep bool
	// Out hears what happens.
	Out io.Writer
}

// points is how many recovery points the demonstration waits for.
const points = 5

// overall bounds the whole run.
const overall = 5 * time.Minute

// run is the state of one demonstration.
type run struct {
	Options
	state, images string
	record        *workload.Record
	uris          []string
	started       time.Time
}

// Run does it all; the error is the first check that did not hold.
func Run(ctx context.Context, o Options) (err error) {
	if o.Dir == "" {
		dir, err := os.MkdirTemp("", "landfall-demo-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		o.Dir = dir
	} else if err := os.MkdirAll(o.Dir, 0o750); err != nil {
		return err
	}
	r := &run{Options: o, state: filepath.Join(o.Dir, "state"), images: filepath.Join(o.Dir, "images"), record: &workload.Record{}, started: time.Now()}
	return r.all(ctx)
}

func (r *run) say(format string, args ...any) {
	fmt.Fprintf(r.Out, "[%5.1fs] %s\n", time.Since(r.started).Seconds(), fmt.Sprintf(format, args...))
}

func (r *run) all(parent context.Context) error {
	ctx, cancel := context.WithTimeout(parent, overall)
	defer cancel()
	data, err := makeMachine(filepath.Join(r.images, machineName))
	if err != nil {
		return fmt.Errorf("make the machine: %w", err)
	}
	g := guest()
	r.say("made machine %s: two disks (raw and fixed VHD), %d MiB, %d MiB of them data", machineName, (g.Disks[0].Size+g.Disks[1].Size)/mib, data/mib)

	server, err := r.startServer()
	if err != nil {
		return err
	}
	defer func() { _ = server.stop() }() // a failure on the way is what is told
	if err := r.waitForMachine(ctx, server); err != nil {
		return err
	}
	r.say("landfall up: six services in one process, state in %s", r.state)

	writing, stopWriting := context.WithCancel(parent)
	defer stopWriting()
	written := make(chan error, 1)
	go func() {
		written <- g.Run(writing, r.record, func(ctx context.Context, d int) (workload.Target, error) {
			return nbdclient.Dial(ctx, r.uris[d])
		}, workload.Options{Pause: 2 * time.Millisecond, FlushEvery: 50})
	}()
	r.say("a guest writes to both disks over NBD, without pause")

	if err := r.protect(ctx); err != nil {
		return err
	}
	list, err := r.waitForPoints(ctx, points)
	if err != nil {
		return err
	}
	for _, p := range list {
		r.say("point %s  %s  %s  %s stored", p.Ordinal, p.CutTime.Local().Format("15:04:05.000"), strings.ToLower(strings.TrimPrefix(p.Kind, "POINT_KIND_")), human(p.StoredBytes))
	}
	page := &summary{data: data}
	older := list[len(list)-2] // the second point of all: one delta after the base
	if page.older, err = r.drill(ctx, "an older point", older); err != nil {
		return err
	}
	if list, err = r.points(ctx); err != nil {
		return err
	}
	if page.latest, err = r.drill(ctx, "the latest point", list[0]); err != nil {
		return err
	}
	if page.planned, err = r.takeOver(ctx); err != nil {
		return err
	}
	if err := r.page(ctx, page); err != nil {
		return err
	}
	select {
	case err := <-written:
		return fmt.Errorf("the guest stopped writing: %w", err)
	default:
	}
	if r.Keep {
		return r.keep(parent)
	}
	stopWriting()
	if err := <-written; err != nil {
		return fmt.Errorf("the guest saw an error: %w", err)
	}
	return server.stop()
}

// server is the `landfall up` process.
type server struct {
	cmd  *exec.Cmd
	log  *os.File
	done chan error
	over bool
}

func (r *run) startServer() (*server, error) {
	log, err := os.Create(filepath.Join(r.Dir, "landfall.log"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(r.Landfall, "up", "--state", r.state, "--images", r.images)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		_ = log.Close()
		return nil, fmt.Errorf("start landfall up: %w", err)
	}
	s := &server{cmd: cmd, log: log, done: make(chan error, 1)}
	go func() { s.done <- cmd.Wait() }()
	return s, nil
}

// stop ends the process that was started, politely, and reports how it ended.
func (s *server) stop() error {
	if s.over {
		return nil
	}
	s.over = true
	defer s.log.Close()
	_ = s.cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-s.done:
		if err != nil {
			return fmt.Errorf("landfall up ended with: %w", err)
		}
		return nil
	case <-time.After(30 * time.Second):
		_ = s.cmd.Process.Kill()
		return fmt.Errorf("landfall up did not stop within 30 seconds and was killed: %w", <-s.done)
	}
}

// landfall runs one command and decodes its JSON into out, if there is one.
func (r *run) landfall(ctx context.Context, out any, args ...string) error {
	args = append(args, "--state", r.state)
	if out != nil {
		args = append(args, "-o", "json")
	}
	cmd := exec.CommandContext(ctx, r.Landfall, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("landfall %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(stdout.Bytes(), out)
}

// until repeats f until it says done, its deadline passes, or the server ends.
func until(ctx context.Context, f func() (bool, error)) error {
	var last error
	for {
		done, err := f()
		if done {
			return err
		}
		last = err
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return errors.Join(ctx.Err(), last)
		case <-t.C:
		}
	}
}

func (r *run) waitForMachine(ctx context.Context, s *server) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	return until(ctx, func() (bool, error) {
		select {
		case err := <-s.done:
			s.done <- err
			raw, _ := os.ReadFile(s.log.Name())
			return true, fmt.Errorf("landfall up ended: %w\n%s", err, raw)
		default:
		}
		var v struct {
			VMs []struct {
				Machine struct {
					DisplayName string `json:"display_name"`
					Disks       []struct {
						ID  string `json:"id"`
						URI string `json:"export_uri"`
					} `json:"disks"`
				} `json:"machine"`
			} `json:"vms"`
		}
		if err := r.landfall(ctx, &v, "vms"); err != nil {
			return false, err
		}
		for _, vm := range v.VMs {
			if vm.Machine.DisplayName == machineName && len(vm.Machine.Disks) == 2 {
				r.uris = []string{vm.Machine.Disks[0].URI, vm.Machine.Disks[1].URI}
				return true, nil
			}
		}
		return false, errors.New("the machine is not listed yet")
	})
}

func (r *run) protect(ctx context.Context) error {
	policy := filepath.Join(r.Dir, "policy.yaml")
	if err := os.WriteFile(policy, []byte("name: demo\ncopy_interval: 2s\n"), 0o600); err != nil {
		return err
	}
	if err := r.landfall(ctx, nil, "policy", "apply", "-f", policy); err != nil {
		return err
	}
	before, _ := r.record.Acked()
	start := time.Now()
	r.say("$ landfall protect %s --policy demo --wait", machineName)
	cmd := exec.CommandContext(ctx, r.Landfall, "protect", machineName, "--policy", "demo", "--wait", "--state", r.state)
	cmd.Stdout, cmd.Stderr = &indent{w: r.Out}, &indent{w: r.Out}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("landfall protect: %w", err)
	}
	after, _ := r.record.Acked()
	if after == before {
		return errors.New("the guest wrote nothing during initial replication")
	}
	r.say("protected after %.1fs; the guest made %d writes meanwhile", time.Since(start).Seconds(), after-before)
	return nil
}

// indent sets a program's lines off from ours.
type indent struct{ w io.Writer }

func (i *indent) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		fmt.Fprint(i.w, "           ", line)
	}
	return len(p), nil
}

// point is one recovery point in `landfall points -o json`.
type point struct {
	Ordinal     string    `json:"ordinal"`
	Kind        string    `json:"kind"`
	CutTime     time.Time `json:"cut_time"`
	StoredBytes int64     `json:"stored_bytes,string"`
	Processed   bool      `json:"processed"`
}

func (r *run) points(ctx context.Context) ([]point, error) {
	var v struct {
		Points []point `json:"points"`
	}
	err := r.landfall(ctx, &v, "points", machineName)
	return v.Points, err
}

func (r *run) waitForPoints(ctx context.Context, n int) (list []point, err error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	err = until(ctx, func() (bool, error) {
		var err error
		if list, err = r.points(ctx); err != nil {
			return false, err
		}
		return len(list) >= n, fmt.Errorf("%d of %d recovery points", len(list), n)
	})
	if len(list) >= n {
		err = nil
	}
	return list, err
}

// drilled is the result of one test failover.
type drilled struct {
	point  point
	rto    time.Duration
	writes uint64
}

// drill takes a test failover, verifies every byte and cleans up.
func (r *run) drill(ctx context.Context, what string, p point) (*drilled, error) {
	out := filepath.Join(r.Dir, "drill-"+p.Ordinal)
	r.say("$ landfall failover test %s --point %s --out %s --wait   (%s)", machineName, p.Ordinal, filepath.Base(out), what)
	start := time.Now()
	if err := r.landfall(ctx, nil, "failover", "test", machineName, "--point", p.Ordinal, "--out", out, "--wait"); err != nil {
		return nil, err
	}
	d := &drilled{point: p, rto: time.Since(start)}
	list, err := r.points(ctx)
	if err != nil {
		return nil, err
	}
	end := time.Now()
	for i, q := range list { // newest first: the next cut bounds this one
		if q.Ordinal == p.Ordinal && i > 0 {
			end = list[i-1].CutTime
		}
	}
	low, high := r.record.Bounds(p.CutTime, end)
	if d.writes, err = r.verify(ctx, out, low, high); err != nil {
		return nil, fmt.Errorf("point %s is WRONG: %w", p.Ordinal, err)
	}
	r.say("  every byte of both disks is the machine after write %d, as recorded (the cut lies between %d and %d)", d.writes, low, high)
	if err := r.landfall(ctx, nil, "failover", "cleanup", machineName, "--wait"); err != nil {
		return nil, err
	}
	if _, err := os.Stat(out); !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("clean-up left %s behind", out)
	}
	return d, nil
}

// verify holds the VHD files in a folder against the guest's record: each byte of both disks is explained by the writes up
// to one number, low to high, which it returns.
func (r *run) verify(ctx context.Context, out string, low, high uint64) (uint64, error) {
	g := guest()
	var copies []io.ReaderAt
	for _, disk := range g.Disks {
		image, err := vdisk.Open(filepath.Join(out, disk.ID+".vhd"), vdisk.FormatVHD, true)
		if err != nil {
			return 0, err
		}
		defer image.Close()
		if image.Size() != disk.Size {
			return 0, fmt.Errorf("recovered disk %s has %d bytes, not %d", disk.ID, image.Size(), disk.Size)
		}
		copies = append(copies, image)
	}
	return g.Verify(ctx, copies, initial, low, high)
}

// summary is what the last page shows.
type summary struct {
	data                   int64
	older, latest, planned *drilled
}

func (r *run) page(ctx context.Context, s *summary) error {
	var v struct {
		RPO      string `json:"rpo"`
		Counters struct {
			Points  string `json:"points"`
			Shipped string `json:"shipped_bytes"`
			Changed string `json:"changed_bytes"`
			Missed  string `json:"missed_cycles"`
			Full    string `json:"full_passes"`
		} `json:"counters"`
	}
	if err := r.landfall(ctx, &v, "status", machineName); err != nil {
		return err
	}
	_, bytes := r.record.Acked()
	rpo, _ := time.ParseDuration(v.RPO)
	fmt.Fprintf(r.Out, `
  Landfall did its whole job once. Every check held.

    on the disks            %s of data in %s
    written by the guest    %s
    distinct changed        %s   (a block rewritten within a cycle counts once)
    shipped                 %s   (initial replication and deltas, compressed)
    recovery points         %s   (%s cycles missed, %s full copy)
    RPO now                 %.1f s
    time to failover        %.1f s for point %s, %.1f s for point %s, command to verified-ready disks
    planned failover        %.1f s with the source stopped and its last changes sent: nothing was lost; then cancelled
    verified                both disks, byte for byte, after writes %d, %d and %d of the guest
    whole demonstration     %.1f s

`, human(s.data), human(guest().Disks[0].Size+guest().Disks[1].Size), human(bytes), human(number(v.Counters.Changed)), human(number(v.Counters.Shipped)),
		v.Counters.Points, v.Counters.Missed, v.Counters.Full, rpo.Seconds(),
		s.older.rto.Seconds(), s.older.point.Ordinal, s.latest.rto.Seconds(), s.latest.point.Ordinal, s.planned.rto.Seconds(),
		s.older.writes, s.latest.writes, s.planned.writes, time.Since(r.started).Seconds())
	return nil
}

func (r *run) keep(ctx context.Context) error {
	fmt.Fprintf(r.Out, `  Still running; the guest goes on writing. In another terminal:

    export LANDFALL_STATE=%s
    %[2]s status
    %[2]s points %[3]s --limit 5
    %[2]s events --follow
    %[2]s failover test %[3]s --out %[4]s --wait
    %[2]s failover cleanup %[3]s --wait
    %[2]s resync %[3]s --wait
    qemu-img compare ... or nbdinfo %[5]s

  Interrupt (Ctrl-C) to stop.
`, r.state, r.Landfall, machineName, filepath.Join(r.Dir, "my-drill"), r.uris[0])
	<-ctx.Done()
	return nil
}

func number(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64) // our own output
	return n
}

func human(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/mib) }
