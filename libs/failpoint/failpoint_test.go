package failpoint

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const childSpec = "LANDFALL_FAILPOINT_TEST_CHILD"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childSpec); spec != "" {
		if err := Arm(spec); err != nil {
			os.Exit(3)
		}
		for range 5 {
			_ = Hit("test/kill")
			_, _ = os.Stdout.WriteString("x")
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestCounts(t *testing.T) {
	defer Disarm()
	for _, c := range []struct {
		spec string
		want []bool
	}{
		{"a/b=error", []bool{true, true, true, true}},
		{"a/b=1*error", []bool{true, false, false, false}},
		{"a/b=3*error", []bool{false, false, true, false}},
		{"a/b=2-*error", []bool{false, true, true, true}},
		{"a/b=off", []bool{false, false, false, false}},
		{"", []bool{false, false, false, false}},
		{" a/c=error ; a/b = 2 * error ;", []bool{false, true, false, false}},
	} {
		require.NoError(t, Arm(c.spec), c.spec)
		for i, want := range c.want {
			require.Equal(t, want, errors.Is(Hit("a/b"), ErrInjected), "%s, hit %d", c.spec, i+1)
		}
	}
}

func TestActions(t *testing.T) {
	defer Disarm()
	require.NoError(t, Arm("a/wait=delay(20ms);a/boom=panic"))
	begin := time.Now()
	require.NoError(t, Hit("a/wait"))
	require.GreaterOrEqual(t, time.Since(begin), 20*time.Millisecond)
	require.Panics(t, func() { _ = Hit("a/boom") })
	require.EqualValues(t, 1, Hits("a/wait"))

	mine := errors.New("mine")
	disarm := ArmFunc("a/fn", func() error { return mine })
	require.ErrorIs(t, Hit("a/fn"), mine)
	require.EqualValues(t, 1, Hits("a/wait"), "the others stay armed and counted")
	disarm()
	require.NoError(t, Hit("a/fn"))
}

func TestBadSpecChangesNothing(t *testing.T) {
	defer Disarm()
	require.NoError(t, Arm("a/b=error"))
	for _, spec := range []string{
		"x", "x=kill", "A/b=kill", "a/b", "a/b=", "a/b=boom", "a/b=0*kill", "a/b=-1*kill", "a/b=x*kill",
		"a/b=delay", "a/b=delay()", "a/b=delay(1)", "a/b=delay(-1s)", "a/b=delay(2h)", "a/b=kill;a/b=error", "a//b=kill",
	} {
		require.ErrorIs(t, Arm(spec), ErrSpec, spec)
	}
	require.ErrorIs(t, Hit("a/b"), ErrInjected)
}

func TestKillIsImmediate(t *testing.T) {
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childSpec+"=test/kill=3*kill")
	out, err := cmd.Output()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, "xx", string(out), "nothing runs after the third hit")
	if runtime.GOOS != "windows" {
		require.Equal(t, syscall.SIGKILL, exit.Sys().(syscall.WaitStatus).Signal())
	}
}

func TestNames(t *testing.T) {
	require.Equal(t, "svc/after-seal", Register("svc/after-seal"))
	require.Contains(t, Names(), "svc/after-seal")
	require.Panics(t, func() { Register("no slash") })
}

func FuzzArm(f *testing.F) {
	f.Add("a/b=3*kill;c/d=delay(5ms)")
	f.Fuzz(func(t *testing.T, spec string) {
		defer Disarm()
		if err := Arm(spec); err != nil && !errors.Is(err, ErrSpec) {
			t.Fatal(err)
		}
	})
}

func BenchmarkHitOff(b *testing.B) {
	for b.Loop() {
		_ = Hit("a/b")
	}
}
