package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/vdisk"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// TestFailOverForReal takes a machine over in every way that leaves it with its source: planned, unplanned to an older
// point, cancelled, committed. What is brought up is what the guest had, and after a cancelled failover deltas go on
// where they were.
func TestFailOverForReal(t *testing.T) {
	for _, f := range forms {
		t.Run(f.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), overall)
			defer cancel()
			p := f.make(t)
			m := newMachine(p, 3, 32*mib, 16*mib)
			began := time.Now()
			step := func(what string) { t.Logf("%5.1fs %s", time.Since(began).Seconds(), what) }
			p.startAll()
			m.write(5 * time.Millisecond)
			p.protect(ctx)
			m.since(began, 3, 60*time.Second)
			step("protected")

			out := filepath.Join(p.dir, "recovered")
			require.NoError(t, p.landfall(ctx, nil, "failover", "planned", machineName, "--out", out, "--wait"))
			step("failed over as planned")
			m.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_FAILED_OVER)
			acked, _ := m.record.Acked()
			m.requireCopy(ctx, out, acked, acked+1) // the write under way may or may not have been
			m.requireSources(out)
			again, _ := m.record.Acked()
			require.LessOrEqual(t, again, acked+1, "nobody writes to a fenced machine")

			require.NoError(t, p.landfall(ctx, nil, "failover", "cancel", machineName, "--wait"))
			require.NoDirExists(t, out)
			m.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_PROTECTED)
			points := m.since(time.Now(), 2, 60*time.Second)
			require.NoError(t, m.only(ctx, 1, 0), "the source never diverged: deltas go on")
			step("cancelled, deltas go on")

			chosen := points[len(points)-3]
			require.NoError(t, p.landfall(ctx, nil, "failover", "unplanned", machineName, "--accept-unfenced",
				"--point", strconv.FormatUint(uint64(chosen.Ordinal), 10), "--out", out, "--wait"))
			step("failed over to an older point")
			m.verifyCopy(ctx, out, chosen.Ordinal)
			require.NoError(t, p.landfall(ctx, nil, "failover", "cancel", machineName, "--wait"))
			m.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_PROTECTED)
			m.since(time.Now(), 2, 60*time.Second)
			require.NoError(t, m.only(ctx, 1, 0), "rewound and rewound forward: deltas go on")
			step("cancelled, deltas go on")

			require.NoError(t, p.landfall(ctx, nil, "failover", "unplanned", machineName, "--accept-unfenced", "--point", "latest", "--out", out, "--wait"))
			all, err := m.look(ctx)
			require.NoError(t, err)
			m.verifyCopy(ctx, out, all[len(all)-1].Ordinal)
			require.NoError(t, p.landfall(ctx, nil, "failover", "commit", machineName, "--wait"))
			require.DirExists(t, out, "what was recovered is the machine from now on")
			m.requireState(ctx, typesv1.ProtectionState_PROTECTION_STATE_COMMITTED)
			p.wait(60*time.Second, "the source is fenced", func(ctx context.Context) error {
				vm, err := p.vm(ctx)
				if err == nil && !vm.GetFailover().GetSourceFenced() {
					err = errNotYet
				}
				return err
			})
			require.Error(t, p.landfall(ctx, nil, "failover", "cancel", machineName, "--wait"), "a committed failover is final")
			step("failed over to the newest point and committed")
			m.rest()
			step("the guest is at rest")
			require.NoError(t, m.verifyNew(ctx, 0))
			step(fmt.Sprintf("%d points verified", len(m.verified)))
			for i := len(p.order) - 1; i >= 0; i-- {
				require.NoError(t, p.programs[p.order[i]].interrupt(30*time.Second))
			}
		})
	}
}

// requireState waits for the VM's state.
func (m *machine) requireState(_ context.Context, want typesv1.ProtectionState) {
	m.p.t.Helper()
	m.p.wait(60*time.Second, "the VM is "+want.String(), func(ctx context.Context) error {
		vm, err := m.p.vm(ctx)
		if err == nil && vm.State != want {
			err = fmt.Errorf("the VM is %s", vm.State)
		}
		return err
	})
}

// requireCopy holds the VHD files of a failover against the record: its newest write is one of low to high.
func (m *machine) requireCopy(ctx context.Context, out string, low, high uint64) {
	m.p.t.Helper()
	var copies []io.ReaderAt
	for _, disk := range m.guest.Disks {
		image, err := vdisk.Open(filepath.Join(out, disk.ID+".vhd"), vdisk.FormatVHD, true)
		require.NoError(m.p.t, err)
		defer image.Close()
		copies = append(copies, image)
	}
	_, err := m.guest.Verify(ctx, copies, m.initial, low, high)
	require.NoError(m.p.t, err)
}

// requireSources compares recovered disks with the source's images, byte for byte.
func (m *machine) requireSources(out string) {
	t := m.p.t
	t.Helper()
	formats := []vdisk.Format{vdisk.FormatRaw, vdisk.FormatVHD}
	files := []string{"os.raw", "data.vhd"}
	for d, disk := range m.guest.Disks {
		source, err := vdisk.Open(filepath.Join(m.p.images, machineName, files[d]), formats[d], true)
		require.NoError(t, err)
		defer source.Close()
		got, err := vdisk.Open(filepath.Join(out, disk.ID+".vhd"), vdisk.FormatVHD, true)
		require.NoError(t, err)
		defer got.Close()
		a, b := make([]byte, mib), make([]byte, mib)
		for off := int64(0); off < disk.Size; off += mib {
			_, err := source.ReadAt(a, off)
			require.NoError(t, err)
			_, err = got.ReadAt(b, off)
			require.NoError(t, err)
			require.True(t, bytes.Equal(a, b), "disk %s differs from its source in the MiB at %d", disk.ID, off)
		}
	}
}
