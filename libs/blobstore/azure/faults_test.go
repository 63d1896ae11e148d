package azure

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

// breaker breaks chosen requests. It is called concurrently.
type breaker struct {
	next Doer

	mu    sync.Mutex
	seen  int
	at    map[int]fault // by number of the request from now on
	after func()        // once, when a request that was done is reported lost
}

// fault answers instead of, or besides, the service.
type fault func(b *breaker, req *http.Request) (*http.Response, error)

func (b *breaker) Do(req *http.Request) (*http.Response, error) {
	b.mu.Lock()
	f := b.at[b.seen]
	b.seen++
	b.mu.Unlock()
	if f == nil {
		return b.next.Do(req)
	}
	return f(b, req)
}

// arm counts from here.
func (b *breaker) arm(at map[int]fault) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen, b.at = 0, at
}

func (b *breaker) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen
}

func reset() error {
	return &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
}

func status(code int, word string, header ...string) fault {
	return func(_ *breaker, req *http.Request) (*http.Response, error) {
		h := http.Header{"X-Ms-Error-Code": {word}, "Date": {time.Now().UTC().Format(http.TimeFormat)}}
		for i := 0; i+1 < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
		return &http.Response{StatusCode: code, Header: h, Body: io.NopCloser(strings.NewReader("")), Request: req, ProtoMajor: 1, ProtoMinor: 1}, nil
	}
}

func resetBefore(*breaker, *http.Request) (*http.Response, error) { return nil, reset() }

func resetAfter(b *breaker, req *http.Request) (*http.Response, error) {
	resp, err := b.next.Do(req)
	if err != nil {
		return nil, err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	b.mu.Lock()
	after := b.after
	b.after = nil
	b.mu.Unlock()
	if after != nil {
		after()
	}
	return nil, reset()
}

// torn cuts the answer's body in the middle.
func torn(b *breaker, req *http.Request) (*http.Response, error) {
	resp, err := b.next.Do(req)
	if err != nil || resp.ContentLength <= 1 || req.Method == http.MethodHead {
		return resp, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(resp.Body, resp.ContentLength/2), failing{}), resp.Body}
	return resp, nil
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, reset() }

// silent never answers, after doing it.
func silent(b *breaker, req *http.Request) (*http.Response, error) {
	resp, err := b.next.Do(req)
	if err != nil {
		return nil, err
	}
	_ = resp.Body.Close()
	<-req.Context().Done()
	return nil, req.Context().Err()
}

var faults = map[string]fault{
	"busy":             status(503, "ServerBusy"),
	"busy, come later": status(503, "ServerBusy", "Retry-After", "0"),
	"timed out":        status(500, "OperationTimedOut"),
	"too many":         status(429, ""),
	"bad gateway":      status(502, ""),
	"damaged":          status(400, "Md5Mismatch"),
	"reset before":     resetBefore,
	"reset after":      resetAfter,
	"torn answer":      torn,
}

func broken(t testing.TB, account string) (*Store, *breaker) {
	b := &breaker{}
	set := connString(account)
	set.TryTimeout, set.MinRate = 2*time.Second, 64<<20
	return open(t, set, Options{Wrap: func(d Doer) Doer { b.next = d; return b }}), b
}

// TestEveryRequestBreaks breaks each request of each operation, alone and together with the one after it.
func TestEveryRequestBreaks(t *testing.T) {
	breakAll(t, fake(t, azurefake.Options{PageBlobRequests: -1, PageBlobBytes: -1}).ConnectionString())
}

// The same on the emulator takes much longer, for the same rules.
func TestEveryRequestBreaksOnAzurite(t *testing.T) {
	if os.Getenv("LANDFALL_LONG") == "" {
		t.Skip("LANDFALL_LONG is not set")
	}
	breakAll(t, emulator(t)())
}

func breakAll(t *testing.T, account string) {
	s, b := broken(t, account)
	require.NoError(t, s.CreateContainer(t.Context(), "faults"))
	c := s.Container("faults")
	for op, o := range operations(t.Context()) {
		n := 0
		attempt := func(at map[int]fault) error {
			n++
			name := fmt.Sprintf("%s/%d", strings.ReplaceAll(op, " ", "-"), n)
			b.arm(nil)
			if o.prepare != nil {
				require.NoError(t, o.prepare(c, name))
			}
			b.arm(at)
			err := o.run(c, name)
			requests := b.count()
			b.arm(nil)
			if err == nil {
				o.check(t, c, name)
			}
			b.arm(nil)
			b.seen = requests
			return err
		}
		require.NoError(t, attempt(nil), op)
		requests := b.count()
		require.Positive(t, requests)
		for i := range requests {
			for name, f := range faults {
				require.NoError(t, attempt(map[int]fault{i: f}), "%s, request %d of %d: %s", op, i, requests, name)
			}
			require.NoError(t, attempt(map[int]fault{i: resetAfter, i + 1: resetAfter}), "%s, requests %d and %d of %d lost", op, i, i+1, requests)
		}
	}
}

func TestSilentServiceIsAskedAgain(t *testing.T) {
	s, b := broken(t, fake(t, azurefake.Options{}).ConnectionString())
	s.settings.TryTimeout = 200 * time.Millisecond
	require.NoError(t, s.CreateContainer(t.Context(), "silent"))
	c := s.Container("silent")
	b.arm(map[int]fault{0: silent})
	_, err := c.Put(t.Context(), "a", strings.NewReader("x"), 1, blobstore.Conditions{CreateOnly: true})
	require.NoError(t, err)
	b.arm(map[int]fault{0: silent, 1: silent, 2: silent, 3: silent})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = c.Put(ctx, "a", strings.NewReader("x"), 1, blobstore.Conditions{})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.False(t, refused(err))
}

// TestLostThenRival: our answer is lost, and before we ask again somebody else changes what we wrote. Then nobody can say
// what became of ours, and no sentinel may.
func TestLostThenRival(t *testing.T) {
	s, b := broken(t, fake(t, azurefake.Options{}).ConnectionString())
	ctx := t.Context()
	require.NoError(t, s.CreateContainer(ctx, "rivals"))
	c := s.Container("rivals")
	rival := func(do func() error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.after = func() { require.NoError(t, do()) }
	}
	put := func(name, text string, cond blobstore.Conditions) (blobstore.Properties, error) {
		return c.Put(ctx, name, strings.NewReader(text), int64(len(text)), cond)
	}

	p, err := put("a", "0", blobstore.Conditions{})
	require.NoError(t, err)
	b.arm(map[int]fault{0: resetAfter})
	rival(func() error { _, err := put("a", "rival", blobstore.Conditions{}); return err })
	_, err = put("a", "ours", blobstore.Conditions{IfMatch: p.ETag})
	require.Error(t, err)
	require.False(t, refused(err), "%v", err)
	require.ErrorContains(t, err, "outcome unknown")

	// The same bytes by another: the blob is not ours.
	b.arm(map[int]fault{0: func(b *breaker, req *http.Request) (*http.Response, error) {
		_, err := put("b", "same", blobstore.Conditions{CreateOnly: true})
		require.NoError(t, err)
		return nil, reset()
	}})
	_, err = put("b", "same", blobstore.Conditions{CreateOnly: true})
	require.ErrorIs(t, err, blobstore.ErrExists)

	// The number without a lease: whose change it was cannot be told.
	_, err = c.CreatePages(ctx, "p", 4096, nil, blobstore.Conditions{})
	require.NoError(t, err)
	b.arm(map[int]fault{1: resetAfter})
	_, err = c.SetSequence(ctx, "p", 5, blobstore.Conditions{IfSequence: number(0)})
	require.Error(t, err)
	require.False(t, refused(err), "%v", err)

	// Page writes under an ETag: other bytes are there.
	p, err = c.Stat(ctx, "p", "")
	require.NoError(t, err)
	b.arm(map[int]fault{0: resetAfter})
	rival(func() error { _, err := c.WritePages(ctx, "p", 0, page(2, 1), blobstore.Conditions{}); return err })
	_, err = c.WritePages(ctx, "p", 0, page(1, 1), blobstore.Conditions{IfMatch: p.ETag})
	require.Error(t, err)
	require.False(t, refused(err), "%v", err)
}

// TestPatience: how long a call is repeated, and what it says when it gives up.
func TestPatience(t *testing.T) {
	busy := func(_ *breaker, req *http.Request) (*http.Response, error) {
		return status(503, "ServerBusy")(nil, req)
	}
	always := map[int]fault{}
	for i := range 10_000 {
		always[i] = busy
	}
	b := &breaker{}
	set := connString("BlobEndpoint=http://127.0.0.1:1/acct;AccountName=acct;AccountKey=a2V5")
	set.RetryFor = time.Second
	s := open(t, set, Options{Wrap: func(Doer) Doer { return b }})
	b.arm(always)
	began := time.Now()
	_, err := s.Container("abc").Stat(t.Context(), "x", "")
	require.ErrorContains(t, err, "gave up after")
	require.ErrorContains(t, err, "503 ServerBusy")
	require.False(t, refused(err))
	require.Less(t, time.Since(began), 30*time.Second)
	require.Greater(t, b.count(), 3)
	require.Positive(t, s.pacer.Stats().Cuts)
	require.Equal(t, 1, s.pacer.Stats().Limit)

	for i := range 10_000 {
		always[i] = status(503, "ServerBusy", "Retry-After", "60")
	}
	b.arm(always)
	s.settings.RetryFor = 10 * time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = s.Container("abc").Stat(ctx, "x", "")
	require.ErrorContains(t, err, "gave up after 1 tries", "it is not worth waiting: the deadline comes first")
	require.Equal(t, 1, b.count(), "a Retry-After is obeyed")
}
