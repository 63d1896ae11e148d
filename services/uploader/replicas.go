package uploader

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/replica"
)

// maxReplicas bounds the lineages whose chains are kept in memory; the one used longest ago goes first.
const maxReplicas = 256

// replicas keeps one replica.Replica per lineage, because it caches the immutable chain.
type replicas struct {
	store blobstore.Store

	mu    sync.Mutex
	known map[replica.Lineage]*lineage
	tick  int64
}

// lineage is what the process remembers of one lineage. Nothing in it is trusted beyond what replica.Replica
// verifies.
type lineage struct {
	r    *replica.Replica
	used int64
	// last is the newest result of an applier here; nil before the first.
	last atomic.Pointer[applied]
}

func newReplicas(store blobstore.Store) *replicas {
	return &replicas{store: store, known: map[replica.Lineage]*lineage{}}
}

// get returns the replica of a lineage. The lineage exists: the scheduler made it before it issued a task.
func (c *replicas) get(ctx context.Context, id string) (*replica.Replica, error) {
	l, err := c.lineage(ctx, id)
	if err != nil {
		return nil, err
	}
	return l.r, nil
}

func (c *replicas) lineage(ctx context.Context, id string) (*lineage, error) {
	key, err := replica.ParseLineage(id)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	l, ok := c.known[key]
	if ok {
		c.tick++
		l.used = c.tick
	}
	c.mu.Unlock()
	if ok {
		return l, nil
	}
	r, err := replica.Open(ctx, c.store, key)
	if err != nil {
		return nil, fmt.Errorf("open the journal: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tick++
	if l, ok := c.known[key]; ok { // somebody opened it meanwhile
		l.used = c.tick
		return l, nil
	}
	if len(c.known) >= maxReplicas {
		var oldest replica.Lineage
		for id, l := range c.known {
			if oldest == "" || l.used < c.known[oldest].used {
				oldest = id
			}
		}
		delete(c.known, oldest)
	}
	l = &lineage{r: r, used: c.tick}
	c.known[key] = l
	return l, nil
}
