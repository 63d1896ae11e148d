// Package targettest holds recovery targets to what package target promises.
//
// A target's test calls Child first thing in TestMain and Run in a test. The
// suite makes a machine of two disks whose first one boots by a program of a
// few bytes (BootSector), kills processes that work on it at many moments, and
// looks at what is left.
package targettest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/vdisk"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// Options say what is tested.
type Options struct {
	// New returns the target. It is called in child processes too.
	New func() (target.Target, error)
	// Qemu are the settings of the plans; nil for targets that have none. A target that boots must prove itself by
	// ConsolePattern on what BootSector writes.
	Qemu *failoverv1.QemuTarget
	// Processes counts the machines that run for a plan; needed for targets that boot.
	Processes func(target.Plan) int
	// Kills is how many processes are killed at random moments; 0 means 12.
	Kills int
}

// Run tests a target.
func Run(t *testing.T, o Options) {
	s := &suite{Options: o}
	if s.Kills == 0 {
		s.Kills = 12
	}
	for _, c := range []struct {
		name string
		test func(*suite, *testing.T)
	}{
		{"whole life", (*suite).wholeLife},
		{"leaves what others put there", (*suite).leavesOthers},
		{"refuses folders", (*suite).refusesFolders},
		{"foreign marker", (*suite).foreignMarker},
		{"lost marker", (*suite).lostMarker},
		{"marker cannot escape", (*suite).markerCannotEscape},
		{"racing claims", (*suite).racingClaims},
		{"stale attempts", (*suite).staleAttempts},
		{"leftovers", (*suite).leftovers},
		{"folder that lost its marker in removal", (*suite).halfRemoved},
		{"full volume", (*suite).fullVolume},
		{"killed while it is made", (*suite).killedMaking},
		{"killed while it is removed", (*suite).killedRemoving},
		{"boot starts one machine", (*suite).bootsOnce},
		{"boot after shutdown", (*suite).bootsAgain},
		{"boot without proof", (*suite).noProof},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(s, t) })
	}
}

type suite struct{ Options }

const (
	osDisk, dataDisk = "os", "data"
	osSize           = 3 << 20
	dataSize         = 5<<20 + 512 // the VHD is padded
	described        = `{"version":1}` + "\n"
	marker           = ".landfall-failover.json"
)

func reason(name string) typesv1.ErrorReason {
	return typesv1.ErrorReason(typesv1.ErrorReason_value["ERROR_REASON_"+name])
}

// machine is what is copied.
func machine() *typesv1.Machine {
	return &typesv1.Machine{
		Id: "3f9c", DisplayName: "suite", Generation: 1, Cpus: 1, MemoryBytes: 64 << 20,
		Disks:           []*typesv1.Disk{{Id: dataDisk, SizeBytes: dataSize}, {Id: osDisk, SizeBytes: osSize, OsDisk: true}},
		NetworkAdapters: []*typesv1.NetworkAdapter{{Name: "net", MacAddress: "00:15:5d:0a:0b:0c"}},
	}
}

// content is what a disk holds at its beginning.
func content(disk string) []byte {
	if disk == osDisk {
		return append(BootSector(), bytes.Repeat([]byte{0}, 512)...)
	}
	return bytes.Repeat([]byte("landfall"), 8192)
}

func (s *suite) target(t *testing.T) target.Target {
	t.Helper()
	made, err := s.New()
	require.NoError(t, err)
	return made
}

// plan is a copy into a folder that does not exist, and is cleared away at the end whatever happened.
func (s *suite) plan(t *testing.T) target.Plan {
	t.Helper()
	return s.planFor(t, filepath.Join(t.TempDir(), "drill"), "f1")
}

func (s *suite) planFor(t *testing.T, dir, failover string) target.Plan {
	t.Helper()
	p := target.Plan{Failover: failover, Dir: dir, Machine: machine(), Qemu: s.Qemu}
	made := s.target(t)
	t.Cleanup(func() {
		if made.Boots() && runtime.GOOS != "windows" {
			_ = os.MkdirAll(dir, 0o750) // where a test took it away
		}
		_, _ = made.Remove(context.Background(), p, false)
	})
	return p
}

// bounded is long enough for everything on a busy machine.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// The steps, as the orchestrator makes them.
const (
	stepClaim = iota
	stepDisks
	stepDescribe
	stepBoot
	steps
)

// step makes one step. existed is what Check said.
func step(ctx context.Context, made target.Target, p target.Plan, existed bool, which int) error {
	switch which {
	case stepClaim:
		_, err := made.Claim(ctx, p, existed)
		return err
	case stepDisks:
		return disks(ctx, made, p)
	case stepDescribe:
		return made.Describe(ctx, p, []byte(described))
	case stepBoot:
		if made.Boots() {
			_, err := made.Boot(ctx, p, nil)
			return err
		}
	}
	return nil
}

// disks fills the sink as replica.Materialise does.
func disks(ctx context.Context, made target.Target, p target.Plan) (err error) {
	sink, err := made.Sink(ctx, p)
	if err != nil {
		return err
	}
	defer sink.Close()
	for _, d := range p.Machine.Disks {
		k, err := sink.Disk(ctx, replica.DiskState{ID: d.Id, Gen: 1, Size: d.SizeBytes})
		if err != nil {
			return err
		}
		if err := k.WriteAt(ctx, content(d.Id), 0); err != nil {
			return err
		}
		if err := k.Finish(ctx); err != nil {
			return err
		}
	}
	return nil
}

// make makes the copy in an absent folder, up to and without the given step.
func (s *suite) make(t *testing.T, p target.Plan, upTo int) {
	t.Helper()
	made, ctx := s.target(t), bounded(t)
	existed, err := made.Check(ctx, p)
	require.NoError(t, err)
	for which := range upTo {
		require.NoError(t, step(ctx, made, p, existed, which))
	}
}

// requireCopy looks at the copy: it has exactly the point's bytes, whatever a machine wrote since.
func requireCopy(t *testing.T, made target.Target, p target.Plan) {
	t.Helper()
	for _, d := range p.Machine.Disks {
		image, err := vdisk.Open(filepath.Join(p.Dir, made.DiskFile(d.Id)), vdisk.FormatVHD, true)
		require.NoError(t, err)
		got := make([]byte, image.Size())
		_, err = image.ReadAt(got, 0)
		require.NoError(t, err)
		require.NoError(t, image.Close())
		require.Equal(t, (d.SizeBytes+1<<20-1)>>20<<20, int64(len(got)), "whole MiB")
		want := make([]byte, len(got))
		copy(want, content(d.Id))
		require.True(t, bytes.Equal(want, got), "disk %s", d.Id)
	}
	raw, err := os.ReadFile(filepath.Join(p.Dir, "vm.json"))
	require.NoError(t, err)
	require.Equal(t, described, string(raw))
}

// requireGone looks at what is left of a copy whose folder it made itself.
func (s *suite) requireGone(t *testing.T, p target.Plan) {
	t.Helper()
	require.NoDirExists(t, p.Dir)
	left, err := os.ReadDir(filepath.Dir(p.Dir))
	require.NoError(t, err)
	require.Empty(t, left, "nothing beside the folder")
	if s.Processes != nil {
		require.Zero(t, s.Processes(p))
	}
}

func requireReason(t *testing.T, name string, err error) {
	t.Helper()
	require.True(t, errcat.Is(err, reason(name)), "want %s, have %v: %v", name, errcat.Reason(err), err)
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func sum(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	return sha256.Sum256(raw)
}
