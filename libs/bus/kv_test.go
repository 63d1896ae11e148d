package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/bus/bustest"
	"github.com/landfall-dr/landfall/libs/testkit"
)

type text = wrapperspb.StringValue

func bucket(t testing.TB, b *bus.Bus) *bus.KV[*text] {
	t.Helper()
	kv, err := bus.OpenKV[*text](testkit.Context(t), b, bus.BucketVMs)
	require.NoError(t, err)
	return kv
}

func TestKVCompareAndSet(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	kv := bucket(t, b)
	_, _, err := kv.Get(ctx, "a")
	require.ErrorIs(t, err, bus.ErrNotFound)
	_, err = kv.Update(ctx, "a", wrapperspb.String("x"), 1)
	require.ErrorIs(t, err, bus.ErrRevision)
	r1, err := kv.Create(ctx, "a", wrapperspb.String("one"))
	require.NoError(t, err)
	_, err = kv.Create(ctx, "a", wrapperspb.String("other"))
	require.ErrorIs(t, err, bus.ErrExists)
	r2, err := kv.Update(ctx, "a", wrapperspb.String("two"), r1)
	require.NoError(t, err)
	_, err = kv.Update(ctx, "a", wrapperspb.String("two"), r1)
	require.ErrorIs(t, err, bus.ErrRevision, "equal content of another write is no success")
	require.NotErrorIs(t, err, bus.ErrExists)
	v, rev, err := kv.Get(ctx, "a")
	require.NoError(t, err)
	require.Equal(t, r2, rev)
	require.Equal(t, "two", v.GetValue())

	require.ErrorIs(t, kv.Delete(ctx, "a", r1), bus.ErrRevision)
	require.NoError(t, kv.Delete(ctx, "a", r2))
	require.NoError(t, kv.Delete(ctx, "a", r2), "again")
	_, _, err = kv.Get(ctx, "a")
	require.ErrorIs(t, err, bus.ErrNotFound)
	r3, err := kv.Create(ctx, "a", wrapperspb.String("three"))
	require.NoError(t, err)
	require.Greater(t, r3, r2)

	_, err = bus.OpenKV[*text](ctx, b, "nothing")
	require.ErrorIs(t, err, bus.ErrNotFound)
	_, err = kv.Create(ctx, "a b", wrapperspb.String(""))
	require.ErrorIs(t, err, bus.ErrName)
}

func TestKVMutateUnderContention(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	kv := bucket(t, b)
	const writers, each = 4, 15
	var wg sync.WaitGroup
	errs := make(chan error, writers*each)
	for range writers {
		wg.Go(func() {
			for range each {
				_, _, err := kv.MutateOrCreate(ctx, "n", func(v *text) error { v.Value += "x"; return nil })
				errs <- err
			}
		})
	}
	wg.Wait()
	for range writers * each {
		require.NoError(t, <-errs)
	}
	v, rev, err := kv.Get(ctx, "n")
	require.NoError(t, err)
	require.Len(t, v.GetValue(), writers*each, "no update was lost or doubled")

	boom := errors.New("boom")
	_, _, err = kv.Mutate(ctx, "n", func(*text) error { return boom })
	require.ErrorIs(t, err, boom)
	_, same, err := kv.Mutate(ctx, "n", func(*text) error { return bus.NoChange })
	require.NoError(t, err)
	require.Equal(t, rev, same)
	_, _, err = kv.Mutate(ctx, "absent", func(*text) error { return nil })
	require.ErrorIs(t, err, bus.ErrNotFound)
}

func TestKVListAndWatch(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	kv := bucket(t, b)
	for _, key := range []string{bus.Key("s1", "v2"), bus.Key("s1", "v1"), bus.Key("s2", "v1")} {
		_, err := kv.Create(ctx, key, wrapperspb.String(key))
		require.NoError(t, err)
	}
	list, err := kv.List(ctx, "s1.>")
	require.NoError(t, err)
	require.Len(t, list, 2)
	require.Equal(t, "s1.v1", list[0].Key)
	require.Equal(t, "s1.v1", list[0].Value.GetValue())
	keys, err := kv.Keys(ctx, "")
	require.NoError(t, err)
	require.Equal(t, []string{"s1.v1", "s1.v2", "s2.v1"}, keys)
	require.NoError(t, kv.Delete(ctx, "s1.v2", list[1].Revision))
	keys, err = kv.Keys(ctx, "s1.*")
	require.NoError(t, err)
	require.Equal(t, []string{"s1.v1"}, keys)
	none, err := kv.List(ctx, "s3.>")
	require.NoError(t, err)
	require.Empty(t, none)

	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var steps []string
	for u, err := range kv.Watch(wctx, "s2.>") {
		if err != nil {
			require.ErrorIs(t, err, context.Canceled)
			break
		}
		steps = append(steps, fmt.Sprintf("%d %s %s", u.Kind, u.Key, u.Value.GetValue()))
		switch u.Kind {
		case bus.Current:
			_, _, err = kv.Mutate(ctx, "s2.v1", func(v *text) error { v.Value = "new"; return nil })
			require.NoError(t, err)
		case bus.Put:
			if u.Value.GetValue() == "new" {
				require.NoError(t, kv.Delete(ctx, u.Key, u.Revision))
			}
		case bus.Deleted:
			require.Nil(t, u.Value)
			cancel()
		}
	}
	require.Equal(t, []string{"1 s2.v1 s2.v1", "3  ", "1 s2.v1 new", "2 s2.v1 "}, steps)

	for _, err := range kv.Watch(ctx, "") { // leaving the loop leaves nothing behind
		require.NoError(t, err)
		break
	}
}

func TestKeyRoundTrip(t *testing.T) {
	require.Equal(t, "s1.Gold=20policy.=00.a=2Eb", bus.Key("s1", "Gold policy", "", "a.b"))
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(rapid.String(), 1, 4).Draw(t, "parts")
		for i := range parts {
			if parts[i] == "\x00" {
				parts[i] = "nul" // shares its spelling with the empty part
			}
		}
		key := bus.Key(parts...)
		got, err := bus.KeyParts(key)
		require.NoError(t, err)
		require.Equal(t, parts, got)
		require.Regexp(t, `^[-_=.A-Za-z0-9]+$`, key)
	})
	for _, bad := range []string{"", "a..b", ".a", "a b", "a=2", "a=zz", "=41", "a*", ">"} {
		_, err := bus.KeyParts(bad)
		require.ErrorIs(t, err, bus.ErrName, bad)
	}
}

func TestLeaseHandsOver(t *testing.T) {
	const ttl = 400 * time.Millisecond
	server := bustest.Serve(t, bus.ServerOptions{})
	ctx := testkit.Context(t)
	a, b := bustest.Dial(t, bus.Options{Server: server}), bustest.Dial(t, bus.Options{Server: server})
	require.NoError(t, a.Declare(ctx, bus.Declaration{}))
	first, err := a.Lease(ctx, "scheduler", "a", time.Minute)
	require.NoError(t, err)
	require.EqualValues(t, 1, first.Generation())
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	_, err = b.Lease(short, "scheduler", "b", ttl)
	cancel()
	require.ErrorIs(t, err, context.DeadlineExceeded, "a live holder keeps it")
	require.True(t, first.Valid())
	require.NoError(t, first.Release(ctx))
	require.False(t, first.Valid())
	require.ErrorIs(t, context.Cause(first.Context()), context.Canceled)

	begin := time.Now()
	second, err := b.Lease(ctx, "scheduler", "b", ttl)
	require.NoError(t, err)
	require.EqualValues(t, 2, second.Generation())
	require.Less(t, time.Since(begin), 30*time.Second, "a released lease is free at once")

	// The holder's connection is gone: it knows before the contender gets it.
	require.NoError(t, b.Close(bustest.Cleanup(t)))
	third, err := a.Lease(ctx, "scheduler", "a", ttl)
	require.NoError(t, err)
	require.EqualValues(t, 3, third.Generation())
	require.False(t, second.Valid())
	require.ErrorIs(t, context.Cause(second.Context()), bus.ErrLeaseLost)
	require.NoError(t, third.Release(ctx))
	require.NoError(t, second.Release(ctx), "releasing what is lost is no error")
}

// Contenders come, hold, release or lose their connection, at random. Whoever
// says Valid is alone, and generations only grow.
func TestLeaseHistoryNeverOverlaps(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("some seconds")
	}
	server := bustest.Serve(t, bus.ServerOptions{})
	ctx := testkit.Context(t)
	require.NoError(t, bustest.Dial(t, bus.Options{Server: server}).Declare(ctx, bus.Declaration{}))
	const ttl = 200 * time.Millisecond
	seed := testkit.Seed(t)

	var mu sync.Mutex
	var last *bus.Lease
	var highest uint64
	var held int
	end := time.Now().Add(4 * time.Second)
	var wg sync.WaitGroup
	for n := range 3 {
		wg.Go(func() {
			r := testkit.RandOf(seed + uint64(n))
			for i := 0; time.Now().Before(end); i++ {
				name := fmt.Sprintf("%d-%d", n, i)
				b, err := bus.Connect(ctx, bus.Options{Server: server, Name: name})
				if err != nil {
					t.Error(err)
					return
				}
				tctx, cancel := context.WithDeadline(ctx, end)
				l, err := b.Lease(tctx, "l", name, ttl)
				if err != nil {
					cancel()
					_ = b.Close(ctx)
					return
				}
				mu.Lock()
				if l.Valid() {
					if last != nil && last.Valid() {
						t.Errorf("%s holds while the holder of generation %d does", name, highest)
					}
					if l.Generation() <= highest {
						t.Errorf("%s: generation %d after %d", name, l.Generation(), highest)
					}
					last, highest = l, l.Generation()
					held++
				}
				mu.Unlock()
				loses := r.IntN(2) == 0
				if loses {
					_ = b.Close(ctx)
					<-l.Context().Done()
				} else {
					_ = testkit.Poll(ctx, timeAfter(time.Duration(r.IntN(300))*time.Millisecond))
				}
				if !loses {
					_ = l.Release(ctx)
					_ = b.Close(ctx)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	require.Greater(t, held, 5)
}

func timeAfter(d time.Duration) func(context.Context) (bool, error) {
	begin := time.Now()
	return func(context.Context) (bool, error) { return time.Since(begin) >= d, nil }
}

// A list has every record that there was all the time, also one that is being rewritten: the server then announces the end
// too early now and then.
func TestKVListWhileRewritten(t *testing.T) {
	b, ctx := open(t), testkit.Context(t)
	kv := bucket(t, b)
	want := []string{"a", "b", "c", "rewritten"}
	for _, key := range want {
		_, err := kv.Create(ctx, key, wrapperspb.String("x"))
		require.NoError(t, err)
	}
	rev, err := kv.Create(ctx, "deleted", wrapperspb.String("x"))
	require.NoError(t, err)
	require.NoError(t, kv.Delete(ctx, "deleted", rev))
	stop := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, _, err := kv.Mutate(ctx, "rewritten", func(v *text) error { v.Value = fmt.Sprint(n); return nil }); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer writing.Wait()
	defer close(stop)
	keysOf := func(list []bus.Entry[*text]) (keys []string) {
		for _, e := range list {
			keys = append(keys, e.Key)
		}
		return keys
	}
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		list, err := kv.List(ctx, "")
		require.NoError(t, err)
		require.Equal(t, want, keysOf(list))
		keys, err := kv.Keys(ctx, "")
		require.NoError(t, err)
		require.Equal(t, want, keys)
		seen := map[string]bool{}
		for u, err := range kv.Watch(ctx, "") {
			require.NoError(t, err)
			if u.Kind == bus.Current {
				break
			}
			if u.Kind == bus.Put {
				seen[u.Key] = true
			}
		}
		require.Len(t, seen, len(want))
	}
}
