package qemutarget

import (
	"os"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/targettest"
)

// config is the default one, except that a program without ACPI need not be waited for.
func config() Config {
	c := Default()
	c.ShutdownTimeout = time.Second
	return c
}

var options = targettest.Options{
	New:       func() (target.Target, error) { return New(config(), time.Now), nil },
	Qemu:      &failoverv1.QemuTarget{ConsolePattern: "(?m)^" + targettest.ConsoleText + `\d$`, BootTimeoutSeconds: 30},
	Processes: func(p target.Plan) int { return len(processes(identity(p))) },
}

func TestMain(m *testing.M) {
	targettest.Child(options)
	goleak.VerifyTestMain(m)
}

// needQEMU skips where QEMU is not installed, except in CI, where that is a mistake.
func needQEMU(t *testing.T) {
	t.Helper()
	_, err := lookUp(Default().Program, systemPackage)
	if err == nil {
		_, err = lookUp(Default().ImageProgram, imagePackage)
	}
	if err == nil {
		err = supported()
	}
	if err != nil && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	needQEMU(t)
	if runtime.GOOS != "linux" {
		t.Skip("processes are counted by /proc")
	}
	targettest.Run(t, options)
}
