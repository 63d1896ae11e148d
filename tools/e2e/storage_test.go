package e2e

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
)

// storage is the kind of store that a product keeps its lineages in.
type storage string

const (
	onDir     storage = "dir"     // a folder
	onAzurite storage = "azurite" // the real emulator, by the azure backend
)

// storageEnv makes every test use one kind of store.
const storageEnv = "LANDFALL_E2E_STORE"

// wholeStorageEnv adds what the short set leaves out: both forms on both stores, not each on one.
const wholeStorageEnv = "LANDFALL_E2E_WHOLE"

// chosen is the kind of store that the environment wants, or else the one that the test wants.
func (s storage) chosen(t testing.TB) storage {
	switch forced := storage(os.Getenv(storageEnv)); forced {
	case "":
		return s
	case onDir, onAzurite:
		return forced
	default:
		t.Fatalf("%s is %q, want %s or %s", storageEnv, forced, onDir, onAzurite)
		return ""
	}
}

// either is the first for an even number, the second for an odd one: with many seeds each test meets both.
func either(n uint64, even, odd storage) storage {
	if n%2 == 0 {
		return even
	}
	return odd
}

// useStorage decides where the lineages are.
func (p *product) useStorage(kind storage) {
	settings := backend.DefaultSettings()
	if kind.chosen(p.t) == onAzurite {
		settings.Azure.ConnectionString = config.NewSecret(azurite.Start(p.t).ConnectionString())
		p.storeConfig = map[string]any{"azure": map[string]any{"connection_string": settings.Azure.ConnectionString.Reveal()}}
	} else {
		settings.Dir = filepath.Join(p.state, "store")
		p.storeConfig = map[string]any{"dir": settings.Dir}
	}
	p.storage = settings
}

// storeFile writes the section store to a file, as `landfall up` and `landfall recover` take it.
func (p *product) storeFile() string {
	raw, err := yaml.Marshal(map[string]any{"store": p.storeConfig})
	require.NoError(p.t, err)
	file := filepath.Join(p.dir, "store.yaml")
	require.NoError(p.t, os.WriteFile(file, raw, 0o600))
	return file
}

// openStore opens the store as another program.
func (p *product) openStore(ctx context.Context) (blobstore.Store, error) {
	return backend.Open(ctx, p.storage, backend.Options{})
}
