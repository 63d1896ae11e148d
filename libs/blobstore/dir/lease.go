package dir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// leaseV is the version of a lease file.
const leaseV = 1

// leaseInfo is who holds a blob; for a block blob it is kept in a file of its own.
type leaseInfo struct {
	V        int               `json:"v"`
	Lease    blobstore.LeaseID `json:"lease"`
	Expires  int64             `json:"expires_unix_ns"`
	Duration int64             `json:"duration_ns"`
}

// readLease returns a block blob's lease; none is the zero value.
func readLease(path string) (leaseInfo, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return leaseInfo{}, nil
	}
	if err != nil {
		return leaseInfo{}, err
	}
	var l leaseInfo
	if err := json.Unmarshal(raw, &l); err != nil {
		return leaseInfo{}, fmt.Errorf("lease file: %w", err)
	}
	if l.V != leaseV {
		return leaseInfo{}, fmt.Errorf("%w: lease file version %d, this program knows %d", blobstore.ErrInvalid, l.V, leaseV)
	}
	return l, nil
}

// writeLease replaces a block blob's lease durably.
func (c *container) writeLease(r ref, l leaseInfo) error {
	l.V = leaseV
	raw, err := json.Marshal(l)
	if err != nil {
		return err
	}
	tmp := c.s.tempPath()
	defer os.Remove(tmp)
	if err := c.s.writeFile(tmp, append(raw, '\n')); err != nil {
		return err
	}
	return c.place(r.parent(), func() error { return os.Rename(tmp, r.lease()) })
}

// checkLease checks the lease that a call carries against the blob's. needed is false for calls that a
// leased blob accepts without one.
func (s *Store) checkLease(holder blobstore.LeaseID, expires int64, given blobstore.LeaseID, needed bool) error {
	active := holder != "" && s.opts.Clock().UnixNano() < expires
	if given != "" && (!active || holder != given) || given == "" && active && needed {
		return blobstore.ErrLeaseConflict
	}
	return nil
}

// changeLease runs fn on the blob's lease and makes the result durable. It holds the state lock only, so a
// lease can be renewed while a snapshot is copied; page writes that passed their check have landed.
func (c *container) changeLease(ctx context.Context, op, name string, fn func(leaseInfo) (leaseInfo, error)) error {
	r, err := c.begin(ctx, name)
	if err != nil {
		return c.wrap(op, name, err)
	}
	g, err := c.s.lockLease(ctx, c.name, name)
	if err != nil {
		return c.wrap(op, name, err)
	}
	defer g.release()
	if _, err := os.Lstat(r.block()); err == nil {
		l, err := readLease(r.lease())
		if err == nil {
			was := l
			if l, err = fn(l); err == nil && l != was {
				err = c.writeLease(r, l)
			}
		}
		return c.wrap(op, name, err)
	}
	h, err := c.openPages(ctx, r)
	if err != nil {
		return c.wrap(op, name, err)
	}
	defer h.put()
	st, err := h.count.readState()
	if err != nil {
		return c.wrap(op, name, err)
	}
	was := leaseInfo{Lease: st.lease, Expires: st.leaseEnd, Duration: st.leaseDur}
	l, err := fn(was)
	if err != nil || l == was {
		return c.wrap(op, name, err)
	}
	st.lease, st.leaseEnd, st.leaseDur = l.Lease, l.Expires, l.Duration
	return c.wrap(op, name, c.s.writeState(h.state, &st, true))
}

// AcquireLease takes or renews the lease under id.
func (c *container) AcquireLease(ctx context.Context, name string, id blobstore.LeaseID, duration time.Duration) error {
	const op = "acquire lease"
	if err := errors.Join(blobstore.CheckLeaseID(id), blobstore.CheckLeaseDuration(duration)); err != nil {
		return c.wrap(op, name, err)
	}
	return c.changeLease(ctx, op, name, func(l leaseInfo) (leaseInfo, error) {
		now := c.s.opts.Clock().UnixNano()
		if l.Lease != "" && l.Lease != id && now < l.Expires {
			return l, blobstore.ErrLeaseConflict
		}
		return leaseInfo{V: l.V, Lease: id, Expires: now + int64(duration), Duration: int64(duration)}, nil
	})
}

// RenewLease extends an active lease by its duration.
func (c *container) RenewLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	return c.changeLease(ctx, "renew lease", name, func(l leaseInfo) (leaseInfo, error) {
		now := c.s.opts.Clock().UnixNano()
		if id == "" || l.Lease != id || now >= l.Expires {
			return l, blobstore.ErrLeaseConflict
		}
		l.Expires = now + l.Duration
		return l, nil
	})
}

// ReleaseLease ends the lease that id holds.
func (c *container) ReleaseLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	return c.changeLease(ctx, "release lease", name, func(l leaseInfo) (leaseInfo, error) {
		if id == "" || l.Lease != id {
			return l, blobstore.ErrLeaseConflict
		}
		return leaseInfo{V: l.V}, nil
	})
}

// BreakLease ends any lease.
func (c *container) BreakLease(ctx context.Context, name string) error {
	return c.changeLease(ctx, "break lease", name, func(l leaseInfo) (leaseInfo, error) {
		return leaseInfo{V: l.V}, nil
	})
}
