package blobstoretest

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemoryConforms(t *testing.T) {
	Run(t, func(*testing.T) blobstore.Store { return NewMemory() })
}

// A decorator without a script changes nothing.
func TestFaultyConforms(t *testing.T) {
	Run(t, func(*testing.T) blobstore.Store { return NewFaulty(NewMemory(), nil) })
}

func TestMemoryClock(t *testing.T) {
	at := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	m := NewMemoryClock(func() time.Time { return at })
	now, err := m.Now(t.Context())
	require.NoError(t, err)
	require.Equal(t, at, now)
}

func TestFaulty(t *testing.T) {
	ctx := context.Background()
	mem := NewMemory()
	require.NoError(t, mem.CreateContainer(ctx, "box"))
	put := func(f *Faulty, name string) error {
		_, err := f.Container("box").Put(ctx, name, bytes.NewReader(nil), 0, blobstore.Conditions{CreateOnly: true})
		return err
	}
	exists := func(name string) bool {
		_, err := mem.Container("box").Stat(ctx, name, "")
		return err == nil
	}
	f := NewFaulty(mem, FailBefore(2))
	require.NoError(t, put(f, "a"))
	require.ErrorIs(t, put(f, "b"), ErrInjected)
	require.False(t, exists("b"))
	require.NoError(t, put(f, "b"))
	require.EqualValues(t, 3, f.Calls())

	f.SetHook(FailAfter(1))
	require.ErrorIs(t, put(f, "c"), ErrInjected)
	require.True(t, exists("c"))
	f.SetHook(FailAfter(1))
	err := put(f, "c")
	require.ErrorIs(t, err, ErrInjected)
	require.NotErrorIs(t, err, blobstore.ErrExists, "the answer is lost, whatever it was")

	f.SetHook(CrashAt(1))
	require.ErrorIs(t, put(f, "d"), ErrCrashed)
	require.False(t, exists("d"))
	require.ErrorIs(t, put(f, "d"), ErrCrashed)
	require.True(t, f.Crashed())
	other := NewFaulty(mem, nil)
	require.NoError(t, put(other, "e"), "another client lives on")
	f.Revive()
	require.NoError(t, put(f, "d"))

	f.SetHook(FailNth(1, CrashAfter))
	require.ErrorIs(t, put(f, "g"), ErrCrashed)
	require.True(t, exists("g"))
	f.Revive()
	f.SetHook(nil)
	r, _, err := f.Container("box").Get(ctx, "a", 0, -1)
	require.NoError(t, err)
	f.Crash()
	_, err = r.Read(make([]byte, 1))
	require.ErrorIs(t, err, ErrCrashed)
	require.ErrorIs(t, lastError(f.Container("box").List(ctx, "", "")), ErrCrashed)
}

func TestMemoryWriteOnce(t *testing.T) {
	ctx := t.Context()
	m := NewMemory()
	require.ErrorIs(t, m.ProtectContainer(ctx, "journal", blobstore.Protection{WriteOnce: time.Hour}), blobstore.ErrNoContainer)
	require.NoError(t, m.CreateContainer(ctx, "journal"))
	require.NoError(t, m.ProtectContainer(ctx, "journal", blobstore.Protection{WriteOnce: time.Hour, LegalHold: true}))
	require.NoError(t, m.ProtectContainer(ctx, "journal", blobstore.Protection{WriteOnce: time.Minute}))
	p, err := m.ContainerProtection(ctx, "journal")
	require.NoError(t, err)
	require.Equal(t, blobstore.Protection{WriteOnce: time.Hour, LegalHold: true}, p)
	c := m.Container("journal")
	put := func(cond blobstore.Conditions) error {
		_, err := c.Put(ctx, "a", strings.NewReader("x"), 1, cond)
		return err
	}
	require.NoError(t, put(blobstore.Conditions{}))
	require.ErrorIs(t, put(blobstore.Conditions{}), blobstore.ErrWriteOnce)
	require.ErrorIs(t, put(blobstore.Conditions{CreateOnly: true}), blobstore.ErrExists)
	m.Advance(time.Hour)
	require.ErrorIs(t, c.Delete(ctx, "a", blobstore.Conditions{}), blobstore.ErrWriteOnce, "the hold")
	m.LiftLegalHold("journal")
	require.ErrorIs(t, put(blobstore.Conditions{}), blobstore.ErrWriteOnce)
	require.NoError(t, c.Delete(ctx, "a", blobstore.Conditions{}))
	require.NoError(t, put(blobstore.Conditions{CreateOnly: true}))
	require.ErrorIs(t, c.Delete(ctx, "a", blobstore.Conditions{}), blobstore.ErrWriteOnce)
}
