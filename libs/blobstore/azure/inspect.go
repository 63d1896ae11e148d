package azure

import (
	"context"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

var _ blobstore.Inspector = (*Store)(nil)

// Inspect is [Store.Facts] for who knows no account. Versioning is known only once a blob was put.
func (s *Store) Inspect(ctx context.Context) (blobstore.AccountFacts, error) {
	f, err := s.Facts(ctx)
	return blobstore.AccountFacts{
		SKU: f.SKU, Kind: f.Kind, Hierarchical: f.Hierarchical, Versioning: f.Versioning,
		SoftDelete: time.Duration(f.SoftDeleteDays) * 24 * time.Hour,
	}, err
}
