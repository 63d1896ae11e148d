package bus

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Kind names a work queue.
type Kind string

// Work queues. Each message names its task proto.
const (
	KindShip   Kind = "ship"   // uploader:ship of the site: points
	KindCopy   Kind = "copy"   // the same: tasks of passes, which must not stand before points
	KindApply  Kind = "apply"  // uploader:apply near storage
	KindResync Kind = "resync" // resync-engine of the site
	KindRetain Kind = "retain" // uploader:retain near storage
)

// Kinds returns every work queue that [Bus.Declare] makes.
func Kinds() []Kind { return []Kind{KindShip, KindCopy, KindApply, KindResync, KindRetain} }

// Buckets of state. One service writes each record (design section 9).
const (
	BucketSites     = "sites"     // scheduler
	BucketHosts     = "hosts"     // scheduler
	BucketVMs       = "vms"       // scheduler
	BucketCycles    = "cycles"    // scheduler
	BucketPolicies  = "policies"  // scheduler
	BucketPlans     = "plans"     // failover-orchestrator
	BucketJobs      = "jobs"      // the service that runs the job
	BucketFailovers = "failovers" // failover-orchestrator
	BucketLeases    = "leases"    // whoever holds it; see Lease
	BucketBacklogs  = "backlogs"  // uploader: alarms about what waits to be applied
	BucketFlows     = "flows"     // each uploader and resync-engine its own: what it wants to send
)

// Buckets returns every bucket that [Bus.Declare] makes.
func Buckets() []string {
	return []string{
		BucketSites, BucketHosts, BucketVMs, BucketCycles, BucketPolicies, BucketPlans, BucketJobs, BucketFailovers, BucketLeases,
		BucketFlows, BucketBacklogs,
	}
}

const (
	eventStream  = "LANDFALL_EVENTS"
	eventPrefix  = "landfall.v1."
	workPrefix   = "landfall.work."
	bucketPrefix = "landfall-"

	// AllSites, given to [Bus.Consumer] in place of a site, takes the work of all.
	AllSites = "*"

	kvHistory      = 8              // enough to find a write again whose answer was lost
	kvMaxValue     = 512 << 10      // records hold references, not maps of blocks
	kvMarkerAge    = 24 * time.Hour // a watcher that slept longer starts afresh
	workMaxAge     = 7 * 24 * time.Hour
	maxMessage     = 512 << 10
	dedupWindow    = 2 * time.Minute
	eventDedup     = 15 * time.Minute
	defaultWorkCap = 64 << 20
	defaultKVCap   = 256 << 20
)

// Declaration says what [Bus.Declare] makes; the zero value is a good default.
type Declaration struct {
	// EventAge and EventBytes bound the event stream; default 7 days and 1 GiB.
	// The oldest events go first.
	EventAge   time.Duration
	EventBytes int64
	// WorkBytes bounds each work queue; default 64 MiB. A full queue refuses.
	WorkBytes int64
	// BucketBytes bounds each bucket; default 256 MiB. A full bucket refuses.
	BucketBytes int64
	// Replicas of new and existing streams; 0 is 1 for new ones and leaves
	// existing ones alone.
	Replicas int
	// ExtraKinds and ExtraBuckets are made beside [Kinds] and [Buckets].
	ExtraKinds   []Kind
	ExtraBuckets []string
}

// Declare creates the event stream, the work queues and the buckets, or brings
// existing ones to this configuration. It is idempotent and may run in several
// programs at once.
func (b *Bus) Declare(ctx context.Context, d Declaration) error {
	if d.EventAge <= 0 {
		d.EventAge = 7 * 24 * time.Hour
	}
	if d.EventBytes <= 0 {
		d.EventBytes = 1 << 30
	}
	if d.WorkBytes <= 0 {
		d.WorkBytes = defaultWorkCap
	}
	if d.BucketBytes <= 0 {
		d.BucketBytes = defaultKVCap
	}
	configs := []jetstream.StreamConfig{{
		Name: eventStream, Description: "Landfall events, docs/events.md",
		Subjects: []string{eventPrefix + ">"}, Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld,
		MaxAge: d.EventAge, MaxBytes: d.EventBytes, MaxMsgSize: maxMessage, Duplicates: eventDedup,
		Storage: jetstream.FileStorage, AllowDirect: true,
	}}
	for _, kind := range append(Kinds(), d.ExtraKinds...) {
		if err := checkToken("work kind", string(kind)); err != nil {
			return err
		}
		configs = append(configs, jetstream.StreamConfig{
			Name: workStream(kind), Description: "Landfall work queue",
			Subjects: []string{workPrefix + string(kind) + ".*"}, Retention: jetstream.WorkQueuePolicy,
			Discard: jetstream.DiscardNew, MaxAge: workMaxAge, MaxBytes: d.WorkBytes, MaxMsgSize: maxMessage,
			Duplicates: dedupWindow, Storage: jetstream.FileStorage,
		})
	}
	for _, bucket := range append(Buckets(), d.ExtraBuckets...) {
		if err := checkToken("bucket", bucket); err != nil {
			return err
		}
		configs = append(configs, bucketConfig(bucket, d.BucketBytes))
	}
	for _, c := range configs {
		if err := b.declareStream(ctx, c, d.Replicas); err != nil {
			return fmt.Errorf("declare stream %s: %w", c.Name, err)
		}
	}
	return nil
}

// bucketConfig is what a KV bucket is made of, with direct reads off: those may
// be answered by a replica that is behind, and a compare-and-set loop wants the
// leader's word.
func bucketConfig(bucket string, maxBytes int64) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: "KV_" + bucketPrefix + bucket, Description: "Landfall state, docs/formats/kv.md",
		Subjects:          []string{"$KV." + bucketPrefix + bucket + ".>"},
		MaxMsgsPerSubject: kvHistory, MaxMsgSize: kvMaxValue, MaxBytes: maxBytes, Discard: jetstream.DiscardNew,
		Storage: jetstream.FileStorage, AllowRollup: true, DenyDelete: true, AllowDirect: false,
		AllowMsgTTL: true, SubjectDeleteMarkerTTL: kvMarkerAge, Duplicates: dedupWindow,
	}
}

func (b *Bus) declareStream(ctx context.Context, c jetstream.StreamConfig, replicas int) error {
	c.Replicas = max(replicas, 1)
	if replicas == 0 {
		s, err := b.js.Stream(ctx, c.Name)
		switch {
		case err == nil:
			c.Replicas = s.CachedInfo().Config.Replicas
		case !errors.Is(err, jetstream.ErrStreamNotFound):
			return err
		}
	}
	_, err := b.js.CreateOrUpdateStream(ctx, c)
	return err
}

func workStream(kind Kind) string {
	return "LANDFALL_WORK_" + strings.ToUpper(strings.ReplaceAll(string(kind), "-", "_"))
}

var tokenPattern = regexp.MustCompile(`^[a-z0-9]+(-+[a-z0-9]+)*$`)

const maxToken = 64

func checkToken(what, token string) error {
	if len(token) > maxToken || !tokenPattern.MatchString(token) {
		return fmt.Errorf("%s %q: %w: want up to %d of a-z, 0-9 and inner hyphens", what, token, ErrName, maxToken)
	}
	return nil
}

// Backlog returns how many tasks of a kind wait or are being worked on, for one
// site or for [AllSites].
func (b *Bus) Backlog(ctx context.Context, kind Kind, site string) (uint64, error) {
	subject := workPrefix + string(kind) + "." + site
	s, err := b.js.Stream(ctx, workStream(kind))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return 0, fmt.Errorf("work queue %s: %w", kind, ErrNotFound)
	} else if err != nil {
		return 0, fmt.Errorf("work queue %s: %w", kind, err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(subject))
	if err != nil {
		return 0, fmt.Errorf("work queue %s: %w", kind, err)
	}
	var n uint64
	for _, c := range info.State.Subjects {
		n += c
	}
	return n, nil
}

// sorted returns the strings in order, without changing the argument.
func sorted(in []string) []string {
	out := slices.Clone(in)
	slices.Sort(out)
	return out
}
