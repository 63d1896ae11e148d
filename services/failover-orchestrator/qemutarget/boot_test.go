//go:build linux

package qemutarget

import (
	"context"
	"encoding/json"
	"fmt"
	"image/png"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/targettest"
)

// made is a copy that only has to be booted.
func made(t *testing.T, c Config, dir string, change func(*target.Plan)) (*Target, target.Plan) {
	t.Helper()
	needQEMU(t)
	q := New(c, time.Now)
	p := target.Plan{Failover: "f1", Dir: dir, Qemu: proto.CloneOf(options.Qemu), Machine: &typesv1.Machine{
		Disks: []*typesv1.Disk{{Id: "data", SizeBytes: 5 << 20}, {Id: "os", SizeBytes: 3 << 20, OsDisk: true}}, MemoryBytes: 128 << 20,
	}}
	if change != nil {
		change(&p)
	}
	ctx := context.Background()
	existed, err := q.Check(ctx, p)
	require.NoError(t, err)
	_, err = q.Claim(ctx, p, existed)
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := q.Remove(ctx, p, existed)
		require.NoError(t, err)
		require.Empty(t, processes(identity(p)))
		require.NoDirExists(t, p.Dir)
	})
	s, err := q.Sink(ctx, p)
	require.NoError(t, err)
	defer s.Close()
	for _, d := range p.Machine.Disks {
		k, err := s.Disk(ctx, replica.DiskState{ID: d.Id, Gen: 1, Size: d.SizeBytes})
		require.NoError(t, err)
		if d.OsDisk {
			require.NoError(t, k.WriteAt(ctx, targettest.BootSector(), 0))
		}
		require.NoError(t, k.Finish(ctx))
	}
	require.NoError(t, q.Describe(ctx, p, []byte("{}")))
	return q, p
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// do asks the machine's monitor.
func do(t *testing.T, p target.Plan, command string, args, result any) {
	t.Helper()
	require.NoError(t, machineOf(p).tell(bounded(t), func(m *monitor) error { return m.do(bounded(t), command, args, result) }))
}

// Each kind of machine boots from the right disk, sees disks of exactly the source's size, and shows a screen.
func TestBootModes(t *testing.T) {
	t.Parallel()
	for _, mode := range []failoverv1.BootMode{
		failoverv1.BootMode_BOOT_MODE_BIOS, failoverv1.BootMode_BOOT_MODE_GENERATION_1, failoverv1.BootMode_BOOT_MODE_UEFI,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			if _, err := config().firmware(); mode == failoverv1.BootMode_BOOT_MODE_UEFI && err != nil && os.Getenv("CI") != "true" {
				t.Skip(err)
			}
			q, p := made(t, config(), filepath.Join(t.TempDir(), "drill"), func(p *target.Plan) {
				p.Qemu.Boot = mode
				p.Qemu.Network = failoverv1.TargetNetwork_TARGET_NETWORK_USER
				p.Machine.NetworkAdapters = []*typesv1.NetworkAdapter{{MacAddress: "00:15:5d:0a:0b:0c"}, {}}
				if mode == failoverv1.BootMode_BOOT_MODE_UEFI {
					p.Qemu.ConsolePattern = "BdsDxe" // there is no system for UEFI on the disk; the firmware says so
				}
			})
			e, err := q.Boot(bounded(t), p, nil)
			require.NoError(t, err)
			require.Equal(t, "console-pattern", e.Proof)
			t.Logf("%s after %.2f s", e.Proof, e.Seconds)
			require.LessOrEqual(t, len(e.ConsoleTail), tailBytes)
			f, err := os.Open(filepath.Join(p.Dir, e.ScreenshotFile))
			require.NoError(t, err)
			defer f.Close()
			_, err = png.Decode(f)
			require.NoError(t, err)
			var nodes []struct {
				Name  string `json:"node-name"`
				RO    bool
				Image struct {
					Size int64 `json:"virtual-size"`
				}
			}
			do(t, p, "query-named-block-nodes", map[string]any{"flat": true}, &nodes)
			sizes := map[string]int64{}
			for _, n := range nodes {
				sizes[n.Name] = n.Image.Size
				require.True(t, n.RO || !strings.HasPrefix(n.Name, "vhd"), "the VHD %s is read-only", n.Name)
			}
			want := []int64{5 << 20, 3 << 20}
			if mode == failoverv1.BootMode_BOOT_MODE_GENERATION_1 {
				want = []int64{3 << 20, 5 << 20}
			}
			require.Equal(t, want, []int64{sizes["disk0"], sizes["disk1"]})
			require.Equal(t, want, []int64{sizes["vhd0"], sizes["vhd1"]})
		})
	}
}

// A folder may be deeper than a socket's address is long, and be named as nobody would.
func TestDeepFolder(t *testing.T) {
	t.Parallel()
	parent := filepath.Join(t.TempDir(), strings.Repeat("deep,=", 20), strings.Repeat("x y'\"", 20))
	require.NoError(t, os.MkdirAll(parent, 0o750))
	q, p := made(t, config(), filepath.Join(parent, "drill"), nil)
	_, err := q.Boot(bounded(t), p, nil)
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(p.Dir, ScreenshotFile))
}

// What QEMU says when it does not start is in the error; the next attempt is not in its way.
func TestDoesNotStart(t *testing.T) {
	t.Parallel()
	bad := config()
	bad.Accelerator = "tcg,nonsense=on"
	q, p := made(t, bad, filepath.Join(t.TempDir(), "drill"), nil)
	_, err := q.Boot(bounded(t), p, nil)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT), "%v", err)
	require.ErrorContains(t, err, "nonsense")
	q = New(config(), time.Now)
	e, err := q.Boot(bounded(t), p, nil)
	require.NoError(t, err)
	require.Contains(t, e.ConsoleTail, targettest.ConsoleText+"1")
}

// A machine that dies while it is waited for is reported at once, and the next boot starts it from what it wrote.
func TestDiesWhileAwaited(t *testing.T) {
	t.Parallel()
	q, p := made(t, config(), filepath.Join(t.TempDir(), "drill"), nil)
	waiting := proto.CloneOf(p.Qemu)
	waiting.ConsolePattern = "never"
	patient := p
	patient.Qemu = waiting
	shown := func(string) {
		go func() {
			for _, pid := range processes(identity(p)) {
				_ = kill(pid, identity(p))
			}
		}()
	}
	start := time.Now()
	e, err := q.Boot(bounded(t), patient, shown)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT), "%v", err)
	require.ErrorContains(t, err, "ended while")
	require.Equal(t, ConsoleFile, e.ConsoleFile)
	require.Less(t, time.Since(start), 10*time.Second)
	_, err = q.Boot(bounded(t), p, nil)
	require.NoError(t, err)
}

// Whatever is lost of what says that a machine runs, a second one is not started, and the machine is ended in the end.
func TestLosesTraces(t *testing.T) {
	for _, lost := range [][]string{{lockFile}, {pidFile, MonitorSocket}, {lockFile, stateFile, pidFile}} {
		t.Run(strings.Join(lost, " "), func(t *testing.T) {
			t.Parallel()
			c := config()
			c.StartTimeout = time.Second
			q, p := made(t, c, filepath.Join(t.TempDir(), "drill"), nil)
			_, err := q.Boot(bounded(t), p, nil)
			require.NoError(t, err)
			for _, name := range lost {
				require.NoError(t, os.Remove(filepath.Join(p.Dir, name)))
			}
			before := processes(identity(p))
			require.Len(t, before, 1)
			_, err = q.Boot(bounded(t), p, nil)
			if lost[0] == lockFile {
				require.NoError(t, err)
			} else {
				require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE), "%v", err)
			}
			require.Equal(t, before, processes(identity(p)))
		})
	}
}

// A folder that was taken away does not leave its machine behind.
func TestFolderTakenAway(t *testing.T) {
	t.Parallel()
	q, p := made(t, config(), filepath.Join(t.TempDir(), "drill"), nil)
	_, err := q.Boot(bounded(t), p, nil)
	require.NoError(t, err)
	require.NoError(t, os.RemoveAll(p.Dir))
	detail, err := q.Remove(bounded(t), p, false)
	require.NoError(t, err)
	require.Contains(t, detail, "no folder")
	require.Empty(t, processes(identity(p)))
}

// QEMU itself refuses to write an overlay that another one has open: the last line of defence.
func TestImagesAreLocked(t *testing.T) {
	t.Parallel()
	q, p := made(t, config(), filepath.Join(t.TempDir(), "drill"), nil)
	_, err := q.Boot(bounded(t), p, nil)
	require.NoError(t, err)
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(p.Dir, OverlayFile("os")), "1M").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "lock")
}

// A machine that hears nothing is ended by force.
func TestHangs(t *testing.T) {
	t.Parallel()
	q, p := made(t, config(), filepath.Join(t.TempDir(), "drill"), nil)
	_, err := q.Boot(bounded(t), p, nil)
	require.NoError(t, err)
	pids := processes(identity(p))
	require.Len(t, pids, 1)
	require.NoError(t, syscall.Kill(pids[0], syscall.SIGSTOP))
	running, err := q.Running(bounded(t), p)
	require.NoError(t, err)
	require.True(t, running)
	_, err = q.Remove(bounded(t), p, false)
	require.NoError(t, err)
	require.Empty(t, processes(identity(p)))
}

// Pids and sockets of others are never taken for ours.
func TestStrangers(t *testing.T) {
	q, p := made(t, config(), filepath.Join(t.TempDir(), "drill"), nil)
	stranger := exec.Command("sleep", "60")
	require.NoError(t, stranger.Start())
	t.Cleanup(func() { _ = stranger.Process.Kill(); _ = stranger.Wait() })
	pid := strconv.Itoa(stranger.Process.Pid)
	require.NoError(t, os.WriteFile(filepath.Join(p.Dir, pidFile), []byte(pid+"\n"), 0o600))
	quit := make(chan struct{}, 1)
	serveMonitor(t, filepath.Join(p.Dir, MonitorSocket), "00000000-0000-0000-0000-000000000001", func(command string) {
		if command == "quit" {
			quit <- struct{}{}
		}
	})
	running, err := q.Running(bounded(t), p)
	require.NoError(t, err)
	require.False(t, running)
	_, err = dialMonitor(bounded(t), p.Dir, identity(p))
	require.ErrorIs(t, err, errStranger)
	require.NoError(t, kill(stranger.Process.Pid, identity(p)))
	require.NoError(t, q.Shutdown(bounded(t), p))
	_, err = q.Remove(bounded(t), p, false)
	require.NoError(t, err)
	require.Empty(t, quit)
	require.NoError(t, stranger.Process.Signal(syscall.Signal(0)), "it lives")
}

// serveMonitor answers like QEMU's monitor of a machine with this UUID.
func serveMonitor(t *testing.T, path, id string, heard func(string)) {
	t.Helper()
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte(`{"QMP":{}}` + "\n" + `{"event":"RESUME"}` + "\n"))
			in := json.NewDecoder(conn)
			var request struct {
				Execute string
				ID      json.RawMessage
			}
			for in.Decode(&request) == nil {
				heard(request.Execute)
				answer := `{}`
				if request.Execute == "query-uuid" {
					answer = `{"UUID":"` + id + `"}`
				}
				_, _ = fmt.Fprintf(conn, `{"return":%s,"id":%s}`+"\n", answer, request.ID)
			}
			_ = conn.Close()
		}
	}()
}

// What is missing is named with its package, before anything is made.
func TestUnavailable(t *testing.T) {
	needQEMU(t)
	p := target.Plan{Failover: "f1", Dir: filepath.Join(t.TempDir(), "drill"), Machine: &typesv1.Machine{Generation: 2}}
	for want, change := range map[string]func(*Config){
		"qemu-system-x86": func(c *Config) { c.Program = "qemu-system-not-there" },
		"qemu-utils":      func(c *Config) { c.ImageProgram = "/not/there" },
		"/not/there":      func(c *Config) { c.FirmwareCode, c.FirmwareVariables = "/not/there", "/not/there" },
	} {
		c := config()
		change(&c)
		q := New(c, time.Now)
		_, err := q.Check(bounded(t), p)
		require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_UNAVAILABLE), "%v", err)
		require.ErrorContains(t, err, want)
		require.NoDirExists(t, p.Dir)
	}
	q := New(config(), time.Now)
	p.Qemu = &failoverv1.QemuTarget{ConsolePattern: "("}
	_, err := q.Check(bounded(t), p)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT), "%v", err)
	p.Qemu, p.Machine = nil, &typesv1.Machine{Disks: make([]*typesv1.Disk, maxDisks+1)}
	_, err = q.Check(bounded(t), p)
	require.True(t, errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TARGET_UNSUPPORTED), "%v", err)
}
