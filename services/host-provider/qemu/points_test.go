package qemu

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func TestPointsOfEveryFormat(t *testing.T) {
	for _, f := range [][]string{{"vhdx", "qcow2"}, {"raw", "vpc"}} {
		t.Run(f[0]+"+"+f[1], func(t *testing.T) {
			l := newLab(t, formats(f...))
			l.write("d0", 0, mib, 1)
			l.write("d1", mib, mib, 2)
			l.establish()
			require.True(t, l.points().PassRequired)
			_, err := l.cut(l.next())
			requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED)
			l.copyAll(full)
			l.point()
			l.write("d1", 3*mib+512, 1024, 7)
			l.zero("d0", 64<<10, 128<<10)
			l.point()
			l.tidy(1)

			// Abandoned twice, with writes before, between and after.
			for range 2 {
				n := l.next()
				l.write("d0", 2*mib, 4096, byte(n))
				_, err := l.cut(n)
				require.NoError(t, err)
				l.write("d1", 6*mib, 4096, byte(n))
				_, err = l.settle(n, giveUp)
				require.NoError(t, err)
				l.tidy(1)
			}
			l.point()
			l.point()
			l.tidy(1)
			require.NoError(t, l.driver.Dissolve(l.ctx(), vmA, lineageA, 1))
			l.tidy(0)
			require.False(t, l.points().Tracking)
		})
	}
}

// TestOverwrittenWhileOpen overwrites, zeroes and discards what an open point still has to be read, at any alignment.
func TestOverwrittenWhileOpen(t *testing.T) {
	t.Parallel()
	l := newLab(t, formats("vhdx", "qcow2", "raw", "vpc"))
	l.establish()
	l.copyAll(full)
	random := rand.New(rand.NewPCG(testkit.Seed(t), 1))
	disturb := func(times int) {
		for range times {
			d, off, n := disk(random.IntN(4)), random.IntN(imageSize/512-2048)*512, (1+random.IntN(2047))*512
			if random.IntN(3) == 0 {
				l.zero(d, off, n)
			} else {
				l.write(d, off, n, byte(1+random.IntN(255)))
			}
		}
	}
	for range 6 {
		disturb(20)
		n := l.next()
		_, err := l.cut(n)
		require.NoError(t, err)
		want := l.snapshot()
		disturb(20)
		l.ship(n)
		l.same(want, "point")
		_, err = l.settle(n, commit)
		require.NoError(t, err)
	}
}
