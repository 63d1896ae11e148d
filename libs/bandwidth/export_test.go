package bandwidth

import "time"

// Hurry makes a follower n times as quick, and tidy.
func (f *Follower) Hurry(n time.Duration) *Follower {
	c := &f.cadence
	for _, d := range []*time.Duration{&c.linger, &c.tick, &c.refresh, &c.writeGap, &c.expiry} {
		*d /= n
	}
	c.litter = 2 * c.expiry
	return f
}
