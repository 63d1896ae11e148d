package program

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

type sample struct {
	Program Settings `koanf:"program"`
	Worker  struct {
		Tasks int `koanf:"tasks"`
	} `koanf:"worker"`
}

const good = `
program:
  site: paris
  listen: 127.0.0.1:0
  certificates: certificates/worker
  bus: {url: "tls://nats:4222"}
  peers: {scheduler: "10.0.0.5:7443"}
worker: {tasks: 3}
`

func start(t *testing.T, file string, environ []string, args ...string) (code int, out, problems string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "worker.yaml")
	require.NoError(t, os.WriteFile(path, []byte(file), 0o600))
	var stdout, stderr bytes.Buffer
	built := func(context.Context, *Env, *sample) (Service, error) {
		t.Error("the service must not be built")
		return nil, nil
	}
	code = run(context.Background(), "worker", append([]string{"--config", path}, args...), environ, &stdout, &stderr,
		sample{Program: DefaultSettings()}, func(s *sample) *Settings { return &s.Program }, built)
	return code, stdout.String(), stderr.String()
}

func TestConfigurationIsCheckedBeforeAnythingStarts(t *testing.T) {
	code, _, problems := start(t, good, nil, "--config.check")
	require.Zero(t, code, problems)

	code, out, _ := start(t, good, []string{"LANDFALL_WORKER__TASKS=7"}, "--print-config=diff")
	require.Zero(t, code)
	require.Contains(t, out, "7", "the environment wins over the file")
	require.Contains(t, out, "paris")

	for name, c := range map[string]struct{ file, want string }{
		"unknown key":   {good + "surprise: 1\n", "surprise"},
		"all at once":   {"program: {log: {level: loud}}\n", "program.certificates"},
		"no event bus":  {"program: {certificates: c}\n", "program.bus.url"},
		"bad exporter":  {"program: {trace: {exporter: carrier-pigeon}}\n", "carrier-pigeon"},
		"long drain":    {"program: {drain_delay: 1h}\n", "drain_delay"},
		"bad failpoint": {"program: {certificates: c, bus: {url: u}, failpoints: 'x=explode'}\n", "explode"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, problems := start(t, c.file, nil)
			require.Equal(t, 2, code)
			require.Contains(t, problems, c.want)
		})
	}
}

// A certificate that is not there ends the program with a reason, not with a panic or a wait.
func TestMissingCertificate(t *testing.T) {
	code, _, problems := start(t, good, nil)
	require.Equal(t, 1, code)
	require.Contains(t, problems, "load certificate")
}
