package qemutarget

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/qmp"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

func TestBootMode(t *testing.T) {
	const auto, bios, uefi, gen1 = failoverv1.BootMode_BOOT_MODE_UNSPECIFIED, failoverv1.BootMode_BOOT_MODE_BIOS, failoverv1.BootMode_BOOT_MODE_UEFI, failoverv1.BootMode_BOOT_MODE_GENERATION_1
	for _, c := range []struct {
		generation int32
		firmware   typesv1.Firmware
		asked      failoverv1.BootMode
		want       failoverv1.BootMode
	}{
		{0, typesv1.Firmware_FIRMWARE_UNSPECIFIED, auto, bios},
		{1, typesv1.Firmware_FIRMWARE_UNSPECIFIED, auto, gen1},
		{2, typesv1.Firmware_FIRMWARE_UNSPECIFIED, auto, uefi},
		{0, typesv1.Firmware_FIRMWARE_BIOS, auto, bios},
		{1, typesv1.Firmware_FIRMWARE_BIOS, auto, gen1},
		{2, typesv1.Firmware_FIRMWARE_BIOS, auto, bios},
		{0, typesv1.Firmware_FIRMWARE_UEFI, auto, uefi},
		{1, typesv1.Firmware_FIRMWARE_UEFI, auto, uefi},
		{1, typesv1.Firmware_FIRMWARE_BIOS, uefi, uefi},
		{2, typesv1.Firmware_FIRMWARE_UEFI, bios, bios},
	} {
		require.Equal(t, c.want, bootMode(&typesv1.Machine{Generation: c.generation, Firmware: c.firmware}, c.asked), "%+v", c)
	}
}

// Settings win over the machine, the machine over the defaults.
func TestLayout(t *testing.T) {
	l, err := layoutOf(nil, nil)
	require.NoError(t, err)
	require.Equal(t, []any{int64(1024), int32(1), 300 * time.Second}, []any{l.memory, l.cpus, l.timeout})
	m := &typesv1.Machine{Cpus: 4, MemoryBytes: 2 << 30, NetworkAdapters: []*typesv1.NetworkAdapter{{MacAddress: "00:15:5d:00:00:01"}, {MacAddress: "dynamic"}}}
	l, err = layoutOf(m, nil)
	require.NoError(t, err)
	require.Equal(t, []any{int64(2048), int32(4)}, []any{l.memory, l.cpus})
	require.Equal(t, []string{"00:15:5d:00:00:01", ""}, l.nics)
	l, err = layoutOf(m, &failoverv1.QemuTarget{Cpus: 2, MemoryBytes: 512 << 20, BootTimeoutSeconds: 7})
	require.NoError(t, err)
	require.Equal(t, []any{int64(512), int32(2), 7 * time.Second}, []any{l.memory, l.cpus, l.timeout})
	l, err = layoutOf(&typesv1.Machine{}, &failoverv1.QemuTarget{Network: failoverv1.TargetNetwork_TARGET_NETWORK_USER})
	require.NoError(t, err)
	require.Len(t, l.nics, 1)
}

// The accelerator is what the settings say, and nothing of a machine reaches out unless it is asked for.
func TestArguments(t *testing.T) {
	p := target.Plan{Failover: "f1", Dir: "/drills/a,b"}
	m := &typesv1.Machine{Generation: 1, NetworkAdapters: []*typesv1.NetworkAdapter{{}, {}}}
	for i := range 6 {
		m.Disks = append(m.Disks, &typesv1.Disk{Id: fmt.Sprint("d", i), OsDisk: i == 5})
	}
	l, err := layoutOf(m, nil)
	require.NoError(t, err)
	line := strings.Join(l.arguments(Default(), p, firmware{}), " ")
	require.Contains(t, line, "-accel tcg,thread=multi ")
	require.NotContains(t, line, "kvm")
	require.NotContains(t, line, "user,id")
	require.Contains(t, line, "ide-hd,drive=disk0,id=dev-disk0,bus=ide.0,unit=0,serial=d5,bootindex=1")
	require.Contains(t, line, "ide-hd,drive=disk3,id=dev-disk3,bus=ide.1,unit=1,serial=d2")
	require.Contains(t, line, "virtio-blk-pci,drive=disk4", "the controller has four places")
	require.Contains(t, line, "path=/drills/a,,b/console.log")
	require.Contains(t, line, "bootindex=3")
	require.Equal(t, 6, strings.Count(line, "bootindex"))
	l.network = failoverv1.TargetNetwork_TARGET_NETWORK_USER
	line = strings.Join(l.arguments(Default(), p, firmware{}), " ")
	require.Contains(t, line, "-netdev user,id=net0 ")
	require.Contains(t, line, "-netdev hubport,id=net1,hubid=1")

	other := p
	require.Equal(t, identity(p), identity(other))
	other.Failover = "f2"
	require.NotEqual(t, identity(p), identity(other))
	require.Empty(t, Default().Problems())
	require.Len(t, Config{FirmwareCode: "x"}.Problems(), 7)
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"\x1b[2J\x1b[01;01H\x1b[=3h\x1b[0m\x1b[35m\x1b[40mUEFI\x1b[3;4HShell\r\n\r\n> ": "UEFI\nShell\n> ",
		"\x1b]0;title\x07\x1b(Bok\x07\b\x00":                                            "ok",
		"gr\xfc\xdf\tgrüß":                                                              "gr??\tgrüß",
		"half\x1b[3":                                                                    "half",
	} {
		require.Equal(t, want, plain([]byte(in)), "%q", in)
	}
	long := strings.Repeat("ü", 5000) + "\n" + strings.Repeat("line\n", 10)
	require.LessOrEqual(t, len(tail(long, tailBytes)), tailBytes)
	require.Equal(t, "line\nline", tail("begin\nline\nline\n", 12))
	require.Equal(t, "üü", tail("üüü", 5))
}

// A pattern is found wherever the reads of a growing file cut it, and memory stays bounded.
func TestConsoleFind(t *testing.T) {
	path := filepath.Join(t.TempDir(), ConsoleFile)
	c := console{path: path}
	pattern := regexp.MustCompile(`(?m)^login:`)
	seen, err := c.find(pattern)
	require.NoError(t, err)
	require.False(t, seen, "there is no file yet")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	for _, piece := range []string{strings.Repeat("x", 3*window-3) + "\nlo", "g\x1b[", "0mout: not yet\nlo", "gin"} {
		_, err = f.WriteString(piece)
		require.NoError(t, err)
		seen, err = c.find(pattern)
		require.NoError(t, err)
		require.False(t, seen, piece)
	}
	_, err = f.WriteString(":")
	require.NoError(t, err)
	seen, err = c.find(pattern)
	require.NoError(t, err)
	require.True(t, seen)
	require.LessOrEqual(t, len(c.carry), overlap)
}

// serveAgent is a guest's agent behind QEMU's socket. It stays deaf for the first questions, answers an old one with
// somebody else's id, then ours.
func serveAgent(t *testing.T, dir string, deaf int) (asked func() int) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, AgentSocket))
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	questions := make(chan struct{}, 100)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			for in := bufio.NewScanner(conn); in.Scan(); {
				questions <- struct{}{}
				var q struct {
					Execute   string
					Arguments struct{ ID int64 }
				}
				line := in.Bytes()
				if line[0] != 0xFF || json.Unmarshal(line[1:], &q) != nil || q.Execute != "guest-sync-delimited" || len(questions) <= deaf {
					continue
				}
				_, _ = fmt.Fprintf(conn, "\xff{\"return\": %d}\n{\"error\":{}}\n\xff{\"return\": %d}\n", q.Arguments.ID+1, q.Arguments.ID)
			}
			_ = conn.Close()
		}
	}()
	return func() int { return len(questions) }
}

func TestAgent(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	dir := t.TempDir()
	late := make(chan error, 1)
	go func() { late <- awaitAgent(ctx, dir) }() // before there is a socket
	asked := serveAgent(t, dir, 1)
	require.NoError(t, <-late)
	require.Equal(t, 2, asked(), "it asks again")

	deaf := t.TempDir()
	serveAgent(t, deaf, 100)
	brief, end := context.WithTimeout(ctx, 50*time.Millisecond)
	defer end()
	require.ErrorIs(t, awaitAgent(brief, deaf), context.DeadlineExceeded)
}

// A monitor that serves somebody else accepts and says nothing: that ends, with its own bound and with the caller's.
func TestSilentMonitor(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, MonitorSocket))
	require.NoError(t, err)
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err = dialMonitor(ctx, dir, "id")
	require.True(t, errors.Is(err, context.DeadlineExceeded) || errors.Is(err, qmp.ErrInUse), "%v", err)
	require.Less(t, time.Since(start), 10*time.Second)
}
