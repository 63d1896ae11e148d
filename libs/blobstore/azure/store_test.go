package azure

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/binary"
	"fmt"
	"hash/crc64"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/config"
)

// TestCRC64 compares our checksum with the one that the SDK computes for the same bytes, as it is on the wire.
func TestCRC64(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	var theirs atomic.Value
	s := open(t, connString(srv.ConnectionString()), Options{Wrap: func(d Doer) Doer {
		return doer(func(req *http.Request) (*http.Response, error) {
			if v := sent(req, "x-ms-content-crc64"); v != "" {
				theirs.Store(v)
			}
			return d.Do(req)
		})
	}})
	ctx := t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	_, err := c.CreatePages(ctx, "p", 1<<20, nil, blobstore.Conditions{})
	require.NoError(t, err)
	for n := 1; n < 40; n++ {
		data := bytes.Repeat([]byte(fmt.Sprintf("%08d", n)), n*64)
		_, err := c.WritePages(ctx, "p", 0, data, blobstore.Conditions{})
		require.NoError(t, err)
		ours := theirs.Load()
		require.NotNil(t, ours)
		theirs.Store("")
		_, err = c.(*ctr).client.NewPageBlobClient("p").UploadPages(ctx, streaming.NopCloser(bytes.NewReader(data)), blob.HTTPRange{Count: int64(len(data))},
			&pageblob.UploadPagesOptions{TransactionalValidation: blob.TransferValidationTypeComputeCRC64()})
		require.NoError(t, err)
		require.Equal(t, theirs.Load(), ours)
	}
	sum, err := bytesSource([]byte("123456789")).sum(sumCRC64)
	require.NoError(t, err)
	require.Equal(t, uint64(0xae8b14860a799888), uint64(sum.(blob.TransferValidationTypeCRC64)), "CRC-64/NVME's check value")
	data := make([]byte, 100_001)
	for i := range data {
		data[i] = byte(i * i >> 3)
	}
	table := crc64.MakeTable(0x9A6C9329AC4BC9B5)
	for _, n := range []int{0, 1, 7, 8, 63, 64, 127, 128, 129, 1000, 4096, len(data)} {
		src, err := newSource(onlySeeker{bytes.NewReader(data)}, int64(n))
		require.NoError(t, err)
		sum, err := src.sum(sumCRC64)
		require.NoError(t, err)
		require.Equal(t, crc64.Checksum(data[:n], table), uint64(sum.(blob.TransferValidationTypeCRC64)))
		sum, err = bytesSource(data[:n]).sum(sumCRC64)
		require.NoError(t, err)
		require.Equal(t, crc64.Checksum(data[:n], table), uint64(sum.(blob.TransferValidationTypeCRC64)))
	}
	require.Equal(t, sumCRC64, summing(s.checksum.Load()))
}

// onlySeeker has no WriteTo.
type onlySeeker struct{ io.ReadSeeker }

// sent is a header as it goes out: the SDK does not spell names as net/http does.
func sent(req *http.Request, name string) string {
	for k, v := range req.Header {
		if strings.EqualFold(k, name) {
			return strings.Join(v, ",")
		}
	}
	return ""
}

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(r *http.Request) (*http.Response, error) { return d(r) }

// TestChecksumByCapability: a service without CRC64 gets MD5 of block blobs, and learns it once.
func TestChecksumByCapability(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	var refused, md5s atomic.Int32
	s := open(t, connString(srv.ConnectionString()), Options{Wrap: func(d Doer) Doer {
		return doer(func(req *http.Request) (*http.Response, error) {
			if sent(req, "x-ms-content-crc64") != "" || sent(req, "x-ms-range-get-content-crc64") != "" {
				refused.Add(1)
				return status(500, "FeatureNotSupported")(nil, req)
			}
			if sent(req, "content-md5") != "" {
				md5s.Add(1)
			}
			return d.Do(req)
		})
	}})
	ctx := t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			_, err := c.Put(ctx, fmt.Sprint(i), strings.NewReader("text"), 4, blobstore.Conditions{})
			require.NoError(t, err)
		})
	}
	wg.Wait()
	require.EqualValues(t, 8, md5s.Load())
	probes := refused.Load()
	_, err := c.CreatePages(ctx, "p", 4096, nil, blobstore.Conditions{})
	require.NoError(t, err)
	_, err = c.WritePages(ctx, "p", 0, page(1, 1), blobstore.Conditions{})
	require.NoError(t, err)
	require.NoError(t, c.ReadPages(ctx, "p", "", 0, make([]byte, 512)))
	require.Equal(t, probes, refused.Load(), "asked once")
	require.EqualValues(t, 8, md5s.Load(), "no MD5 of pages: the emulator does not check it")
}

// TestDamageOnTheWay: a flipped bit in an answer is seen and read again.
func TestDamageOnTheWay(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s, ctx := open(t, connString(srv.ConnectionString()), Options{}), t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	want := bytes.Repeat([]byte("segment "), 1<<16)
	_, err := c.Put(ctx, "a", bytes.NewReader(want), int64(len(want)), blobstore.Conditions{})
	require.NoError(t, err)
	var n atomic.Int32
	srv.SetIntercept(func(r *http.Request) azurefake.Fault {
		return azurefake.Fault{FlipBit: r.Method == http.MethodGet && n.Add(1) <= 2}
	})
	r, _, err := c.Get(ctx, "a", 0, -1)
	require.NoError(t, err)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.True(t, bytes.Equal(want, got))
	require.EqualValues(t, 3, n.Load())
}

// TestReaderKeepsToItsVersion: content larger than what is read ahead, overwritten while it is read, ends in an error.
func TestReaderKeepsToItsVersion(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s, ctx := open(t, connString(srv.ConnectionString()), Options{}), t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	old := bytes.Repeat([]byte("old "), 4<<20) // four pieces
	put := func(name string, data []byte) {
		_, err := c.Put(ctx, name, bytes.NewReader(data), int64(len(data)), blobstore.Conditions{})
		require.NoError(t, err)
	}
	for name, change := range map[string]func(){
		"overwritten": func() { put("overwritten", bytes.Repeat([]byte("new "), 4<<20)) },
		"deleted":     func() { require.NoError(t, c.Delete(ctx, "deleted", blobstore.Conditions{})) },
	} {
		put(name, old)
		r, _, err := c.Get(ctx, name, 0, -1)
		require.NoError(t, err)
		change()
		got, err := io.ReadAll(r)
		require.Error(t, err)
		require.True(t, bytes.HasPrefix(old, got), "only bytes of the version that was opened")
		require.NoError(t, r.Close())
		_, err = r.Read(make([]byte, 1))
		require.ErrorIs(t, err, errReaderClosed)
	}
	put("whole", old)
	r, _, err := c.Get(ctx, "whole", 3, 9<<20)
	require.NoError(t, err)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.Equal(t, md5.Sum(old[3:3+9<<20]), md5.Sum(got))
	require.NoError(t, r.Close())
	r, _, err = c.Get(ctx, "whole", 0, -1) // closed with a piece on its way
	require.NoError(t, err)
	_, err = r.Read(make([]byte, 1))
	require.NoError(t, err)
	require.NoError(t, r.Close())
	short, cancel := context.WithCancel(ctx)
	r, _, err = c.Get(short, "whole", 0, -1)
	require.NoError(t, err)
	cancel()
	_, err = io.ReadAll(r)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, r.Close())
}

// TestBlocks: what is too large for one request is staged, and visible at once.
func TestBlocks(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s, ctx := open(t, connString(srv.ConnectionString()), Options{}), t.Context()
	s.single = 1 << 20
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	want := bytes.Repeat([]byte("0123456789abcdef"), 130<<20/16) // 64 + 64 + 2 MiB
	p, err := c.Put(ctx, "big", bytes.NewReader(want), int64(len(want)), blobstore.Conditions{CreateOnly: true})
	require.NoError(t, err)
	st, err := c.Stat(ctx, "big", "")
	require.NoError(t, err)
	require.Equal(t, p, st)
	r, _, err := c.Get(ctx, "big", 63<<20, 2<<20)
	require.NoError(t, err)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.True(t, bytes.Equal(want[63<<20:65<<20], got))
	_, err = c.Put(ctx, "big", bytes.NewReader(want[:2<<20]), 2<<20, blobstore.Conditions{CreateOnly: true})
	require.ErrorIs(t, err, blobstore.ErrExists)
}

// TestBodyIsTakenBack: a transport that reads on after its answer gets nothing from a buffer that the caller uses again.
func TestBodyIsTakenBack(t *testing.T) {
	src := bytesSource(page(1, 4))
	b := src.section(0, src.size)
	_, err := io.ReadFull(b, make([]byte, 512))
	require.NoError(t, err)
	b.revoke()
	_, err = b.Read(make([]byte, 1))
	require.ErrorIs(t, err, errRevoked)
	all, err := io.ReadAll(src.section(512, 1024))
	require.NoError(t, err)
	require.Len(t, all, 1024)
}

func TestStorageTime(t *testing.T) {
	var c clock
	now := time.Now()
	_, ok := c.now(now)
	require.False(t, ok)
	service := time.Date(2030, 1, 1, 0, 0, 0, 900e6, time.UTC)
	header := func(at time.Time) string { return at.Format(http.TimeFormat) }
	c.observe(header(service), now)
	at, ok := c.now(now)
	require.True(t, ok)
	require.Equal(t, service.Truncate(time.Second), at)
	// Later answers bring the bound nearer to the truth, never past it, and never back.
	for d := 100 * time.Millisecond; d < 20*time.Second; d += 130 * time.Millisecond {
		c.observe(header(service.Add(d)), now.Add(d))
		got, ok := c.now(now.Add(d))
		require.True(t, ok)
		require.False(t, got.After(service.Add(d)), "ahead of the service")
		require.False(t, got.Before(at), "went back")
		at = got
	}
	require.WithinDuration(t, service.Add(20*time.Second), at, 300*time.Millisecond)
	_, ok = c.now(now.Add(time.Minute))
	require.False(t, ok, "too old to be carried on")
	c.observe("nonsense", now.Add(time.Minute))
	_, ok = c.now(now.Add(time.Minute))
	require.False(t, ok)
	c.observe(header(service), now.Add(time.Hour)) // the service was set back by an hour
	at, ok = c.now(now.Add(time.Hour))
	require.True(t, ok)
	require.Equal(t, service.Truncate(time.Second), at)
}

// TestPageRate: the service's limits for a page blob are kept, so that it never says 503.
func TestPageRate(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s, ctx := open(t, connString(srv.ConnectionString()), Options{}), t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	_, err := c.CreatePages(ctx, "p", 1<<20, nil, blobstore.Conditions{})
	require.NoError(t, err)
	began := time.Now()
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 40 {
				_, err := c.WritePages(ctx, "p", int64(w*40+i)*512, page(1, 1), blobstore.Conditions{})
				require.NoError(t, err)
			}
		})
	}
	wg.Wait()
	require.Zero(t, srv.Stats().Codes["ServerBusy"])
	require.Greater(t, time.Since(began), time.Second)
	require.EqualValues(t, (60<<20)/450, s.BytesPerRequest())
}

// TestThrottled: a service that takes less than it says is met by fewer requests in flight, and everything is written.
func TestThrottled(t *testing.T) {
	srv := fake(t, azurefake.Options{PageBlobRequests: 150, LimitBurst: 50 * time.Millisecond})
	set := connString(srv.ConnectionString())
	set.PageRequests, set.Concurrency, set.BlobConcurrency = -1, 32, 32
	var limited atomic.Int64
	s := open(t, set, Options{Backoff: 20 * time.Millisecond, OnRequest: func(r Request) {
		if r.Limited {
			limited.Add(1)
		}
	}})
	ctx := t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	_, err := c.CreatePages(ctx, "p", 1<<20, nil, blobstore.Conditions{})
	require.NoError(t, err)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 10 {
				_, err := c.WritePages(ctx, "p", int64(w*10+i)*512, page(byte(w), 1), blobstore.Conditions{})
				require.NoError(t, err)
			}
		})
	}
	wg.Wait()
	require.Positive(t, limited.Load())
	require.Positive(t, s.pacer.Stats().Cuts)
	st, ok := srv.Blob("abc", "p")
	require.True(t, ok)
	require.EqualValues(t, 160*512, st.Valid)
}

func TestFacts(t *testing.T) {
	srv := fake(t, azurefake.Options{SoftDeleteDays: 7, Versioning: true})
	s, ctx := open(t, connString(srv.ConnectionString()), Options{}), t.Context()
	f, err := s.Facts(ctx)
	require.NoError(t, err)
	require.Equal(t, 7, f.SoftDeleteDays)
	require.NotEmpty(t, f.SKU)
	require.False(t, f.Versioning)
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	_, err = s.Container("abc").Put(ctx, "a", strings.NewReader("x"), 1, blobstore.Conditions{})
	require.NoError(t, err)
	f, err = s.Facts(ctx)
	require.NoError(t, err)
	require.True(t, f.Versioning)
	require.Equal(t, Load{Limit: 8}, s.Load())
}

// TestLargeRanges: more ranges than the service lists at once.
func TestLargeRanges(t *testing.T) {
	srv := fake(t, azurefake.Options{PageBlobRequests: -1, PageBlobBytes: -1})
	set := connString(srv.ConnectionString())
	set.PageRequests, set.PageBandwidth = -1, 1
	s, ctx := open(t, set, Options{}), t.Context()
	require.NoError(t, s.CreateContainer(ctx, "abc"))
	c := s.Container("abc")
	const n = 10_050
	_, err := c.CreatePages(ctx, "p", 2*n*512, nil, blobstore.Conditions{})
	require.NoError(t, err)
	for at := int64(0); at < 2*n*512; at += 4 << 20 { // whole, then holes
		size := min(4<<20, 2*n*512-at)
		_, err := c.WritePages(ctx, "p", at, page(1, int(size/512)), blobstore.Conditions{})
		require.NoError(t, err)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := w; i < n; i += 8 {
				_, err := c.ClearPages(ctx, "p", int64(2*i+1)*512, 512, blobstore.Conditions{})
				require.NoError(t, err)
			}
		})
	}
	wg.Wait()
	var got int64
	for r, err := range c.PageRanges(ctx, "p", "", 0, 2*n*512) {
		require.NoError(t, err)
		require.Equal(t, blobstore.PageRange{Offset: got * 1024, Length: 512}, r)
		got++
	}
	require.EqualValues(t, n, got)
}

// TestConformsOnRealAccount is never run here. It needs LANDFALL_AZURE_TEST_URL of an account that holds nothing else, and
// LANDFALL_AZURE_TEST_CONNECTION_STRING, LANDFALL_AZURE_TEST_SAS, or what LANDFALL_AZURE_TEST_CREDENTIAL (managed-identity,
// workload-identity) finds in the environment. Each test's containers get a prefix of their own and are left behind.
func TestConformsOnRealAccount(t *testing.T) {
	address := os.Getenv("LANDFALL_AZURE_TEST_URL")
	if address == "" {
		t.Skip("LANDFALL_AZURE_TEST_URL is not set")
	}
	set := DefaultSettings()
	set.Credential = os.Getenv("LANDFALL_AZURE_TEST_CREDENTIAL")
	set.SAS = config.NewSecret(os.Getenv("LANDFALL_AZURE_TEST_SAS"))
	set.ConnectionString = config.NewSecret(os.Getenv("LANDFALL_AZURE_TEST_CONNECTION_STRING"))
	var n atomic.Int64
	blobstoretest.Run(t, func(t *testing.T) blobstore.Store {
		s, err := Open(address, set, Options{})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return &prefixed{Store: s, prefix: fmt.Sprintf("t%x%x-", uint32(time.Now().Unix()), n.Add(1))}
	})
}

func BenchmarkStore(b *testing.B) {
	srv := fake(b, azurefake.Options{Discard: true, PageBlobRequests: -1, PageBlobBytes: -1})
	set := connString(srv.ConnectionString())
	set.PageRequests, set.PageBandwidth = -1, 1
	data := bytes.Repeat([]byte{1}, 4<<20)
	binary.LittleEndian.PutUint64(data, 42)
	for _, sum := range []string{ChecksumNone, ChecksumCRC64, ChecksumMD5} {
		set.Checksum = sum
		s := open(b, set, Options{})
		require.NoError(b, s.CreateContainer(b.Context(), "abc"))
		c := s.Container("abc")
		_, err := c.CreatePages(b.Context(), "p-"+sum, 64<<20, nil, blobstore.Conditions{})
		require.NoError(b, err)
		parallel := func(name string, do func(i int64) error) {
			b.Run(name+"/"+sum, func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				b.ReportAllocs()
				b.SetParallelism(4)
				var n atomic.Int64
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := do(n.Add(1)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			})
		}
		parallel("WritePages", func(i int64) error {
			_, err := c.WritePages(context.Background(), "p-"+sum, i%16<<22, data, blobstore.Conditions{})
			return err
		})
		parallel("Put", func(i int64) error {
			_, err := c.Put(context.Background(), fmt.Sprint("b-", i%64), bytes.NewReader(data), int64(len(data)), blobstore.Conditions{})
			return err
		})
		parallel("ReadPages", func(i int64) error {
			buf := s.buffer(int64(len(data)))
			defer s.recycle(buf)
			return c.ReadPages(context.Background(), "p-"+sum, "", i%16<<22, buf)
		})
	}
}
