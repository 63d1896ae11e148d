package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/rpc"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
)

// host is one host in a child process, and the way to it.
type host struct {
	t        *testing.T
	settings settings
	caller   rpc.Identity
	kill     func()
	close    func()
	host     hostproviderv1.HostServiceClient
	tracker  changetrackerv1.ChangeTrackerServiceClient
}

// startHost makes certificates and starts the child.
func startHost(t *testing.T, s settings) *host {
	authority, err := pki.Open(filepath.Join(s.Dir, "ca"), time.Now)
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(s.sockets(), 0o700))
	_, err = authority.Ensure(s.certificates(), pki.Request{Identity: pki.ServiceIdentity("change-tracker", "host-provider")})
	require.NoError(t, err)
	callers := filepath.Join(s.Dir, "caller")
	_, err = authority.Ensure(callers, pki.Request{Identity: pki.ServiceIdentity("scheduler", "uploader", "resync-engine")})
	require.NoError(t, err)
	h := &host{t: t, settings: s}
	h.caller, err = rpc.LoadIdentity(callers, time.Now)
	require.NoError(t, err)
	h.start()
	t.Cleanup(func() { h.stop() })
	return h
}

func (h *host) start() {
	h.t.Helper()
	_ = os.Remove(h.settings.address())
	raw, err := json.Marshal(h.settings)
	require.NoError(h.t, err)
	log, err := os.OpenFile(filepath.Join(h.settings.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(h.t, err)
	defer log.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(raw))
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(h.t, cmd.Start())
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	h.kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	var address []byte
	testkit.Eventually(h.t, 30*time.Second, func() error {
		select {
		case <-done:
			return fmt.Errorf("the host ended: %s", h.tail())
		default:
		}
		var err error
		if address, err = os.ReadFile(h.settings.address()); errors.Is(err, fs.ErrNotExist) {
			return errors.New("the host has no address yet")
		}
		return err
	})
	dialer := rpc.NewDialer(rpc.DialerOptions{Identity: h.caller})
	conn, err := dialer.Conn(string(address))
	require.NoError(h.t, err)
	h.close = sync.OnceFunc(func() { require.NoError(h.t, dialer.Close()) })
	h.host, h.tracker = hostproviderv1.NewHostServiceClient(conn), changetrackerv1.NewChangeTrackerServiceClient(conn)
}

// stop kills the host.
func (h *host) stop() {
	h.close()
	h.kill()
	if h.t.Failed() {
		h.t.Logf("the host's log ends with:\n%s", h.tail())
	}
}

func (h *host) tail() string {
	b, _ := os.ReadFile(filepath.Join(h.settings.Dir, "log"))
	return string(b[max(0, len(b)-8000):])
}

func (h *host) Host() hostproviderv1.HostServiceClient              { return h.host }
func (h *host) Tracker() changetrackerv1.ChangeTrackerServiceClient { return h.tracker }

// machine waits until the host lists its only machine.
func (h *host) machine() *hostproviderv1.GetMachineResponse {
	h.t.Helper()
	var out *hostproviderv1.GetMachineResponse
	testkit.Eventually(h.t, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(testkit.Context(h.t), 10*time.Second)
		defer cancel()
		list, err := h.host.ListMachines(ctx, &hostproviderv1.ListMachinesRequest{})
		if err != nil {
			return err
		}
		if len(list.Machines) != 1 {
			return fmt.Errorf("host lists %d machines, problems: %v", len(list.Machines), list.Problems)
		}
		out = &hostproviderv1.GetMachineResponse{Machine: list.Machines[0]}
		return nil
	})
	return out
}
