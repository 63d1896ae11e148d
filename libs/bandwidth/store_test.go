package bandwidth_test

import (
	"bytes"
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/bandwidth/pacing"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

func TestStorePacesWhatSaysItsClass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bandwidth.NewLimiter()
		l.Limit(bandwidth.Part{0, mib, 0})
		inner := blobstoretest.NewMemory()
		s := bandwidth.Store(inner, l)
		require.NoError(t, s.CreateContainer(t.Context(), "lfj-x"))
		c := s.Container("lfj-x")
		put := func(ctx context.Context, name string, n int) time.Duration {
			t.Helper()
			began := time.Now()
			body := bytes.NewReader(make([]byte, n+7))
			_, err := body.Seek(7, io.SeekStart)
			require.NoError(t, err)
			p, err := c.Put(ctx, name, body, int64(n), blobstore.Conditions{CreateOnly: true})
			require.NoError(t, err)
			require.EqualValues(t, n, p.Size)
			return time.Since(began)
		}
		require.Zero(t, put(t.Context(), "log/1", 10*mib), "a manifest")
		require.Zero(t, l.Sent(bulk))
		ctx, cancel := pacing.Timeout(bandwidth.With(t.Context(), bulk), time.Second)
		defer cancel()
		require.InDelta(t, 10*time.Second, put(ctx, "seg/1", 10*mib), float64(100*time.Millisecond))
		require.NoError(t, ctx.Err(), "the wait is not the store's")
		require.InDelta(t, 10*time.Second, pacing.Waited(ctx), float64(100*time.Millisecond))
		require.EqualValues(t, 10*mib, l.Sent(bulk))
		require.Equal(t, [bandwidth.Classes]int{}, l.Active())

		gone, leave := context.WithTimeout(bandwidth.With(t.Context(), bulk), time.Second)
		defer leave()
		_, err := c.Put(gone, "seg/2", bytes.NewReader(make([]byte, 10*mib)), 10*mib, blobstore.Conditions{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// reader reads as a backend does: once for a checksum, then twice to send.
type reader struct {
	blobstore.Container
	t *testing.T
}

func (r reader) Put(_ context.Context, _ string, body io.ReadSeeker, size int64, _ blobstore.Conditions) (blobstore.Properties, error) {
	for i, b := range []io.Reader{pacing.Free(body), body, body} {
		_, err := body.Seek(0, io.SeekStart)
		require.NoError(r.t, err)
		n, err := io.Copy(io.Discard, b)
		require.NoError(r.t, err)
		require.Equal(r.t, size, n, i)
	}
	return blobstore.Properties{}, nil
}

type readingStore struct {
	*blobstoretest.Memory
	t *testing.T
}

func (s readingStore) Container(name string) blobstore.Container {
	return reader{s.Memory.Container(name), s.t}
}

func TestOnlyWhatIsSentCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bandwidth.NewLimiter()
		l.Limit(bandwidth.Part{mib, 0, 0})
		c := bandwidth.Store(readingStore{blobstoretest.NewMemory(), t}, l).Container("x")
		began := time.Now()
		_, err := c.Put(bandwidth.With(t.Context(), delta), "seg", bytes.NewReader(make([]byte, 5*mib)), 5*mib, blobstore.Conditions{})
		require.NoError(t, err)
		require.EqualValues(t, 10*mib, l.Sent(delta))
		require.InDelta(t, 10*time.Second, time.Since(began), float64(100*time.Millisecond))
	})
}

type plain struct{ blobstore.Store }

type cost struct{ blobstore.Store }

func (cost) BytesPerRequest() int64 { return 42 }

type everything struct{ *blobstoretest.Memory }

func (everything) BytesPerRequest() int64 { return 43 }
func (everything) Inspect(context.Context) (blobstore.AccountFacts, error) {
	return blobstore.AccountFacts{Versioning: true}, nil
}

func TestOptionalInterfacesStay(t *testing.T) {
	m := blobstoretest.NewMemory()
	type protector struct {
		blobstore.Store
		blobstore.Protector
	}
	type inspector struct {
		blobstore.Store
		blobstore.Inspector
	}
	type both struct {
		blobstore.Store
		blobstore.Protector
		blobstore.Inspector
	}
	type costly struct {
		cost
		blobstore.Protector
	}
	type seen struct {
		cost
		blobstore.Inspector
	}
	e := everything{m}
	for _, inner := range []blobstore.Store{
		plain{m}, cost{m}, protector{m, m}, inspector{m, e}, both{m, m, e}, costly{cost{m}, m}, seen{cost{m}, e}, e,
	} {
		s := bandwidth.Store(inner, bandwidth.NewLimiter())
		for what, has := range map[string]func(blobstore.Store) bool{
			"cost":      func(s blobstore.Store) bool { _, ok := s.(blobstore.RequestCost); return ok },
			"protector": func(s blobstore.Store) bool { _, ok := s.(blobstore.Protector); return ok },
			"inspector": func(s blobstore.Store) bool { _, ok := s.(blobstore.Inspector); return ok },
		} {
			require.Equal(t, has(inner), has(s), "%T %s", inner, what)
		}
	}
	require.EqualValues(t, 43, bandwidth.Store(e, bandwidth.NewLimiter()).(blobstore.RequestCost).BytesPerRequest())
}

// The store behaves as before, with a limit and without one.
func TestConformance(t *testing.T) {
	blobstoretest.Run(t, func(t *testing.T) blobstore.Store {
		return bandwidth.Store(blobstoretest.NewMemory(), bandwidth.NewLimiter())
	})
}
