// Package testkit has what the tests of every package need: waiting for a
// condition instead of sleeping, contexts that end before the test does, a
// printed random seed, deterministic disk content, recorders for logs and
// traces. Production code never imports it.
package testkit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"testing"
	"time"
)

const (
	pollFirst = time.Millisecond
	pollLast  = 50 * time.Millisecond

	// defaultTimeout ends a test context when go test set no earlier deadline.
	defaultTimeout = 2 * time.Minute
	// deadlineMargin is left for clean-up and for printing what went wrong.
	deadlineMargin = 2 * time.Second
)

// SeedEnv names the environment variable that repeats a random test.
const SeedEnv = "LANDFALL_SEED"

// Eventually waits until cond holds (returns true, or a nil error) and stops the
// test if it does not within timeout. The last error of cond and message, a
// format with its arguments, are printed. cond runs in the calling goroutine,
// so it never outlives the test and may use require.
func Eventually[C func() bool | func() error](t testing.TB, timeout time.Duration, cond C, message ...any) {
	t.Helper()
	if limit := Deadline(t); time.Until(limit) < timeout {
		timeout = time.Until(limit)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var last error
	err := Poll(ctx, func(context.Context) (bool, error) {
		switch cond := any(cond).(type) {
		case func() bool:
			return cond(), nil
		case func() error:
			last = cond()
			return last == nil, nil
		}
		return false, errors.New("no condition")
	})
	if err == nil {
		return
	}
	text := "condition"
	if len(message) > 0 {
		if format, ok := message[0].(string); ok {
			text = fmt.Sprintf(format, message[1:]...)
		} else {
			text = fmt.Sprint(message...)
		}
	}
	if last != nil {
		t.Fatalf("%s: not within %s: %v", text, timeout, last)
	}
	t.Fatalf("%s: not within %s", text, timeout)
}

// Poll calls cond, at first every millisecond and then ever less often (at
// least every 50 ms), until it returns true, returns an error, or ctx ends.
func Poll(ctx context.Context, cond func(context.Context) (bool, error)) error {
	wait := pollFirst
	for {
		done, err := cond(ctx)
		if err != nil || done {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		case <-timer.C:
		}
		wait = min(wait*3/2, pollLast)
	}
}

// Deadline returns the moment by which the test has to be done: a little before
// the deadline of go test, and two minutes from now at the latest.
func Deadline(t testing.TB) time.Time {
	limit := time.Now().Add(defaultTimeout)
	if d, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if end, set := d.Deadline(); set && end.Add(-deadlineMargin).Before(limit) {
			limit = end.Add(-deadlineMargin)
		}
	}
	return limit
}

// Context returns a context that ends at [Deadline], and when the test's
// clean-up begins.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithDeadline(context.Background(), Deadline(t))
	t.Cleanup(cancel)
	return ctx
}

// FreeAddr returns a loopback address host:port that nothing listened on a
// moment ago. Prefer to listen on port 0; this is for programs that must be
// told their port.
func FreeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen on loopback: %v", err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// FreePort is the port of [FreeAddr].
func FreePort(t testing.TB) int {
	t.Helper()
	_, port, err := net.SplitHostPort(FreeAddr(t))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Seed returns the seed of a random test: that of the environment variable
// LANDFALL_SEED, else a fresh one. A failing test prints it.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv(SeedEnv); text != "" {
		n, err := strconv.ParseUint(text, 0, 64)
		if err != nil {
			t.Fatalf("%s: %v", SeedEnv, err)
		}
		seed = n
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat with %s=%d", SeedEnv, seed)
		}
	})
	return seed
}

// Rand returns a source of random numbers seeded by [Seed].
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	return RandOf(Seed(t))
}

// RandOf returns the source that [Rand] makes of seed.
func RandOf(seed uint64) *rand.Rand {
	return rand.New(rand.NewPCG(seed, seed^0x9e3779b97f4a7c15))
}
