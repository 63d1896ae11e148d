package vhdtarget_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/replica"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// A program that is not ours sees the disk as it is.
func TestOthersReadIt(t *testing.T) {
	qemu, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip(err)
	}
	ctx := context.Background()
	p := target.Plan{Failover: "f1", Dir: filepath.Join(t.TempDir(), "drill"), Machine: &typesv1.Machine{Disks: []*typesv1.Disk{{Id: "os"}}}}
	made := vhdtarget.Target{}
	files, err := made.Claim(ctx, p, false)
	require.NoError(t, err)
	require.Equal(t, []string{"os.vhd", "vm.json"}, files)
	sink, err := made.Sink(ctx, p)
	require.NoError(t, err)
	d, err := sink.Disk(ctx, replica.DiskState{ID: "os", Gen: 1, Size: 3 << 20})
	require.NoError(t, err)
	require.NoError(t, d.Finish(ctx))
	require.NoError(t, sink.Close())
	out, err := exec.Command(qemu, "info", "-f", "vpc", filepath.Join(p.Dir, "os.vhd")).CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "3 MiB (3145728 bytes)")
}
