package azurefake_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

func TestMainServes(t *testing.T) {
	run, stop := context.WithCancel(ctx(t))
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- azurefake.Main(run, []string{"-discard", "-digest", "-page-requests", "-1"}, w) }()
	var a azurefake.Announcement
	require.NoError(t, json.NewDecoder(r).Decode(&a))
	h := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	c, err := azblob.NewClientFromConnectionString(a.ConnectionString, &azblob.ClientOptions{ClientOptions: options(t, azurefake.New(azurefake.Options{})).ClientOptions})
	require.NoError(t, err)
	_, err = c.CreateContainer(ctx(t), "one", nil)
	require.NoError(t, err)
	_, err = c.UploadBuffer(ctx(t), "one", "b", fill(1000, 1), nil)
	require.NoError(t, err)
	ask := func(method, what string, into any) {
		req, err := http.NewRequestWithContext(ctx(t), method, a.Control+what, nil)
		require.NoError(t, err)
		resp, err := h.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.NoError(t, json.NewDecoder(resp.Body).Decode(into))
	}
	var st azurefake.Stats
	ask(http.MethodGet, "stats", &st)
	require.EqualValues(t, 1000, st.Operations["PutBlob"].BytesIn)
	var b azurefake.BlobState
	ask(http.MethodGet, "blob?container=one&name=b", &b)
	require.Equal(t, azurefake.CRC64(fill(1000, 1)), b.Digest)
	ask(http.MethodPost, "reset", &struct{}{})
	st = azurefake.Stats{}
	ask(http.MethodGet, "stats", &st)
	require.Zero(t, st.Requests())
	stop()
	require.NoError(t, <-done)
	require.Error(t, azurefake.Main(ctx(t), []string{"-addr", "no address"}, io.Discard))
}
