package catalogue

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/testkit"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testLineage = "0123456789abcdef0123456789abcdef"

var at = time.Date(2026, 11, 23, 4, 5, 6, 7e6, time.UTC)

func vmRecord(name string) *Record {
	return &Record{Written: at, VM: &VM{Site: "lab", ID: "6f1c2d3e-0000-4000-8000-00000000000a", DisplayName: name, Lineage: testLineage,
		Host: "sites/lab/hosts/h1", Policy: "policies/gold", Created: at}}
}

func policyRecord(seconds int64) *Record {
	return &Record{Written: at, Policy: &schedulerv1.Policy{Name: "policies/gold", CopyInterval: &durationpb.Duration{Seconds: seconds}}}
}

func planRecord() *Record {
	return &Record{Written: at, Plan: &failoverv1.RecoveryPlan{Name: "recoveryPlans/all", Groups: []*failoverv1.PlanGroup{{Title: "first", Vms: []string{"sites/lab/vms/web"}}}}}
}

func TestRecordsComeBackAsTheyWent(t *testing.T) {
	for _, r := range []*Record{vmRecord("web"), policyRecord(30), planRecord()} {
		c := Open(blobstoretest.NewMemory())
		none, v, err := c.Get(t.Context(), r.Name())
		require.NoError(t, err)
		require.Nil(t, none)
		v, err = c.Put(t.Context(), r, v)
		require.NoError(t, err)
		require.EqualValues(t, 1, r.Revision)
		got, read, err := c.Get(t.Context(), r.Name())
		require.NoError(t, err)
		require.Equal(t, v, read)
		require.Empty(t, cmp.Diff(r, got, protocmp.Transform()))
		require.True(t, r.same(got))
		e := got.ended(at)
		_, err = c.Put(t.Context(), e, v)
		require.NoError(t, err)
		require.False(t, r.same(e))
		_, err = c.Put(t.Context(), r, v)
		require.ErrorIs(t, err, ErrStale, "what it was built on is gone")
		_, err = c.Put(t.Context(), r, VersionOf{})
		require.ErrorIs(t, err, ErrStale)
	}
}

func TestStrictReading(t *testing.T) {
	r := vmRecord("web")
	r.Revision = 3
	raw, err := r.Encode()
	require.NoError(t, err)
	good := string(raw)
	for what, bad := range map[string]string{
		"nothing":         "",
		"text":            "hello",
		"no version":      strings.Replace(good, `"v": 1,`, "", 1),
		"an older one":    strings.Replace(good, `"v": 1,`, `"v": 0,`, 1),
		"unknown member":  strings.Replace(good, `"v": 1,`, `"v": 1, "w": 1,`, 1),
		"more after it":   good + "{}",
		"no revision":     strings.Replace(good, `"revision": 3,`, "", 1),
		"a bad lineage":   strings.Replace(good, testLineage, "../"+testLineage, 1),
		"a bad site":      strings.Replace(good, `"lab"`, `"La/b"`, 1),
		"nothing in it":   `{"v":1,"revision":1,"written":"2026-11-23T04:05:06Z"}`,
		"a bad policy":    `{"v":1,"revision":1,"written":"2026-11-23T04:05:06Z","policy":{"name":"gold"}}`,
		"two in one":      strings.Replace(good, `"vm": {`, `"policy":{"name":"policies/gold"},"vm": {`, 1),
		"a bad name":      `{"v":1,"revision":1,"written":"2026-11-23T04:05:06Z","plan":{"name":"recoveryPlans/a/b"}}`,
		"a broken policy": `{"v":1,"revision":1,"written":"2026-11-23T04:05:06Z","policy":{"name":3}}`,
	} {
		_, err := Decode([]byte(bad))
		require.ErrorIs(t, err, ErrInvalid, what)
		require.NotErrorIs(t, err, ErrNewer, what)
	}
	_, err = Decode([]byte(strings.Replace(good, `"v": 1,`, `"v": 2,`, 1)))
	require.ErrorIs(t, err, ErrNewer)
	_, err = Decode([]byte(`{"v":1,"revision":1,"written":"2026-11-23T04:05:06Z","policy":{"name":"policies/gold","later":1}}`))
	require.NoError(t, err, "fields are added to a policy without another version")
	site, vm, lineage, ok := ParseVMName(r.Name())
	require.True(t, ok)
	require.Equal(t, []string{"lab", r.VM.ID, testLineage}, []string{site, vm, lineage})
	_, _, _, ok = ParseVMName("sites/lab/vms/x/y.json")
	require.False(t, ok)
}

func FuzzDecode(f *testing.F) {
	for _, r := range []*Record{vmRecord("web"), policyRecord(30), planRecord()} {
		r.Revision = 1
		raw, err := r.Encode()
		require.NoError(f, err)
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := Decode(raw)
		if err != nil {
			return
		}
		again, err := r.Encode()
		require.NoError(t, err)
		back, err := Decode(again)
		require.NoError(t, err)
		require.True(t, r.same(back))
	})
}

func TestOneBadRecordHidesNoOther(t *testing.T) {
	store := blobstoretest.NewMemory()
	c := Open(store)
	l, err := c.List(t.Context(), "")
	require.NoError(t, err, "no catalogue is an empty one")
	require.Empty(t, l.Records)
	for _, r := range []*Record{vmRecord("web"), policyRecord(30), planRecord()} {
		_, err := c.Put(t.Context(), r, VersionOf{})
		require.NoError(t, err)
	}
	spoil(t, store, policyRecord(1).Name(), "{")
	spoil(t, store, "sites/what-is-this", "?")
	l, err = c.List(t.Context(), "")
	require.NoError(t, err)
	require.Len(t, l.Records, 2)
	require.Len(t, l.Problems, 2)
	require.Equal(t, "policies/gold.json", l.Problems[0].Name)
	l, err = c.List(t.Context(), "plans/")
	require.NoError(t, err)
	require.Len(t, l.Records, 1)
}

func spoil(t *testing.T, store blobstore.Store, name, text string) {
	t.Helper()
	_, err := store.Container(Container).Put(t.Context(), name, strings.NewReader(text), int64(len(text)), blobstore.Conditions{})
	require.NoError(t, err)
}

// source is a truth that tests change.
type source struct {
	mu      sync.Mutex
	records map[string]*Record
	ended   map[string]bool
	asked   func(name string) // before the truth is read
}

func (s *source) Names(context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name := range s.records {
		names = append(names, name)
	}
	return names, nil
}

func (s *source) Truth(_ context.Context, name string) (Truth, error) {
	if s.asked != nil {
		s.asked(name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return Truth{Record: s.records[name], Ended: s.ended[name]}, nil
}

func (s *source) set(r *Record) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[r.Name()] = r
	return r.Name()
}

func (s *source) end(name string, evidence bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records, name)
	s.ended[name] = evidence
}

func newSource(records ...*Record) *source {
	s := &source{records: map[string]*Record{}, ended: map[string]bool{}}
	for _, r := range records {
		s.set(r)
	}
	return s
}

func run(t *testing.T, o MirrorOptions) *Mirror {
	t.Helper()
	o.Retry, o.Logger = time.Millisecond, testkit.Logger(t)
	if o.Prefixes == nil {
		o.Prefixes = []string{""}
	}
	m := NewMirror(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); m.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return m
}

func eventually(t *testing.T, c *Catalogue, name string, ok func(r *Record) bool) {
	t.Helper()
	testkit.Eventually(t, 10*time.Second, func() error {
		r, _, err := c.Get(t.Context(), name)
		if err == nil && !(r != nil && ok(r)) {
			err = fmt.Errorf("record is %v", r)
		}
		return err
	})
}

func TestMirrorFollows(t *testing.T) {
	s := newSource(vmRecord("web"), policyRecord(30))
	c := Open(blobstoretest.NewMemory())
	m := run(t, MirrorOptions{Catalogue: c, Source: s})
	eventually(t, c, vmRecord("").Name(), func(r *Record) bool { return r.VM.DisplayName == "web" })
	eventually(t, c, PolicyName("gold"), func(r *Record) bool { return r.Policy.CopyInterval.Seconds == 30 })

	m.Touch(s.set(vmRecord("web-01")))
	eventually(t, c, vmRecord("").Name(), func(r *Record) bool { return r.VM.DisplayName == "web-01" && r.Revision == 2 })

	s.end(PolicyName("gold"), true)
	m.Touch(PolicyName("gold"))
	eventually(t, c, PolicyName("gold"), func(r *Record) bool { return !r.Ended.IsZero() && r.Policy.CopyInterval.Seconds == 30 })
	m.Touch(s.set(policyRecord(60)))
	eventually(t, c, PolicyName("gold"), func(r *Record) bool {
		return r.Ended.IsZero() && r.Policy.CopyInterval.Seconds == 60 && r.Revision == 3
	})
}

// Records that the truth lost are kept: nothing says that they ended.
func TestLostTruthEndsNothing(t *testing.T) {
	store := blobstoretest.NewMemory()
	c := Open(store)
	run(t, MirrorOptions{Catalogue: c, Source: newSource(vmRecord("web"), policyRecord(30))})
	eventually(t, c, vmRecord("").Name(), func(*Record) bool { return true })
	eventually(t, c, PolicyName("gold"), func(*Record) bool { return true })
	spoil(t, store, PolicyName("broken"), "{")

	m := run(t, MirrorOptions{Catalogue: c, Source: newSource()})
	testkit.Eventually(t, 10*time.Second, func() error {
		if l := m.Lag(); len(l.Unknown) != 2 || l.Err == nil {
			return fmt.Errorf("%+v", l)
		}
		return nil
	})
	for _, name := range []string{vmRecord("").Name(), PolicyName("gold")} {
		r, _, err := c.Get(t.Context(), name)
		require.NoError(t, err)
		require.True(t, r.Ended.IsZero())
	}
}

// A writer that slept between its look at the truth and its write changes nothing that was written since.
func TestStaleWriterRollsNothingBack(t *testing.T) {
	c := Open(blobstoretest.NewMemory())
	name := policyRecord(1).Name()
	old := newSource(policyRecord(30))
	fresh := newSource(policyRecord(60))
	writer := func(s *source) error {
		m := NewMirror(MirrorOptions{Catalogue: c, Source: s})
		_, err := m.one(t.Context(), name)
		return err
	}
	overtaken := false
	old.asked = func(string) { // the catalogue is read, the truth is not
		if !overtaken {
			overtaken = true
			require.NoError(t, writer(fresh))
			old.set(policyRecord(60)) // the same truth, which the sleeper reads again when its write is refused
		}
	}
	truths := 0
	sleeper := NewMirror(MirrorOptions{Catalogue: c, Source: sleepy{old, &truths}})
	_, err := sleeper.one(t.Context(), name)
	require.NoError(t, err)
	require.Equal(t, 2, truths, "its first write was refused")
	r, _, err := c.Get(t.Context(), name)
	require.NoError(t, err)
	require.EqualValues(t, 60, r.Policy.CopyInterval.Seconds)
	require.EqualValues(t, 1, r.Revision, "nothing was written after the one who knew better")
}

// sleepy answers what it saw before it slept, the first time.
type sleepy struct {
	*source
	n *int
}

func (s sleepy) Truth(ctx context.Context, name string) (Truth, error) {
	*s.n++
	if *s.n == 1 {
		before := Truth{Record: &Record{Policy: proto.CloneOf(s.records[name].Policy)}}
		_, _ = s.source.Truth(ctx, name)
		return before, nil
	}
	return s.source.Truth(ctx, name)
}

// Storage that is away, loses answers or refuses stops nobody and is caught up with.
func TestMirrorCatchesUp(t *testing.T) {
	faulty := blobstoretest.NewFaulty(blobstoretest.NewMemory(), nil)
	var mu sync.Mutex
	away, calls := true, 0
	faulty.SetHook(func(blobstoretest.Op, string, string) blobstoretest.Fault {
		mu.Lock()
		defer mu.Unlock()
		calls++
		switch {
		case away:
			return blobstoretest.Before
		case calls%3 == 0:
			return blobstoretest.After
		}
		return blobstoretest.None
	})
	s := newSource(vmRecord("web"), policyRecord(30), planRecord())
	m := run(t, MirrorOptions{Catalogue: Open(faulty), Source: s})
	testkit.Eventually(t, 10*time.Second, func() error {
		if l := m.Lag(); l.Err == nil || l.Since.IsZero() {
			return errors.New("not behind yet")
		}
		return nil
	})
	m.Touch(s.set(policyRecord(45)))
	mu.Lock()
	away = false
	mu.Unlock()
	testkit.Eventually(t, 10*time.Second, func() error {
		if l := m.Lag(); l.Err != nil || !l.Since.IsZero() || l.Runs == 0 {
			return fmt.Errorf("%+v", l)
		}
		return nil
	})
	faulty.SetHook(nil)
	l, err := Open(faulty).List(t.Context(), "")
	require.NoError(t, err)
	require.Len(t, l.Records, 3)
	eventually(t, Open(faulty), PolicyName("gold"), func(r *Record) bool { return r.Policy.CopyInterval.Seconds == 45 })
}

// A record of a newer program is left alone; a damaged one is replaced by the truth.
func TestNewerAndDamagedRecords(t *testing.T) {
	store := blobstoretest.NewMemory()
	require.NoError(t, store.CreateContainer(t.Context(), Container))
	spoil(t, store, PolicyName("gold"), `{"v":2}`)
	spoil(t, store, PlanName("all"), `{"v":1,`)
	c := Open(store)
	m := run(t, MirrorOptions{Catalogue: c, Source: newSource(policyRecord(30), planRecord())})
	eventually(t, c, PlanName("all"), func(r *Record) bool { return r.Revision == 1 })
	testkit.Eventually(t, 10*time.Second, func() error {
		if err := m.Lag().Err; !errors.Is(err, ErrNewer) {
			return fmt.Errorf("lag: %w", err)
		}
		return nil
	})
	_, _, err := c.Get(t.Context(), PolicyName("gold"))
	require.ErrorIs(t, err, ErrNewer)
}
