package catalogue

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Catalogue is the container in one store. It is safe for concurrent use and holds no state.
type Catalogue struct {
	store blobstore.Store
	c     blobstore.Container
}

// Open returns the catalogue of a store, without asking the store.
func Open(store blobstore.Store) *Catalogue {
	return &Catalogue{store: store, c: store.Container(Container)}
}

// VersionOf is what was read of a record, for a later Put. The zero Version is "there is none".
type VersionOf struct {
	etag     blobstore.ETag
	revision uint64
}

// Get reads a record by its blob name; nil with the zero version when there is none. Of a damaged or newer record the
// version is returned beside the error (ErrInvalid, ErrNewer): a damaged one may be replaced, a newer one must not.
func (c *Catalogue) Get(ctx context.Context, name string) (*Record, VersionOf, error) {
	raw, etag, err := c.read(ctx, name)
	if errors.Is(err, blobstore.ErrNotFound) {
		return nil, VersionOf{}, nil
	}
	if err != nil {
		return nil, VersionOf{}, fmt.Errorf("read catalogue record %s: %w", name, err)
	}
	v := VersionOf{etag: etag}
	r, err := Decode(raw)
	if err == nil && r.Name() != name {
		err = fmt.Errorf("it describes %s: %w", r.Name(), ErrInvalid)
	}
	if err != nil {
		return nil, v, fmt.Errorf("read catalogue record %s: %w", name, err)
	}
	v.revision = r.Revision
	return r, v, nil
}

func (c *Catalogue) read(ctx context.Context, name string) ([]byte, blobstore.ETag, error) {
	rc, props, err := c.c.Get(ctx, name, 0, -1)
	if err != nil {
		return nil, "", err
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, maxRecord+1))
	return raw, props.ETag, err
}

// Put writes a record if it is still at the version that was read, and returns the new version: ErrStale otherwise. Its
// revision is set to one more than that version's. An error that is none of the sentinels leaves the outcome open: read again.
func (c *Catalogue) Put(ctx context.Context, r *Record, on VersionOf) (VersionOf, error) {
	r.Revision = on.revision + 1
	raw, err := r.Encode()
	if err != nil {
		return VersionOf{}, err
	}
	cond := blobstore.Conditions{IfMatch: on.etag, CreateOnly: on.etag == ""}
	put := func() (blobstore.Properties, error) {
		return c.c.Put(ctx, r.Name(), bytes.NewReader(raw), int64(len(raw)), cond)
	}
	props, err := put()
	if errors.Is(err, blobstore.ErrNotFound) && on.etag == "" { // there is no container yet
		if cerr := c.store.CreateContainer(ctx, Container); cerr != nil {
			return VersionOf{}, fmt.Errorf("make container %s: %w", Container, cerr)
		}
		props, err = put()
	}
	switch {
	case err == nil:
		return VersionOf{etag: props.ETag, revision: r.Revision}, nil
	case errors.Is(err, blobstore.ErrExists), errors.Is(err, blobstore.ErrConditionFailed), errors.Is(err, blobstore.ErrNotFound):
		return VersionOf{}, fmt.Errorf("write catalogue record %s: %w", r.Name(), ErrStale)
	}
	return VersionOf{}, fmt.Errorf("write catalogue record %s: %w", r.Name(), err)
}

// Problem is a record that cannot be read. It hides no other.
type Problem struct {
	Name string
	Err  error
}

// Contents is all of the catalogue.
type Contents struct {
	// Records by blob name, ended ones too.
	Records []*Record
	// Problems are what could not be read, and objects that are no records.
	Problems []Problem
}

// listParallel is how many records are read at once.
const listParallel = 8

// Names yields the blob names that begin with prefix, in order; none when there is no catalogue.
func (c *Catalogue) Names(ctx context.Context, prefix string) ([]string, error) {
	var names []string
	for p, err := range c.c.List(ctx, prefix, "") {
		if errors.Is(err, blobstore.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list the catalogue: %w", err)
		}
		if names = append(names, p.Name); len(names) > maxRecords {
			return nil, fmt.Errorf("the catalogue has more than %d records: %w", maxRecords, ErrInvalid)
		}
	}
	return names, nil
}

// List reads all records whose blob name begins with prefix. Only an error of listing the container is one of List.
func (c *Catalogue) List(ctx context.Context, prefix string) (*Contents, error) {
	names, err := c.Names(ctx, prefix)
	if err != nil {
		return nil, err
	}
	type result struct {
		r   *Record
		err error
	}
	results := make([]result, len(names))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(listParallel)
	for i, name := range names {
		group.Go(func() error {
			r, _, err := c.Get(gctx, name)
			if gctx.Err() != nil {
				return gctx.Err()
			}
			results[i] = result{r, err}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, fmt.Errorf("list the catalogue: %w", err)
	}
	out := &Contents{}
	for i, res := range results {
		switch {
		case res.err != nil:
			out.Problems = append(out.Problems, Problem{Name: names[i], Err: res.err})
		case res.r != nil: // else it went meanwhile
			out.Records = append(out.Records, res.r)
		}
	}
	return out, nil
}

// ParseVMName takes the blob name of a protection apart.
func ParseVMName(name string) (site, vm, lineage string, ok bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 5 || parts[0] != "sites" || parts[2] != "vms" {
		return "", "", "", false
	}
	lineage, ok = strings.CutSuffix(parts[4], ".json")
	ok = ok && sitePattern.MatchString(parts[1]) && vmPattern.MatchString(parts[3]) && lineagePattern.MatchString(lineage)
	return parts[1], parts[3], lineage, ok
}

// ended is r, ended at a time.
func (r *Record) ended(at time.Time) *Record {
	e := *r
	e.Ended = at
	return &e
}
