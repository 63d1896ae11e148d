package testkit

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEventually(t *testing.T) {
	n := 0
	Eventually(t, time.Second, func() bool { n++; return n == 3 }, "third time")
	Eventually(t, time.Second, func() error {
		if n++; n < 6 {
			return errors.New("not yet")
		}
		return nil
	})
	require.Equal(t, 6, n)
}

func TestPollEnds(t *testing.T) {
	ctx, cancel := context.WithTimeout(Context(t), 5*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, Poll(ctx, func(context.Context) (bool, error) { return false, nil }), context.DeadlineExceeded)
	boom := errors.New("boom")
	require.ErrorIs(t, Poll(Context(t), func(context.Context) (bool, error) { return false, boom }), boom)
}

func TestFillAtIsOneContent(t *testing.T) {
	r := Rand(t)
	whole := make([]byte, 1000)
	Fill(whole, 7)
	got := make([]byte, len(whole))
	for off := 0; off < len(got); {
		n := min(1+r.IntN(40), len(got)-off)
		FillAt(got[off:off+n], int64(off), 7)
		off += n
	}
	require.Equal(t, whole, got)
	other := make([]byte, len(whole))
	Fill(other, 8)
	require.NotEqual(t, whole, other)
}

func TestSeedIsRepeatable(t *testing.T) {
	t.Setenv(SeedEnv, "42")
	first, second := Rand(t).Uint64(), Rand(t).Uint64()
	require.Equal(t, first, second)
}

func TestLogs(t *testing.T) {
	logs := NewLogs(t)
	logs.Logger().With("vm", "v1").WithGroup("g").Warn("lost", "n", 3, slog.Group("in", "x", 1))
	require.Len(t, logs.Find("lost"), 1)
	require.Equal(t, "WARN lost g.in.x=1 g.n=3 vm=v1", logs.Records()[0].String())
}

func TestSpanTree(t *testing.T) {
	spans := NewSpans(t)
	tracer := spans.Provider().Tracer("t")
	ctx, root := tracer.Start(t.Context(), "root")
	_, a := tracer.Start(ctx, "a")
	a.End()
	ctxB, b := tracer.Start(ctx, "b")
	_, c := tracer.Start(ctxB, "c")
	c.End()
	b.End()
	root.End()
	require.Equal(t, "root\n  a\n  b\n    c\n", spans.Trace(root.SpanContext().TraceID()))
	require.Len(t, spans.Find("c"), 1)
}

func BenchmarkFill(b *testing.B) {
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		Fill(p, 1)
	}
}
