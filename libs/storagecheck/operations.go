package storagecheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// step is one promise of the store.
type step struct {
	what string
	do   func() error
}

// run tries steps in order until one fails: those after it build on it.
func (t *trial) run(name string, steps []step) bool {
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.report.add(name, Fail, "This store cannot hold a replica. If it is an emulator or a gateway, use the service itself.", "%s: %v", s.what, err)
			return false
		}
	}
	t.report.add(name, OK, "", "%d operations behave as promised", len(steps))
	return true
}

// want turns an outcome that is not the wanted one into an error.
func want(err, sentinel error) error {
	if errors.Is(err, sentinel) {
		return nil
	}
	return fmt.Errorf("it should be refused with %q, and was: %w", sentinel.Error(), errOr(err))
}

func errOr(err error) error {
	if err == nil {
		return errors.New("accepted")
	}
	return err
}

// blocks tries what the journal relies on.
func (t *trial) blocks(ctx context.Context) {
	const name = "operations of journals"
	where := ""
	for _, c := range []string{Lineage.JournalContainer(), Lineage.StagingContainer(), Lineage.FailoverContainer()} {
		if t.rights.Allow(blobstore.Create, c, t.name("log/")) {
			where = c
			break
		}
	}
	if where == "" {
		t.report.add(name, Skip, "", "role %s writes no journal", t.o.Role)
		return
	}
	c, blob := t.store.Container(where), t.name("log/")+"-operations"
	body := bytes.Repeat([]byte("landfall"), 1<<13)
	var first blobstore.Properties
	t.run(name, []step{
		{"create-only put", func() (err error) {
			first, err = c.Put(ctx, blob, bytes.NewReader(body), int64(len(body)), blobstore.Conditions{CreateOnly: true})
			if err == nil {
				t.made = append(t.made, [2]string{where, blob})
			}
			return err
		}},
		{"a second create-only put", func() error {
			_, err := c.Put(ctx, blob, bytes.NewReader(body[:8]), 8, blobstore.Conditions{CreateOnly: true})
			if errors.Is(err, blobstore.ErrWriteOnce) {
				return nil
			}
			return want(err, blobstore.ErrExists)
		}},
		{"ranged read", func() error {
			r, p, err := c.Get(ctx, blob, 5, 100)
			if err != nil {
				return err
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			if err == nil && (!bytes.Equal(got, body[5:105]) || p.ETag != first.ETag) {
				err = errors.New("other bytes, or another version, than were put")
			}
			return err
		}},
		{"listing", func() error {
			for p, err := range c.List(ctx, blob, "") {
				if err != nil {
					return err
				}
				if p.Name == blob {
					return nil
				}
			}
			return errors.New("the blob is not listed")
		}},
	})
}

// pages tries what replica disks rely on.
func (t *trial) pages(ctx context.Context) {
	const name = "operations of replica disks"
	where, blob := Lineage.ReplicaContainer(), t.name("disks/")+"-pages.vhd"
	if !t.rights.Allow(blobstore.Write, where, blob) {
		t.report.add(name, Skip, "", "role %s writes no replica disks", t.o.Role)
		return
	}
	c := t.store.Container(where)
	const size = 1 << 20
	data := bytes.Repeat([]byte("disaster"), 1<<9) // 4 KiB
	number, other := int64(41), int64(42)
	lease := blobstore.LeaseID(uuid.NewString())
	cond := blobstore.Conditions{Lease: lease, IfSequence: &number}
	var snapshot blobstore.SnapshotID
	var rest blobstore.Properties
	ok := t.run(name, []step{
		{"create", func() error {
			_, err := c.CreatePages(ctx, blob, size, map[string]string{"landfall": "validate"}, blobstore.Conditions{CreateOnly: true})
			if err == nil {
				t.made = append(t.made, [2]string{where, blob})
			}
			return err
		}},
		{"lease", func() error { return c.AcquireLease(ctx, blob, lease, blobstore.MinLease) }},
		{"a second lease", func() error {
			return want(c.AcquireLease(ctx, blob, blobstore.LeaseID(uuid.NewString()), blobstore.MinLease), blobstore.ErrLeaseConflict)
		}},
		{"set the number", func() error {
			_, err := c.SetSequence(ctx, blob, number, blobstore.Conditions{Lease: lease})
			return err
		}},
		{"write pages", func() error { _, err := c.WritePages(ctx, blob, 8192, data, cond); return err }},
		{"write under another number", func() error {
			_, err := c.WritePages(ctx, blob, 0, data, blobstore.Conditions{Lease: lease, IfSequence: &other})
			return want(err, blobstore.ErrConditionFailed)
		}},
		{"write without the lease", func() error {
			_, err := c.WritePages(ctx, blob, 0, data, blobstore.Conditions{IfSequence: &number})
			return want(err, blobstore.ErrLeaseConflict)
		}},
		{"set the number again", func() (err error) {
			rest, err = c.SetSequence(ctx, blob, other, blobstore.Conditions{Lease: lease})
			return err
		}},
		{"snapshot of that version", func() (err error) {
			snapshot, _, err = c.SnapshotPages(ctx, blob, nil, blobstore.Conditions{IfMatch: rest.ETag})
			return err
		}},
		{"clear pages", func() error {
			_, err := c.ClearPages(ctx, blob, 8192, 4096, blobstore.Conditions{Lease: lease, IfSequence: &other})
			return err
		}},
		{"snapshot of a version that is gone", func() error {
			_, _, err := c.SnapshotPages(ctx, blob, nil, blobstore.Conditions{IfMatch: rest.ETag})
			return want(err, blobstore.ErrConditionFailed)
		}},
		{"read the snapshot", func() error { return expect(ctx, c, blob, snapshot, 8192, data) }},
		{"read the cleared pages", func() error { return expect(ctx, c, blob, "", 8192, make([]byte, len(data))) }},
		{"ranges", func() error {
			for r, err := range c.PageRanges(ctx, blob, snapshot, 0, size) {
				if err != nil {
					return err
				}
				if r.Offset <= 8192 && r.Offset+r.Length >= 8192+4096 && r.Length < size {
					return nil
				}
			}
			return errors.New("the written range is not told")
		}},
		{"release", func() error { return c.ReleaseLease(ctx, blob, lease) }},
	})
	if !ok {
		_ = c.BreakLease(ctx, blob)
	}
}

func expect(ctx context.Context, c blobstore.Container, blob string, snapshot blobstore.SnapshotID, offset int64, want []byte) error {
	got := make([]byte, len(want))
	if err := c.ReadPages(ctx, blob, snapshot, offset, got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("other bytes than were written")
	}
	return nil
}

// parallel is how many requests are in flight while the rate is taken.
const parallel = 4

// speed takes the rates of what the role writes, and the time of a small request.
func (t *trial) speed(ctx context.Context) {
	if t.o.Bytes < 0 {
		return
	}
	t.requestTime(ctx)
	chunk := make([]byte, blobstore.MaxPageWrite)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(chunk)
	n := max(t.o.Bytes/int64(len(chunk)), 1)
	if where := Lineage.StagingContainer(); t.rights.Allow(blobstore.Create, where, "seg/x") {
		c := t.store.Container(where)
		t.report.PutBytesPerSecond = t.rate(ctx, "rate of segments", n, int64(len(chunk)), func(ctx context.Context, i int64) error {
			name := fmt.Sprintf("%s-%d", t.name("seg/"), i)
			_, err := c.Put(ctx, name, bytes.NewReader(chunk), int64(len(chunk)), blobstore.Conditions{CreateOnly: true})
			return err
		})
		for i := range n {
			t.made = append(t.made, [2]string{where, fmt.Sprintf("%s-%d", t.name("seg/"), i)})
		}
	}
	where, blob := Lineage.ReplicaContainer(), t.name("disks/")+"-speed.vhd"
	if !t.rights.Allow(blobstore.Write, where, blob) {
		return
	}
	c := t.store.Container(where)
	if _, err := c.CreatePages(ctx, blob, n*int64(len(chunk)), nil, blobstore.Conditions{CreateOnly: true}); err != nil {
		t.report.add("rate of pages", Fail, "", "%v", err)
		return
	}
	t.made = append(t.made, [2]string{where, blob})
	t.report.PageBytesPerSecond = t.rate(ctx, "rate of pages", n, int64(len(chunk)), func(ctx context.Context, i int64) error {
		_, err := c.WritePages(ctx, blob, i*int64(len(chunk)), chunk, blobstore.Conditions{})
		return err
	})
}

// rate runs n calls, some at once.
func (t *trial) rate(ctx context.Context, name string, n, bytes int64, call func(ctx context.Context, i int64) error) int64 {
	start := t.o.Clock()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i := range n {
		g.Go(func() error { return call(ctx, i) })
	}
	if err := g.Wait(); err != nil {
		t.report.add(name, Fail, "", "%v", err)
		return 0
	}
	perSecond := int64(float64(n*bytes) / max(t.o.Clock().Sub(start).Seconds(), 1e-6))
	t.report.add(name, OK, "", "%d MiB/s with %d requests of %d MiB in flight: an hour moves %d GiB", perSecond>>20, parallel, bytes>>20, perSecond*3600>>30)
	return perSecond
}

// requestTime takes the median of small requests.
func (t *trial) requestTime(ctx context.Context) {
	const n = 15
	var took []time.Duration
	c := t.store.Container(Lineage.ReplicaContainer())
	for range n {
		start := t.o.Clock()
		if _, err := c.Stat(ctx, "validate/none", ""); err != nil && !errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrPermission) {
			t.report.add("request time", Fail, "", "%v", err)
			return
		}
		took = append(took, t.o.Clock().Sub(start))
	}
	slices.Sort(took)
	t.report.RequestTime = took[n/2]
	result := OK
	if took[n/2] > 250*time.Millisecond {
		result = Warn
	}
	t.report.add("request time", result, "Look at the network path, or use an account in a nearer region: deltas wait for a few requests each.",
		"median %s, longest %s", took[n/2].Round(10*time.Microsecond), took[n-1].Round(10*time.Microsecond))
}
