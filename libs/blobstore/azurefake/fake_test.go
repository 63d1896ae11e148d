package azurefake_test

import (
	"bytes"
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is storage time that stands until it is moved.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Now()} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func start(t *testing.T, o azurefake.Options) *azurefake.Server {
	t.Helper()
	return azurefake.New(o).Start(t)
}

// options are a client's: no retries, and a transport that leaves nothing behind.
func options(t *testing.T, s *azurefake.Server) *azblob.ClientOptions {
	t.Helper()
	h := s.Client()
	t.Cleanup(h.CloseIdleConnections)
	return &azblob.ClientOptions{ClientOptions: policy.ClientOptions{Transport: h, Retry: policy.RetryOptions{MaxRetries: -1}}}
}

func client(t *testing.T, s *azurefake.Server) *azblob.Client {
	t.Helper()
	c, err := azblob.NewClientFromConnectionString(s.ConnectionString(), options(t, s))
	require.NoError(t, err)
	return c
}

// box is a container that exists.
func box(t *testing.T, s *azurefake.Server, name string) *container.Client {
	t.Helper()
	c := client(t, s).ServiceClient().NewContainerClient(name)
	_, err := c.Create(ctx(t), nil)
	require.NoError(t, err)
	return c
}

func ctx(t *testing.T) context.Context { t.Helper(); return testkit.Context(t) }

// code asserts the status and the code of a refusal.
func code(t *testing.T, err error, status int, want bloberror.Code) {
	t.Helper()
	require.Error(t, err)
	var r *azcore.ResponseError
	require.ErrorAs(t, err, &r)
	require.Equal(t, string(want), r.ErrorCode)
	require.Equal(t, status, r.StatusCode)
}

func body(p []byte) *readSeekCloser { return &readSeekCloser{bytes.NewReader(p)} }

type readSeekCloser struct{ *bytes.Reader }

func (readSeekCloser) Close() error { return nil }

func fill(n int, seed uint64) []byte {
	p := make([]byte, n)
	testkit.Fill(p, seed)
	return p
}

// pageBlob makes a page blob of size bytes.
func pageBlob(t *testing.T, c *container.Client, name string, size int64) *pageblob.Client {
	t.Helper()
	p := c.NewPageBlobClient(name)
	_, err := p.Create(ctx(t), size, nil)
	require.NoError(t, err)
	return p
}

func write(t *testing.T, p *pageblob.Client, off int64, data []byte, o *pageblob.UploadPagesOptions) error {
	t.Helper()
	_, err := p.UploadPages(ctx(t), body(data), blob.HTTPRange{Offset: off, Count: int64(len(data))}, o)
	return err
}

func put(t *testing.T, c *container.Client, name string, data []byte, createOnly bool) error {
	t.Helper()
	o := &blockblob.UploadOptions{}
	if createOnly {
		o.AccessConditions = &blob.AccessConditions{ModifiedAccessConditions: &blob.ModifiedAccessConditions{IfNoneMatch: to.Ptr(azcore.ETagAny)}}
	}
	_, err := c.NewBlockBlobClient(name).Upload(ctx(t), body(data), o)
	return err
}

func get(t *testing.T, c *container.Client, name string, o *blob.DownloadStreamOptions) ([]byte, error) {
	t.Helper()
	r, err := c.NewBlobClient(name).DownloadStream(ctx(t), o)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	var b bytes.Buffer
	_, err = b.ReadFrom(r.Body)
	return b.Bytes(), err
}

func TestBlockBlobs(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "blocks")
	data := fill(300_000, 1)
	require.NoError(t, put(t, c, "a/b", data, true))
	code(t, put(t, c, "a/b", data, true), 409, bloberror.BlobAlreadyExists)
	got, err := get(t, c, "a/b", nil)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
	got, err = get(t, c, "a/b", &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: 1000, Count: 77}})
	require.NoError(t, err)
	require.Equal(t, data[1000:1077], got)
	got, err = get(t, c, "a/b", &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: 299_990, Count: 1000}})
	require.NoError(t, err)
	require.Len(t, got, 10)
	_, err = get(t, c, "a/b", &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: 300_000, Count: 1}})
	code(t, err, 416, bloberror.InvalidRange)
	_, err = get(t, c, "none", nil)
	code(t, err, 404, bloberror.BlobNotFound)

	b := c.NewBlockBlobClient("staged")
	for i, id := range []string{"MDE=", "MDI="} {
		_, err := b.StageBlock(ctx(t), id, body(data[i*1000:(i+1)*1000]), nil)
		require.NoError(t, err)
	}
	_, err = get(t, c, "staged", nil)
	code(t, err, 404, bloberror.BlobNotFound)
	_, err = b.CommitBlockList(ctx(t), []string{"MDE=", "MDM="}, nil)
	code(t, err, 400, bloberror.InvalidBlockList)
	_, err = b.StageBlock(ctx(t), "MDEyMw==", body(data), nil)
	code(t, err, 400, bloberror.InvalidBlobOrBlock)
	list, err := b.GetBlockList(ctx(t), blockblob.BlockListTypeAll, nil)
	require.NoError(t, err)
	require.Len(t, list.UncommittedBlocks, 2)
	_, err = b.CommitBlockList(ctx(t), []string{"MDI=", "MDE="}, nil)
	require.NoError(t, err)
	got, err = get(t, c, "staged", &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: 990, Count: 20}})
	require.NoError(t, err)
	require.Equal(t, append(bytes.Clone(data[1990:2000]), data[:10]...), got)
}

func TestConditions(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "conditions")
	require.NoError(t, put(t, c, "b", []byte("1"), false))
	b := c.NewBlockBlobClient("b")
	p, err := b.GetProperties(ctx(t), nil)
	require.NoError(t, err)
	with := func(m blob.ModifiedAccessConditions) *blockblob.UploadOptions {
		return &blockblob.UploadOptions{AccessConditions: &blob.AccessConditions{ModifiedAccessConditions: &m}}
	}
	_, err = b.Upload(ctx(t), body([]byte("2")), with(blob.ModifiedAccessConditions{IfMatch: p.ETag}))
	require.NoError(t, err)
	_, err = b.Upload(ctx(t), body([]byte("3")), with(blob.ModifiedAccessConditions{IfMatch: p.ETag}))
	code(t, err, 412, bloberror.ConditionNotMet)
	_, err = c.NewBlockBlobClient("new").Upload(ctx(t), body([]byte("3")), with(blob.ModifiedAccessConditions{IfMatch: p.ETag}))
	code(t, err, 412, bloberror.ConditionNotMet)
	_, err = b.GetProperties(ctx(t), &blob.GetPropertiesOptions{AccessConditions: &blob.AccessConditions{ModifiedAccessConditions: &blob.ModifiedAccessConditions{IfMatch: p.ETag}}})
	code(t, err, 412, bloberror.ConditionNotMet)
	now, err := b.GetProperties(ctx(t), nil)
	require.NoError(t, err)
	// The SDK takes a 304 for a success without a body.
	same, err := b.DownloadStream(ctx(t), &blob.DownloadStreamOptions{AccessConditions: &blob.AccessConditions{ModifiedAccessConditions: &blob.ModifiedAccessConditions{IfNoneMatch: now.ETag}}})
	require.NoError(t, err)
	require.Equal(t, string(bloberror.ConditionNotMet), *same.ErrorCode)
	_, err = b.Upload(ctx(t), body([]byte("3")), with(blob.ModifiedAccessConditions{IfUnmodifiedSince: to.Ptr(time.Now().Add(-time.Hour))}))
	code(t, err, 412, bloberror.ConditionNotMet)
}

func TestContainers(t *testing.T) {
	clk := newClock()
	s := start(t, azurefake.Options{Now: clk.now, SoftDeleteDays: 7})
	svc := client(t, s).ServiceClient()
	c := box(t, s, "one")
	_, err := c.Create(ctx(t), nil)
	code(t, err, 409, bloberror.ContainerAlreadyExists)
	_, err = svc.NewContainerClient("none").GetProperties(ctx(t), nil)
	code(t, err, 404, bloberror.ContainerNotFound)
	code(t, put(t, svc.NewContainerClient("none"), "b", nil, false), 404, bloberror.ContainerNotFound)
	_, err = svc.NewContainerClient("xx").Create(ctx(t), nil)
	code(t, err, 400, bloberror.OutOfRangeInput)
	_, err = svc.NewContainerClient("UPPER").Create(ctx(t), nil)
	code(t, err, 400, bloberror.InvalidResourceName)
	box(t, s, "two")
	var names []string
	pager := svc.NewListContainersPager(&azblob.ListContainersOptions{MaxResults: to.Ptr(int32(1))})
	for pager.More() {
		page, err := pager.NextPage(ctx(t))
		require.NoError(t, err)
		for _, i := range page.ContainerItems {
			names = append(names, *i.Name)
		}
	}
	require.Equal(t, []string{"one", "two"}, names)
	_, err = c.Delete(ctx(t), nil)
	require.NoError(t, err)
	_, err = c.Create(ctx(t), nil)
	code(t, err, 409, bloberror.ContainerBeingDeleted)
	clk.add(31 * time.Second)
	_, err = c.Create(ctx(t), nil)
	require.NoError(t, err)
	props, err := svc.GetProperties(ctx(t), nil)
	require.NoError(t, err)
	require.True(t, *props.DeleteRetentionPolicy.Enabled)
	require.EqualValues(t, 7, *props.DeleteRetentionPolicy.Days)
	info, err := svc.GetAccountInfo(ctx(t), nil)
	require.NoError(t, err)
	require.False(t, *info.IsHierarchicalNamespaceEnabled)
}

func TestListBlobs(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "list")
	for _, n := range []string{"a/1", "a/2", "a/3", "b/1", "c"} {
		require.NoError(t, put(t, c, n, []byte(n), false))
	}
	pb := pageBlob(t, c, "pages", 512)
	for range 3 {
		_, err := pb.CreateSnapshot(ctx(t), &blob.CreateSnapshotOptions{Metadata: map[string]*string{"k": to.Ptr("v")}})
		require.NoError(t, err)
	}
	list := func(o container.ListBlobsFlatOptions) (names []string) {
		pager := c.NewListBlobsFlatPager(&o)
		for pager.More() {
			page, err := pager.NextPage(ctx(t))
			require.NoError(t, err)
			for _, i := range page.Segment.BlobItems {
				n := *i.Name
				if i.Snapshot != nil && *i.Snapshot != "" {
					n += "@"
					require.Equal(t, "v", *i.Metadata["k"])
				}
				names = append(names, n)
			}
		}
		return names
	}
	for _, size := range []int32{1, 2, 3, 100} {
		require.Equal(t, []string{"a/1", "a/2", "a/3", "b/1", "c", "pages"}, list(container.ListBlobsFlatOptions{MaxResults: &size}))
		require.Equal(t, []string{"a/1", "a/2", "a/3"}, list(container.ListBlobsFlatOptions{MaxResults: &size, Prefix: to.Ptr("a/")}))
		require.Equal(t, []string{"pages@", "pages@", "pages@", "pages"},
			list(container.ListBlobsFlatOptions{MaxResults: &size, Prefix: to.Ptr("p"), Include: container.ListBlobsInclude{Snapshots: true, Metadata: true}}))
	}
	require.Equal(t, []string{"a/3", "b/1", "c", "pages"}, list(container.ListBlobsFlatOptions{StartFrom: to.Ptr("a/3")}))
	var prefixes []string
	pager := c.NewListBlobsHierarchyPager("/", nil)
	for pager.More() {
		page, err := pager.NextPage(ctx(t))
		require.NoError(t, err)
		for _, p := range page.Segment.BlobPrefixes {
			prefixes = append(prefixes, *p.Name)
		}
	}
	require.Equal(t, []string{"a/", "b/"}, prefixes)
}

func TestHandlerAlone(t *testing.T) {
	s := azurefake.New(azurefake.Options{Account: "acct"})
	r, err := http.NewRequestWithContext(ctx(t), http.MethodGet, "/acct?comp=list", nil)
	require.NoError(t, err)
	w := &recorder{header: http.Header{}}
	s.ServeHTTP(w, r)
	require.Equal(t, http.StatusUnauthorized, w.status)
	require.Equal(t, "NoAuthenticationInformation", w.header.Get("x-ms-error-code"))
}

type recorder struct {
	header http.Header
	status int
	bytes.Buffer
}

func (r *recorder) Header() http.Header { return r.header }
func (r *recorder) WriteHeader(s int)   { r.status = s }
