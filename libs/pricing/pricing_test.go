package pricing_test

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/pricing"
)

func TestStorage(t *testing.T) {
	table := pricing.Default()
	for _, c := range []struct {
		media pricing.Media
		bytes int64
		want  float64
	}{
		{pricing.Blocks, 0, 0},
		{pricing.Blocks, -5, 0},
		{pricing.Blocks, 1 << 30, 0.0184},
		{pricing.Blocks, 512 << 20, 0.0092},
		{pricing.Pages, 1 << 40, 46.08},
		{pricing.Pages, 100 << 30, 4.5},
	} {
		require.InDelta(t, c.want, table.Storage(c.media, c.bytes), 1e-9)
	}
}

func TestRequests(t *testing.T) {
	table := pricing.Default()
	for _, c := range []struct {
		puts, bytes, want int64
		cost              float64
	}{
		{0, 0, 0, 0},
		{1, 1, 60, 0.0003},                 // the put and one page write, each day
		{1, 128 << 10, 60, 0.0003},         // exactly one write's worth
		{1, 128<<10 + 1, 90, 0.00045},      // one byte more is another write
		{-1, -1, 0, 0},                     // nothing known
		{8640, 0, 259_200, 1.296},          // a point of no bytes every ten seconds
		{5760, 20 << 30, 5_088_000, 25.44}, // 20 GiB a day, a manifest and a segment every 30 s
	} {
		got := table.Requests(c.puts, c.bytes)
		require.Equal(t, c.want, got)
		require.InDelta(t, c.cost, table.RequestCost(got), 1e-9)
	}
}

func TestValidate(t *testing.T) {
	require.NoError(t, pricing.Default().Validate())
	err := pricing.Table{BlockGiBMonth: -1, PageGiBMonth: math.NaN(), Writes10k: math.Inf(1)}.Validate()
	for _, key := range []string{"name:", "currency:", "block_gib_month:", "page_gib_month:", "writes_10k:", "page_write_bytes:"} {
		require.ErrorContains(t, err, key)
	}
	require.Equal(t, "mine", pricing.Table{Name: "mine"}.String())
	require.Equal(t, "mine, 2027-01", pricing.Table{Name: "mine", Date: "2027-01"}.String())
}
