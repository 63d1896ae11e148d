package azurefake_test

import (
	"context"
	"net"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/lease"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

func dialTo(addr string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, addr)
	}
}

func leasedBy(id string) *pageblob.UploadPagesOptions {
	if id == "" {
		return nil
	}
	return &pageblob.UploadPagesOptions{AccessConditions: &blob.AccessConditions{LeaseAccessConditions: &blob.LeaseAccessConditions{LeaseID: &id}}}
}

// leaseCall does one lease action on a container, or on its blob "disk"; n is the duration or the break period (-1: none).
func leaseCall(t *testing.T, s *azurefake.Server, url, action, id, proposed string, n int) error {
	t.Helper()
	key, err := azblob.NewSharedKeyCredential(s.Account, s.Key)
	require.NoError(t, err)
	use := id
	if action == "acquire" {
		use = proposed
	}
	if len(url) > 5 && url[len(url)-5:] == "/disk" {
		bc, err := blob.NewClientWithSharedKeyCredential(url, key, (*blob.ClientOptions)(options(t, s)))
		require.NoError(t, err)
		lo := &lease.BlobClientOptions{}
		if use != "" {
			lo.LeaseID = &use
		}
		l, err := lease.NewBlobClient(bc, lo)
		require.NoError(t, err)
		switch action {
		case "acquire":
			_, err = l.AcquireLease(ctx(t), int32(n), nil)
		case "renew":
			_, err = l.RenewLease(ctx(t), nil)
		case "change":
			_, err = l.ChangeLease(ctx(t), proposed, nil)
		case "release":
			_, err = l.ReleaseLease(ctx(t), nil)
		case "break":
			bo := &lease.BlobBreakOptions{}
			if n >= 0 {
				bo.BreakPeriod = to.Ptr(int32(n))
			}
			_, err = l.BreakLease(ctx(t), bo)
		}
		return err
	}
	cc, err := container.NewClientWithSharedKeyCredential(url, key, (*container.ClientOptions)(options(t, s)))
	require.NoError(t, err)
	l, err := lease.NewContainerClient(cc, &lease.ContainerClientOptions{LeaseID: &use})
	require.NoError(t, err)
	_, err = l.AcquireLease(ctx(t), int32(n), nil)
	return err
}
