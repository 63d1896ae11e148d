package azurefake_test

import (
	"bytes"
	"crypto/md5"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

const mib = 1 << 20

func sequence(n int64) *pageblob.UploadPagesOptions {
	return &pageblob.UploadPagesOptions{SequenceNumberAccessConditions: &pageblob.SequenceNumberAccessConditions{IfSequenceNumberEqualTo: &n}}
}

// spans is what Get Page Ranges says, pages of size results; cleared ranges are negative.
func spans(t *testing.T, p *pageblob.Client, prev string, size int32) (out [][2]int64) {
	t.Helper()
	add := func(l pageblob.PageList) {
		for _, r := range l.PageRange {
			out = append(out, [2]int64{*r.Start, *r.End + 1})
		}
		for _, r := range l.ClearRange {
			out = append(out, [2]int64{-*r.Start, -*r.End - 1})
		}
	}
	if prev != "" {
		pager := p.NewGetPageRangesDiffPager(&pageblob.GetPageRangesDiffOptions{PrevSnapshot: &prev, MaxResults: &size})
		for pager.More() {
			page, err := pager.NextPage(ctx(t))
			require.NoError(t, err)
			add(page.PageList)
		}
		return out
	}
	pager := p.NewGetPageRangesPager(&pageblob.GetPageRangesOptions{MaxResults: &size})
	for pager.More() {
		page, err := pager.NextPage(ctx(t))
		require.NoError(t, err)
		add(page.PageList)
	}
	return out
}

func TestPutPageLimits(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "pages")
	p := pageBlob(t, c, "disk", 8*mib)
	whole := fill(5*mib, 1)
	require.NoError(t, write(t, p, 0, whole[:4*mib], nil))
	code(t, write(t, p, 0, whole, nil), 413, bloberror.RequestBodyTooLarge)
	code(t, write(t, p, 8*mib-512, whole[:1024], nil), 416, bloberror.InvalidPageRange)
	code(t, write(t, p, 8*mib, whole[:512], nil), 416, bloberror.InvalidPageRange)
	code(t, write(t, p, 100, whole[:512], nil), 416, bloberror.InvalidPageRange)
	code(t, write(t, p, 0, whole[:500], nil), 416, bloberror.InvalidPageRange)
	_, err := p.ClearPages(ctx(t), blob.HTTPRange{Offset: 7 * mib, Count: 2 * mib}, nil)
	code(t, err, 416, bloberror.InvalidPageRange)
	_, err = c.NewPageBlobClient("odd").Create(ctx(t), 1000, nil)
	code(t, err, 400, bloberror.InvalidHeaderValue)
	code(t, write(t, c.NewPageBlobClient("none"), 0, whole[:512], nil), 404, bloberror.BlobNotFound)
	require.NoError(t, put(t, c, "block", nil, false))
	code(t, write(t, c.NewPageBlobClient("block"), 0, whole[:512], nil), 409, bloberror.InvalidBlobType)
}

func TestChecksums(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "sums")
	p := pageBlob(t, c, "disk", mib)
	data := fill(4096, 2)
	crc := func(p []byte) *pageblob.UploadPagesOptions {
		return &pageblob.UploadPagesOptions{TransactionalValidation: blob.TransferValidationTypeCRC64(azurefake.CRC64(p))}
	}
	sum := func(p []byte) *pageblob.UploadPagesOptions {
		m := md5.Sum(p)
		return &pageblob.UploadPagesOptions{TransactionalValidation: blob.TransferValidationTypeMD5(m[:])}
	}
	require.NoError(t, write(t, p, 0, data, crc(data)))
	require.NoError(t, write(t, p, 0, data, sum(data)))
	code(t, write(t, p, 0, data, crc(data[1:])), 400, bloberror.CRC64Mismatch)
	code(t, write(t, p, 0, data, sum(data[1:])), 400, bloberror.MD5Mismatch)
	require.NoError(t, write(t, p, 0, data, &pageblob.UploadPagesOptions{TransactionalValidation: blob.TransferValidationTypeComputeCRC64()}))
}

func TestSequenceNumbers(t *testing.T) {
	s := start(t, azurefake.Options{})
	p := pageBlob(t, box(t, s, "numbers"), "disk", mib)
	data := fill(512, 3)
	require.NoError(t, write(t, p, 0, data, sequence(0)))
	set := func(a pageblob.SequenceNumberActionType, n int64) (int64, error) {
		o := &pageblob.UpdateSequenceNumberOptions{ActionType: &a, SequenceNumber: &n}
		r, err := p.UpdateSequenceNumber(ctx(t), o)
		if err != nil {
			return 0, err
		}
		return *r.BlobSequenceNumber, nil
	}
	got, err := set(pageblob.SequenceNumberActionTypeMax, 7)
	require.NoError(t, err)
	require.EqualValues(t, 7, got)
	got, err = set(pageblob.SequenceNumberActionTypeMax, 5)
	require.NoError(t, err)
	require.EqualValues(t, 7, got)
	got, err = set(pageblob.SequenceNumberActionTypeUpdate, 1<<62)
	require.NoError(t, err)
	require.EqualValues(t, 1<<62, got)
	got, err = set(pageblob.SequenceNumberActionTypeUpdate, 5)
	require.NoError(t, err)
	require.EqualValues(t, 5, got)
	code(t, write(t, p, 0, data, sequence(4)), 412, bloberror.SequenceNumberConditionNotMet)
	require.NoError(t, write(t, p, 0, data, sequence(5)))
	code(t, write(t, p, 0, data, &pageblob.UploadPagesOptions{SequenceNumberAccessConditions: &pageblob.SequenceNumberAccessConditions{IfSequenceNumberLessThan: to.Ptr(int64(5))}}),
		412, bloberror.SequenceNumberConditionNotMet)
}

func TestSnapshots(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "snapshots")
	p := pageBlob(t, c, "disk", mib)
	first := fill(mib, 4)
	require.NoError(t, write(t, p, 0, first, nil))
	before, err := p.GetProperties(ctx(t), nil)
	require.NoError(t, err)
	var ids []string
	for range 20 { // many in one tick of the clock
		r, err := p.CreateSnapshot(ctx(t), nil)
		require.NoError(t, err)
		ids = append(ids, *r.Snapshot)
	}
	for i := 1; i < len(ids); i++ {
		require.Less(t, ids[i-1], ids[i])
	}
	after, err := p.GetProperties(ctx(t), nil)
	require.NoError(t, err)
	require.Equal(t, before.ETag, after.ETag, "a snapshot does not change the blob's ETag")
	require.NoError(t, write(t, p, 4096, fill(4096, 5), nil))
	frozen, err := p.WithSnapshot(ids[0])
	require.NoError(t, err)
	r, err := frozen.DownloadStream(ctx(t), nil)
	require.NoError(t, err)
	var got bytes.Buffer
	_, err = got.ReadFrom(r.Body)
	require.NoError(t, err)
	r.Body.Close()
	require.True(t, bytes.Equal(first, got.Bytes()), "a snapshot stays as it was")
	code(t, write(t, frozen, 0, first[:512], nil), 400, bloberror.InvalidQueryParameterValue)
	_, err = p.Delete(ctx(t), nil)
	code(t, err, 409, bloberror.SnapshotsPresent)
	_, err = frozen.Delete(ctx(t), nil)
	require.NoError(t, err)
	_, err = frozen.GetProperties(ctx(t), nil)
	code(t, err, 404, bloberror.BlobNotFound)
	require.Positive(t, s.Used())
	_, err = p.Delete(ctx(t), &blob.DeleteOptions{DeleteSnapshots: to.Ptr(blob.DeleteSnapshotsOptionTypeInclude)})
	require.NoError(t, err)
	require.Zero(t, s.Used(), "everything is freed")
}

func TestResize(t *testing.T) {
	s := start(t, azurefake.Options{})
	p := pageBlob(t, box(t, s, "resize"), "disk", mib)
	require.NoError(t, write(t, p, 0, fill(mib, 6), nil))
	_, err := p.Resize(ctx(t), 512, nil)
	require.NoError(t, err)
	_, err = p.Resize(ctx(t), mib, nil)
	require.NoError(t, err)
	require.Equal(t, [][2]int64{{0, 512}}, spans(t, p, "", 100))
	_, err = p.Resize(ctx(t), 1000, nil)
	code(t, err, 400, bloberror.InvalidHeaderValue)
}

// Ranges and diffs against a model of pages, with every size of answer.
func TestPageRangesModel(t *testing.T) {
	const pages = 1024
	s := start(t, azurefake.Options{PageBlobRequests: -1})
	p := pageBlob(t, box(t, s, "model"), "disk", pages*512)
	rng := rand.New(rand.NewPCG(1, 2))
	var valid, touched [pages]bool
	var prev string
	for round := range 6 {
		touched = [pages]bool{}
		for range 40 {
			at, n := rng.IntN(pages), 1+rng.IntN(40)
			n = min(n, pages-at)
			if set := rng.IntN(3) > 0; set {
				require.NoError(t, write(t, p, int64(at)*512, fill(n*512, uint64(at)), nil))
				for i := at; i < at+n; i++ {
					valid[i], touched[i] = true, true
				}
			} else {
				_, err := p.ClearPages(ctx(t), blob.HTTPRange{Offset: int64(at) * 512, Count: int64(n) * 512}, nil)
				require.NoError(t, err)
				for i := at; i < at+n; i++ {
					touched[i] = touched[i] || valid[i]
					valid[i] = false
				}
			}
		}
		require.Empty(t, cmp.Diff(merge(valid[:]), flat(spans(t, p, "", int32(1+rng.IntN(50))))), "round %d", round)
		if prev != "" {
			// A page that was empty and was cleared may be named or not: only what must be there and what must not is compared.
			seen := map[int64]bool{}
			for _, r := range spans(t, p, prev, int32(1+rng.IntN(50))) {
				gone := r[1] < 0
				from, to := max(r[0], -r[0])/512, max(r[1], -r[1])/512
				for i := from; i < to; i++ {
					seen[i] = true
					require.Equal(t, !valid[i], gone, "page %d", i)
				}
			}
			for i, was := range touched {
				require.True(t, !was || seen[int64(i)], "page %d was touched", i)
			}
		}
		r, err := p.CreateSnapshot(ctx(t), nil)
		require.NoError(t, err)
		prev = *r.Snapshot
		require.Empty(t, spans(t, p, prev, 100), "nothing has changed since")
	}
}

func merge(valid []bool) (out [][2]int64) {
	for i, v := range valid {
		at := int64(i) * 512
		switch {
		case !v:
		case len(out) > 0 && out[len(out)-1][1] == at:
			out[len(out)-1][1] += 512
		default:
			out = append(out, [2]int64{at, at + 512})
		}
	}
	return out
}

// flat joins what the border of an answer has cut.
func flat(in [][2]int64) (out [][2]int64) {
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1][1] == r[0] {
			out[n-1][1] = r[1]
			continue
		}
		out = append(out, r)
	}
	return out
}

func TestDiffRefusals(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "diffs")
	p := pageBlob(t, c, "disk", mib)
	a, err := p.CreateSnapshot(ctx(t), nil)
	require.NoError(t, err)
	b, err := p.CreateSnapshot(ctx(t), nil)
	require.NoError(t, err)
	diff := func(p *pageblob.Client, prev string) error {
		_, err := p.NewGetPageRangesDiffPager(&pageblob.GetPageRangesDiffOptions{PrevSnapshot: &prev}).NextPage(ctx(t))
		return err
	}
	code(t, diff(p, "2020-01-01T00:00:00.0000000Z"), 409, bloberror.PreviousSnapshotNotFound)
	old, err := p.WithSnapshot(*a.Snapshot)
	require.NoError(t, err)
	code(t, diff(old, *b.Snapshot), 400, bloberror.PreviousSnapshotCannotBeNewer)
	_, err = p.Create(ctx(t), mib, nil)
	require.NoError(t, err)
	code(t, diff(p, *b.Snapshot), 409, bloberror.BlobOverwritten)
}

// Terabytes of holes cost nothing.
func TestSparse(t *testing.T) {
	s := start(t, azurefake.Options{})
	p := pageBlob(t, box(t, s, "sparse"), "disk", 8<<40)
	require.NoError(t, write(t, p, 1<<40, fill(512, 1), nil))
	_, err := p.ClearPages(ctx(t), blob.HTTPRange{Offset: 0, Count: 1 << 40}, nil)
	require.NoError(t, err)
	require.Equal(t, [][2]int64{{1 << 40, 1<<40 + 512}}, spans(t, p, "", 10))
	_, err = p.ClearPages(ctx(t), blob.HTTPRange{Offset: 0, Count: 8 << 40}, nil)
	require.NoError(t, err)
	require.Empty(t, spans(t, p, "", 10))
	require.Zero(t, s.Used())
}

func TestWriteOnce(t *testing.T) {
	for _, first := range []bool{false, true} {
		clk := newClock()
		s := start(t, azurefake.Options{Now: clk.now, MaxSkew: -1, ImmutableFirst: first})
		c := box(t, s, "worm")
		require.True(t, s.SetWriteOnce("worm", azurefake.WriteOnce{Retention: time.Hour, Locked: true}))
		require.False(t, s.SetWriteOnce("none", azurefake.WriteOnce{}))
		props, err := c.GetProperties(ctx(t), nil)
		require.NoError(t, err)
		require.True(t, *props.HasImmutabilityPolicy)
		require.NoError(t, put(t, c, "b", []byte("1"), true))
		want := bloberror.BlobAlreadyExists
		if first {
			want = bloberror.BlobImmutableDueToPolicy
		}
		code(t, put(t, c, "b", []byte("2"), true), 409, want)
		p := pageBlob(t, c, "p", mib)
		meta := map[string]*string{"k": to.Ptr("v")}
		refused := func(code func(error)) {
			code(put(t, c, "b", []byte("2"), false))
			code(write(t, p, 0, fill(512, 1), nil))
			_, err := p.CreateSnapshot(ctx(t), nil)
			code(err)
			_, err = c.NewBlobClient("b").SetMetadata(ctx(t), meta, nil)
			code(err)
			_, err = p.UpdateSequenceNumber(ctx(t), &pageblob.UpdateSequenceNumberOptions{ActionType: to.Ptr(pageblob.SequenceNumberActionTypeMax), SequenceNumber: to.Ptr(int64(3))})
			code(err)
		}
		immutable := func(err error) { t.Helper(); code(t, err, 409, bloberror.BlobImmutableDueToPolicy) }
		refused(immutable)
		_, err = c.NewBlobClient("b").Delete(ctx(t), nil)
		immutable(err)
		_, err = c.Delete(ctx(t), nil)
		code(t, err, 409, "ContainerImmutabilityPolicyLocked")
		clk.add(time.Hour + time.Second)
		refused(immutable)
		s.SetWriteOnce("worm", azurefake.WriteOnce{Retention: time.Hour, LegalHold: true})
		_, err = c.NewBlobClient("b").Delete(ctx(t), nil)
		code(t, err, 409, "BlobImmutableDueToLegalHold")
		s.SetWriteOnce("worm", azurefake.WriteOnce{Retention: time.Hour})
		_, err = c.NewBlobClient("b").Delete(ctx(t), nil)
		require.NoError(t, err)
	}
}

func TestFullAccount(t *testing.T) {
	s := start(t, azurefake.Options{Capacity: mib})
	c := box(t, s, "full")
	require.NoError(t, put(t, c, "b", fill(900_000, 1), false))
	code(t, put(t, c, "b2", fill(900_000, 1), false), 409, "AccountCapacityExceeded")
	p := pageBlob(t, c, "p", 4*mib)
	code(t, write(t, p, 0, fill(mib, 1), nil), 409, "AccountCapacityExceeded")
	_, err := c.NewBlobClient("b").Delete(ctx(t), nil)
	require.NoError(t, err)
	require.NoError(t, put(t, c, "b2", fill(900_000, 1), false))
	s.SetFull(true)
	code(t, put(t, c, "b3", []byte("1"), false), 409, "AccountCapacityExceeded")
	_, err = c.NewBlobClient("b2").GetProperties(ctx(t), nil)
	require.NoError(t, err)
	s.SetFull(false)
	require.NoError(t, put(t, c, "b3", []byte("1"), false))
}

func TestTamper(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "rot")
	data := fill(1000, 1)
	require.NoError(t, put(t, c, "b", data, false))
	require.True(t, s.Tamper("rot", "b", 500, func(b byte) byte { return b ^ 1 }))
	require.False(t, s.Tamper("rot", "b", 1000, func(b byte) byte { return b }))
	got, err := get(t, c, "b", nil)
	require.NoError(t, err)
	require.Equal(t, data[500]^1, got[500])
	p := pageBlob(t, c, "p", mib)
	require.NoError(t, write(t, p, 512, fill(512, 1), nil))
	require.True(t, s.Tamper("rot", "p", 512, func(byte) byte { return 77 }))
	got, err = get(t, c, "p", &blob.DownloadStreamOptions{Range: blob.HTTPRange{Offset: 512, Count: 1}})
	require.NoError(t, err)
	require.Equal(t, []byte{77}, got)
}
