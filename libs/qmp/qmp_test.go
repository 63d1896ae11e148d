package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// shortDir is a folder whose sockets have short paths.
func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "qm")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// script serves each connection by handle, one at a time.
func script(t *testing.T, handle func(c net.Conn, r *bufio.Reader)) string {
	t.Helper()
	socket := filepath.Join(shortDir(t), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	var served sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	served.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			handle(c, bufio.NewReader(c))
			_ = c.Close()
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		served.Wait()
	})
	return socket
}

// silence takes everything and says nothing.
func silence(_ net.Conn, r *bufio.Reader) { _, _ = r.WriteTo(io.Discard) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`

// monitor is a scripted monitor: it greets, and answers each command with what answer returns; "" is silence.
func monitor(t *testing.T, answer func(command string, id uint64) string) string {
	return script(t, func(c net.Conn, r *bufio.Reader) {
		_, _ = fmt.Fprintln(c, greeting)
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return
			}
			var m struct {
				Execute string
				ID      uint64
			}
			if json.Unmarshal(line, &m) != nil {
				return
			}
			out := fmt.Sprintf(`{"return": {}, "id": %d}`, m.ID)
			if m.Execute != "qmp_capabilities" {
				out = answer(m.Execute, m.ID)
			}
			if out == "close" {
				return
			}
			if out != "" {
				_, _ = fmt.Fprintln(c, out)
			}
		}
	})
}

func requireUnreachable(t *testing.T, err error) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, errcat.Reason(err), "%v", err)
}

func TestDialErrors(t *testing.T) {
	_, err := Dial(testContext(t), filepath.Join(shortDir(t), "nothing"))
	requireUnreachable(t, err)

	silent := script(t, silence)
	start := time.Now()
	_, err = Dial(testContext(t), silent)
	requireUnreachable(t, err)
	require.ErrorIs(t, err, ErrInUse)
	require.Less(t, time.Since(start), 2*greetingTimeout)

	// The caller's deadline and cancellation end it sooner, and a cancellation is no fault.
	ctx, cancel := context.WithCancel(testContext(t))
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err = Dial(ctx, silent)
	require.ErrorIs(t, err, context.Canceled)

	_, err = Dial(testContext(t), script(t, func(c net.Conn, _ *bufio.Reader) { _, _ = fmt.Fprintln(c, "SSH-2.0") }))
	requireUnreachable(t, err)
	require.NotErrorIs(t, err, ErrInUse)
}

func TestExecute(t *testing.T) {
	late := make(chan struct{}, 1)
	m, err := Dial(testContext(t), monitor(t, func(command string, id uint64) string {
		switch command {
		case "fails":
			return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %d}`, id)
		case "never":
			select {
			case late <- struct{}{}:
			default:
			}
			return ""
		case "events":
			return `{"event": "A", "data": {"n": 1}, "timestamp": {"seconds": 5, "microseconds": 7}}` + "\n" +
				`{"event": "B", "timestamp": {"seconds": 6, "microseconds": 0}}` + "\n" + fmt.Sprintf(`{"return": 7, "id": %d}`, id)
		case "dies":
			return "close"
		case "big":
			return fmt.Sprintf(`{"return": %q, "id": %d}`, strings.Repeat("x", 300<<10), id)
		}
		return fmt.Sprintf(`{"return": {"name": %q}, "id": %d}`, command, id)
	}))
	require.NoError(t, err)
	defer func() { _ = m.Close() }()
	require.Equal(t, "7.2.22", m.Version().String())

	var all sync.WaitGroup
	for i := range 50 { // answers find their callers
		all.Go(func() {
			var r struct{ Name string }
			name := fmt.Sprintf("c%d", i)
			if err := m.Execute(testContext(t), name, nil, &r); err != nil || r.Name != name {
				t.Errorf("%s: %q, %v", name, r.Name, err)
			}
		})
	}
	all.Wait()

	err = m.Execute(testContext(t), "fails", nil, nil)
	require.True(t, Refused(err))
	require.EqualError(t, err, "fails: no such thing")

	short, cancel := context.WithTimeout(testContext(t), 30*time.Millisecond)
	defer cancel()
	err = m.Execute(short, "never", nil, nil)
	requireUnreachable(t, err)
	require.False(t, Refused(err))
	<-late
	err = m.Execute(short, "never", nil, nil) // an ended context sends nothing and harms nobody
	requireUnreachable(t, err)

	s, small := m.Subscribe(10), m.Subscribe(1)
	var n int
	require.NoError(t, m.Execute(testContext(t), "events", nil, &n))
	require.Equal(t, 7, n)
	a, b := <-s.Events(), <-s.Events()
	require.Equal(t, []string{"A", "B"}, []string{a.Name, b.Name})
	require.JSONEq(t, `{"n": 1}`, string(a.Data))
	require.Equal(t, time.Unix(5, 7000), a.Time)
	require.False(t, s.Lost())
	require.True(t, small.Lost())
	require.Equal(t, "A", (<-small.Events()).Name)
	small.Close()
	small.Close()

	var text string
	require.NoError(t, m.Execute(testContext(t), "big", nil, &text))
	require.Len(t, text, 300<<10)

	requireUnreachable(t, m.Execute(testContext(t), "dies", nil, nil))
	<-m.Done()
	_, ok := <-s.Events()
	require.False(t, ok)
	requireUnreachable(t, m.Execute(testContext(t), "c", nil, nil))
	_, ok = <-m.Subscribe(1).Events()
	require.False(t, ok)
}

func TestPool(t *testing.T) {
	socket := monitor(t, func(command string, id uint64) string {
		if command == "dies" {
			return "close"
		}
		return fmt.Sprintf(`{"return": {}, "id": %d}`, id)
	})
	p := NewPool()
	a, err := p.Get(testContext(t), socket)
	require.NoError(t, err)
	b, err := p.Get(testContext(t), socket)
	require.NoError(t, err)
	require.Same(t, a, b)
	require.Error(t, a.Execute(testContext(t), "dies", nil, nil))
	c, err := p.Get(testContext(t), socket)
	require.NoError(t, err)
	require.NotSame(t, a, c)
	p.Forget(socket)
	<-c.Done()
	_, err = p.Get(testContext(t), socket)
	require.NoError(t, err)
	p.Close()
	_, err = p.Get(testContext(t), socket)
	requireUnreachable(t, err)

	// A silent monitor is waited for once, not by every caller.
	silent := script(t, silence)
	p = NewPool()
	defer p.Close()
	start := time.Now()
	for range 5 {
		_, err = p.Get(testContext(t), silent)
		require.ErrorIs(t, err, ErrInUse)
	}
	require.Less(t, time.Since(start), 2*greetingTimeout)
}

func TestAgent(t *testing.T) {
	socket := script(t, func(c net.Conn, r *bufio.Reader) {
		_, _ = c.Write([]byte(`{"return": "an answer that an earlier client did not wait for"}` + "\n"))
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			var m struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if json.Unmarshal([]byte(strings.ReplaceAll(line, "\xff", "")), &m) != nil {
				return
			}
			switch m.Execute {
			case "guest-sync-delimited":
				_, _ = fmt.Fprintf(c, "\xff{\"return\": %d}\n", m.Arguments.ID)
			case "guest-fsfreeze-freeze":
				_, _ = fmt.Fprintln(c, `{"return": 3}`)
			case "guest-fsfreeze-status":
				_, _ = fmt.Fprintln(c, `{"return": "frozen"}`)
			case "guest-fsfreeze-thaw":
				_, _ = fmt.Fprintln(c, `{"error": {"class": "GenericError", "desc": "not now"}}`)
			}
		}
	})
	a, err := DialAgent(testContext(t), socket)
	require.NoError(t, err)
	n, err := a.Freeze(testContext(t))
	require.NoError(t, err)
	require.Equal(t, 3, n)
	frozen, err := a.Frozen(testContext(t))
	require.NoError(t, err)
	require.True(t, frozen)
	_, err = a.Thaw(testContext(t))
	require.True(t, Refused(err))
	short, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	require.NoError(t, a.Shutdown(short), "an agent that does not answer shuts down")
	_, err = a.Freeze(testContext(t)) // what would come now belongs to the command before
	requireUnreachable(t, err)
	require.NoError(t, a.Close())

	silent := script(t, silence)
	_, err = DialAgent(testContext(t), silent)
	requireUnreachable(t, err)
	require.ErrorContains(t, err, "not running in the guest")
}

func TestRealQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("qemu-system-x86_64 is not installed")
		}
		t.Skip("qemu-system-x86_64 is not installed")
	}
	socket := filepath.Join(shortDir(t), "q")
	cmd := exec.Command("qemu-system-x86_64", "-S", "-machine", "q35", "-accel", "tcg,thread=multi", "-m", "16", "-display", "none",
		"-nodefaults", "-qmp", "unix:"+socket+",server=on,wait=off")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var m *Monitor
	testkit.Eventually(t, 15*time.Second, func() (err error) {
		m, err = Dial(testContext(t), socket)
		return err
	})
	_, err := Dial(testContext(t), socket)
	require.ErrorIs(t, err, ErrInUse)
	s, err := m.Schema(testContext(t))
	require.NoError(t, err)
	require.True(t, s.Command("blockdev-reopen"))
	require.False(t, s.Command("blockdev-frobnicate"))
	require.True(t, s.BlockDriver("qcow2"))
	require.False(t, s.BlockDriver("copy-before-write", "no-such-option"))
	require.True(t, s.Argument("blockdev-backup", "sync"))
	require.False(t, s.Argument("blockdev-backup", "no-such-argument"))
	events := m.Subscribe(16)
	require.NoError(t, m.Execute(testContext(t), "cont", nil, nil))
	require.Equal(t, "RESUME", (<-events.Events()).Name)
	out, err := m.HMP(testContext(t), "info status")
	require.NoError(t, err)
	require.Contains(t, out, "running")
	require.NoError(t, m.Close())
	testkit.Eventually(t, 10*time.Second, func() (err error) { // it takes the next client
		m, err = Dial(testContext(t), socket)
		return err
	})
	require.NoError(t, m.Close())
}
