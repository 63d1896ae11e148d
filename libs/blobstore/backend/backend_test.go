package backend

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPlaces(t *testing.T) {
	folder := t.TempDir()
	sas := config.NewSecret("sv=2024-11-04&sig=c2VjcmV0")
	connection := config.NewSecret("AccountName=a;AccountKey=c2VjcmV0;BlobEndpoint=http://127.0.0.1:9/a")
	for _, tt := range []struct {
		name string
		s    Settings
		want any // a store, or what the error says
	}{
		{"nothing", Settings{}, "no store is named"},
		{"folder", Settings{Dir: folder}, &dir.Store{}},
		{"plain path", Settings{URL: folder}, &dir.Store{}},
		{"folder's URL", Settings{URL: "dir://" + filepath.ToSlash(folder)}, &dir.Store{}},
		{"account with a SAS", Settings{URL: "https://a.blob.core.windows.net", Azure: azure.Settings{SAS: sas}}, &azure.Store{}},
		{"connection string alone", Settings{Azure: azure.Settings{ConnectionString: connection}}, &azure.Store{}},
		{"both", Settings{Dir: folder, URL: "https://a.blob.core.windows.net", Azure: azure.Settings{SAS: sas}}, "leave one out"},
		{"account without credentials", Settings{URL: "https://a.blob.core.windows.net"}, "azure.credential"},
		{"another account than the connection string's", Settings{URL: "http://127.0.0.1:9/b", Azure: azure.Settings{ConnectionString: connection}}, "not the account"},
		{"credentials in the address", Settings{URL: "https://a.blob.core.windows.net/?sig=x", Azure: azure.Settings{SAS: sas}}, "must hold no credentials"},
		{"unknown scheme", Settings{URL: "s3://bucket"}, "s3 is not one of"},
		{"host in a folder's URL", Settings{URL: "dir://srv/x"}, "dir:///PATH"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			store, err := Open(t.Context(), tt.s, Options{})
			if text, refused := tt.want.(string); refused {
				require.ErrorContains(t, err, text)
				require.NotContains(t, err.Error(), "c2VjcmV0")
				return
			}
			require.NoError(t, err)
			require.IsType(t, tt.want, store)
			require.NotContains(t, tt.s.String(), "c2VjcmV0")
			require.NoError(t, store.Close())
		})
	}
}

// TestAzuriteBySettings is the way from settings to bytes.
func TestAzuriteBySettings(t *testing.T) {
	s := DefaultSettings()
	s.Azure.ConnectionString = config.NewSecret(azurite.Start(t).ConnectionString())
	store, err := Open(t.Context(), s, Options{})
	require.NoError(t, err)
	defer store.Close()
	require.NoError(t, store.CreateContainer(t.Context(), "one"))
	_, err = store.Container("two").Stat(t.Context(), "x", "")
	require.ErrorIs(t, err, blobstore.ErrNoContainer)
}
