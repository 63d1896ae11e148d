package dir

import (
	"flag"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

func TestMain(m *testing.M) {
	if child() {
		return
	}
	// Each example costs some dozens of fsyncs; the memory store runs the suite's models in full.
	if err := flag.Set("rapid.checks", "25"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// clocked is a store whose time the suite can move.
type clocked struct {
	*Store
	mu  sync.Mutex
	now time.Time
}

func (c *clocked) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func openClocked(t *testing.T, opts Options) *clocked {
	c := &clocked{now: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)}
	opts.Clock = func() time.Time {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.now
	}
	s, err := Open(t.TempDir(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	c.Store = s
	return c
}

// A clock that stands still is the harshest for ETags; two open handles keep the cache turning over.
func TestConforms(t *testing.T) {
	blobstoretest.Run(t, func(t *testing.T) blobstore.Store { return openClocked(t, Options{MaxOpen: 2}) })
}

func TestConformsNoSync(t *testing.T) {
	blobstoretest.Run(t, func(t *testing.T) blobstore.Store {
		s, err := Open(t.TempDir(), Options{NoSync: true})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	})
}
