package config_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type uploader struct {
	Workers int             `koanf:"workers" help:"segments built at once"`
	Cap     config.ByteSize `koanf:"segment_size" help:"bytes of a segment"`
	Timeout time.Duration   `koanf:"timeout"`
	Fast    bool            `koanf:"fast"`
	Hosts   []string        `koanf:"hosts"`
	Token   config.Secret   `koanf:"token"`
}

func (u *uploader) Validate() error {
	var errs []error
	if u.Workers < 1 {
		errs = append(errs, config.Bad("workers", "at least 1, not %d", u.Workers))
	}
	if u.Timeout < 0 {
		errs = append(errs, config.Bad("timeout", "not negative"))
	}
	return errors.Join(errs...)
}

type conf struct {
	Failpoints string            `koanf:"failpoints"`
	Uploader   uploader          `koanf:"uploader"`
	Labels     map[string]string `koanf:"labels"`
	Level      slog.Level        `koanf:"level" help:"log level"`
}

func (c conf) Validate() error {
	if c.Labels["bad"] != "" {
		return errors.New("labels and level do not go together")
	}
	return nil
}

func defaults() conf {
	return conf{Uploader: uploader{
		Workers: 4, Cap: 32 * config.MiB, Timeout: 30 * time.Second, Hosts: []string{"a", "b", "c"}, Token: config.NewSecret("default"),
	}}
}

func write(t *testing.T, text string) string {
	name := filepath.Join(t.TempDir(), "c.yaml")
	require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
	return name
}

func TestLayers(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(secret, []byte("hush\n"), 0o600))
	file := write(t, `
uploader:
  workers: 5
  segment_size: 64MiB
  timeout: 1m
  hosts: [x]
labels: {a.b: c, d: e}
level: WARN
`)
	got, err := config.Load(defaults(), config.Options{
		Name: "uploader", Args: []string{"--config", file, "--uploader.workers=7", "--uploader.fast"},
		Environ: []string{
			"LANDFALL_UPLOADER__WORKERS=6", "LANDFALL_UPLOADER__TIMEOUT=2m", "LANDFALL_UPLOADER__TOKEN=file:" + secret,
			"LANDFALL_FAILPOINTS=a/b=kill", "LANDFALL_SEED=1", "LANDFALL_SCHEDULER__X=1", "PATH=/bin",
		},
	})
	require.NoError(t, err)
	want := conf{
		Failpoints: "a/b=kill", Level: slog.LevelWarn, Labels: map[string]string{"a.b": "c", "d": "e"},
		Uploader: uploader{
			Workers: 7, Cap: 64 * config.MiB, Timeout: 2 * time.Minute, Fast: true, Hosts: []string{"x"}, Token: config.NewSecret("hush"),
		},
	}
	require.Empty(t, cmp.Diff(want, got, cmp.Comparer(func(a, b config.Secret) bool { return a.Reveal() == b.Reveal() })))
}

func TestEveryProblemIsReported(t *testing.T) {
	file := write(t, `
uploader:
  worker: 5
  workers: zero
  timeout: 30
  segment_size: 1.0000001KiB
nothing: 1
level: LOUD
labels: {bad: x}
`)
	_, err := config.Load(defaults(), config.Options{
		Name: "uploader", Args: []string{"--config", file}, Environ: []string{"LANDFALL_UPLOADER__TOKN=x"},
	})
	var all *config.Error
	require.ErrorAs(t, err, &all)
	text := err.Error()
	for _, want := range []string{
		"uploader.worker: unknown key, did you mean uploader.workers? (file " + file + ")",
		"nothing: unknown key (file",
		"uploader.tokn: unknown key, did you mean uploader.token? (environment LANDFALL_UPLOADER__TOKN)",
		"uploader.workers: ", "uploader.timeout: ", "a unit is missing, as in 30s", "uploader.segment_size: ", "as in 64MiB",
		"level: ", "labels and level do not go together",
	} {
		require.Contains(t, text, want)
	}
	require.Len(t, all.Problems, 8)

	_, err = config.Load(defaults(), config.Options{Args: []string{"--uploader.workers=0", "--uploader.timeout=-1s"}})
	require.ErrorContains(t, err, "uploader.workers: at least 1, not 0 (flag --uploader.workers)\n  uploader.timeout: not negative")
	for _, args := range [][]string{{"--nope"}, {"extra"}, {"--print-config=x"}, {"--config=/does/not/exist"}, {"--uploader.token=x"}} {
		_, err = config.Load(defaults(), config.Options{Args: args})
		require.ErrorAs(t, err, &all, args)
	}
	_, err = config.Load(defaults(), config.Options{File: "/does/not/exist"})
	require.NoError(t, err, "only the default file may be missing")
	_, err = config.Load(defaults(), config.Options{Args: []string{"--config", write(t, "a: [")}})
	require.ErrorAs(t, err, &all)
	_, err = config.Load(defaults(), config.Options{Args: []string{"--config", write(t, "uploader:\n")}})
	require.NoError(t, err, "an empty section")
}

func TestAnswers(t *testing.T) {
	ask := func(args ...string) string {
		var out bytes.Buffer
		_, err := config.Load(defaults(), config.Options{
			Name: "uploader", Args: args, Stdout: &out, Environ: []string{"LANDFALL_UPLOADER__TOKEN=hush"},
		})
		require.ErrorIs(t, err, config.ErrDone)
		require.NotContains(t, out.String(), "hush")
		return out.String()
	}
	require.Equal(t, "configuration is valid\n", ask("--config.check"))
	require.Equal(t, "uploader:\n  workers: 9\n  token: '***'\n", ask("--print-config=diff", "--uploader.workers=9"))
	full := ask("--print-config=full")
	require.Contains(t, full, "  # segments built at once\n  workers: 4\n")
	require.Contains(t, full, "  segment_size: 32MiB\n  timeout: 30s\n")
	require.Equal(t, `Usage: uploader [flags]

      --config string                YAML file of the configuration
      --config.check[=true|false]    check the configuration and exit
      --print-config string          print the configuration as YAML and exit: full, or diff for what differs from the defaults
      --failpoints string            
      --uploader.workers int         segments built at once (default 4)
      --uploader.segment_size size   bytes of a segment (default 32MiB)
      --uploader.timeout duration     (default 30s)
      --uploader.fast                
      --uploader.hosts list           (default a,b,c)
      --level text                   log level (default INFO)
`, ask("--help"))
	again, err := config.Load(defaults(), config.Options{Args: []string{"--config", write(t, full)}})
	require.NoError(t, err, "what is printed can be read")
	require.Equal(t, 4, again.Uploader.Workers)
}

func TestSecretIsNotPrinted(t *testing.T) {
	s := config.NewSecret("hush")
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "s", s)
	out, err := json.Marshal(map[string]any{"s": s})
	require.NoError(t, err)
	text := fmt.Sprintf("%v %+v %#v %s %q %x %d", s, s, s, s, s, s, s) + fmt.Sprint(uploader{Token: s}) + string(out) + log.String()
	require.NotContains(t, text, "hush")
	require.NotContains(t, text, fmt.Sprintf("%x", "hush"))
	require.Equal(t, "hush", s.Reveal())
	require.Empty(t, config.Secret{}.String())
	require.Error(t, s.UnmarshalText([]byte("file:/does/not/exist")))
}

func TestByteSize(t *testing.T) {
	for text, want := range map[string]config.ByteSize{
		"0": 0, "512": 512, "64KiB": 64 * config.KiB, "1.5GiB": 3 * config.GiB / 2, "10MB": 1e7, "2 TiB": 2 * config.TiB, "7B": 7,
	} {
		got, err := config.ParseByteSize(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "x", "-1", "1.5", "1e30TiB", "9223372036854775808", "NaN", "Inf", "64 mib", "8388608TiB"} {
		_, err := config.ParseByteSize(text)
		require.Error(t, err, text)
	}
	rapid.Check(t, func(t *rapid.T) {
		size := config.ByteSize(rapid.Int64Min(0).Draw(t, "size"))
		got, err := config.ParseByteSize(size.String())
		require.NoError(t, err)
		require.Equal(t, size, got)
	})
}

func TestLoaderForACommand(t *testing.T) {
	l := config.New(defaults(), config.Options{Name: "up"})
	require.NoError(t, l.Flags().Parse([]string{"--uploader.hosts=p, q"}))
	got, err := l.Load()
	require.NoError(t, err)
	require.Equal(t, []string{"p", "q"}, got.Uploader.Hosts)
	require.Panics(t, func() { config.New(struct{ X int }{}, config.Options{}) }, "no tag")
	require.Panics(t, func() {
		config.New(struct {
			X func() `koanf:"x"`
		}{}, config.Options{})
	})
}
