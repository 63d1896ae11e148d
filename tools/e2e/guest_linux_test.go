package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/guesttest"
	"github.com/landfall-dr/landfall/tools/guest/guestvm"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

// wholeEnv runs the guest tests in all modes, formats and forms; without it a short set runs.
const wholeEnv = "LANDFALL_GUEST_WHOLE"

// guestTime bounds one scenario under software emulation.
const guestTime = 15 * time.Minute

// source is the protected machine: a real guest in a real QEMU, and what it acknowledged when.
type source struct {
	p      *product
	config guestvm.Config
	vm     *guestvm.VM

	mu    sync.Mutex
	acks  []ack
	quit  context.CancelFunc
	ended chan struct{}
}

type ack struct {
	at time.Time
	n  uint64
}

// newSource makes the machine's disks and its definition; call it before the product starts.
func newSource(t *testing.T, p *product, mode guestvm.Mode, format image.Format) *source {
	s := &source{p: p, config: guesttest.Config(t, mode, format)}
	s.config.Name = machineName
	sockets, err := os.MkdirTemp("", "lfg")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	s.config.Sockets = sockets
	require.NoError(t, os.MkdirAll(p.images, 0o700))
	args, err := s.config.Args()
	require.NoError(t, err)
	start, err := json.Marshal(append([]string{guestvm.Program}, args...))
	require.NoError(t, err)
	firmware, generation := "bios", 2
	switch mode {
	case guestvm.UEFI:
		firmware = "uefi"
	case guestvm.Gen1:
		generation = 1
	}
	require.NoError(t, os.WriteFile(filepath.Join(p.images, machineName+".yaml"), fmt.Appendf(nil, `version: 1
id: %s
name: %s
qmp: %s
agent: %s
firmware: %s
generation: %d
start: %s
`, machineID, machineName, s.config.QMPPath(), s.config.AgentPath(), firmware, generation, start), 0o600))
	s.start()
	t.Cleanup(s.end)
	return s
}

// start starts the machine and waits until its guest writes.
func (s *source) start() {
	t := s.p.t
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), guesttest.BootTimeout)
	defer cancel()
	var err error
	s.vm, err = guestvm.Start(ctx, s.config)
	require.NoError(t, err)
	s.follow()
	require.NoError(t, s.vm.WaitReady(ctx))
	require.NoError(t, s.vm.WaitAcked(ctx, s.vm.Acked()+5))
}

// follow records what was acknowledged when.
func (s *source) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	s.quit, s.ended = cancel, make(chan struct{})
	vm := s.vm
	go func() {
		defer close(s.ended)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			if n := vm.Acked(); n > 0 {
				s.mu.Lock()
				if len(s.acks) == 0 || s.acks[len(s.acks)-1].n != n {
					s.acks = append(s.acks, ack{time.Now(), n})
				}
				s.mu.Unlock()
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
}

// end ends the machine, if the test started it.
func (s *source) end() {
	if s.quit != nil {
		s.quit()
		<-s.ended
		s.vm.Close()
		s.quit = nil
	}
}

// kill is a power failure of the source.
func (s *source) kill() {
	require.NoError(s.p.t, s.vm.Kill())
	s.end()
}

// ackedBefore is the newest step that was surely acknowledged before a moment.
func (s *source) ackedBefore(at time.Time) (n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.acks {
		if a.at.Before(at) {
			n = max(n, a.n)
		}
	}
	return n
}

// failedOver is what a failover's job says.
type failedOver struct {
	Job *typesv1.Job
	Out string
}

// failover runs a failover by the command line and waits for it.
func (s *source) failover(ctx context.Context, out string, args ...string) failedOver {
	t := s.p.t
	t.Helper()
	var raw json.RawMessage
	args = append(append([]string{"failover"}, args...), "--target", "qemu", "--out", out, "--boot-timeout", "4m", "--wait")
	if !slices.Contains(args, "latest-app") { // proved by the guest agent, which is the default; the others by the console
		args = append(args, "--console-pattern", guest.ReadyLine)
	}
	began := time.Now()
	require.NoError(t, s.p.landfall(ctx, &raw, args...))
	took := time.Since(began)
	f := failedOver{Job: &typesv1.Job{}, Out: out}
	require.NoError(t, protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(raw, f.Job))
	var steps []string
	for _, st := range f.Job.Steps {
		if st.EndTime != nil && st.StartTime != nil {
			steps = append(steps, fmt.Sprintf("%s %.2f", st.Id, st.EndTime.AsTime().Sub(st.StartTime.AsTime()).Seconds()))
		}
	}
	t.Logf("%s: RTO %.2f s, guest boot %.2f s, the rest %.2f s (%s)", strings.Join(args[:3], " "), took.Seconds(), f.boot().GetSeconds(),
		took.Seconds()-f.boot().GetSeconds(), strings.Join(steps, ", "))
	return f
}

func (f failedOver) boot() *typesv1.BootEvidence {
	if b := f.Job.GetTestFailover().GetBoot(); b != nil {
		return b
	}
	return f.Job.GetFailover().GetBoot()
}

func (f failedOver) cut() time.Time {
	if r := f.Job.GetTestFailover(); r != nil {
		return r.CutTime.AsTime()
	}
	return f.Job.GetFailover().CutTime.AsTime()
}

// requireRecovered reads what the recovered machine found of itself: every file right, the ledger consistent across
// disks, and nothing missing that was acknowledged before the cut.
func (s *source) requireRecovered(f failedOver) guest.Report {
	t := s.p.t
	t.Helper()
	b := f.boot()
	require.NotNil(t, b, "the job has no evidence of a boot")
	console, err := os.ReadFile(filepath.Join(f.Out, b.ConsoleFile))
	require.NoError(t, err)
	require.NotEmpty(t, b.ScreenshotFile)
	require.FileExists(t, filepath.Join(f.Out, b.ScreenshotFile))
	r, ok := guest.LastReport(string(console))
	require.True(t, ok, "the recovered machine verified nothing:\n%s", b.ConsoleTail)
	require.True(t, r.OK, "the recovered machine found %v", r.Bad)
	require.False(t, r.Fresh)
	require.LessOrEqual(t, r.Commit, r.Intent)
	require.LessOrEqual(t, r.Intent, r.Commit+1)
	require.Positive(t, r.Files)
	low := s.ackedBefore(f.cut())
	require.GreaterOrEqual(t, r.Commit, low, "acknowledged before the cut and missing")
	t.Logf("recovered at step %d (%d acknowledged before the cut), %d files, journals replayed %+v", r.Commit, low, r.Files, r.JournalReplayed)
	return r
}

// points waits until n points that were cut after a moment are received.
func (s *source) points(ctx context.Context, after time.Time, n int) []listedPoint {
	s.p.t.Helper()
	var out []listedPoint
	s.p.wait(3*time.Minute, fmt.Sprintf("%d points", n), func(context.Context) error {
		var listed struct {
			Points []listedPoint `json:"points"`
		}
		if err := s.p.landfall(ctx, &listed, "points", machineName); err != nil {
			return err
		}
		out = listed.Points
		slices.Reverse(out) // oldest first
		out = slices.DeleteFunc(out, func(p listedPoint) bool { return p.CutTime.Before(after) })
		if len(out) < n {
			return fmt.Errorf("%d points of %d", len(out), n)
		}
		return nil
	})
	return out
}

type listedPoint struct {
	Ordinal     string    `json:"ordinal"`
	CutTime     time.Time `json:"cut_time"`
	Consistency string    `json:"consistency"`
}

func (s *source) protect(ctx context.Context) {
	t := s.p.t
	t.Helper()
	file := filepath.Join(s.p.dir, "policy.yaml")
	require.NoError(t, os.WriteFile(file, []byte("name: e2e\ncopy_interval: 2s\napp_consistent_interval: 60s\n"), 0o600))
	require.NoError(t, s.p.landfall(ctx, nil, "policy", "apply", "-f", file))
	s.p.wait(time.Minute, "the machine is listed", func(ctx context.Context) error {
		return s.p.landfall(ctx, nil, "vms", "show", machineName)
	})
	require.NoError(t, s.p.landfall(ctx, nil, "protect", machineName, "--policy", "e2e", "--wait"))
}

// drill takes a test failover, verifies it and cleans up.
func (s *source) drill(ctx context.Context, point string) guest.Report {
	t := s.p.t
	t.Helper()
	out := filepath.Join(s.p.dir, "drill")
	r := s.requireRecovered(s.failover(ctx, out, "test", machineName, "--point", point))
	require.NoError(t, s.p.landfall(ctx, nil, "failover", "cleanup", machineName, "--wait"))
	require.NoDirExists(t, out, "clean-up removes what the failover made")
	return r
}

// requireSame compares each recovered disk with the source's by qemu-img.
func (s *source) requireSame(ctx context.Context, out string) {
	t := s.p.t
	t.Helper()
	for id, d := range map[string]guestvm.Disk{"os": s.config.OS, "data": s.config.Data} {
		said, err := exec.CommandContext(ctx, tool(t.(*testing.T), "qemu-img"), "compare", "-U", "-f", string(d.Format), "-F", "vpc", d.Path, filepath.Join(out, id+".vhd")).CombinedOutput()
		require.NoError(t, err, "disk %s: %s", id, said)
		require.Contains(t, string(said), "Images are identical.", "disk %s", id)
	}
}

type scenario struct {
	mode   guestvm.Mode
	format image.Format
	form   form
}

// scenarios are the short set, or all.
func scenarios() []scenario {
	up, fleet := formOf("up", onDir), formOf("fleet", onDir)
	upAzurite, fleetAzurite := formOf("up", onAzurite), formOf("fleet", onAzurite)
	if os.Getenv(wholeEnv) == "" {
		return []scenario{{guestvm.BIOS, image.VHDX, up}}
	}
	return []scenario{
		{guestvm.BIOS, image.VHDX, up}, {guestvm.UEFI, image.QCOW2, up}, {guestvm.Gen1, image.VHDX, upAzurite},
		{guestvm.UEFI, image.VHDX, fleetAzurite}, {guestvm.BIOS, image.QCOW2, fleet}, {guestvm.Gen1, image.QCOW2, fleetAzurite},
	}
}

// TestARealMachineComesBack protects a guest that writes without pause and takes it through everything that may happen
// to it, by the command line alone.
func TestARealMachineComesBack(t *testing.T) {
	guesttest.Require(t)
	for _, sc := range scenarios() {
		t.Run(fmt.Sprintf("%s/%s/%s", sc.form.name, sc.mode, sc.format), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), guestTime)
			defer cancel()
			comesBack(ctx, t, sc)
		})
	}
}

func comesBack(ctx context.Context, t *testing.T, sc scenario) {
	p := sc.form.qemu(t)
	began := time.Now()
	step := func(what string) { t.Logf("%6.1fs %s", time.Since(began).Seconds(), what) }
	s := newSource(t, p, sc.mode, sc.format)
	step("the source runs")
	p.startAll()
	s.protect(ctx)
	step("protected")

	// (a) two points, (d) one of them application-consistent.
	points := s.points(ctx, began, 4)
	s.drill(ctx, points[3].Ordinal) // the first is application-consistent: it was due at once
	app := s.drill(ctx, "latest-app")
	require.Equal(t, guest.PerDisk[bool]{}, app.JournalReplayed, "a frozen file system needs no replay of its journal")
	step("two points came up")

	// (f) everything, or one service after the other, is killed in the middle.
	for _, name := range p.order {
		if name == natsServer {
			continue
		}
		before := time.Now()
		p.programs[name].kill()
		require.NoError(t, p.programs[name].start(""))
		s.points(ctx, before, 2)
	}
	s.drill(ctx, "latest")
	step("killed services came back, the newest point came up")

	// (b) the source is lost.
	s.kill()
	killed := time.Now()
	out := filepath.Join(p.dir, "recovered")
	f := s.failover(ctx, out, "unplanned", machineName, "--point", "latest", "--accept-unfenced")
	s.requireRecovered(f)
	require.Less(t, killed.Sub(f.cut()), 30*time.Second, "the newest point is not old")
	require.NoError(t, p.landfall(ctx, nil, "failover", "cancel", machineName, "--wait"))
	require.NoDirExists(t, out)
	step("failed over from a lost source, and cancelled")

	// (e) the source comes back without its bitmaps.
	s.reclaim()
	s.resync(ctx)
	s.drill(ctx, "latest")
	step("resynchronised, the newest point came up")

	// (c) planned: nothing is lost.
	f = s.failover(ctx, out, "planned", machineName)
	report := s.requireRecovered(f)
	require.GreaterOrEqual(t, report.Commit, s.ackedBefore(time.Now()), "a planned failover loses nothing")
	s.requireSame(ctx, out)
	require.NoError(t, p.landfall(ctx, nil, "failover", "commit", machineName, "--wait"))
	step("failed over as planned and committed")
	s.shutDownRecovered(out)
}

// reclaim takes the source over for the lab: cancelling a failover started it again, or the test does.
func (s *source) reclaim() {
	t := s.p.t
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), guesttest.BootTimeout)
	defer cancel()
	var err error
	for {
		if s.vm, err = guestvm.Attach(ctx, s.config); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the cancelled failover did not start the source: %v", err)
		case <-time.After(200 * time.Millisecond):
		}
	}
	s.follow()
	require.NoError(t, s.vm.WaitAcked(ctx, 1))
}

// resync waits until the loss is seen, and has source and replica compared.
func (s *source) resync(ctx context.Context) {
	t := s.p.t
	t.Helper()
	s.p.wait(3*time.Minute, "the lost bitmap is seen", func(ctx context.Context) error {
		vm, err := s.p.vm(ctx)
		if err == nil && vm.State != typesv1.ProtectionState_PROTECTION_STATE_RESYNC_REQUIRED {
			err = fmt.Errorf("the VM is %s", vm.State)
		}
		if err == nil && vm.ResyncReason != typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST {
			return fmt.Errorf("resync is due because of %s", vm.ResyncReason)
		}
		return err
	})
	require.NoError(t, s.p.landfall(ctx, nil, "resync", machineName, "--wait"))
	s.points(ctx, time.Now(), 1)
}

// shutDownRecovered ends the committed machine by its own process id: it is ours, and nothing else ends it.
func (s *source) shutDownRecovered(out string) {
	t := s.p.t
	t.Helper()
	matches, err := filepath.Glob(filepath.Join(out, "*.pid"))
	require.NoError(t, err)
	require.NotEmpty(t, matches, "a machine of target qemu has a pid file")
	raw, err := os.ReadFile(matches[0])
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	require.NoError(t, err)
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	require.NoError(t, err)
	require.Contains(t, string(cmdline), out, "process %d is not the recovered machine", pid)
	process, err := os.FindProcess(pid)
	require.NoError(t, err)
	require.NoError(t, process.Kill())
}
