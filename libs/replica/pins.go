package replica

import (
	"context"
	"fmt"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// ReadPins reads the pins of a lineage, expired ones too, without reading its chain: one request. A lineage that does not
// exist has none.
func ReadPins(ctx context.Context, store blobstore.Store, lineage Lineage) ([]Pin, error) {
	l, err := ParseLineage(string(lineage))
	if err != nil {
		return nil, err
	}
	r := &Replica{lineage: l, replica: store.Container(l.ReplicaContainer())}
	pins, err := r.Pins(ctx)
	if err != nil {
		return nil, fmt.Errorf("lineage %s: %w", l, err)
	}
	return pins, nil
}
