package blobstoretest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Advancer is implemented by stores under test whose storage time can be moved: Run then also checks that
// leases expire.
type Advancer interface {
	Advance(d time.Duration)
}

// SequenceLimiter is implemented by stores under test that do not keep all sequence numbers up to 1<<62: an emulator whose
// numbers are floating point (Azurite). MaxSequence is the highest it keeps exactly.
type SequenceLimiter interface {
	MaxSequence() int64
}

// callTimeout bounds every test's calls: a backend that hangs fails instead.
const callTimeout = 60 * time.Second

// Run checks a backend against every rule of the blobstore interface. open returns an empty store; it is
// called once for each test and registers its own clean-up. Tests run in parallel with each other's
// stores, never on the same one.
func Run(t *testing.T, open func(t *testing.T) blobstore.Store) {
	tests := []struct {
		name string
		run  func(e *env)
	}{
		{"containers", testContainers},
		{"names", testNames},
		{"put and get", testPutGet},
		{"put conditions", testPutConditions},
		{"put short body", testShortBody},
		{"put race", testPutRace},
		{"conditional put race", testConditionalRace},
		{"get keeps its version", testGetKeepsVersion},
		{"list order", testListOrder},
		{"list against model", testListModel},
		{"large list", testLargeList},
		{"delete", testDelete},
		{"cancelled", testCancelled},
		{"create pages", testCreatePages},
		{"create pages race", testCreatePagesRace},
		{"page bounds", testPageBounds},
		{"pages against model", testPagesModel},
		{"sequence", testSequence},
		{"etag of pages", testPagesETag},
		{"snapshots", testSnapshots},
		{"snapshot under etag", testSnapshotETag},
		{"snapshot against writers", testSnapshotRace},
		{"lease", testLease},
		{"lease of pages", testPagesLease},
		{"lease expiry", testLeaseExpiry},
		{"lease of snapshot", testSnapshotLease},
		{"lease race", testLeaseRace},
		{"delete pages", testDeletePages},
		{"time", testTime},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
			defer cancel()
			s := open(t)
			e := &env{T: t, ctx: ctx, s: s}
			e.mk("test-container")
			tc.run(e)
		})
	}
}

// env is one test's store with calls that must succeed.
type env struct {
	*testing.T
	ctx context.Context //nolint:containedctx // a test's own
	s   blobstore.Store
	c   blobstore.Container
}

func (e *env) mk(name string) {
	e.Helper()
	require.NoError(e, e.s.CreateContainer(e.ctx, name))
	e.c = e.s.Container(name)
}

func (e *env) put(name, body string, cond blobstore.Conditions) (blobstore.Properties, error) {
	return e.c.Put(e.ctx, name, bytes.NewReader([]byte(body)), int64(len(body)), cond)
}

func (e *env) mustPut(name, body string) blobstore.Properties {
	e.Helper()
	p, err := e.put(name, body, blobstore.Conditions{})
	require.NoError(e, err)
	return p
}

func (e *env) get(name string, offset, length int64) string {
	e.Helper()
	r, _, err := e.c.Get(e.ctx, name, offset, length)
	require.NoError(e, err)
	data, err := io.ReadAll(r)
	require.NoError(e, err)
	require.NoError(e, r.Close())
	return string(data)
}

func (e *env) mustPages(name string, size int64) blobstore.Properties {
	e.Helper()
	p, err := e.c.CreatePages(e.ctx, name, size, map[string]string{"kind": "disk"}, blobstore.Conditions{CreateOnly: true})
	require.NoError(e, err)
	return p
}

func (e *env) write(name string, offset int64, data []byte, cond blobstore.Conditions) (blobstore.Properties, error) {
	return e.c.WritePages(e.ctx, name, offset, data, cond)
}

func (e *env) mustWrite(name string, offset int64, data []byte) blobstore.Properties {
	e.Helper()
	p, err := e.write(name, offset, data, blobstore.Conditions{})
	require.NoError(e, err)
	return p
}

func (e *env) read(name string, snap blobstore.SnapshotID, offset, length int64) []byte {
	e.Helper()
	buf := bytes.Repeat([]byte{0xee}, int(length)) // must be overwritten, also by zeros
	require.NoError(e, e.c.ReadPages(e.ctx, name, snap, offset, buf))
	return buf
}

func (e *env) stat(name string) blobstore.Properties {
	e.Helper()
	p, err := e.c.Stat(e.ctx, name, "")
	require.NoError(e, err)
	return p
}

func (e *env) setSeq(name string, n int64) blobstore.Properties {
	e.Helper()
	p, err := e.c.SetSequence(e.ctx, name, n, blobstore.Conditions{})
	require.NoError(e, err)
	return p
}

func (e *env) names(prefix, after string) []string {
	e.Helper()
	out := []string{}
	for p, err := range e.c.List(e.ctx, prefix, after) {
		require.NoError(e, err)
		out = append(out, p.Name)
	}
	return out
}

// lastError drains a sequence and returns its error.
func lastError[T any](seq iter.Seq2[T, error]) error {
	for _, err := range seq {
		if err != nil {
			return err
		}
	}
	return nil
}

// page returns n pages of a recognisable pattern.
func page(seed string, n int) []byte {
	h := sha256.Sum256([]byte(seed))
	return bytes.Repeat(h[:], n*blobstore.PageSize/len(h))
}

func leaseID(seed string) blobstore.LeaseID {
	return blobstore.LeaseID(uuid.NewSHA1(uuid.NameSpaceOID, []byte(seed)).String())
}

func ptr(n int64) *int64 { return &n }

// sentinels are the errors whose meaning is that nothing happened.
var sentinels = []error{
	blobstore.ErrNotFound, blobstore.ErrExists, blobstore.ErrConditionFailed,
	blobstore.ErrLeaseConflict, blobstore.ErrInvalid, blobstore.ErrFull,
}

// is asserts that err is the sentinel and no other.
func (e *env) is(err, want error) {
	e.Helper()
	for _, s := range sentinels {
		if got := errors.Is(err, s); got != (s == want) { //nolint:errorlint // the sentinel itself
			require.Failf(e, "wrong error", "want %q, got %q", want, fmt.Sprint(err))
		}
	}
}
