package inventory

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Every definition of testdata is read as its golden file says: what was understood, and all problems at once.
func TestReadDefinition(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	folder, err := filepath.Abs("testdata")
	require.NoError(t, err)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			d, err := ReadDefinition(filepath.Join(folder, filepath.Base(file)))
			var b strings.Builder
			for _, p := range flatten(err) {
				fmt.Fprintf(&b, "problem: %v\n", p)
			}
			if err == nil {
				out, err := yaml.Marshal(d)
				require.NoError(t, err)
				b.Write(out)
			}
			golden(t, strings.TrimSuffix(file, ".yaml")+".golden", strings.ReplaceAll(b.String(), folder, "FOLDER"))
		})
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if os.Getenv("LANDFALL_UPDATE") != "" {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o600))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err, "LANDFALL_UPDATE=1 go test writes it")
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs; LANDFALL_UPDATE=1 go test rewrites it:\n%s", path, diff)
	}
}

func TestIdentify(t *testing.T) {
	for node, want := range map[string]string{
		"os": "os", "libvirt-1-format": "libvirt-1-format", "Data_Disk.2": "data-disk-2", "--x--": "x", "äö": "", "": "", "#block12": "block12",
		strings.Repeat("a", 60): strings.Repeat("a", 40), strings.Repeat("a", 39) + "_b": strings.Repeat("a", 39),
	} {
		id := identify(node)
		require.Equal(t, want, id, node)
		if id != "" {
			require.Regexp(t, diskID, id)
		}
	}
}

func FuzzReadDefinition(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.yaml")
	for _, file := range files {
		b, err := os.ReadFile(file)
		require.NoError(f, err)
		f.Add(b)
	}
	folder := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(folder, "x.yaml")
		require.NoError(t, os.WriteFile(path, b, 0o600))
		d, err := ReadDefinition(path)
		require.NotNil(t, d)
		if err == nil {
			require.NotEmpty(t, d.QMP)
		}
	})
}
