package replica

import (
	"context"
	"fmt"
)

// UsageKind is one kind of thing that a lineage keeps in storage.
type UsageKind string

// The kinds of usage.
const (
	UsageJournal   UsageKind = "journal"   // manifests, configurations, and segments that manifests name
	UsageStaging   UsageKind = "staging"   // segments of passes
	UsageReplica   UsageKind = "replica"   // page blobs, written ranges only, and the records beside them
	UsageSnapshots UsageKind = "snapshots" // pages that only snapshots hold: an estimate
	UsageOrphans   UsageKind = "orphans"   // what nothing in the chain names
)

// UsageSum is what one kind takes.
type UsageSum struct {
	// Objects counts objects, or snapshots.
	Objects int64
	// Bytes stored, of page blobs written ranges.
	Bytes int64
	// HiddenObjects and HiddenBytes are the part of them that retention gave up, and that is not deleted yet.
	HiddenObjects, HiddenBytes int64
}

// Usage is what a lineage takes in storage.
type Usage struct {
	Kinds map[UsageKind]UsageSum
	// Points by tier.
	Points map[Tier]int
	// DayPuts and DayBytes are the manifests and segments stored in the last 24 hours of storage time, which a price of
	// requests is estimated from.
	DayPuts, DayBytes int64
}

// Usage lists the lineage's containers and says what they hold. It costs one request for every few thousand objects, and a
// few for every snapshot.
func (r *Replica) Usage(ctx context.Context) (Usage, error) {
	return Usage{}, fmt.Errorf("usage of lineage %s: not written yet: %w", r.lineage, ctx.Err())
}
