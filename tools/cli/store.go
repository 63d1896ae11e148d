package cli

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/storagereason"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// storeSettings are what a command that opens a store itself is told: by --config, LANDFALL_STORE__… and flags.
type storeSettings struct {
	Store backend.Settings `koanf:"store"`
}

// storeFlags adds the flags of a store to a command and returns what reads them. The URL has a flag of its own, urlFlag.
func storeFlags(c *cobra.Command, urlFlag, help string) func() (backend.Settings, error) {
	url := c.Flags().String(urlFlag, "", help)
	loader := config.New(storeSettings{Store: backend.DefaultSettings()}, config.Options{Name: c.Name(), Environ: os.Environ()})
	flags := loader.Flags()
	flags.VisitAll(func(f *pflag.Flag) { f.Hidden = f.Name != config.FlagFile && f.Name != "store.azure.credential" })
	flags.Lookup(config.FlagFile).Usage = "YAML file with the section store: url and azure.* (docs/operations/storage.md)"
	c.Flags().AddFlagSet(flags)
	return func() (backend.Settings, error) {
		if *url != "" {
			if err := flags.Set("store.url", *url); err != nil {
				return backend.Settings{}, err
			}
		}
		s, err := loader.Load()
		if err != nil {
			return backend.Settings{}, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_STORAGE_CONFIG_INVALID, err, "settings of the store")
		}
		return s.Store, nil
	}
}

// openStore opens what the settings name.
func openStore(ctx context.Context, s backend.Settings) (blobstore.Store, error) {
	store, err := backend.Open(ctx, s, backend.Options{})
	var bad *config.Error
	switch {
	case errors.As(err, &bad), errors.Is(err, blobstore.ErrInvalid):
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_STORAGE_CONFIG_INVALID, err, "open the store")
	case err != nil:
		return nil, storeError(err, "open the store")
	}
	return store, nil
}

// storeError gives an error of a store that this command opened itself its reason.
func storeError(err error, format string, args ...any) error {
	reason, ok := storagereason.Of(err)
	if !ok {
		reason = typesv1.ErrorReason_ERROR_REASON_STORAGE_UNAVAILABLE
	}
	return errcat.Wrap(reason, err, format, args...)
}
