package azure

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/lease"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Container returns a handle.
func (s *Store) Container(name string) blobstore.Container {
	return &ctr{s: s, name: name, client: s.client.NewContainerClient(name)}
}

// CreateContainer makes a container. One who may not make any succeeds where it exists and he may list it.
func (s *Store) CreateContainer(ctx context.Context, name string) error {
	const op = "create container"
	if err := blobstore.CheckContainerName(name); err != nil {
		return s.wrap(op, name, err)
	}
	c := s.client.NewContainerClient(name)
	_, err := s.call(ctx, call{op: op, name: name}, func(ctx context.Context) error {
		_, err := c.Create(ctx, nil)
		if bloberror.HasCode(err, bloberror.ContainerAlreadyExists) {
			return nil
		}
		return err
	})
	if errors.Is(err, blobstore.ErrPermission) {
		_, lerr := s.call(ctx, call{op: op, name: name}, func(ctx context.Context) error {
			one := int32(1)
			_, err := c.NewListBlobsFlatPager(&container.ListBlobsFlatOptions{MaxResults: &one}).NextPage(ctx)
			return err
		})
		if lerr == nil {
			return nil
		}
	}
	return err
}

// ListContainers pages through the account.
func (s *Store) ListContainers(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := s.ready(ctx); err != nil {
			yield("", s.wrap("list containers", "", err))
			return
		}
		o := &service.ListContainersOptions{Prefix: &prefix}
		for more := true; more; more = value(o.Marker) != "" {
			var page service.ListContainersResponse
			_, err := s.call(ctx, call{op: "list containers"}, func(ctx context.Context) (err error) {
				page, err = s.client.NewListContainersPager(o).NextPage(ctx) // one per try: a pager that failed once fails for ever
				return err
			})
			o.Marker = page.NextMarker
			if err != nil {
				yield("", err)
				return
			}
			for _, c := range page.ContainerItems {
				if !yield(value(c.Name), nil) {
					return
				}
			}
		}
	}
}

// List pages through the container. The service cannot begin after a name: pages before it are read and skipped.
func (c *ctr) List(ctx context.Context, prefix, after string) iter.Seq2[blobstore.Properties, error] {
	return func(yield func(blobstore.Properties, error) bool) {
		c.list(ctx, "list", &container.ListBlobsFlatOptions{Prefix: &prefix, Include: container.ListBlobsInclude{Metadata: true}},
			func(p blobstore.Properties, err error) bool {
				if err == nil && p.Name <= after {
					return true
				}
				return yield(p, err)
			})
	}
}

func (c *ctr) list(ctx context.Context, op string, o *container.ListBlobsFlatOptions, yield func(blobstore.Properties, error) bool) {
	none := blobstore.Properties{}
	err := blobstore.CheckContainerName(c.name)
	if err == nil {
		err = c.s.ready(ctx)
	}
	if err != nil {
		yield(none, c.s.wrap(op, c.name, err))
		return
	}
	for more := true; more; more = value(o.Marker) != "" {
		var page container.ListBlobsFlatResponse
		_, err := c.s.call(ctx, call{op: op, name: c.name}, func(ctx context.Context) (err error) {
			page, err = c.client.NewListBlobsFlatPager(o).NextPage(ctx) // one per try, as above
			return err
		})
		o.Marker = page.NextMarker
		if err != nil {
			yield(none, err)
			return
		}
		if page.Segment == nil {
			continue
		}
		for _, b := range page.Segment.BlobItems {
			if !yield(item(b), nil) {
				return
			}
		}
	}
}

// ListSnapshots lists the names that begin with the blob's, where it and its snapshots come first. The service has the oldest
// first, the emulator the newest.
func (c *ctr) ListSnapshots(ctx context.Context, name string) iter.Seq2[blobstore.Properties, error] {
	const op = "list snapshots"
	return func(yield func(blobstore.Properties, error) bool) {
		err := c.begin(ctx, op, name)
		var found bool
		var all []blobstore.Properties
		if err == nil {
			c.list(ctx, op, &container.ListBlobsFlatOptions{Prefix: &name, Include: container.ListBlobsInclude{Metadata: true, Snapshots: true}},
				func(p blobstore.Properties, lerr error) bool {
					if err = lerr; err != nil || p.Name != name {
						return false
					}
					found = true
					if p.Snapshot != "" {
						all = append(all, p)
					}
					return true
				})
		}
		if err == nil && !found {
			err = c.wrap(op, name, blobstore.ErrNotFound)
		}
		if err != nil {
			yield(blobstore.Properties{}, err)
			return
		}
		slices.SortFunc(all, func(a, b blobstore.Properties) int { return strings.Compare(string(a.Snapshot), string(b.Snapshot)) })
		for _, p := range all {
			if !yield(p, nil) {
				return
			}
		}
	}
}

// leased runs a lease call on a blob.
func (c *ctr) leased(ctx context.Context, op, name string, id blobstore.LeaseID, do func(ctx context.Context, l *lease.BlobClient) error) (lost bool, err error) {
	if err := c.begin(ctx, op, name); err != nil {
		return false, err
	}
	o := &lease.BlobClientOptions{}
	if id != "" {
		text := string(id)
		o.LeaseID = &text
	}
	l, err := lease.NewBlobClient(c.client.NewBlobClient(name), o)
	if err != nil {
		return false, c.wrap(op, name, err)
	}
	return c.s.call(ctx, call{op: op, name: c.key(name), blob: true}, func(ctx context.Context) error { return do(ctx, l) })
}

// AcquireLease proposes the same id with every try: a try whose answer was lost is renewed by the next.
func (c *ctr) AcquireLease(ctx context.Context, name string, id blobstore.LeaseID, duration time.Duration) error {
	const op = "acquire lease"
	if err := errors.Join(blobstore.CheckLeaseID(id), blobstore.CheckLeaseDuration(duration)); err != nil {
		return c.wrap(op, name, err)
	}
	_, err := c.leased(ctx, op, name, id, func(ctx context.Context, l *lease.BlobClient) error {
		_, err := l.AcquireLease(ctx, int32((duration+time.Second-1)/time.Second), nil)
		return err
	})
	return err
}

// RenewLease extends the lease.
func (c *ctr) RenewLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	const op = "renew lease"
	if err := blobstore.CheckLeaseID(id); err != nil {
		return c.wrap(op, name, err)
	}
	_, err := c.leased(ctx, op, name, id, func(ctx context.Context, l *lease.BlobClient) error {
		_, err := l.RenewLease(ctx, nil)
		return err
	})
	return err
}

// ReleaseLease ends the lease. After a lost answer it is enough that the lease is not ours.
func (c *ctr) ReleaseLease(ctx context.Context, name string, id blobstore.LeaseID) error {
	const op = "release lease"
	if err := blobstore.CheckLeaseID(id); err != nil {
		return c.wrap(op, name, err)
	}
	lost, err := c.leased(ctx, op, name, id, func(ctx context.Context, l *lease.BlobClient) error {
		_, err := l.ReleaseLease(ctx, nil)
		return err
	})
	if lost && errors.Is(err, blobstore.ErrLeaseConflict) {
		return nil
	}
	return err
}

// BreakLease ends whoever's lease at once.
func (c *ctr) BreakLease(ctx context.Context, name string) error {
	_, err := c.leased(ctx, "break lease", name, "", func(ctx context.Context, l *lease.BlobClient) error {
		now := int32(0)
		_, err := l.BreakLease(ctx, &lease.BlobBreakOptions{BreakPeriod: &now})
		if bloberror.HasCode(err, bloberror.LeaseNotPresentWithLeaseOperation, bloberror.LeaseAlreadyBroken) {
			return nil
		}
		return err
	})
	return err
}

// BytesPerRequest is the page blob's bandwidth over its requests, as set: what the service is known to allow. Without limits
// it is the published one's.
func (s *Store) BytesPerRequest() int64 {
	if s.settings.PageRequests > 0 && s.settings.PageBandwidth > 1 {
		return int64(s.settings.PageBandwidth) / int64(s.settings.PageRequests)
	}
	return (60 << 20) / 500
}

// ContainerProtection reads it from the management plane when that is there. The service itself says only that there is a
// policy, not for how long.
func (s *Store) ContainerProtection(ctx context.Context, name string) (blobstore.Protection, error) {
	const op = "container protection"
	var p blobstore.Protection
	if err := blobstore.CheckContainerName(name); err != nil {
		return p, s.wrap(op, name, err)
	}
	if s.opts.Immutability != nil {
		p, err := s.opts.Immutability.ContainerPolicy(ctx, s.account, name)
		if err != nil {
			err = s.wrap(op, name, err)
		}
		return p, err
	}
	c := s.client.NewContainerClient(name)
	_, err := s.call(ctx, call{op: op, name: name}, func(ctx context.Context) error {
		r, err := c.GetProperties(ctx, nil)
		p = blobstore.Protection{LegalHold: value(r.HasLegalHold)}
		if value(r.HasImmutabilityPolicy) {
			p.WriteOnce = 1
		}
		return err
	})
	if errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
		err = s.wrap(op, name, blobstore.ErrNoContainer) // the answer to HEAD may have no code
	}
	return p, err
}

// ProtectContainer needs the management plane: without it the error says what to set by hand.
func (s *Store) ProtectContainer(ctx context.Context, name string, want blobstore.Protection) error {
	const op = "protect container"
	if s.opts.Immutability != nil {
		if err := s.opts.Immutability.ProtectContainer(ctx, s.account, name, want); err != nil {
			return s.wrap(op, name, err)
		}
		return nil
	}
	have, err := s.ContainerProtection(ctx, name)
	if err != nil {
		return err
	}
	// How long a policy is cannot be seen from here: only what needs no length is known to be there.
	if have.WriteOnce >= want.WriteOnce && (have.LegalHold || !want.LegalHold) && !want.Locked {
		return nil
	}
	days := int((want.WriteOnce + 24*time.Hour - 1) / (24 * time.Hour))
	text := fmt.Sprintf("set it by hand: az storage container immutability-policy create --account-name %s --container-name %s --period %d", s.account, name, max(1, days))
	if want.Locked {
		text += ", then lock it (az storage container immutability-policy lock)"
	}
	if want.LegalHold {
		text = fmt.Sprintf("set it by hand: az storage container legal-hold set --account-name %s --container-name %s --tags landfall", s.account, name)
	}
	return s.wrap(op, name, fmt.Errorf("%w: a write-once policy is a right of the management plane; %s", blobstore.ErrPermission, text))
}
