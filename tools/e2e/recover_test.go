package e2e

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/tools/cli"
)

// recoverFrom runs `landfall recover` with nothing but where the store is: no state folder, no server.
func recoverFrom(ctx context.Context, t *testing.T, settings string, args ...string) (out, errOut string, code int) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	all := append([]string{"recover", "--config", settings, "--state", filepath.Join(t.TempDir(), "no-state")}, args...)
	code = cli.Main(ctx, all, strings.NewReader(""), &stdout, &stderr)
	return stdout.String(), stderr.String(), code
}

// TestRecoverFromStorageAlone kills everything while the guest writes, and brings the machine back from the store
// and nothing else: the oldest and the newest point that were received, then the newest one by a plan that takes over. When
// the site comes back to life, nothing that it sends counts.
func TestRecoverFromStorageAlone(t *testing.T) {
	for _, on := range []storage{onDir, onAzurite} {
		t.Run(string(on), func(t *testing.T) { recoverAlone(t, on) })
	}
}

func recoverAlone(t *testing.T, on storage) {
	p := newUp(t, on) // builds the programs, which may take a while
	ctx, cancel := context.WithTimeout(t.Context(), overall)
	defer cancel()
	settings := p.storeFile()
	m := newMachine(p, 11, 16*mib, 8*mib)
	began := time.Now()
	p.startAll()
	m.write(5 * time.Millisecond)
	p.protect(ctx)
	plan := filepath.Join(p.dir, "plan.yaml")
	require.NoError(t, os.WriteFile(plan, []byte("name: everything\ngroups:\n- title: all of it\n  vms: ["+machineName+"]\n"), 0o600))
	require.NoError(t, p.landfall(ctx, nil, "plan", "apply", "-f", plan))
	points := m.since(began, 4, 60*time.Second)
	p.wait(60*time.Second, "the catalogue has the plan and the machine", func(ctx context.Context) error {
		out, errOut, code := recoverFrom(ctx, t, settings)
		if code != 0 || !strings.Contains(out, "everything") || !strings.Contains(out, "e2e") || strings.Contains(out, "not in the catalogue") {
			return errNotYet
		}
		require.Empty(t, errOut)
		return nil
	})
	p.killAll()
	received, err := m.look(ctx)
	require.NoError(t, err)

	text, errOut, code := recoverFrom(ctx, t, settings, "--vm", machineName)
	require.Zero(t, code, errOut)
	require.Contains(t, text, "\n"+strconv.FormatUint(uint64(points[0].Ordinal), 10)+" ")
	for _, point := range []replica.Point{received[0], received[len(received)-1]} {
		out := filepath.Join(t.TempDir(), "copy")
		_, errOut, code = recoverFrom(ctx, t, settings, "--vm", machineName, "--point", strconv.FormatUint(uint64(point.Ordinal), 10), "--out", out)
		require.Zero(t, code, errOut)
		m.verifyCopy(ctx, out, point.Ordinal)
	}

	out := filepath.Join(t.TempDir(), "all")
	_, errOut, code = recoverFrom(ctx, t, settings, "--plan", "everything", "--out", out, "--take-over", "--yes")
	require.Zero(t, code, errOut)
	m.verifyCopy(ctx, filepath.Join(out, machineName), received[len(received)-1].Ordinal)

	// The site comes back. It must not be able to commit any more.
	head := func() replica.Seq {
		st, err := m.chain.Refresh(ctx)
		require.NoError(t, err)
		require.True(t, st.Closed())
		require.True(t, strings.HasPrefix(st.Fence.Failover, "recover-"))
		return st.Head
	}
	before := head()
	p.startAll()
	p.wait(60*time.Second, "the site says that it cannot send", func(ctx context.Context) error {
		vm, err := p.vm(ctx)
		if err == nil && vm.GetRetry().GetAttempt() == 0 && vm.GetState().String() == "PROTECTION_STATE_PROTECTED" {
			err = errNotYet
		}
		return err
	})
	require.Equal(t, before, head(), "nothing of the old site came after the close")
}
