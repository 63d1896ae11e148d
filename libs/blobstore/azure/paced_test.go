package azure

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/testkit"
)

// Under a limit each byte is counted once, although the checksum reads the body first; and a put that is slow on purpose
// is neither given up nor taken for a slow service.
func TestPacedPut(t *testing.T) {
	srv := fake(t, azurefake.Options{})
	s := connString(srv.ConnectionString())
	s.TryTimeout, s.MinRate = 300*time.Millisecond, 1<<30
	var took []time.Duration
	st := open(t, s, Options{OnRequest: func(r Request) {
		require.NoError(t, r.Err)
		require.Zero(t, r.Try)
		took = append(took, r.Took)
	}})
	l := bandwidth.NewLimiter()
	c := bandwidth.Store(st, l).Container("lfj-paced")
	ctx := bandwidth.With(testkit.Context(t), bandwidth.Delta)
	require.NoError(t, st.CreateContainer(ctx, "lfj-paced"))
	body := make([]byte, 2<<20)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(body)
	l.Limit(bandwidth.Part{2 << 20, 0, 0})
	for name, single := range map[string]int64{"whole": 8 << 20, "blocks": 1 << 20} {
		st.single = single
		before, began := l.Sent(bandwidth.Delta), time.Now()
		_, err := c.Put(ctx, name, bytes.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
		require.NoError(t, err, name)
		require.Greater(t, time.Since(began), 700*time.Millisecond, name)
		require.EqualValues(t, len(body), l.Sent(bandwidth.Delta)-before, name)
		got, _, err := c.Get(ctx, name, 0, -1)
		require.NoError(t, err)
		read, err := io.ReadAll(got)
		require.NoError(t, err)
		require.NoError(t, got.Close())
		require.True(t, bytes.Equal(body, read), name)
	}
	require.NotEmpty(t, took)
}
