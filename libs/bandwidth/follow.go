package bandwidth

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

const (
	// writeTimeout bounds one write of a record.
	writeTimeout = 2 * time.Second
	// retryDelay is the pause before a watch that broke is begun again.
	retryDelay = time.Second
)

// cadence is how often and for how long; tests are in a hurry.
type cadence struct {
	// linger is how long a stream that ended still counts: between two segments it is about to send again, and records
	// must not flicker.
	linger time.Duration
	// tick is how often time itself is asked for a change, while there is a schedule.
	tick time.Duration
	// refresh is how often a worker with demand says so again.
	refresh time.Duration
	// writeGap is the least time between two records of one worker.
	writeGap time.Duration
	// expiry is the age at which a record counts no more.
	expiry time.Duration
	// litter is the age at which anybody deletes a record: its worker died without doing so.
	litter time.Duration
}

var usual = cadence{
	linger: time.Second, tick: 500 * time.Millisecond, refresh: 2 * time.Second, writeGap: 200 * time.Millisecond,
	expiry: 6 * time.Second, litter: time.Minute,
}

// FollowerOptions configures a Follower.
type FollowerOptions struct {
	// Bus has the buckets "sites" and "flows".
	Bus *bus.Bus
	// Site that the worker sends from.
	Site string
	// Service that this process is; with something random behind it, it names the worker among all of the site.
	Service string
	// Limiter that is told the worker's part, and asked for its streams.
	Limiter *Limiter
	// Clock tells which window of the schedule holds; nil is the system's.
	Clock func() time.Time
	// Logger; nil discards.
	Logger *slog.Logger
}

// Follower keeps a worker's Limiter at the worker's part of the site's rate.
type Follower struct {
	o      FollowerOptions
	worker string
	cadence
	start time.Time
	ready chan struct{}
	once  sync.Once
	kick  chan struct{} // the streams changed
	dirty chan struct{} // the record may have to be written

	mu       sync.Mutex
	schedule *Schedule
	others   map[string]other // by key
	offset   time.Duration    // the bus's clock ahead of ours, at least
	offsetOK bool
	held     [Classes]int
	heldAt   [Classes]time.Time
	away     bool      // the bus is away, or was until lately
	backAt   time.Time // when it came back
	rate     int64     // of the site; 0 is no limit
	part     Part
	said     bool // the log knows of a limit
}

// other is the newest record of another worker.
type other struct {
	demand   Demand
	at       time.Time // by the bus
	revision uint64
}

// NewFollower checks the options; Run starts it.
func NewFollower(o FollowerOptions) (*Follower, error) {
	if o.Bus == nil || o.Site == "" || o.Service == "" || o.Limiter == nil {
		return nil, errors.New("follow the bandwidth: bus, site, service and limiter are needed")
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Follower{
		o: o, worker: o.Service + "-" + strings.ToLower(rand.Text()), cadence: usual, start: time.Now(), ready: make(chan struct{}), kick: make(chan struct{}, 1), dirty: make(chan struct{}, 1), others: map[string]other{},
	}, nil
}

// Ready closes when the schedule was read for the first time, or is known to be out of reach: work that waits for it never sends
// faster than a limit that was set before.
func (f *Follower) Ready() <-chan struct{} { return f.ready }

// Run follows until ctx ends, and then takes the worker's record away. It returns nil at the end of ctx.
func (f *Follower) Run(ctx context.Context) error {
	defer f.once.Do(func() { close(f.ready) })
	sites, err := openWhenThere[*schedulerv1.SiteBandwidth](ctx, f, bus.BucketSites)
	if err != nil {
		return nil //nolint:nilerr // ctx is over
	}
	flows, err := openWhenThere[*uploaderv1.TransferDemand](ctx, f, bus.BucketFlows)
	if err != nil {
		return nil //nolint:nilerr // ctx is over
	}
	tell := func() { poke(f.kick) }
	f.o.Limiter.changed.Store(&tell)
	defer f.o.Limiter.changed.Store(nil)
	var group errgroup.Group
	for _, run := range []func(context.Context){
		func(ctx context.Context) { f.watchSites(ctx, sites) },
		func(ctx context.Context) { f.watchFlows(ctx, flows) },
		f.pace,
		func(ctx context.Context) { f.write(ctx, flows) },
	} {
		group.Go(func() error {
			run(ctx)
			return nil
		})
	}
	return group.Wait()
}

// openWhenThere opens a bucket, waiting for it: an older installation declares it later. The error is the context's.
func openWhenThere[T proto.Message](ctx context.Context, f *Follower, bucket string) (*bus.KV[T], error) {
	for wait := retryDelay; ; wait = min(2*wait, time.Minute) {
		kv, err := bus.OpenKV[T](ctx, f.o.Bus, bucket)
		if err == nil {
			return kv, nil
		}
		if ctx.Err() == nil {
			f.o.Logger.WarnContext(ctx, "bandwidth cannot be limited before its bucket is opened", "bucket", bucket, "error", err)
		}
		if errors.Is(err, bus.ErrNotFound) { // there is no limit where nobody can have set one
			f.once.Do(func() { close(f.ready) })
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (f *Follower) watchSites(ctx context.Context, kv *bus.KV[*schedulerv1.SiteBandwidth]) {
	for ctx.Err() == nil {
		for u, err := range kv.Watch(ctx, bus.Key(f.o.Site)) {
			if err != nil {
				f.broke(ctx, "schedule", err)
				break
			}
			switch u.Kind {
			case bus.Put:
				f.adopt(ctx, u.Value)
			case bus.Deleted:
				f.setSchedule(nil)
			case bus.Current:
				f.once.Do(func() { close(f.ready) })
			}
		}
		_ = sleep(ctx, retryDelay)
	}
}

// adopt takes over a schedule. One that this program cannot use, because a newer one wrote it, is not taken for none: the last
// one stays, or else the lowest limit that it names.
func (f *Follower) adopt(ctx context.Context, b *schedulerv1.SiteBandwidth) {
	s, err := NewSchedule(b)
	if err == nil {
		f.setSchedule(s)
		return
	}
	f.mu.Lock()
	have := f.schedule
	f.mu.Unlock()
	f.o.Logger.ErrorContext(ctx, "the bandwidth's schedule cannot be used, set it again", "site", f.o.Site, "error", err, "kept", have != nil)
	if have == nil && smallest(b) > 0 {
		f.setSchedule(&Schedule{rate: smallest(b)})
	}
}

func (f *Follower) setSchedule(s *Schedule) {
	f.mu.Lock()
	f.schedule = s
	f.mu.Unlock()
	f.recompute()
	poke(f.kick)
}

func (f *Follower) watchFlows(ctx context.Context, kv *bus.KV[*uploaderv1.TransferDemand]) {
	for ctx.Err() == nil {
		for u, err := range kv.Watch(ctx, bus.Key(f.o.Site)+".*") {
			if err != nil {
				f.broke(ctx, "flows", err)
				break
			}
			if u.Kind == bus.Current {
				continue
			}
			f.see(u)
			f.recompute()
		}
		_ = sleep(ctx, retryDelay)
	}
}

func (f *Follower) broke(ctx context.Context, what string, err error) {
	if ctx.Err() == nil {
		f.o.Logger.WarnContext(ctx, "bandwidth: the last known state holds until the watch works again", "of", what, "error", err)
	}
}

// see notes a record. The bus's clock is not ours: the youngest record says how far it is ahead, and our own, written a moment
// ago, says so best.
func (f *Follower) see(u bus.Update[*uploaderv1.TransferDemand]) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ahead := u.Time.Sub(f.steady()); !u.Time.IsZero() && (!f.offsetOK || ahead > f.offset || u.Key == f.key()) {
		f.offset, f.offsetOK = ahead, true
	}
	if u.Kind != bus.Put {
		delete(f.others, u.Key)
		return
	}
	if u.Key == f.key() {
		return
	}
	d := Demand{Worker: u.Key}
	for c, name := range classNames {
		d.Streams[c] = int(u.Value.GetStreams()[name])
	}
	f.others[u.Key] = other{demand: d, at: u.Time, revision: u.Revision}
}

func (f *Follower) key() string { return bus.Key(f.o.Site, f.worker) }

// pace recomputes when the streams change and when time may have changed something.
func (f *Follower) pace(ctx context.Context) {
	timer := time.NewTimer(f.tick)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.kick:
		case <-timer.C:
		}
		f.recompute()
		poke(f.dirty)
		timer.Stop()
		f.mu.Lock()
		idle := f.schedule == nil
		f.mu.Unlock()
		if !idle {
			timer.Reset(f.tick)
		}
	}
}

// recompute brings the limiter to what is known now.
func (f *Follower) recompute() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	f.rate = f.schedule.Rate(f.o.Clock())
	if f.rate == 0 {
		f.part = Part{}
		f.o.Limiter.Unlimit()
		f.say()
		return
	}
	f.hold(now)
	f.age(now)
	self := Demand{Worker: f.key(), Streams: f.held}
	if !self.Any() {
		self.Streams[Delta] = 1 // what the first stream would have
	}
	demands := []Demand{self}
	for _, o := range f.others {
		demands = append(demands, o.demand)
	}
	f.part = Share(f.rate, demands, self.Worker)
	f.o.Limiter.Limit(f.part)
	f.say()
}

func (f *Follower) say() {
	if limited := f.rate > 0; limited != f.said {
		f.said = limited
		f.o.Logger.Info("bandwidth limit changed", "site", f.o.Site, "limited", limited, "site_bytes_per_second", f.rate)
	}
}

// hold follows the number of streams, downwards only after a while.
func (f *Follower) hold(now time.Time) {
	for c, n := range f.o.Limiter.Active() {
		if n >= f.held[c] || now.Sub(f.heldAt[c]) >= f.linger {
			f.held[c], f.heldAt[c] = n, now
		}
	}
}

// age forgets the workers whose records are too old. While the bus is away nobody can renew any, and what was known is
// kept; after it came back, everybody has time to.
func (f *Follower) age(now time.Time) {
	switch connected := f.o.Bus.State() == bus.Connected; {
	case !connected:
		f.away, f.backAt = true, time.Time{}
		return
	case f.away && f.backAt.IsZero():
		f.backAt = now
		return
	case f.away && now.Sub(f.backAt) < f.expiry:
		return
	}
	f.away = false
	for key, o := range f.others {
		if f.ageOf(o) > f.expiry {
			o.demand.Streams = [Classes]int{} // write deletes it one day
			f.others[key] = o
		}
	}
}

// steady is the time by a clock that nobody sets.
func (f *Follower) steady() time.Time { return f.start.Round(0).Add(time.Since(f.start)) }

func (f *Follower) ageOf(o other) time.Duration { return f.steady().Add(f.offset).Sub(o.at) }

// write keeps the worker's record what it should be, and takes it away in the end.
func (f *Follower) write(ctx context.Context, kv *bus.KV[*uploaderv1.TransferDemand]) {
	r := record{kv: kv, refresh: f.refresh, key: f.key(), site: "sites/" + f.o.Site, worker: f.worker}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
		defer cancel()
		if err := r.remove(end); err != nil {
			f.o.Logger.InfoContext(ctx, "bandwidth: own record not deleted, others will", "error", err)
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.dirty:
		}
		if f.o.Bus.State() != bus.Connected {
			continue // the next tick asks again
		}
		f.mu.Lock()
		streams, rate := f.held, f.rate
		old := f.gone()
		f.mu.Unlock()
		wctx, cancel := context.WithTimeout(ctx, writeTimeout)
		err := r.keep(wctx, streams, rate > 0)
		for key, revision := range old {
			err = errors.Join(err, ignoreRevision(kv.Delete(wctx, key, revision)))
		}
		cancel()
		if err != nil && ctx.Err() == nil {
			f.o.Logger.DebugContext(ctx, "bandwidth: record not written", "error", err)
		}
		if err := sleep(ctx, f.writeGap); err != nil {
			return
		}
	}
}

// gone is the records that dead workers left. The lock is held.
func (f *Follower) gone() (old map[string]uint64) {
	for key, o := range f.others {
		if !f.away && f.ageOf(o) > f.cadence.litter {
			if old == nil {
				old = map[string]uint64{}
			}
			old[key] = o.revision
			delete(f.others, key)
		}
		if len(old) == 16 {
			break
		}
	}
	return old
}

func ignoreRevision(err error) error {
	if errors.Is(err, bus.ErrRevision) {
		return nil // it lives again, or somebody else was first
	}
	return err
}

// record is the worker's own in bucket "flows".
type record struct {
	kv                *bus.KV[*uploaderv1.TransferDemand]
	key, site, worker string
	refresh           time.Duration

	revision uint64
	unknown  bool // what is stored is not known
	streams  [Classes]int
	at       time.Time
}

// keep writes the streams when they changed or were last said a while ago, and removes the record when there are none.
func (r *record) keep(ctx context.Context, streams [Classes]int, limited bool) error {
	if !limited || streams == [Classes]int{} {
		return r.remove(ctx)
	}
	now := time.Now()
	if r.revision != 0 && !r.unknown && streams == r.streams && now.Sub(r.at) < r.refresh {
		return nil
	}
	d := &uploaderv1.TransferDemand{Site: r.site, Worker: r.worker, Streams: map[string]int32{}, Time: timestamppb.New(now)}
	for c, n := range streams {
		if n > 0 {
			d.Streams[classNames[c]] = int32(min(n, maxStreams))
		}
	}
	if err := r.look(ctx); err != nil {
		return err
	}
	var err error
	if r.revision == 0 {
		r.revision, err = r.kv.Create(ctx, r.key, d)
	} else {
		r.revision, err = r.kv.Update(ctx, r.key, d, r.revision)
	}
	if err != nil {
		r.unknown = true
		return fmt.Errorf("say the demand: %w", err)
	}
	r.streams, r.at = streams, now
	return nil
}

// look finds out what is stored after a write whose outcome is not known, or that another one overtook.
func (r *record) look(ctx context.Context) error {
	if !r.unknown {
		return nil
	}
	_, revision, err := r.kv.Get(ctx, r.key)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		revision = 0
	case err != nil:
		return err
	}
	r.revision, r.unknown = revision, false
	return nil
}

func (r *record) remove(ctx context.Context) error {
	if err := r.look(ctx); err != nil || r.revision == 0 {
		return err
	}
	if err := r.kv.Delete(ctx, r.key, r.revision); err != nil {
		r.unknown = true
		return fmt.Errorf("take the demand back: %w", err)
	}
	r.revision, r.streams = 0, [Classes]int{}
	return nil
}

// Workers lists the workers of the site that count now, this one not among them, for tests and status.
func (f *Follower) Workers() (names []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, o := range f.others {
		if o.demand.Any() {
			names = append(names, key)
		}
	}
	slices.Sort(names)
	return names
}
