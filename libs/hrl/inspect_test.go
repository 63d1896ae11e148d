package hrl

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestInspectGolden(t *testing.T) {
	example := exampleFile(t, printedEOL)
	open, _ := smallLog(t, false)
	torn, _ := smallLog(t, true)
	torn[len(torn)-512+8] ^= 1
	for name, raw := range map[string][]byte{
		"example": example, "unclosed": open[:len(open)-100], "corrupt": torn, "no-log": []byte("short"),
	} {
		for _, format := range []Format{FormatTable, FormatJSON} {
			t.Run(name+"."+string(format), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "x.hrl")
				require.NoError(t, os.WriteFile(path, raw, 0o600))
				var out bytes.Buffer
				err := InspectFile(context.Background(), path, &out, format)
				require.Equal(t, name == "corrupt" || name == "no-log", err != nil, "%v", err)
				if format == FormatJSON {
					require.True(t, json.Valid(out.Bytes()))
				}
				golden := filepath.Join("testdata", "inspect-"+name+"."+string(format))
				if *update {
					require.NoError(t, os.WriteFile(golden, out.Bytes(), 0o644))
				}
				want, err := os.ReadFile(golden)
				require.NoError(t, err)
				require.Empty(t, cmp.Diff(string(want), out.String()))
			})
		}
	}
}

func TestInspectRefuses(t *testing.T) {
	require.ErrorIs(t, InspectFile(context.Background(), filepath.Join(t.TempDir(), "x"), &bytes.Buffer{}, FormatJSON),
		os.ErrNotExist)
	require.Error(t, InspectFile(context.Background(), t.TempDir(), &bytes.Buffer{}, FormatJSON))
	require.Error(t, Inspect(context.Background(), bytes.NewReader(nil), 0, &bytes.Buffer{}, "xml"))
}
