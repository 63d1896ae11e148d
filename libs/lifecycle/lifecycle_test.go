package lifecycle_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/lifecycle"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type story struct {
	mu    sync.Mutex
	steps []string
}

func (s *story) tell(step string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, step)
}

func (s *story) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.steps, " ")
}

func (s *story) component(name string, needs ...string) lifecycle.Component {
	return lifecycle.Component{
		Name: name, Needs: needs,
		Start: func(context.Context) error { s.tell("+" + name); return nil },
		Run:   func(ctx context.Context) error { <-ctx.Done(); s.tell("~" + name); return ctx.Err() },
		Stop:  func(context.Context) error { s.tell("-" + name); return nil },
	}
}

func fast(t *testing.T, signals chan os.Signal) lifecycle.Options {
	return lifecycle.Options{DrainDelay: -1, StopTimeout: 2 * time.Second, Signals: signals, Logger: testkit.Logger(t)}
}

func TestOrder(t *testing.T) {
	var s story
	signals := make(chan os.Signal, 1)
	o := fast(t, signals)
	o.OnReady = func() { s.tell("ready"); signals <- syscall.SIGTERM }
	o.OnDrain = func() { s.tell("drain") }
	err := lifecycle.Run(testkit.Context(t), o, s.component("api", "svc"), s.component("svc", "bus", "store"), s.component("bus"), s.component("store"))
	require.NoError(t, err)
	require.Equal(t, "+bus +store +svc +api ready drain -api ~api -svc ~svc -store ~store -bus ~bus", s.String())
}

func TestReadinessGates(t *testing.T) {
	var s story
	var asked atomic.Int64
	a := s.component("a")
	a.Ready = func(context.Context) error {
		if asked.Add(1) < 3 {
			return errors.New("warming up")
		}
		s.tell("a-ready")
		return nil
	}
	ctx, cancel := context.WithCancel(testkit.Context(t))
	o := fast(t, make(chan os.Signal))
	o.OnReady = cancel
	require.NoError(t, lifecycle.Run(ctx, o, s.component("b", "a"), a))
	require.True(t, strings.HasPrefix(s.String(), "+a a-ready +b "), s.String())

	never := lifecycle.Component{Name: "never", Ready: func(context.Context) error { return errors.New("no store") }}
	o.StartTimeout = 50 * time.Millisecond
	err := lifecycle.Run(testkit.Context(t), o, never)
	require.ErrorContains(t, err, "never is not ready: no store")
}

func TestFirstFailureIsNamedAndStopsAll(t *testing.T) {
	boom := errors.New("boom")
	for name, bad := range map[string]lifecycle.Component{
		"start": {Start: func(context.Context) error { return boom }},
		"run":   {Run: func(context.Context) error { return boom }},
		"early": {Run: func(context.Context) error { return nil }},
		"panic": {Run: func(context.Context) error { panic("boom") }},
		"ready": {Run: func(context.Context) error { return boom }, Ready: func(context.Context) error { return errors.New("no") }},
	} {
		t.Run(name, func(t *testing.T) {
			var s story
			bad.Name, bad.Needs = "bad", []string{"good"}
			err := lifecycle.Run(testkit.Context(t), fast(t, make(chan os.Signal)), bad, s.component("good"))
			require.ErrorContains(t, err, "bad")
			if name != "early" && name != "panic" {
				require.ErrorIs(t, err, boom)
			}
			require.Equal(t, "+good -good ~good", s.String())
		})
	}
}

func TestSignalDuringStart(t *testing.T) {
	var s story
	signals := make(chan os.Signal, 1)
	slow := lifecycle.Component{Name: "slow", Needs: []string{"a"}, Start: func(ctx context.Context) error {
		signals <- syscall.SIGTERM
		<-ctx.Done()
		return ctx.Err()
	}}
	require.NoError(t, lifecycle.Run(testkit.Context(t), fast(t, signals), s.component("a"), slow))
	require.Equal(t, "+a -a ~a", s.String())
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	signals := make(chan os.Signal, 2)
	o := fast(t, signals)
	o.StopTimeout = time.Minute
	o.OnReady = func() { signals <- syscall.SIGTERM }
	release := make(chan struct{})
	defer close(release)
	stuck := lifecycle.Component{Name: "stuck", Stop: func(context.Context) error {
		signals <- syscall.SIGTERM
		<-release
		return nil
	}}
	begin := time.Now()
	require.ErrorIs(t, lifecycle.Run(testkit.Context(t), o, stuck), lifecycle.ErrForced)
	require.Less(t, time.Since(begin), 10*time.Second)

	o.DrainDelay = time.Minute
	o.OnDrain = func() { signals <- syscall.SIGTERM }
	require.ErrorIs(t, lifecycle.Run(testkit.Context(t), o, lifecycle.Component{Name: "x"}), lifecycle.ErrForced)
}

// However many components hang, the stop takes no longer than MaxStop.
func TestStopIsBounded(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	hang := func(context.Context) error { <-release; return nil }
	var parts []lifecycle.Component
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		parts = append(parts, lifecycle.Component{Name: name, Stop: hang, Run: hang, StopTimeout: 150 * time.Millisecond})
	}
	ctx, cancel := context.WithCancel(testkit.Context(t))
	o := lifecycle.Options{
		DrainDelay: 50 * time.Millisecond, StopTimeout: 400 * time.Millisecond, Signals: make(chan os.Signal), OnReady: cancel,
		Logger: testkit.Logger(t),
	}
	require.Equal(t, 450*time.Millisecond, o.MaxStop())
	begin := time.Now()
	err := lifecycle.Run(ctx, o, parts...)
	took := time.Since(begin)
	require.ErrorIs(t, err, lifecycle.ErrStopTimeout)
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		require.ErrorContains(t, err, "stop "+name)
	}
	require.Less(t, took, o.MaxStop()+500*time.Millisecond)
	require.Less(t, lifecycle.Options{}.MaxStop(), 30*time.Second, "the default fits the usual grace period")
}

func TestBadGraphs(t *testing.T) {
	run := func(c ...lifecycle.Component) error {
		return lifecycle.Run(testkit.Context(t), fast(t, make(chan os.Signal)), c...)
	}
	require.ErrorContains(t, run(lifecycle.Component{Name: "a", Needs: []string{"b"}}), `"a" needs "b"`)
	require.ErrorContains(t, run(lifecycle.Component{Name: "a"}, lifecycle.Component{Name: "a"}), "taken")
	require.ErrorContains(t, run(lifecycle.Component{Name: "a", Needs: []string{"b"}}, lifecycle.Component{Name: "b", Needs: []string{"a"}}), "a -> b -> a")
}
