package azurefake_test

import (
	"bytes"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/testkit"
)

func TestPageBlobTargets(t *testing.T) {
	s := start(t, azurefake.Options{PageBlobRequests: 5, LimitBurst: 200 * time.Millisecond, RetryAfter: 1500 * time.Millisecond})
	c := box(t, s, "busy")
	p, other := pageBlob(t, c, "one", mib), pageBlob(t, c, "two", mib)
	busy := 0
	for range 20 {
		if err := write(t, p, 0, fill(512, 1), nil); err != nil {
			code(t, err, 503, bloberror.ServerBusy)
			var r *azcore.ResponseError
			require.ErrorAs(t, err, &r)
			require.Equal(t, "2", r.RawResponse.Header.Get("Retry-After"))
			busy++
		}
	}
	require.Positive(t, busy)
	require.NoError(t, write(t, other, 0, fill(512, 1), nil), "the limit is per blob")
	require.EqualValues(t, busy, s.Stats().Codes["ServerBusy"])
	testkit.Eventually(t, 5*time.Second, func() error { return write(t, p, 0, fill(512, 1), nil) }, "it recovers")

	b := start(t, azurefake.Options{PageBlobBytes: 64 << 10, LimitBurst: 100 * time.Millisecond})
	p = pageBlob(t, box(t, b, "busy"), "one", 8*mib)
	whole := &pageblob.GetPageRangesOptions{Range: blob.HTTPRange{Count: 8 * mib}}
	_, err := p.NewGetPageRangesPager(whole).NextPage(t.Context())
	require.NoError(t, err, "asking what lies in a range moves none of its bytes")
	require.NoError(t, write(t, p, 0, fill(mib, 1), nil), "a request may overdraw")
	code(t, write(t, p, 0, fill(512, 1), nil), 503, bloberror.ServerBusy)
}

// The standard limits let 500 requests/s pass and not many more.
func TestStandardTarget(t *testing.T) {
	s := start(t, azurefake.Options{})
	p := pageBlob(t, box(t, s, "target"), "disk", mib)
	data := fill(512, 1)
	var ok atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for time.Since(began) < 600*time.Millisecond {
				_, err := p.UploadPages(t.Context(), body(data), blob.HTTPRange{Count: 512}, nil)
				if err == nil {
					ok.Add(1)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began).Seconds()
	require.LessOrEqual(t, float64(ok.Load()), 500*(took+0.25)+1)
}

func TestFaults(t *testing.T) {
	var next atomic.Pointer[azurefake.Fault]
	s := start(t, azurefake.Options{Intercept: func(*http.Request) azurefake.Fault {
		if f := next.Swap(nil); f != nil {
			return *f
		}
		return azurefake.Fault{}
	}})
	c := box(t, s, "faults")
	with := func(f azurefake.Fault) { next.Store(&f) }

	with(azurefake.Busy(time.Second))
	code(t, put(t, c, "busy", fill(mib, 1), true), 503, bloberror.ServerBusy)
	_, err := get(t, c, "busy", nil)
	code(t, err, 404, bloberror.BlobNotFound)

	with(azurefake.Fault{ResetBefore: true})
	require.Error(t, put(t, c, "before", []byte("1"), true))
	_, err = get(t, c, "before", nil)
	code(t, err, 404, bloberror.BlobNotFound)

	with(azurefake.Fault{ResetAfter: true})
	err = put(t, c, "after", []byte("1"), true)
	require.Error(t, err)
	require.False(t, bloberror.HasCode(err, bloberror.BlobAlreadyExists), "no answer, not a refusal")
	code(t, put(t, c, "after", []byte("1"), true), 409, bloberror.BlobAlreadyExists)

	with(azurefake.Fault{Status: 500, Code: "OperationTimedOut"})
	code(t, put(t, c, "x", []byte("1"), true), 500, bloberror.OperationTimedOut)

	with(azurefake.Fault{Delay: 50 * time.Millisecond, DelayAfter: 50 * time.Millisecond})
	began := time.Now()
	require.NoError(t, put(t, c, "slow", fill(1000, 1), true))
	require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond)

	with(azurefake.Fault{FlipBit: true})
	got, err := get(t, c, "slow", nil)
	require.NoError(t, err)
	want := fill(1000, 1)
	require.False(t, bytes.Equal(want, got))
	got[500] ^= 1
	require.True(t, bytes.Equal(want, got))

	s.SetIntercept(func(r *http.Request) azurefake.Fault {
		if strings.HasSuffix(r.URL.Path, "/never") {
			return azurefake.Fault{Status: 404, Code: "BlobNotFound"}
		}
		return azurefake.Fault{}
	})
	code(t, put(t, c, "never", []byte("1"), true), 404, bloberror.BlobNotFound)
	require.NoError(t, put(t, c, "always", []byte("1"), true))
}

func TestTLSFaults(t *testing.T) {
	s := start(t, azurefake.Options{TLS: true})
	c := box(t, s, "tls")
	s.SetIntercept(func(*http.Request) azurefake.Fault { return azurefake.Fault{ResetAfter: true} })
	require.Error(t, put(t, c, "after", []byte("1"), true))
	s.SetIntercept(nil)
	code(t, put(t, c, "after", []byte("1"), true), 409, bloberror.BlobAlreadyExists)
}

func TestShaping(t *testing.T) {
	s := start(t, azurefake.Options{Bandwidth: 10 * mib, Latency: 20 * time.Millisecond})
	c := box(t, s, "shape")
	data := fill(2*mib, 1)
	began := time.Now()
	require.NoError(t, put(t, c, "b", data, true))
	require.GreaterOrEqual(t, time.Since(began), 200*time.Millisecond)
	began = time.Now()
	_, err := get(t, c, "b", nil)
	require.NoError(t, err)
	require.GreaterOrEqual(t, time.Since(began), 200*time.Millisecond)

	per := start(t, azurefake.Options{BlobBandwidth: 10 * mib})
	c = box(t, per, "shape")
	began = time.Now()
	var wg sync.WaitGroup
	for _, n := range []string{"one", "two"} {
		wg.Go(func() {
			_, err := c.NewBlockBlobClient(n).Upload(t.Context(), body(data), nil)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	require.GreaterOrEqual(t, took, 190*time.Millisecond)
}

func TestDiscard(t *testing.T) {
	s := start(t, azurefake.Options{Discard: true, Digest: true, PageBlobRequests: -1, PageBlobBytes: -1})
	c := box(t, s, "sink")
	p := pageBlob(t, c, "disk", 64*mib)
	data := fill(4*mib, 1)
	var want uint64
	for i := range int64(8) {
		require.NoError(t, write(t, p, i*4*mib, data, nil))
		want += azurefake.PageDigest(i*4*mib, data)
	}
	st, ok := s.Blob("sink", "disk")
	require.True(t, ok)
	require.Equal(t, azurefake.BlobState{Size: 64 * mib, Valid: 32 * mib, Digest: want}, st)
	require.Zero(t, s.Used())
	require.Equal(t, [][2]int64{{0, 32 * mib}}, spans(t, p, "", 100))
	got, err := get(t, c, "disk", &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: 0, Count: 4096}})
	require.NoError(t, err)
	require.Equal(t, make([]byte, 4096), got)
	require.NoError(t, put(t, c, "segment", data, true))
	st, ok = s.Blob("sink", "segment")
	require.True(t, ok)
	require.Equal(t, azurefake.CRC64(data), st.Digest)
	counts := s.Stats().Operations
	require.EqualValues(t, 8, counts["PutPage"].Requests)
	require.EqualValues(t, 32*mib, counts["PutPage"].BytesIn)
	require.EqualValues(t, 4096, counts["GetBlob"].BytesOut)
	s.ResetStats()
	require.Zero(t, s.Stats().Requests())
}

// Everything at once, for the race detector: snapshots, writes, clears, reads and listings of one blob.
func TestConcurrency(t *testing.T) {
	s := start(t, azurefake.Options{PageBlobRequests: -1, PageBlobBytes: -1})
	c := box(t, s, "race")
	p := pageBlob(t, c, "disk", mib)
	data := fill(64<<10, 1)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 20 {
				off := int64((w*20+i)%16) * 64 << 10
				var err error
				switch (w + i) % 4 {
				case 0, 1:
					_, err = p.UploadPages(t.Context(), body(data), blob.HTTPRange{Offset: off, Count: int64(len(data))}, nil)
				case 2:
					_, err = p.CreateSnapshot(t.Context(), nil)
				case 3:
					_, err = p.ClearPages(t.Context(), blob.HTTPRange{Offset: off, Count: int64(len(data))}, nil)
				}
				if err == nil {
					_, err = p.NewGetPageRangesPager(nil).NextPage(t.Context())
				}
				if err == nil {
					var r blob.DownloadStreamResponse
					if r, err = p.DownloadStream(t.Context(), nil); err == nil {
						_, err = new(bytes.Buffer).ReadFrom(r.Body)
						r.Body.Close()
					}
				}
				if err == nil {
					_, err = c.NewListBlobsFlatPager(nil).NextPage(t.Context())
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestClientThatDies(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "dies")
	short := &half{Reader: bytes.NewReader(fill(mib, 1))}
	_, err := c.NewBlockBlobClient("b").Upload(ctx(t), short, nil)
	require.Error(t, err)
	_, err = get(t, c, "b", nil)
	code(t, err, 404, bloberror.BlobNotFound)
}

// half says that it is longer than it is.
type half struct{ *bytes.Reader }

func (h *half) Seek(off int64, whence int) (int64, error) {
	n, err := h.Reader.Seek(off, whence)
	if whence == 2 {
		n *= 2
	}
	return n, err
}
func (*half) Close() error { return nil }

func TestVersioningShows(t *testing.T) {
	for _, on := range []bool{false, true} {
		s := start(t, azurefake.Options{Versioning: on})
		c := box(t, s, "versions")
		r, err := c.NewBlockBlobClient("b").Upload(ctx(t), body([]byte("1")), nil)
		require.NoError(t, err)
		require.Equal(t, on, r.VersionID != nil)
		p, err := c.NewBlobClient("b").GetProperties(ctx(t), nil)
		require.NoError(t, err)
		require.Equal(t, on, p.IsCurrentVersion != nil && *p.IsCurrentVersion)
	}
}
