package azure

import (
	"context"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"
)

// Facts are what an account says of itself to somebody who checks it before its first use.
type Facts struct {
	// SKU such as Standard_LRS, and Kind such as StorageV2; "" when the caller may not know.
	SKU, Kind string
	// Hierarchical accounts (Data Lake) have no page blobs.
	Hierarchical bool
	// SoftDeleteDays is for how long deleted blobs are kept; 0 is off.
	SoftDeleteDays int
	// Versioning says that an answer to a Put since Open named a version: put something first. The service tells its setting
	// only to the management plane.
	Versioning bool
}

// Facts asks the account. Who may not ask gets ErrPermission, and what is known without.
func (s *Store) Facts(ctx context.Context) (Facts, error) {
	const op = "account facts"
	f := Facts{Versioning: s.versions.Load()}
	_, err := s.call(ctx, call{op: op}, func(ctx context.Context) error {
		r, err := s.client.GetAccountInfo(ctx, &service.GetAccountInfoOptions{})
		f.SKU, f.Kind, f.Hierarchical = string(value(r.SKUName)), string(value(r.AccountKind)), value(r.IsHierarchicalNamespaceEnabled)
		return err
	})
	if err != nil {
		return f, err
	}
	_, err = s.call(ctx, call{op: op}, func(ctx context.Context) error {
		r, err := s.client.GetProperties(ctx, nil)
		if d := r.DeleteRetentionPolicy; d != nil && value(d.Enabled) {
			f.SoftDeleteDays = int(value(d.Days))
		}
		return err
	})
	return f, err
}

// Load is how hard the account is driven, for metrics.
type Load struct {
	// Limit is how many requests the account is believed to take at once; InFlight how many there are.
	Limit, InFlight int
	// Cuts counts how often the limit was halved since Open.
	Cuts uint64
}

// Load returns the present one.
func (s *Store) Load() Load {
	st := s.pacer.Stats()
	return Load{Limit: st.Limit, InFlight: st.InFlight, Cuts: st.Cuts}
}
