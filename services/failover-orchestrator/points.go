package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// pointSession is how long an opened point stays pinned after it was opened or read last. A read lengthens that once less
	// than pointRenew is left, so the record in storage is written at most every pointSession - pointRenew.
	pointSession = 15 * time.Minute
	pointRenew   = 10 * time.Minute
	// maxSessions is how many sessions this process keeps at hand; any other is found by its pin.
	maxSessions = 64
	// maxLineageSessions is how many points of one lineage may be open at once.
	maxLineageSessions = 64
	// storageTimeout bounds one change of the pins.
	storageTimeout = 20 * time.Second
	// unknownFor is how long it is remembered that no pin has a session's name.
	unknownFor = 5 * time.Second
	maxUnknown = 1024
	// searchParallel is how many lineages are searched for a pin at once.
	searchParallel = 8

	restorePrefix = "restore/"
)

// pointSessions are the points that are open. All that matters is in storage: the pin names lineage and manifest, so any
// instance goes on with a session that another one began.
type pointSessions struct {
	s      *Service
	reader *PointReader

	mu      sync.Mutex
	open    map[string]*openPoint
	unknown map[string]time.Time
	clock   uint64        // of uses
	search  chan struct{} // one search at a time
}

// openPoint is a session. rep and m do not change.
type openPoint struct {
	id  string
	rep *replica.Replica
	m   *replica.Manifest

	mu       sync.Mutex
	until    time.Time     // of the pin, by storage time
	ahead    time.Duration // of storage time before our clock
	renewing bool
	used     uint64 // guarded by pointSessions.mu
}

func newPointSessions(s *Service) *pointSessions {
	return &pointSessions{s: s, reader: NewPointReader(), open: map[string]*openPoint{}, unknown: map[string]time.Time{}, search: make(chan struct{}, 1)}
}

// left is how long the session lasts yet.
func (p *openPoint) left(now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.until.Sub(now.Add(p.ahead))
}

func sessionGone(id string) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND, "no recovery point is open as session %s", id).With("session", id)
}

// begin opens a point, or finds the session open and lengthens it.
func (ps *pointSessions) begin(ctx context.Context, lineage replica.Lineage, title, selector, id string) (*openPoint, error) {
	want, err := parseSelector(selector)
	if err != nil {
		return nil, err
	}
	rep, err := replica.Open(ctx, ps.s.deps.Store, lineage)
	if err != nil {
		return nil, chainError(err, "open the replica of %s", title)
	}
	now, err := ps.s.deps.Store.Now(ctx)
	if err != nil {
		return nil, chainError(err, "ask storage for the time")
	}
	pins, err := rep.Pins(ctx)
	if err != nil {
		return nil, chainError(err, "read the pins of %s", title)
	}
	seq, err := ps.chosen(ctx, rep, title, pins, want, id, now)
	if err != nil {
		return nil, err
	}
	p := &openPoint{id: id, rep: rep}
	if err := ps.pin(ctx, p, seq); err != nil {
		return nil, err
	}
	if p.m, err = rep.Manifest(ctx, seq); err != nil {
		return nil, chainError(err, "read manifest %d of %s", seq, title)
	}
	ps.keep(p)
	return p, nil
}

// chosen is the manifest of the session's pin, if it has one, or else of the point that is wanted.
func (ps *pointSessions) chosen(ctx context.Context, rep *replica.Replica, title string, pins []replica.Pin, want *failoverv1.PointSelector, id string, now time.Time) (replica.Seq, error) {
	points, err := rep.Points(ctx)
	if err != nil {
		return 0, chainError(err, "list the recovery points of %s", title)
	}
	open := 0
	for _, pin := range pins {
		if !isSession(pin) || !now.Before(pin.Until) {
			continue
		}
		if pin.Owner != restorePrefix+id {
			open++
			continue
		}
		i := slices.IndexFunc(points, func(p replica.Point) bool { return p.Seq == pin.Seq })
		if i < 0 {
			return 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_FOUND, "session %s has manifest %d open, which is no recovery point", id, pin.Seq)
		}
		if n := want.GetOrdinal(); n != 0 && n != uint64(points[i].Ordinal) {
			return 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "session %s has point %d open, not %d", id, points[i].Ordinal, n)
		}
		return pin.Seq, nil
	}
	if open >= maxLineageSessions {
		return 0, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "%d points of %s are open already: close some, or wait until they end", open, title)
	}
	p, err := choose(points, want)
	return p.Seq, err
}

// isSession says whether a pin is that of an opened point: "restore/<session>".
func isSession(p replica.Pin) bool {
	return strings.HasPrefix(p.Owner, restorePrefix)
}

// parseSelector reads a point as the API has it.
func parseSelector(s string) (*failoverv1.PointSelector, error) {
	switch s {
	case "", "latest":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Latest{Latest: true}}, nil
	case "latest-processed":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestProcessed{LatestProcessed: true}}, nil
	case "latest-app":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestApp{LatestApp: true}}, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "point %q is not latest, latest-processed, latest-app or a number", s)
	}
	return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Ordinal{Ordinal: n}}, nil
}

// pin keeps the point for another pointSession, by storage time.
func (ps *pointSessions) pin(ctx context.Context, p *openPoint, seq replica.Seq) error {
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	now, err := ps.s.deps.Store.Now(ctx)
	if err != nil {
		return chainError(err, "ask storage for the time")
	}
	until, ahead := now.Add(pointSession), now.Sub(ps.s.deps.Clock())
	err = p.rep.Pin(ctx, replica.Pin{Seq: seq, Owner: restorePrefix + p.id, Until: until, Reason: "read without restoring it"})
	if err != nil {
		return chainError(err, "pin manifest %d", seq)
	}
	p.mu.Lock()
	p.until, p.ahead = until, ahead
	p.mu.Unlock()
	return nil
}

// find returns an open session and lengthens it when that is due.
func (ps *pointSessions) find(ctx context.Context, id string) (*openPoint, error) {
	p, err := ps.look(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := ps.lengthen(ctx, p); err != nil {
		return nil, err
	}
	return p, nil
}

func (ps *pointSessions) look(ctx context.Context, id string) (*openPoint, error) {
	if p := ps.known(id); p != nil {
		return p, nil
	}
	if !ps.mayExist(id) {
		return nil, sessionGone(id)
	}
	select {
	case ps.search <- struct{}{}:
		defer func() { <-ps.search }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if p := ps.known(id); p != nil { // found by the search before
		return p, nil
	}
	lineage, pin, ahead, err := ps.searchPin(ctx, id)
	if err != nil {
		return nil, err
	}
	if lineage == "" {
		ps.remember(id)
		return nil, sessionGone(id)
	}
	rep, err := replica.Open(ctx, ps.s.deps.Store, lineage)
	if err != nil {
		return nil, chainError(err, "open lineage %s", lineage)
	}
	p := &openPoint{id: id, rep: rep, until: pin.Until, ahead: ahead}
	if p.m, err = rep.Manifest(ctx, pin.Seq); err != nil {
		return nil, chainError(err, "read manifest %d of lineage %s", pin.Seq, lineage)
	}
	ps.keep(p)
	return p, nil
}

// known is a session at hand that is not over.
func (ps *pointSessions) known(id string) *openPoint {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.open[id]
	if p == nil {
		return nil
	}
	if p.left(ps.s.deps.Clock()) <= 0 { // its pin may have been lengthened elsewhere: storage says
		delete(ps.open, id)
		return nil
	}
	ps.clock++
	p.used = ps.clock
	return p
}

// keep has a session at hand, in place of the one that was not used for longest.
func (ps *pointSessions) keep(p *openPoint) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.unknown, p.id)
	delete(ps.open, p.id)
	for len(ps.open) >= maxSessions {
		oldest := ""
		for id, o := range ps.open {
			if oldest == "" || o.used < ps.open[oldest].used {
				oldest = id
			}
		}
		delete(ps.open, oldest)
	}
	ps.clock++
	p.used = ps.clock
	ps.open[p.id] = p
}

func (ps *pointSessions) drop(p *openPoint) {
	ps.mu.Lock()
	if ps.open[p.id] == p {
		delete(ps.open, p.id)
	}
	ps.mu.Unlock()
	ps.reader.forget(p.rep.Lineage(), p.m.Seq)
}

// mayExist is false for a session that was searched for in vain just now.
func (ps *pointSessions) mayExist(id string) bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	at, ok := ps.unknown[id]
	return !ok || ps.s.deps.Clock().Sub(at) >= unknownFor
}

func (ps *pointSessions) remember(id string) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if len(ps.unknown) >= maxUnknown {
		clear(ps.unknown)
	}
	ps.unknown[id] = ps.s.deps.Clock()
}

// searchPin looks for a session's pin in the lineages of all VMs. An empty lineage: there is none that is not over.
func (ps *pointSessions) searchPin(ctx context.Context, id string) (found replica.Lineage, pin replica.Pin, ahead time.Duration, err error) {
	vms, err := ps.s.vms.List(ctx, "")
	if err != nil {
		return "", pin, 0, storeError(err)
	}
	now, err := ps.s.deps.Store.Now(ctx)
	if err != nil {
		return "", pin, 0, chainError(err, "ask storage for the time")
	}
	var mu sync.Mutex
	var problems []error
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(searchParallel)
	for _, e := range vms {
		lineage, err := replica.ParseLineage(e.Value.Lineage)
		if err != nil {
			continue // not replicated yet
		}
		group.Go(func() error {
			pins, err := replica.ReadPins(gctx, ps.s.deps.Store, lineage)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, replica.ErrCorrupt): // then nothing of it can be read either
				ps.s.log.WarnContext(ctx, "the pins of a lineage cannot be read", "lineage", lineage, "error", err)
			case err != nil:
				problems = append(problems, err)
			}
			i := slices.IndexFunc(pins, func(p replica.Pin) bool { return p.Owner == restorePrefix+id && now.Before(p.Until) })
			if i >= 0 {
				found, pin = lineage, pins[i]
				return errFound
			}
			return nil
		})
	}
	if err := group.Wait(); err == nil && len(problems) > 0 { // it may be where nothing could be read
		return "", pin, 0, chainError(errors.Join(problems...), "look for session %s", id)
	}
	return found, pin, now.Sub(ps.s.deps.Clock()), nil
}

// errFound ends a search.
var errFound = errors.New("found")

// lengthen writes a session's pin anew when it is due. One caller does it, the others go on; and they all go on when it
// fails, as long as the pin lasts.
func (ps *pointSessions) lengthen(ctx context.Context, p *openPoint) error {
	left := p.left(ps.s.deps.Clock())
	if left >= pointRenew {
		return nil
	}
	p.mu.Lock()
	if p.renewing {
		p.mu.Unlock()
		return nil
	}
	p.renewing = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.renewing = false
		p.mu.Unlock()
	}()
	err := ps.renew(ctx, p)
	if err == nil || errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND) {
		return err
	}
	ps.s.log.WarnContext(ctx, "the pin of a point that is being read was not lengthened", "session", p.id, "left", left, "error", err)
	return nil
}

// renew lengthens a pin that is still there: a session that was closed elsewhere does not come back.
func (ps *pointSessions) renew(ctx context.Context, p *openPoint) error {
	pins, err := p.rep.Pins(ctx)
	if err != nil {
		return fmt.Errorf("read the pins: %w", err)
	}
	if !slices.ContainsFunc(pins, func(q replica.Pin) bool { return q.Owner == restorePrefix+p.id && q.Seq == p.m.Seq }) {
		ps.drop(p)
		return sessionGone(p.id)
	}
	return ps.pin(ctx, p, p.m.Seq)
}

// end closes a session. It is success when there is none.
func (ps *pointSessions) end(ctx context.Context, id string) error {
	p, err := ps.look(ctx, id)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_SESSION_NOT_FOUND) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	if err := p.rep.Unpin(ctx, restorePrefix+id, 0); err != nil {
		return chainError(err, "unpin point %d", p.m.Point)
	}
	ps.drop(p)
	return nil
}
