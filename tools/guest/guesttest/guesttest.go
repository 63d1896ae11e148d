// Package guesttest gives tests the lab guest: built once per test program,
// started and ended with the test.
//
// Tests that boot something begin with Require: they run only when
// LANDFALL_GUEST_TESTS=1 is set, are skipped when this machine lacks QEMU or
// a tool of the builder, and fail instead when CI=true.
package guesttest

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/landfall-dr/landfall/tools/guest/guestvm"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

// Env must be "1" for tests that boot machines.
const Env = "LANDFALL_GUEST_TESTS"

// Time bounds under software emulation on a busy machine.
const (
	BuildTimeout = 5 * time.Minute
	BootTimeout  = 3 * time.Minute
)

// Require skips or fails a test that this machine cannot run.
func Require(t testing.TB) {
	t.Helper()
	if os.Getenv(Env) != "1" {
		t.Skipf("boots a machine: set %s=1 (make test-guest)", Env)
	}
	if testing.Short() {
		t.Skip("boots a machine: not with -short")
	}
	if err := image.Missing(true); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI must have what the lab guest needs:\n%v", err)
		}
		t.Skipf("the lab guest needs more than this machine has:\n%v", err)
	}
}

// Build returns a guest with the default options, made at the first call of
// this test program in a folder that cleanup removes: call it in TestMain
// after the tests ran.
func Build(t testing.TB) image.Image {
	t.Helper()
	Require(t)
	built.once.Do(func() {
		built.dir, built.err = os.MkdirTemp("", "landfall-guest-")
		if built.err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), BuildTimeout)
		defer cancel()
		o := image.Default()
		o.Out = built.dir
		built.image, built.err = image.Build(ctx, o)
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.image
}

// built is the one image of the test program.
var built struct {
	once  sync.Once
	dir   string
	image image.Image
	err   error
}

// Cleanup removes what Build made. TestMain calls it after the tests.
func Cleanup() {
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
}

// Config is a machine with disks of its own in a folder that ends with the test.
func Config(t testing.TB, mode guestvm.Mode, format image.Format) guestvm.Config {
	t.Helper()
	img := Build(t)
	cfg := guestvm.Config{Name: "src", Dir: t.TempDir(), Mode: mode}
	ctx, cancel := context.WithTimeout(t.Context(), BootTimeout)
	defer cancel()
	var err error
	if cfg.OS, cfg.Data, err = guestvm.MakeDisks(ctx, img, cfg.Dir, format); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// Start starts a machine and ends it with the test. It does not wait for READY.
func Start(t testing.TB, cfg guestvm.Config) *guestvm.VM {
	t.Helper()
	vm, err := guestvm.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(vm.Close)
	return vm
}
