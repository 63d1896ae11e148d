package targettest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// childVariable tells a process of the test binary that it is a child, and what to do.
const childVariable = "LANDFALL_TARGETTEST_CHILD"

// order is what a child does.
type order struct {
	Dir      string `json:"dir"`
	Failover string `json:"failover"`
	// Remove: remove the copy instead of making it.
	Remove bool `json:"remove"`
	// MaxFile bounds files, in bytes, as a full volume does; 0 does not.
	MaxFile uint64 `json:"max_file"`
}

// Child does a parent's order and ends the process, when this is a child of the suite. Call it first thing in TestMain.
func Child(o Options) {
	raw := os.Getenv(childVariable) //nolint:forbidigo // how a test tells its child
	if raw == "" {
		return
	}
	if err := obey(o, raw); err != nil {
		fmt.Println("error", errcat.Reason(err), strings.ReplaceAll(err.Error(), "\n", " "))
		os.Exit(1)
	}
	fmt.Println("end")
	os.Exit(0)
}

func obey(o Options, raw string) error {
	var do order
	if err := json.Unmarshal([]byte(raw), &do); err != nil {
		return err
	}
	if do.MaxFile > 0 {
		if err := limitFiles(do.MaxFile); err != nil {
			return err
		}
	}
	made, err := o.New()
	if err != nil {
		return err
	}
	ctx := context.Background()
	p := target.Plan{Failover: do.Failover, Dir: do.Dir, Machine: machine(), Qemu: o.Qemu}
	if do.Remove {
		fmt.Println("begin", steps)
		_, err := made.Remove(ctx, p, false)
		return err
	}
	existed, err := made.Check(ctx, p)
	if err != nil {
		return err
	}
	for which := range steps {
		fmt.Println("begin", which)
		if err := step(ctx, made, p, existed, which); err != nil {
			return err
		}
		fmt.Println("done", which)
	}
	return nil
}

// child starts a child; the lines that it says are on the channel, which is closed at its end.
func child(t *testing.T, do order) (*exec.Cmd, <-chan string) {
	t.Helper()
	raw, err := json.Marshal(do)
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childVariable+"="+string(raw))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := make(chan string, 64)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			lines <- in.Text()
		}
		_, _ = io.Copy(io.Discard, out)
	}()
	return cmd, lines
}

// kill runs a child, kills it a moment after it began a step, and answers which steps it had done. A child that was
// faster has done all.
func kill(t *testing.T, do order, at int, after time.Duration) (done int) {
	t.Helper()
	cmd, lines := child(t, do)
	killed := false
	for line := range lines {
		switch word, rest, _ := strings.Cut(line, " "); word {
		case "begin":
			if rest == fmt.Sprint(at) {
				timer := time.NewTimer(after)
				<-timer.C
				require.NoError(t, cmd.Process.Kill())
				killed = true
			}
		case "done":
			done++
		case "error":
			require.Fail(t, "child", line)
		}
	}
	err := cmd.Wait()
	require.True(t, killed || err == nil, "%v", err)
	return done
}

// moment is a random moment of a step: most steps are short, a boot takes up to a second.
func moment(which int) time.Duration {
	longest := 8 * time.Millisecond
	if which == stepBoot {
		longest = 500 * time.Millisecond
	}
	return rand.N(longest)
}

// killedMaking: a process that makes the copy is killed at some moment of some step, and another one goes on from the
// step that it had not finished. The copy is right, and one machine runs that was started once.
func (s *suite) killedMaking(t *testing.T) {
	made, ctx := s.target(t), bounded(t)
	for i := range s.Kills {
		p := s.plan(t)
		at := i % steps
		if made.Boots() && i%2 == 1 {
			at = stepBoot // what is most easily wrong
		}
		after := moment(at)
		done := kill(t, order{Dir: p.Dir, Failover: p.Failover}, at, after)
		for which := done; which < steps; which++ {
			require.NoError(t, step(ctx, made, p, false, which), "step %d, killed %s into step %d", which, after, at)
		}
		requireCopy(t, made, p)
		if made.Boots() {
			require.Equal(t, 1, s.Processes(p))
			e, err := made.Boot(ctx, p, nil)
			require.NoError(t, err)
			require.Contains(t, e.ConsoleTail, ConsoleText+"1", "killed %s into step %d", after, at)
			require.Equal(t, 1, s.Processes(p))
		}
		_, err := made.Remove(ctx, p, false)
		require.NoError(t, err)
		s.requireGone(t, p)
	}
}

// killedRemoving: what a killed removal leaves is removed by the next.
func (s *suite) killedRemoving(t *testing.T) {
	made, ctx := s.target(t), bounded(t)
	for i := range s.Kills {
		p := s.plan(t)
		upTo := steps
		if i%2 == 1 {
			upTo = stepBoot
		}
		s.make(t, p, upTo)
		longest := 3 * time.Millisecond
		if made.Boots() && upTo == steps {
			longest = 80 * time.Millisecond
		}
		kill(t, order{Dir: p.Dir, Failover: p.Failover, Remove: true}, steps, rand.N(longest))
		_, err := made.Remove(ctx, p, false)
		require.NoError(t, err)
		s.requireGone(t, p)
	}
}

// fullVolume: a volume that takes no more is TARGET_UNWRITABLE, and what was made goes.
func (s *suite) fullVolume(t *testing.T) {
	if err := limitFiles(0); err != nil {
		t.Skip(err)
	}
	made, ctx := s.target(t), bounded(t)
	for _, most := range []uint64{16, 64 << 10, 4 << 20} { // the marker, the first bytes of a disk, the second disk
		p := s.plan(t)
		cmd, lines := child(t, order{Dir: p.Dir, Failover: p.Failover, MaxFile: most})
		var last string
		for line := range lines {
			last = line
		}
		require.Error(t, cmd.Wait())
		require.True(t, strings.HasPrefix(last, "error ERROR_REASON_TARGET_UNWRITABLE"), "%d bytes: %s", most, last)
		_, err := made.Remove(ctx, p, false)
		require.NoError(t, err)
		s.requireGone(t, p)
	}
}
