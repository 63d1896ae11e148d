package targettest

import (
	"context"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// bootsOnce: several that boot one copy at once start one machine, and all see it up. It leaves the disks alone.
func (s *suite) bootsOnce(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	s.make(t, p, stepBoot)
	if !made.Boots() {
		e, err := made.Boot(ctx, p, nil)
		require.NoError(t, err)
		require.Nil(t, e)
		return
	}
	disk := filepath.Join(p.Dir, made.DiskFile(osDisk))
	before := sum(t, disk)
	var wg sync.WaitGroup
	evidence, errs := make([]*typesv1.BootEvidence, 4), make([]error, 4)
	var heard sync.Once
	told := make(chan struct{})
	for i := range errs {
		wg.Go(func() {
			evidence[i], errs[i] = made.Boot(ctx, p, func(line string) {
				require.NotEmpty(t, line)
				heard.Do(func() { close(told) })
			})
		})
	}
	wg.Wait()
	for i, err := range errs {
		require.NoError(t, err)
		require.Contains(t, evidence[i].ConsoleTail, ConsoleText+"1")
		require.NotContains(t, evidence[i].ConsoleTail, "\x1b")
		require.Positive(t, evidence[i].Seconds)
		require.FileExists(t, filepath.Join(p.Dir, evidence[i].ConsoleFile))
	}
	require.Equal(t, 1, s.Processes(p))
	<-told
	require.Equal(t, before, sum(t, disk), "the machine wrote to its overlay")
	_, err := made.Remove(ctx, p, false)
	require.NoError(t, err)
	s.requireGone(t, p)
}

// bootsAgain: a machine that was shut down starts from what it wrote.
func (s *suite) bootsAgain(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	if !made.Boots() {
		t.Skip("does not boot")
	}
	s.make(t, p, stepBoot)
	for _, count := range []string{"1", "2"} {
		e, err := made.Boot(ctx, p, nil)
		require.NoError(t, err)
		require.Contains(t, e.ConsoleTail, ConsoleText+count)
		require.NoError(t, made.Shutdown(ctx, p))
		require.NoError(t, made.Shutdown(ctx, p), "a repeat is harmless")
		require.Zero(t, s.Processes(p))
		running, err := made.Running(ctx, p)
		require.NoError(t, err)
		require.False(t, running)
	}
	requireCopy(t, made, p)
}

// noProof: a machine that does not show what is waited for is left running, with evidence; a boot that is called off
// returns soon, and the machine goes on.
func (s *suite) noProof(t *testing.T) {
	made, p, ctx := s.target(t), s.plan(t), bounded(t)
	if !made.Boots() {
		t.Skip("does not boot")
	}
	s.make(t, p, stepBoot)
	p.Qemu = proto.CloneOf(p.Qemu)
	p.Qemu.ConsolePattern = "a kernel that is not there"
	calledOff, cancel := context.WithCancel(ctx)
	defer cancel()
	_, err := made.Boot(calledOff, p, func(string) { cancel() })
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, 1, s.Processes(p))

	p.Qemu.BootTimeoutSeconds = 4
	e, err := made.Boot(ctx, p, nil)
	requireReason(t, "TARGET_DID_NOT_BOOT", err)
	require.ErrorContains(t, err, ConsoleText+"1")
	require.Contains(t, e.ConsoleTail, ConsoleText+"1")
	require.Equal(t, 1, s.Processes(p))

	p.Qemu.ConsolePattern = ConsoleText // and is found again when it does
	_, err = made.Boot(ctx, p, nil)
	require.NoError(t, err)
	p.Qemu.NoWait = true
	e, err = made.Boot(ctx, p, nil)
	require.NoError(t, err)
	require.Equal(t, "none", e.Proof)
}
