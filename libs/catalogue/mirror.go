package catalogue

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// Truth is what the source of a record says about it.
type Truth struct {
	// Record as it is; nil when the source has none. Revision, Written and Ended are not looked at.
	Record *Record
	// Ended says that there is none because it ended: there is evidence of it. Without a record and without evidence the
	// catalogue keeps what it has, since records that were lost look the same.
	Ended bool
}

// Source is the truth that a mirror follows. Its methods may be called from one goroutine of the mirror at a time.
type Source interface {
	// Names are the blob names of all records that the source has.
	Names(ctx context.Context) ([]string, error)
	// Truth says what a record is now. It is asked after the catalogue was read.
	Truth(ctx context.Context, name string) (Truth, error)
}

// MirrorOptions of a Mirror. Catalogue, Source and Prefixes are required.
type MirrorOptions struct {
	Catalogue *Catalogue
	Source    Source
	// Prefixes of the blob names that this mirror writes; others are not its own.
	Prefixes []string
	// Every is how often all is compared; 10 minutes by default.
	Every time.Duration
	// Retry is the pause after a failure, doubled up to a minute; 1 second by default.
	Retry time.Duration
	// Timeout bounds the work on one record; 30 seconds by default.
	Timeout time.Duration
	Now     func() time.Time
	Logger  *slog.Logger
}

const (
	mirrorEvery = 10 * time.Minute
	mirrorRetry = time.Second
	maxRetry    = time.Minute
	// maxTouched bounds what is remembered of announcements; above it everything is compared.
	maxTouched = 10_000
)

// Mirror brings the catalogue to what its source says: at its start, periodically, and when it is told of a change. Storage
// that does not answer is tried again, for ever; nobody waits for it. Make it with NewMirror and Run it in one process at a
// time (in two it does no harm). Touch may be called by anybody at any time.
type Mirror struct {
	o    MirrorOptions
	wake chan struct{}

	// Of the one goroutine that runs:
	comparing bool            // a comparison of everything is not done yet
	lost      map[string]bool // records of which the source knows nothing

	mu      sync.Mutex
	touched map[string]bool
	all     bool // compare everything
	lag     Lag
}

// Lag is how far the catalogue is behind.
type Lag struct {
	// Since is when the catalogue was first found to be behind; zero when it is not.
	Since time.Time
	// Err is what stood in the way last.
	Err error
	// Unknown are records that the catalogue has, not ended, of which the source knows nothing: it lost them, or they
	// ended long ago while storage did not answer. They are kept until a person decides.
	Unknown []string
	// Runs counts full comparisons that succeeded.
	Runs int64
}

// NewMirror returns a mirror that has not compared anything yet.
func NewMirror(o MirrorOptions) *Mirror {
	if o.Every == 0 {
		o.Every = mirrorEvery
	}
	if o.Retry == 0 {
		o.Retry = mirrorRetry
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Mirror{o: o, wake: make(chan struct{}, 1), touched: map[string]bool{}, lost: map[string]bool{}, all: true}
}

// Touch says that something about records may have changed. It never blocks.
func (m *Mirror) Touch(names ...string) {
	m.mu.Lock()
	for _, name := range names {
		if len(m.touched) >= maxTouched {
			m.all = true
			break
		}
		m.touched[name] = true
	}
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Lag says how far the catalogue is behind.
func (m *Mirror) Lag() Lag {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lag
}

// Run works until ctx ends.
func (m *Mirror) Run(ctx context.Context) {
	tick := time.NewTicker(m.o.Every)
	defer tick.Stop()
	retry := m.o.Retry
	for {
		again, err := m.round(ctx)
		if ctx.Err() != nil {
			return
		}
		m.note(ctx, err)
		if !again {
			retry = m.o.Retry
			select {
			case <-ctx.Done():
				return
			case <-m.wake:
			case <-tick.C:
				m.mu.Lock()
				m.all = true
				m.mu.Unlock()
			}
			continue
		}
		t := time.NewTimer(retry) // a change meanwhile does not hurry it: storage is the trouble
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
		retry = min(2*retry, maxRetry)
	}
}

// note keeps how it went, and logs it once each time it changes.
func (m *Mirror) note(ctx context.Context, err error) {
	m.mu.Lock()
	was := m.lag
	m.lag.Err = err
	switch {
	case err == nil:
		m.lag.Since = time.Time{}
	case was.Since.IsZero():
		m.lag.Since = m.o.Now()
	}
	m.mu.Unlock()
	switch {
	case err != nil && was.Err == nil:
		m.o.Logger.WarnContext(ctx, "the catalogue in storage is behind: a recovery from storage alone would not see the latest names, policies and plans; it is tried again", "error", err)
	case err == nil && was.Err != nil:
		m.o.Logger.InfoContext(ctx, "the catalogue in storage is up to date again", "behind_for", m.o.Now().Sub(was.Since))
	}
}

// maxFailures ends a round: storage is away, and that need not be found out for each record.
const maxFailures = 3

// round does what is due. again says that something failed that another attempt may get done; it stays due. A record that
// cannot be read or written whatever one does is an error, and waits for the next comparison.
func (m *Mirror) round(ctx context.Context) (again bool, err error) {
	m.mu.Lock()
	all, due := m.all, m.touched
	m.all, m.touched = false, map[string]bool{}
	m.mu.Unlock()
	if all {
		names, err := m.everything(ctx)
		if err != nil {
			m.remember(true, due)
			return true, err
		}
		for _, name := range names {
			due[name] = true
		}
		m.comparing = true
	}
	var problems []error
	failures := 0
	for _, name := range slices.Sorted(maps.Keys(due)) {
		lost, err := m.one(ctx, name)
		if err == nil || errors.Is(err, ErrInvalid) || errors.Is(err, ErrNewer) {
			delete(due, name)
		} else {
			failures++
		}
		if err == nil && lost {
			m.lost[name] = true
		} else if err == nil {
			delete(m.lost, name)
		}
		problems = append(problems, err)
		if failures == maxFailures || ctx.Err() != nil {
			break
		}
	}
	if failures > 0 {
		m.remember(false, due)
	} else if m.comparing {
		m.comparing = false
		m.compared(ctx, slices.Sorted(maps.Keys(m.lost)))
	}
	return failures > 0, errors.Join(problems...)
}

// remember makes what was not done due again.
func (m *Mirror) remember(all bool, due map[string]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = m.all || all
	maps.Copy(m.touched, due)
}

// compared ends a comparison of everything. Records that nobody knows are logged when they are others than before.
func (m *Mirror) compared(ctx context.Context, names []string) {
	m.mu.Lock()
	was := m.lag.Unknown
	m.lag.Unknown = names
	m.lag.Runs++
	m.mu.Unlock()
	if len(names) > 0 && !slices.Equal(was, names) {
		m.o.Logger.WarnContext(ctx, "the catalogue in storage has records that are not known here; they are kept", "records", names[:min(len(names), 20)], "count", len(names))
	}
}

// everything are all names on either side.
func (m *Mirror) everything(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*m.o.Timeout)
	defer cancel()
	var names []string
	for _, prefix := range m.o.Prefixes { // each is asked alone: a role may not be allowed to see the others
		have, err := m.o.Catalogue.Names(ctx, prefix)
		if err != nil {
			return nil, err
		}
		names = append(names, have...)
	}
	known, err := m.o.Source.Names(ctx)
	if err != nil {
		return nil, fmt.Errorf("list what the catalogue is to have: %w", err)
	}
	return append(names, known...), nil
}

// writeTries bounds how often a record is read again because somebody else wrote it.
const writeTries = 4

// one brings one record to the truth. lost: the catalogue has it and the source knows nothing of it.
func (m *Mirror) one(ctx context.Context, name string) (lost bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, m.o.Timeout)
	defer cancel()
	for range writeTries {
		have, version, gerr := m.o.Catalogue.Get(ctx, name)
		if gerr != nil && !errors.Is(gerr, ErrInvalid) { // also ErrNewer: a newer program's record is not ours to change
			return false, gerr
		}
		truth, terr := m.o.Source.Truth(ctx, name) // after the read: see the package's first invariant
		if terr != nil {
			return false, fmt.Errorf("read what catalogue record %s is to be: %w", name, terr)
		}
		var want *Record
		switch {
		case truth.Record != nil:
			w := *truth.Record
			w.Ended = time.Time{}
			want = &w
		case have == nil:
			return false, gerr // nothing to end; a damaged record that nobody knows stays as it is
		case !have.Ended.IsZero():
			return false, nil
		case !truth.Ended:
			return true, nil
		default:
			want = have.ended(m.o.Now().UTC().Truncate(time.Millisecond))
		}
		if have != nil && want.same(have) {
			return false, nil
		}
		want.Written = m.o.Now().UTC().Truncate(time.Millisecond)
		_, err = m.o.Catalogue.Put(ctx, want, version)
		if !errors.Is(err, ErrStale) {
			return false, err
		}
	}
	return false, err
}
