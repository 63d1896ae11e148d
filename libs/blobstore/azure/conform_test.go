package azure

import (
	"context"
	"flag"
	"fmt"
	"iter"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
)

func TestMain(m *testing.M) {
	// Each example of the suite's models costs some dozens of requests; the memory store runs them in full.
	if err := flag.Set("rapid.checks", "10"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// connString are settings for an account that is reached by its key.
func connString(text string) Settings {
	s := DefaultSettings()
	s.ConnectionString = config.NewSecret(text)
	s.Concurrency, s.BlobConcurrency = 8, 8
	return s
}

func open(t testing.TB, s Settings, o Options) *Store {
	t.Helper()
	if o.Backoff == 0 {
		o.Backoff = 2 * time.Millisecond
	}
	st, err := Open("", s, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	return st
}

// emulator is one Azurite with many accounts, so that each test has one of its own and only one process starts.
func emulator(t testing.TB) func() string {
	names := make([]string, 40)
	for i := range names {
		names[i] = fmt.Sprintf("lftest%02d", i)
	}
	srv := azurite.Start(t, azurite.WithAccounts(names...))
	var next atomic.Int32
	return func() string { return srv.ConnectionStringOf(srv.Accounts()[next.Add(1)-1]) }
}

// fake is an in-process service.
func fake(t testing.TB, o azurefake.Options) *azurefake.Server {
	srv := azurefake.New(o)
	srv.Start(t)
	return srv
}

// clocked is a store on a service whose time the suite can move.
type clocked struct {
	*Store
	ahead *atomic.Int64
}

func (c clocked) Advance(d time.Duration) { c.ahead.Add(int64(d)) }

func TestConformsOnFake(t *testing.T) {
	blobstoretest.Run(t, func(t *testing.T) blobstore.Store {
		ahead := &atomic.Int64{}
		srv := fake(t, azurefake.Options{
			Now:     func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) },
			MaxSkew: -1, PageBlobRequests: -1, PageBlobBytes: -1,
		})
		return clocked{open(t, connString(srv.ConnectionString()), Options{}), ahead}
	})
}

// onAzurite says what Azurite cannot: its sequence numbers are JavaScript's.
type onAzurite struct{ *Store }

func (onAzurite) MaxSequence() int64 { return 1<<53 - 1 }

func TestConformsOnAzurite(t *testing.T) {
	account := emulator(t)
	blobstoretest.Run(t, func(t *testing.T) blobstore.Store { return onAzurite{open(t, connString(account()), Options{})} })
}

// prefixed gives one test its own containers in a shared account.
type prefixed struct {
	*Store
	prefix string
}

func (p *prefixed) CreateContainer(ctx context.Context, name string) error {
	if err := blobstore.CheckContainerName(name); err != nil {
		return err
	}
	return p.Store.CreateContainer(ctx, p.prefix+name)
}

func (p *prefixed) ListContainers(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for n, err := range p.Store.ListContainers(ctx, p.prefix+prefix) {
			if !yield(strings.TrimPrefix(n, p.prefix), err) {
				return
			}
		}
	}
}

func (p *prefixed) Container(name string) blobstore.Container {
	return named{p.Store.Container(p.prefix + name), name}
}

type named struct {
	blobstore.Container
	name string
}

func (n named) Name() string { return n.name }
