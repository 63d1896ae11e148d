package azure

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"
)

// maxClockAge is how long storage time is carried on by this machine's clock before the service is asked again.
const maxClockAge = 30 * time.Second

// clock knows storage time from the Date of every answer. The header has whole seconds, cut off, and is as old as the answer
// was on its way: so it bounds storage time from below. Of several answers the highest bound is kept.
type clock struct {
	mu    sync.Mutex
	zero  time.Time     // a reading of the monotonic clock, and of the wall clock
	ahead time.Duration // storage time is at least zero's wall time + the time since zero + ahead
	seen  time.Time     // when the last answer came
}

// Do is a policy of the SDK's pipeline.
func (c *clock) Do(req *policy.Request) (*http.Response, error) {
	resp, err := req.Next()
	if err == nil && resp != nil {
		c.observe(resp.Header.Get("Date"), time.Now())
	}
	return resp, err
}

func (c *clock) observe(header string, now time.Time) {
	date, err := http.ParseTime(header)
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.zero.IsZero() || c.slept(now) || c.future(date, now) {
		c.zero, c.ahead, c.seen = now, date.Sub(now.Round(0)), now
		return
	}
	c.ahead = max(c.ahead, date.Sub(c.zero.Round(0).Add(now.Sub(c.zero))))
	c.seen = now
}

// future tells whether what is kept is more than a second and a slow answer ahead of a fresh header: the service's clock
// was set back, or ours ran fast; the caller holds mu.
func (c *clock) future(date, now time.Time) bool {
	return c.at(now).Sub(date) > time.Minute
}

// slept tells whether the two clocks of this machine disagree about the time since zero: it was suspended (the monotonic
// clock stood still) or its clock was set; the caller holds mu.
func (c *clock) slept(now time.Time) bool {
	d := now.Round(0).Sub(c.zero.Round(0)) - now.Sub(c.zero)
	return d > time.Second || d < -time.Second
}

// at is storage time; the caller holds mu.
func (c *clock) at(now time.Time) time.Time {
	return c.zero.Round(0).Add(now.Sub(c.zero) + c.ahead).UTC()
}

// now returns storage time unless what is known is too old.
func (c *clock) now(now time.Time) (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.zero.IsZero() || c.slept(now) || now.Sub(c.seen) > maxClockAge {
		return time.Time{}, false
	}
	return c.at(now), true
}

// Now is storage time, from the Date of the answers to all calls. When the last one is older than half a minute, or this
// machine slept, the service is asked; an answer that refuses the caller has a Date as well.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	const op = "storage time"
	if err := s.ready(ctx); err != nil {
		return time.Time{}, s.wrap(op, "", err)
	}
	if at, ok := s.clock.now(time.Now()); ok {
		return at, nil
	}
	_, err := s.call(ctx, call{op: op}, func(ctx context.Context) error {
		one := int32(1)
		_, err := s.client.NewListContainersPager(&service.ListContainersOptions{MaxResults: &one}).NextPage(ctx)
		return err
	})
	if at, ok := s.clock.now(time.Now()); ok {
		return at, nil
	}
	if err == nil {
		err = s.wrap(op, "", errNoDate)
	}
	return time.Time{}, err
}
