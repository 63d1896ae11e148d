package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/tools/guest/guesttest"
)

// binaries is where programs were built, if no folder was given.
var binaries struct {
	sync.Once
	dir string
	err error
}

// overall bounds a test that is not made of many runs.
const overall = 5 * time.Minute

func TestMain(m *testing.M) {
	code := m.Run()
	guesttest.Cleanup()
	if binaries.dir != "" {
		_ = os.RemoveAll(binaries.dir)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

const (
	landfall     = "landfall"
	natsServer   = "nats-server"
	tracker      = "change-tracker"
	host         = "host-provider"
	uploaderName = "uploader"
	uploader2    = "uploader-2"
	resync       = "resync-engine"
	scheduler    = "scheduler"
	scheduler2   = "scheduler-2"
	orchestrator = "failover-orchestrator"
	// orchestrator2 is a standby.
	orchestrator2 = "failover-orchestrator-2"
)

var services = []string{tracker, host, uploaderName, resync, scheduler, orchestrator}

// program is the path of a program, built if LANDFALL_BIN does not name a folder.
func program(t testing.TB, name string) string {
	t.Helper()
	if name == natsServer {
		if path := os.Getenv("LANDFALL_NATS_SERVER"); path != "" {
			return path
		}
		if path := filepath.Join(root(t), ".tools", "bin", natsServer); exists(path) {
			return path
		}
	} else if dir := os.Getenv("LANDFALL_BIN"); dir != "" {
		return filepath.Join(dir, name)
	}
	binaries.Do(func() {
		binaries.dir, binaries.err = os.MkdirTemp("", "landfall-e2e-bin-")
		if binaries.err != nil {
			return
		}
		packages := []string{"./tools/cmd/landfall", "github.com/nats-io/nats-server/v2"}
		for _, s := range services {
			packages = append(packages, "./services/"+s+"/cmd/"+s)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		for _, p := range packages { // one by one: packages of different modules do not share an -o folder
			cmd := exec.CommandContext(ctx, "go", "build", "-o", binaries.dir+string(filepath.Separator), p)
			cmd.Dir = root(t)
			if out, err := cmd.CombinedOutput(); err != nil {
				binaries.err = fmt.Errorf("build %s: %w\n%s", p, err, out)
				return
			}
		}
		v2 := filepath.Join(binaries.dir, "v2") // in case the major version names the program
		if exists(v2) {
			binaries.err = os.Rename(v2, filepath.Join(binaries.dir, natsServer))
		}
	})
	require.NoError(t, binaries.err)
	return filepath.Join(binaries.dir, name)
}

// root is the repository's folder.
func root(t testing.TB) string {
	dir, err := os.Getwd()
	require.NoError(t, err)
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if exists(filepath.Join(dir, "go.work")) {
			return dir
		}
	}
	t.Fatal("no go.work above this folder")
	return ""
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// tool finds a program of the system; in CI it must be there.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if strings.EqualFold(os.Getenv("CI"), "true") {
			t.Fatalf("%s is needed in CI: %v", name, err)
		}
		t.Skipf("%s is not installed", name)
	}
	return path
}
