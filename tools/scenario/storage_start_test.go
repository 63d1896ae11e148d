package scenario

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// job is `jobs show`, as far as it says what failed.
func (a *account) job(id string) string {
	a.t.Helper()
	var b strings.Builder
	b.WriteString("$ landfall jobs show JOB\n")
	for line := range strings.Lines(a.ok("jobs", "show", id).out) {
		for _, part := range []string{"State:", "rror", "ause", "what to do", "Action", "happened"} {
			if strings.Contains(line, part) {
				b.WriteString(line)
				break
			}
		}
	}
	return stepTime.ReplaceAllString(a.steady(b.String()), "$1$2") + "\n"
}

// validate is `landfall storage validate` with what it found wrong.
func (a *account) validate(config, role string, more ...string) string {
	a.t.Helper()
	args := append([]string{"storage", "validate", "--config", config, "--role", role, "--mib", "0"}, more...)
	r := a.run(args...)
	var b strings.Builder
	b.WriteString("$ landfall storage validate --role " + role + "\n")
	for line := range strings.Lines(r.out + r.err) {
		if !strings.HasPrefix(line, "ok ") && !strings.HasPrefix(line, "- ") || strings.HasPrefix(line, "- ") && strings.Contains(line, ": ") {
			b.WriteString(line)
		}
	}
	return a.steady(b.String()) + "\n"
}

// config writes the section store of a person who runs validate with a connection string.
func (a *account) config(name, connection string) string {
	file := filepath.Join(a.root, name)
	require.NoError(a.t, os.WriteFile(file, []byte("store:\n  azure:\n    connection_string: \""+connection+"\"\n    retry_for: 1s\n"), 0o600))
	return file
}

// A product that cannot use its account from the start runs all the same, says why a protection does not begin, and goes on by
// itself once that is set right: first the key is wrong, then the clock.
func TestStorageAtStart(t *testing.T) {
	t.Parallel()
	a := bareAccount(t)
	wrong := strings.Replace(a.srv.ConnectionString(), a.srv.Key, "d3Jvbmc=", 1)
	a.renew(wrong)
	require.NoError(t, a.store.Azure.ConnectionString.UnmarshalText([]byte("file:"+a.sas)))
	a.retryUnit = 400 * time.Millisecond // the whole ladder is climbed once before a protection is given up
	a.up()
	a.applyNow("quick", "1s", "")
	job := strings.TrimSpace(a.ok("protect", "web-01", "--policy", "quick").out)
	text := "# a wrong key\n" + a.says("STORAGE_CREDENTIALS") + a.job(job)
	text += a.validate(a.config("wrong.yaml", wrong), "schedule")
	require.False(t, a.srv.HasContainer("lfj-"+a.status("web-01").Lineage))

	a.ahead.Store(int64(time.Hour))
	a.renew(a.srv.ConnectionString())
	good := a.config("good.yaml", a.srv.ConnectionString())
	text += "# a clock an hour off\n" + a.says("STORAGE_CLOCK_SKEW") + a.job(job)
	text += a.validate(good, "schedule")
	a.ahead.Store(0)
	testkit.Eventually(t, patience, func() bool { return a.full("web-01").State == "PROTECTION_STATE_PROTECTED" }, "the protection begins by itself")
	a.whole(nil)

	text += "# no write-once policy, and the policy demands one\n"
	text += a.validate(good, "schedule", "--write-once", "24h")
	a.ok("unprotect", "web-01", "--wait")
	a.applyNow("worm", "1s", "write_once: 24h\n")
	r := a.run("protect", "web-01", "--policy", "worm", "--wait")
	require.Equal(t, 1, r.code)
	text += a.steady(a.transcript(r))
	require.Contains(t, text, "STORAGE_NOT_WRITE_ONCE")
	require.NotContains(t, a.full("web-01").State, "PROTECTED", "it is not half protected")
	lineage := a.status("web-01").Lineage
	require.True(t, a.srv.SetWriteOnce("lfj-"+lineage, azurefake.WriteOnce{Retention: 25 * time.Hour}))
	r = a.run("protect", "web-01", "--policy", "worm", "--wait")
	text += "# after it was set on that container\n" + a.steady(a.transcript(r))
	require.Zero(t, r.code, "%s%s", r.out, r.err)
	require.Equal(t, lineage, a.status("web-01").Lineage, "the container that the policy was set on is used")
	a.whole(nil)
	golden(t, "storage-start.golden", text)
}
