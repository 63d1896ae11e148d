// Package lifecycle runs the components of a program: it starts them by
// dependency, one after another, each when what it needs is ready, and stops
// them in reverse. The first failure stops all and is named.
//
// A termination signal stops gracefully: not-serving is announced, the drain
// delay passes so that callers go elsewhere, then the components stop. A second
// signal ends [Run] at once. Stopping takes at most DrainDelay + StopTimeout
// ([Options.MaxStop]), however many components there are, because they share
// one deadline; give the process manager more than that.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// DefaultDrainDelay is how long a program goes on serving after it has said
	// that it will not; a few seconds of a load balancer's attention.
	DefaultDrainDelay = 3 * time.Second
	// DefaultStopTimeout leaves a margin below the 30 s that Kubernetes and
	// systemd give by default.
	DefaultStopTimeout = 20 * time.Second
	// DefaultStartTimeout bounds the start of one component.
	DefaultStartTimeout = time.Minute

	readyPoll = 10 * time.Millisecond
)

// ErrForced is returned by [Run] when a second signal ended it with components
// still stopping: the program should exit without another step.
var ErrForced = errors.New("stopped by a second signal")

// ErrStopTimeout is wrapped by the error of a component that did not stop in time.
var ErrStopTimeout = errors.New("did not stop in time")

// Component is one part of a program. Every function is optional.
type Component struct {
	// Name is unique in the program.
	Name string
	// Needs names the components that must be ready before this one starts and
	// that stop only after it has.
	Needs []string
	// Start prepares the component and returns when it can be used.
	Start func(ctx context.Context) error
	// Run works until ctx ends and then returns. Returning earlier, with or
	// without an error, is a failure that stops the program.
	Run func(ctx context.Context) error
	// Ready is asked until it returns nil before components that need this one
	// start.
	Ready func(ctx context.Context) error
	// Stop ends the component gracefully while its Run still runs: the context of
	// Run ends when Stop returns.
	Stop func(ctx context.Context) error
	// StopTimeout bounds Stop and the end of Run together; default what is left
	// of the program's.
	StopTimeout time.Duration
}

// Options configures [Run]; zero durations take the default, negative ones are zero.
type Options struct {
	// DrainDelay passes between the announcement and the first Stop of a
	// graceful stop.
	DrainDelay time.Duration
	// StopTimeout bounds the stop of all components together.
	StopTimeout time.Duration
	// StartTimeout bounds the start of each component, its readiness included.
	StartTimeout time.Duration
	// Signals replaces the process's SIGINT and SIGTERM, for tests.
	Signals <-chan os.Signal
	// OnReady is called when every component is ready, OnDrain when stopping
	// begins: set the health status there.
	OnReady, OnDrain func()
	// Logger tells the story; default discards it.
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	for _, d := range []struct {
		v    *time.Duration
		zero time.Duration
	}{{&o.DrainDelay, DefaultDrainDelay}, {&o.StopTimeout, DefaultStopTimeout}, {&o.StartTimeout, DefaultStartTimeout}} {
		if *d.v == 0 {
			*d.v = d.zero
		}
		*d.v = max(*d.v, 0)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// MaxStop is the longest time between a signal and the return of [Run].
func (o Options) MaxStop() time.Duration {
	o = o.withDefaults()
	return o.DrainDelay + o.StopTimeout
}

// Run starts the components, waits for the end of ctx, a signal or the first
// failure, and stops them. It returns nil after a graceful stop, else the first
// failure with the name of its component, joined with the failures to stop.
func Run(ctx context.Context, o Options, components ...Component) error {
	o = o.withDefaults()
	ordered, err := order(components)
	if err != nil {
		return err
	}
	signals := o.Signals
	if signals == nil {
		ch := make(chan os.Signal, 2)
		signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
		defer signal.Stop(ch)
		signals = ch
	}
	r := &runner{o: o, failures: make(chan error, len(ordered)), force: make(chan struct{})}

	// One goroutine reads signals for the whole run: the first asks for a stop,
	// the second forces it.
	stopCtx, stop := context.WithCancel(ctx)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := 1; ; n++ {
			select {
			case <-quit:
				return
			case s := <-signals:
				o.Logger.Info("signal received", "signal", s.String(), "count", n)
				if n == 1 {
					stop()
				} else {
					close(r.force)
					return
				}
			}
		}
	}()
	defer func() { close(quit); <-done; stop() }()

	first := r.start(stopCtx, ordered)
	graceful := first == nil
	if first == nil && stopCtx.Err() == nil {
		o.Logger.Info("ready", "components", len(r.started))
		if o.OnReady != nil {
			o.OnReady()
		}
		select {
		case <-stopCtx.Done():
		case first = <-r.failures:
			graceful = false
		}
	}
	if first != nil {
		o.Logger.Error("component failed, stopping", "error", first)
	}
	if o.OnDrain != nil {
		o.OnDrain()
	}
	return errors.Join(first, r.stop(context.WithoutCancel(ctx), graceful))
}

type runner struct {
	o        Options
	started  []*running
	failures chan error // of Run functions; holds one per component
	force    chan struct{}
}

type running struct {
	Component
	cancel context.CancelFunc
	done   chan struct{} // Run returned; closed if there is none
}

// start starts the components in order; nil also when ctx ended meanwhile.
func (r *runner) start(ctx context.Context, ordered []Component) error {
	for _, c := range ordered {
		if ctx.Err() != nil {
			return nil
		}
		if err := r.startOne(ctx, c); err != nil {
			if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
				return nil
			}
			return err
		}
	}
	return nil
}

func (r *runner) startOne(ctx context.Context, c Component) error {
	begin := time.Now()
	startCtx, cancelStart := context.WithTimeout(ctx, r.o.StartTimeout)
	defer cancelStart()
	if c.Start != nil {
		if err := guard(startCtx, c.Start); err != nil {
			return fmt.Errorf("start %s: %w", c.Name, err)
		}
	}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // ends in its turn, not with the signal
	run := &running{Component: c, cancel: cancel, done: make(chan struct{})}
	r.started = append(r.started, run)
	if c.Run == nil {
		close(run.done)
	} else {
		go func() {
			defer close(run.done)
			err := guard(runCtx, c.Run)
			if runCtx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
				return
			}
			if err == nil {
				err = errors.New("ended although nobody stopped it")
			}
			r.failures <- fmt.Errorf("%s: %w", c.Name, err)
		}()
	}
	if err := r.awaitReady(startCtx, run); err != nil {
		return err
	}
	r.o.Logger.Debug("component ready", "component", c.Name, "duration", time.Since(begin))
	return nil
}

func (r *runner) awaitReady(ctx context.Context, run *running) error {
	if run.Ready == nil {
		return nil
	}
	ended := run.done
	if run.Run == nil {
		ended = nil
	}
	for {
		err := guard(ctx, run.Ready)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return <-r.failures
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w (%w)", run.Name, err, ctx.Err())
		case <-time.After(readyPoll):
		}
	}
}

// stop stops what was started, in reverse.
func (r *runner) stop(ctx context.Context, graceful bool) error {
	if graceful && r.o.DrainDelay > 0 && len(r.started) > 0 {
		select {
		case <-time.After(r.o.DrainDelay):
		case <-r.force:
			return ErrForced
		}
	}
	ctx, cancel := context.WithTimeout(ctx, r.o.StopTimeout)
	defer cancel()
	var errs []error
	for _, run := range slices.Backward(r.started) {
		forced, err := r.stopOne(ctx, run)
		if err != nil {
			r.o.Logger.Error("component did not stop cleanly", "component", run.Name, "error", err)
			errs = append(errs, fmt.Errorf("stop %s: %w", run.Name, err))
		}
		if forced {
			return errors.Join(append([]error{ErrForced}, errs...)...)
		}
	}
	// A component that failed while another was being stopped is worth a word.
	for {
		select {
		case err := <-r.failures:
			errs = append(errs, err)
		default:
			return errors.Join(errs...)
		}
	}
}

func (r *runner) stopOne(ctx context.Context, run *running) (forced bool, err error) {
	if run.StopTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, run.StopTimeout)
		defer cancel()
	}
	defer run.cancel()
	stopped := make(chan error, 1) // Stop may ignore its context; then it is left behind
	go func() {
		if run.Stop == nil {
			stopped <- nil
			return
		}
		stopped <- guard(ctx, run.Stop)
	}()
	select {
	case err = <-stopped:
	case <-ctx.Done():
		err = ErrStopTimeout
	case <-r.force:
		return true, nil
	}
	run.cancel()
	select {
	case <-run.done:
		return false, err
	default:
	}
	select {
	case <-run.done:
	case <-ctx.Done():
		return false, errors.Join(err, ErrStopTimeout)
	case <-r.force:
		return true, err
	}
	return false, err
}

func guard(ctx context.Context, f func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f(ctx)
}

// order sorts by dependency and otherwise keeps the given order.
func order(components []Component) ([]Component, error) {
	byName := map[string]Component{}
	for _, c := range components {
		if _, twice := byName[c.Name]; twice || c.Name == "" {
			return nil, fmt.Errorf("component %q: the name is empty or taken", c.Name)
		}
		byName[c.Name] = c
	}
	var out []Component
	state := map[string]int{} // 1 being visited, 2 done
	var visit func(name string, path []string) error
	visit = func(name string, path []string) error {
		path = append(path, name)
		switch c, known := byName[name]; {
		case !known:
			return fmt.Errorf("component %q needs %q, which does not exist", path[len(path)-2], name)
		case state[name] == 1:
			return fmt.Errorf("components need each other in a ring: %s", strings.Join(path, " -> "))
		case state[name] == 2:
			return nil
		default:
			state[name] = 1
			for _, need := range c.Needs {
				if err := visit(need, path); err != nil {
					return err
				}
			}
			state[name] = 2
			out = append(out, c)
			return nil
		}
	}
	for _, c := range components {
		if err := visit(c.Name, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}
