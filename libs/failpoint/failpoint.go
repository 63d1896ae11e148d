// Package failpoint lets a test make a program fail at a named instruction.
//
// Code that has a moment worth attacking calls [Hit] there:
//
//	if err := failpoint.Hit("uploader/before-manifest"); err != nil {
//		return err
//	}
//
// Unarmed, a hit is one atomic load. A program's main arms points from its
// configuration (environment LANDFALL_FAILPOINTS) through [Arm]; a test in the
// same process may use [ArmFunc]. The syntax of a specification:
//
//	spec   = term *( ";" term )
//	term   = name "=" [ N ["-"] "*" ] action
//	action = "kill" | "error" | "panic" | "off" | "delay(" duration ")"
//
// "N*action" acts on the N-th hit only, "N-*action" on the N-th and every later
// one; without a count every hit acts. Hits are counted from the moment of
// arming. "kill" ends the process as SIGKILL does: no deferred call runs, no
// buffer is written.
//
// The set of armed points is one per process. That is a deliberate exception to
// the house rule against package state: a point must be reachable from any
// depth without threading a test device through every constructor.
package failpoint

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrInjected is wrapped by every error that a point armed with "error" returns.
var ErrInjected = errors.New("injected failure")

// ErrSpec is wrapped by every error about a malformed specification.
var ErrSpec = errors.New("failpoint specification")

// maxDelay bounds "delay(...)": a longer one is a typing error, not a test.
const maxDelay = 10 * time.Minute

// namePattern is "<service>/<moment>", possibly with more levels.
var namePattern = regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)*(/[a-z0-9]+(-[a-z0-9]+)*)+$`)

type action uint8

const (
	actOff action = iota
	actKill
	actError
	actPanic
	actDelay
	actFunc
)

type point struct {
	hits atomic.Int64
	from int64 // first hit that acts, counted from 1
	only bool  // act on hit number from alone
	act  action
	wait time.Duration
	fn   func() error
}

var (
	armed atomic.Pointer[map[string]*point] // nil when nothing is armed

	mu    sync.Mutex // guards changes of armed, and known
	known = map[string]struct{}{}
)

// killSelf is replaced only by this package's own tests.
var killSelf = func() {
	if p, err := os.FindProcess(os.Getpid()); err == nil {
		_ = p.Kill()
	}
	select {} // the signal is on its way; not one more instruction of the caller runs
}

// Register records name for [Names] and returns it, so that a package can write
//
//	var afterSeal = failpoint.Register("change-tracker/after-seal")
//
// It panics on a name that is not well formed (a programming error).
func Register(name string) string {
	if !namePattern.MatchString(name) {
		panic(fmt.Sprintf("failpoint: malformed name %q", name))
	}
	mu.Lock()
	defer mu.Unlock()
	known[name] = struct{}{}
	return name
}

// Names returns every registered name, sorted. A name that is only hit, never
// registered, is not in it.
func Names() []string {
	mu.Lock()
	defer mu.Unlock()
	names := make([]string, 0, len(known))
	for name := range known {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Hit acts on the point if it is armed: it may return an error wrapping
// [ErrInjected], wait, panic, or never return. Unarmed it returns nil.
func Hit(name string) error {
	points := armed.Load()
	if points == nil {
		return nil
	}
	return hit(*points, name)
}

func hit(points map[string]*point, name string) error {
	p := points[name]
	if p == nil {
		return nil
	}
	n := p.hits.Add(1)
	if n < p.from || (p.only && n != p.from) {
		return nil
	}
	switch p.act {
	case actKill:
		fmt.Fprintf(os.Stderr, "failpoint %s: kill on hit %d\n", name, n)
		killSelf()
	case actError:
		return fmt.Errorf("failpoint %s: %w", name, ErrInjected)
	case actPanic:
		panic("failpoint " + name)
	case actDelay:
		time.Sleep(p.wait) //nolint:forbidigo // delaying is what was asked for
	case actFunc:
		return p.fn()
	case actOff:
	}
	return nil
}

// Hits returns how often the armed point name was hit since it was armed, and 0
// for a point that is not armed.
func Hits(name string) int64 {
	if points := armed.Load(); points != nil {
		if p := (*points)[name]; p != nil {
			return p.hits.Load()
		}
	}
	return 0
}

// Arm replaces everything armed by what spec says; an empty spec disarms. On an
// error, which wraps [ErrSpec] and names the term, nothing changes. A name that
// nobody registered is accepted if it is well formed, because points are also
// hit by names built at run time.
func Arm(spec string) error {
	points := map[string]*point{}
	for term := range strings.SplitSeq(spec, ";") {
		term = strings.TrimSpace(term)
		if term == "" {
			continue
		}
		name, p, err := parseTerm(term)
		if err != nil {
			return err
		}
		if _, twice := points[name]; twice {
			return fmt.Errorf("%w: %s is named twice", ErrSpec, name)
		}
		points[name] = p
	}
	mu.Lock()
	defer mu.Unlock()
	store(points)
	return nil
}

// ArmFunc arms one more point with a function that runs on every hit, in the
// goroutine of the hit; what it returns, [Hit] returns. The result disarms that
// point again. It exists for tests in the same process that must hold a step or
// count it.
func ArmFunc(name string, fn func() error) (disarm func()) {
	p := &point{from: 1, act: actFunc, fn: fn}
	change(func(points map[string]*point) { points[name] = p })
	return func() {
		change(func(points map[string]*point) {
			if points[name] == p {
				delete(points, name)
			}
		})
	}
}

// Disarm disarms every point.
func Disarm() {
	mu.Lock()
	defer mu.Unlock()
	armed.Store(nil)
}

func change(edit func(map[string]*point)) {
	mu.Lock()
	defer mu.Unlock()
	points := map[string]*point{}
	if old := armed.Load(); old != nil {
		for name, p := range *old {
			points[name] = p
		}
	}
	edit(points)
	store(points)
}

// store needs mu.
func store(points map[string]*point) {
	if len(points) == 0 {
		armed.Store(nil)
		return
	}
	armed.Store(&points)
}

func parseTerm(term string) (string, *point, error) {
	name, rest, ok := strings.Cut(term, "=")
	name = strings.TrimSpace(name)
	if !ok || !namePattern.MatchString(name) {
		return "", nil, fmt.Errorf("%w: %q: want <service>/<moment>=<action>", ErrSpec, term)
	}
	p := &point{from: 1}
	if count, act, counted := strings.Cut(rest, "*"); counted {
		digits, open := strings.CutSuffix(strings.TrimSpace(count), "-")
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n < 1 {
			return "", nil, fmt.Errorf("%w: %q: the count before * is a whole number from 1", ErrSpec, term)
		}
		p.from, p.only, rest = n, !open, act
	}
	switch act := strings.TrimSpace(rest); {
	case act == "kill":
		p.act = actKill
	case act == "error":
		p.act = actError
	case act == "panic":
		p.act = actPanic
	case act == "off":
		p.act = actOff
	case strings.HasPrefix(act, "delay(") && strings.HasSuffix(act, ")"):
		d, err := time.ParseDuration(act[len("delay(") : len(act)-1])
		if err != nil || d < 0 || d > maxDelay {
			return "", nil, fmt.Errorf("%w: %q: delay takes a duration from 0 to %s", ErrSpec, term, maxDelay)
		}
		p.act, p.wait = actDelay, d
	default:
		return "", nil, fmt.Errorf("%w: %q: action is kill, error, panic, off or delay(duration)", ErrSpec, term)
	}
	return name, p, nil
}
