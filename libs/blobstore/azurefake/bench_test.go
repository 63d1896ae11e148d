package azurefake_test

import (
	"sync/atomic"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

// BenchmarkSink is what a sink in the process of its client costs: a benchmark that measures more than this measures its
// subject.
func BenchmarkSink(b *testing.B) {
	s := azurefake.New(azurefake.Options{Discard: true, PageBlobRequests: -1, PageBlobBytes: -1}).Start(b)
	h := s.Client()
	defer h.CloseIdleConnections()
	c, err := azblob.NewClientFromConnectionString(s.ConnectionString(), &azblob.ClientOptions{ClientOptions: policy.ClientOptions{Transport: h}})
	require.NoError(b, err)
	_, err = c.CreateContainer(b.Context(), "bench", nil)
	require.NoError(b, err)
	p := c.ServiceClient().NewContainerClient("bench").NewPageBlobClient("disk")
	const size = 4 << 20
	_, err = p.Create(b.Context(), 1<<40, nil)
	require.NoError(b, err)
	data := fill(size, 1)
	b.SetBytes(size)
	var next atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			off := (next.Add(1) - 1) % (1 << 18) * size
			if _, err := p.UploadPages(b.Context(), body(data), blob.HTTPRange{Offset: off, Count: size}, nil); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
