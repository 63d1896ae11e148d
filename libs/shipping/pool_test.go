package shipping

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Who is bulk leaves one buffer, and takes none with it when it goes.
func TestBulkLeavesABuffer(t *testing.T) {
	p := NewPool(3, 1<<10)
	var held [][]byte
	for range 2 {
		b, err := p.get(t.Context(), true)
		require.NoError(t, err)
		held = append(held, b)
	}
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := p.get(short, true)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	b, err := p.get(t.Context(), false)
	require.NoError(t, err)
	p.put(held[0], true)
	again, err := p.get(t.Context(), false)
	require.NoError(t, err)
	_, err = p.get(short, true) // a slot of bulk is free, no buffer is
	require.ErrorIs(t, err, context.DeadlineExceeded)
	p.put(b, false)
	p.put(again, false)
	p.put(held[1], true)
	for range 2 {
		b, err := p.get(t.Context(), true)
		require.NoError(t, err)
		defer p.put(b, true)
	}
	one := NewPool(1, 1<<10)
	b, err = one.get(t.Context(), true)
	require.NoError(t, err, "a single buffer is for all")
	one.put(b, true)
	require.Zero(t, one.InUse())
}
