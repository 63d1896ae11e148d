package azurite_test

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func status(t *testing.T, url string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(testkit.Context(t), http.MethodGet, url+"?comp=list", nil)
	require.NoError(t, err)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	require.NoError(t, err)
	resp.Body.Close()
	return resp.StatusCode
}

func TestStart(t *testing.T) {
	s := azurite.Start(t, azurite.WithAccounts("first", "second"))
	require.Equal(t, "first", s.Account)
	require.Len(t, s.Accounts(), 2)
	for _, a := range s.Accounts() {
		require.Equal(t, http.StatusForbidden, status(t, s.URLOf(a)), "an unsigned request")
		require.Contains(t, s.ConnectionStringOf(a), "AccountKey="+a.Key+";")
	}
	require.NoError(t, s.Stop())
	require.NoError(t, s.Stop(), "again")
	require.NoDirExists(t, s.Folder())
}

func TestEndsWithItsParent(t *testing.T) {
	// Killing a parent needs a second process; the guard is what does the work, so this closes the pipe as a death would.
	dir := t.TempDir()
	s := azurite.Start(t, func(o *azurite.Options) { o.Folder = dir })
	s.CloseStdin()
	testkit.Eventually(t, 20*time.Second, func() bool { return s.Ended() }, "azurite outlives its parent")
	require.NoError(t, s.Stop())
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.NotEmpty(t, left, "a folder that was given is kept")
}

func TestMissing(t *testing.T) {
	_, err := azurite.Run(testkit.Context(t), azurite.Options{Install: t.TempDir()})
	require.ErrorIs(t, err, azurite.ErrMissing)
	t.Setenv(azurite.Env, t.TempDir())
	_, err = azurite.Run(testkit.Context(t), azurite.Options{})
	require.ErrorIs(t, err, azurite.ErrMissing)
}

func TestStartFailureIsExplained(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err := azurite.Run(testkit.Context(t), azurite.Options{CertFile: file, KeyFile: file})
	if errors.Is(err, azurite.ErrMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	require.ErrorContains(t, err, "azurite ended at its start")
}
