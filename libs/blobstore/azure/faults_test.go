package azure

import (
	"bytes"
	"context"
	"errors"
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

	"github.com/google/uuid"
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

// operation is one call that must come out right whatever single request of it breaks.
type operation struct {
	prepare func(c blobstore.Container, name string) error
	run     func(c blobstore.Container, name string) error
	check   func(t *testing.T, c blobstore.Container, name string)
}

func page(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*blobstore.PageSize) }

func number(n int64) *int64 { return &n }

func operations(ctx context.Context) map[string]operation {
	lease := blobstore.LeaseID(uuid.NewString())
	none := blobstore.Conditions{}
	body := strings.Repeat("body", 1000)
	put := func(c blobstore.Container, name, text string, cond blobstore.Conditions) (blobstore.Properties, error) {
		return c.Put(ctx, name, strings.NewReader(text), int64(len(text)), cond)
	}
	read := func(t *testing.T, c blobstore.Container, name string) string {
		r, _, err := c.Get(ctx, name, 0, -1)
		require.NoError(t, err)
		defer r.Close()
		data, err := io.ReadAll(r)
		require.NoError(t, err)
		return string(data)
	}
	pages := func(c blobstore.Container, name string) error {
		_, err := c.CreatePages(ctx, name, 16<<20, map[string]string{"kind": "disk"}, none)
		if err == nil {
			_, err = c.WritePages(ctx, name, 0, page(7, 4), none)
		}
		return err
	}
	leased := func(c blobstore.Container, name string) error {
		return errors.Join(pages(c, name), c.AcquireLease(ctx, name, lease, time.Minute))
	}
	stat := func(t *testing.T, c blobstore.Container, name string) blobstore.Properties {
		p, err := c.Stat(ctx, name, "")
		require.NoError(t, err)
		return p
	}
	same := func(got, want blobstore.Properties, err error) error {
		if err == nil && got.ETag != want.ETag {
			err = fmt.Errorf("returned ETag %s, blob has %s", got.ETag, want.ETag)
		}
		return err
	}
	gone := func(t *testing.T, c blobstore.Container, name string) {
		_, err := c.Stat(ctx, name, "")
		require.ErrorIs(t, err, blobstore.ErrNotFound)
	}
	content := func(t *testing.T, c blobstore.Container, name string, want []byte) {
		got := make([]byte, len(want))
		require.NoError(t, c.ReadPages(ctx, name, "", 0, got))
		require.True(t, bytes.Equal(want, got))
	}
	return map[string]operation{
		"put": {
			run: func(c blobstore.Container, name string) error { _, err := put(c, name, body, none); return err },
			check: func(t *testing.T, c blobstore.Container, name string) {
				require.Equal(t, body, read(t, c, name))
			},
		},
		"put create-only": {
			run: func(c blobstore.Container, name string) error {
				p, err := put(c, name, body, blobstore.Conditions{CreateOnly: true})
				if err != nil {
					return err
				}
				st, err := c.Stat(ctx, name, "")
				return same(p, st, err)
			},
			check: func(t *testing.T, c blobstore.Container, name string) { require.Equal(t, body, read(t, c, name)) },
		},
		"put if-match": {
			prepare: func(c blobstore.Container, name string) error { _, err := put(c, name, "old", none); return err },
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err == nil {
					_, err = put(c, name, body, blobstore.Conditions{IfMatch: p.ETag})
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) { require.Equal(t, body, read(t, c, name)) },
		},
		"create pages": {
			run:   pages,
			check: func(t *testing.T, c blobstore.Container, name string) { content(t, c, name, page(7, 4)) },
		},
		"write pages": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				_, err := c.WritePages(ctx, name, 512, page(9, 2), blobstore.Conditions{Lease: lease, IfSequence: number(0)})
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				content(t, c, name, bytes.Join([][]byte{page(7, 1), page(9, 2), page(7, 1)}, nil))
			},
		},
		"write pages if-match": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err == nil {
					p, err = c.WritePages(ctx, name, 512, page(9, 2), blobstore.Conditions{IfMatch: p.ETag})
				}
				if err != nil {
					return err
				}
				st, err := c.Stat(ctx, name, "")
				return same(p, st, err)
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				content(t, c, name, bytes.Join([][]byte{page(7, 1), page(9, 2), page(7, 1)}, nil))
			},
		},
		"clear pages if-match": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err == nil {
					_, err = c.ClearPages(ctx, name, 512, 512, blobstore.Conditions{IfMatch: p.ETag})
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				content(t, c, name, bytes.Join([][]byte{page(7, 1), page(0, 1), page(7, 2)}, nil))
			},
		},
		"set sequence": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				_, err := c.SetSequence(ctx, name, 5, blobstore.Conditions{Lease: lease})
				if err == nil {
					_, err = c.SetSequence(ctx, name, 3, blobstore.Conditions{Lease: lease})
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				require.EqualValues(t, 3, stat(t, c, name).Sequence)
			},
		},
		"set sequence if-sequence with lease": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				p, err := c.SetSequence(ctx, name, 5, blobstore.Conditions{Lease: lease, IfSequence: number(0)})
				if err == nil && p.Sequence != 5 {
					err = fmt.Errorf("returned %d", p.Sequence)
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				require.EqualValues(t, 5, stat(t, c, name).Sequence)
			},
		},
		"snapshot": {
			prepare: leased,
			run: func(c blobstore.Container, name string) error {
				p, err := c.Stat(ctx, name, "")
				if err != nil {
					return err
				}
				id, s, err := c.SnapshotPages(ctx, name, map[string]string{"seq": "1"}, blobstore.Conditions{IfMatch: p.ETag, IfSequence: number(0), Lease: lease})
				if err == nil && (s.Snapshot != id || s.Metadata["seq"] != "1" || len(s.Metadata) != 1) {
					err = fmt.Errorf("returned %+v", s)
				}
				if err == nil {
					err = c.ReadPages(ctx, name, id, 0, make([]byte, 512))
				}
				return err
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				n := 0
				for _, err := range c.ListSnapshots(ctx, name) {
					require.NoError(t, err)
					n++
				}
				require.GreaterOrEqual(t, n, 1)
				require.LessOrEqual(t, n, 3, "more than one orphan for each lost answer")
			},
		},
		"delete": {
			prepare: func(c blobstore.Container, name string) error {
				_, _, err := c.SnapshotPages(ctx, name, nil, none)
				if errors.Is(err, blobstore.ErrNotFound) {
					err = errors.Join(pages(c, name))
				}
				return err
			},
			run: func(c blobstore.Container, name string) error {
				return c.Delete(ctx, name, blobstore.Conditions{IfSequence: number(0)})
			},
			check: gone,
		},
		"delete snapshot": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				id, _, err := c.SnapshotPages(ctx, name, nil, none)
				if err != nil {
					return err
				}
				return c.DeleteSnapshot(ctx, name, id)
			},
			check: func(t *testing.T, c blobstore.Container, name string) { content(t, c, name, page(7, 4)) },
		},
		"leases": {
			prepare: pages,
			run: func(c blobstore.Container, name string) error {
				return errors.Join(c.AcquireLease(ctx, name, lease, time.Minute), c.RenewLease(ctx, name, lease), c.ReleaseLease(ctx, name, lease),
					c.AcquireLease(ctx, name, lease, time.Minute), c.BreakLease(ctx, name), c.BreakLease(ctx, name))
			},
			check: func(t *testing.T, c blobstore.Container, name string) {
				_, err := c.WritePages(ctx, name, 0, page(1, 1), none)
				require.NoError(t, err)
			},
		},
		"reads": {
			prepare: func(c blobstore.Container, name string) error {
				_, err := c.WritePages(ctx, "shared.vhd", 4<<20, page(3, 16), none)
				if errors.Is(err, blobstore.ErrNotFound) {
					big := bytes.Repeat([]byte("0123456789"), 450_000) // two pieces
					_, perr := c.Put(ctx, "shared", bytes.NewReader(big), int64(len(big)), none)
					err = errors.Join(pages(c, "shared.vhd"), perr)
				}
				return err
			},
			run: func(c blobstore.Container, _ string) error {
				r, _, err := c.Get(ctx, "shared", 5, -1)
				if err != nil {
					return err
				}
				defer r.Close()
				data, err := io.ReadAll(r)
				if err != nil {
					return err
				}
				if !bytes.Equal(data, bytes.Repeat([]byte("0123456789"), 450_000)[5:]) {
					return errors.New("wrong bytes")
				}
				n := 0
				for p, err := range c.List(ctx, "shared", "") {
					if err != nil {
						return err
					}
					if n++; p.Name == "" {
						return errors.New("no name")
					}
				}
				if n != 2 {
					return fmt.Errorf("listed %d", n)
				}
				for r, err := range c.PageRanges(ctx, "shared.vhd", "", 0, 16<<20) {
					if err != nil {
						return err
					}
					n += int(r.Length)
				}
				buf := make([]byte, 5<<20)
				if err := c.ReadPages(ctx, "shared.vhd", "", 0, buf); err != nil {
					return err
				}
				if n < 2+4*512 || buf[0] != 7 || buf[4*512] != 0 {
					return fmt.Errorf("ranges %d, %d %d", n, buf[0], buf[4*512])
				}
				return nil
			},
			check: func(*testing.T, blobstore.Container, string) {},
		},
	}
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
	set.RetryFor = 200 * time.Millisecond
	s := open(t, set, Options{Wrap: func(Doer) Doer { return b }})
	b.arm(always)
	began := time.Now()
	_, err := s.Container("abc").Stat(t.Context(), "x", "")
	require.ErrorContains(t, err, "gave up after")
	require.ErrorContains(t, err, "503 ServerBusy")
	require.False(t, refused(err))
	require.Less(t, time.Since(began), 2*time.Second)
	require.Greater(t, b.count(), 3)
	require.Positive(t, s.pacer.Stats().Cuts)
	require.Equal(t, 1, s.pacer.Stats().Limit)

	for i := range 10_000 {
		always[i] = status(503, "ServerBusy", "Retry-After", "1")
	}
	b.arm(always)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = s.Container("abc").Stat(ctx, "x", "")
	require.ErrorContains(t, err, "gave up after 1 tries", "it is not worth waiting: the deadline comes first")
	require.Equal(t, 1, b.count(), "a Retry-After is obeyed")
}
