package azure

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// TestRenewedCredentials: a SAS, and a connection string, are taken from their file again while the store is open. What cannot
// be used is left alone.
func TestRenewedCredentials(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	owner := open(t, connString(srv.ConnectionString()), Options{})
	require.NoError(t, owner.CreateContainer(t.Context(), "lfj-x"))
	file := filepath.Join(t.TempDir(), "secret")
	write := func(text string) { require.NoError(t, os.WriteFile(file, []byte(text+"\n"), 0o600)) }
	secret := func() (s config.Secret) {
		require.NoError(t, s.UnmarshalText([]byte("file:"+file)))
		return s
	}
	try := func(s *Store) error {
		for _, err := range s.Container("lfj-x").List(t.Context(), "", "") {
			return err
		}
		return nil
	}
	good, bad := srv.SAS("rlcwd", time.Now().Add(time.Hour)), srv.SAS("rlcwd", time.Now().Add(-time.Minute))
	for name, tc := range map[string]struct {
		good, bad, nonsense string
		set                 func(*Settings)
	}{
		"sas": {good, bad, "sv=1", func(s *Settings) { s.SAS = secret() }},
		"key": {
			srv.ConnectionString(), strings.Replace(srv.ConnectionString(), srv.Key, "d3Jvbmc=", 1), "AccountName=other;AccountKey=a2V5",
			func(s *Settings) { s.ConnectionString = secret() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			write(tc.bad)
			settings := DefaultSettings()
			tc.set(&settings)
			s, err := Open(srv.URL(), settings, Options{Backoff: time.Millisecond})
			require.NoError(t, err)
			defer s.Close()
			require.ErrorIs(t, try(s), blobstore.ErrCredentials)
			write(tc.good)
			testkit.Eventually(t, 10*time.Second, func() bool { return try(s) == nil }, "the good one is taken")
			write(tc.nonsense)
			until := time.Now().Add(renewEvery * 3 / 2)
			testkit.Eventually(t, 10*time.Second, func() bool { require.NoError(t, try(s)); return time.Now().After(until) }, "the good one goes on to be used")
			write(tc.bad)
			testkit.Eventually(t, 10*time.Second, func() bool { return try(s) != nil }, "the bad one is taken")
		})
	}
}
