package bench

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMain makes the test program its own worker, as landfall-bench is.
func TestMain(m *testing.M) {
	if is, err := Worker(context.Background()); is {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestStorageRowsOnASmallDisk runs those rows that are quick and between them use every worker, against the sink, each with its check of the result.
func TestStorageRowsOnASmallDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	report, err := Run(t.Context(), Options{
		Root: filepath.Join("..", ".."), Work: filepath.Join(t.TempDir(), "work"), Size: 16 * mib, Set: "test", Runs: 1, Seed: 1, Progress: io.Discard,
		Rows: []string{"st-ir-open", "st-churn", "st-rst"},
	})
	require.NoError(t, err)
	require.Empty(t, report.Failed())
	require.Len(t, report.Rows, 5)
	for _, r := range report.Rows {
		require.True(t, r.Missing != "" || r.Runs == 1, r.Subject)
	}
}

func TestFairness(t *testing.T) {
	require.InDelta(t, 0.5, fairness([]float64{2, 4, 3}), 1e-9)
}

func TestPartOfAConnectionString(t *testing.T) {
	const conn = "DefaultEndpointsProtocol=http;AccountName=a;AccountKey=a2V5;BlobEndpoint=http://127.0.0.1:1/a"
	require.Equal(t, "a2V5", part(conn, "AccountKey"))
	require.Empty(t, part(conn, "Nothing"))
	query, err := sas(conn)
	require.NoError(t, err)
	require.Contains(t, query, "sig=")
}
