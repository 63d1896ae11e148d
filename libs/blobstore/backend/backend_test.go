package backend

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPlace(t *testing.T) {
	key := config.NewSecret("AccountName=a;AccountKey=a2V5")
	for _, tc := range []struct {
		name, kind, where, problem string
		s                          Settings
	}{
		{name: "dir", s: Settings{Dir: "/x"}, kind: KindDir, where: "/x"},
		{name: "dir url", s: Settings{URL: "dir:///x/y"}, kind: KindDir, where: filepath.FromSlash("/x/y")},
		{name: "windows", s: Settings{URL: "dir:///C:/x"}, kind: KindDir, where: filepath.FromSlash("C:/x")},
		{name: "path as url", s: Settings{URL: "/x"}, kind: KindDir, where: "/x"},
		{name: "account", s: Settings{URL: "https://acct.blob.core.windows.net"}, kind: KindAzure, where: "https://acct.blob.core.windows.net"},
		{name: "emulator", s: Settings{URL: "http://127.0.0.1:1/acct"}, kind: KindAzure, where: "http://127.0.0.1:1/acct"},
		{name: "connection string alone", s: Settings{Azure: azure.Settings{ConnectionString: key}}, kind: KindAzure},
		{name: "both", s: Settings{Dir: "/x", URL: "/y"}, problem: "one store only"},
		{name: "none", problem: "no store"},
		{name: "two slashes", s: Settings{URL: "dir://x"}, problem: "three slashes"},
		{name: "other", s: Settings{URL: "s3://bucket"}, problem: "is no store"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kind, where, err := tc.s.place()
			if tc.problem != "" {
				require.ErrorContains(t, err, tc.problem)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.kind, kind)
			require.Equal(t, tc.where, where)
		})
	}
}

// TestConfig: the settings are a section of a program's, from file to flags, and problems carry their keys.
func TestConfig(t *testing.T) {
	type program struct {
		Store Settings `koanf:"store"`
	}
	load := func(env ...string) (program, error) {
		return config.Load(program{Store: DefaultSettings()}, config.Options{Name: "test", Environ: env})
	}
	_, err := load()
	require.NoError(t, err)
	p, err := load("LANDFALL_STORE__URL=https://acct.blob.core.windows.net", "LANDFALL_STORE__AZURE__SAS=sv=1&sig=secret", "LANDFALL_STORE__AZURE__PAGE_BANDWIDTH=50MiB")
	require.NoError(t, err)
	require.Equal(t, KindAzure, p.Store.Kind())
	require.Equal(t, 50*config.MiB, p.Store.Azure.PageBandwidth)
	_, err = load("LANDFALL_STORE__URL=http://acct.blob.core.windows.net", "LANDFALL_STORE__AZURE__CREDENTIAL=managed-identity")
	require.ErrorContains(t, err, "store.url: managed-identity cannot be used over plain http")
	_, err = load("LANDFALL_STORE__URL=https://acct.blob.core.windows.net")
	require.ErrorContains(t, err, "store.azure.credential: must be set")
	_, err = load("LANDFALL_STORE__URL=https://acct.blob.core.windows.net", "LANDFALL_STORE__AZURE__CREDENTIAL=client-certificate", "LANDFALL_STORE__AZURE__CHECKSUM=sha")
	for _, key := range []string{"store.azure.tenant", "store.azure.client", "store.azure.certificate", "store.azure.checksum"} {
		require.ErrorContains(t, err, key)
	}
}

func TestOpen(t *testing.T) {
	s, err := Parse("dir://"+filepath.ToSlash(t.TempDir()), DefaultSettings())
	require.NoError(t, err)
	try := func(s Settings) {
		st, err := Open(t.Context(), s, Options{})
		require.NoError(t, err)
		require.NoError(t, st.CreateContainer(t.Context(), "abc"))
		require.NoError(t, st.Close())
	}
	try(s)
	try(Settings{Dir: t.TempDir()})

	srv := azurefake.New(azurefake.Options{})
	srv.Start(t)
	from := DefaultSettings()
	from.Azure.ConnectionString = config.NewSecret(srv.ConnectionString())
	try(from)
	s, err = Parse(srv.URL(), from)
	require.NoError(t, err)
	try(s)
	_, err = Open(t.Context(), Settings{URL: "http://127.0.0.1:1/other", Azure: from.Azure}, Options{})
	require.ErrorContains(t, err, "is not the account of the connection string")

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	from.Azure.ConnectionString = config.NewSecret("AccountName=acct;AccountKey=c2VjcmV0;BlobEndpoint=http://127.0.0.1:1/acct")
	_, err = Open(ctx, from, Options{})
	require.ErrorContains(t, err, "reach storage account acct")
	require.NotContains(t, err.Error(), "c2VjcmV0")
	require.NotErrorIs(t, err, blobstore.ErrCredentials)
}
