package azure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"regexp"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/pageblob"
	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// snapshotForm is how the service names snapshots: a time, of one width, so that ids sort by age.
var snapshotForm = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{7}Z$`)

// checkSnapshot answers for ids that no snapshot can have.
func (c *ctr) checkSnapshot(op, name string, id blobstore.SnapshotID) error {
	if id == "" || snapshotForm.MatchString(string(id)) {
		return nil
	}
	return c.wrap(op, name, fmt.Errorf("%w: snapshot %q", blobstore.ErrNotFound, id))
}

// version is a client of the blob or of its snapshot. Never write through it: the emulator writes to the base blob.
func (c *ctr) version(op, name string, snapshot blobstore.SnapshotID) (*blob.Client, error) {
	b := c.client.NewBlobClient(name)
	if snapshot == "" {
		return b, nil
	}
	if err := c.checkSnapshot(op, name, snapshot); err != nil {
		return nil, err
	}
	v, err := b.WithSnapshot(string(snapshot))
	if err != nil {
		return nil, c.wrap(op, name, err)
	}
	return v, nil
}

// CreatePages makes a page blob, with sequence number 0.
func (c *ctr) CreatePages(ctx context.Context, name string, size int64, md map[string]string, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "create pages"
	none := blobstore.Properties{}
	if err := c.begin(ctx, op, name); err != nil {
		return none, err
	}
	if err := errors.Join(blobstore.CheckPageBlobSize(size), blobstore.CheckMetadata(md)); err != nil {
		return none, c.wrap(op, name, err)
	}
	if _, taken := md[callKey]; taken {
		return none, c.invalid(op, name, "metadata key %s is reserved", callKey)
	}
	if cond.IfMatch != "" || cond.IfSequence != nil || cond.Lease != "" { // conditions that only an existing blob can meet
		_, err := c.head(ctx, op, name, "", "")
		switch {
		case err == nil:
			err = c.wrap(op, name, blobstore.ErrExists)
		case errors.Is(err, blobstore.ErrNoContainer) || !errors.Is(err, blobstore.ErrNotFound):
		case cond.Lease != "":
			err = c.wrap(op, name, blobstore.ErrLeaseConflict)
		default:
			err = c.wrap(op, name, blobstore.ErrConditionFailed)
		}
		return none, err
	}
	cond.CreateOnly = true
	id, zero := uuid.NewString(), int64(0)
	b := c.client.NewPageBlobClient(name)
	i := info{size: size, metadata: maps.Clone(md)}
	if len(md) == 0 {
		i.metadata = nil
	}
	var p blobstore.Properties
	lost, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true}, func(ctx context.Context) error {
		r, err := b.Create(ctx, size, &pageblob.CreateOptions{SequenceNumber: &zero, Metadata: header(md, id), AccessConditions: access(cond)})
		if err == nil {
			c.s.infos.put(c.key(name), i)
			p = c.written(name, i, r.ETag, r.LastModified, &zero)
		}
		return err
	})
	if err != nil {
		return c.resolvePut(ctx, op, name, id, cond, lost, err)
	}
	return p, nil
}

// inside returns what is known of the blob when the range is pages of it.
func (c *ctr) inside(ctx context.Context, op, name string, offset, length int64, cond blobstore.Conditions) (info, error) {
	if err := c.begin(ctx, op, name); err != nil {
		return info{}, err
	}
	if cond.CreateOnly {
		return info{}, c.invalid(op, name, "create-only")
	}
	i, err := c.pageInfo(ctx, op, name)
	if err != nil {
		return i, err
	}
	if err := blobstore.CheckPages(offset, length, i.size); err != nil {
		c.s.infos.drop(c.key(name)) // it may have been made again with another size
		if i, err = c.pageInfo(ctx, op, name); err != nil {
			return i, err
		}
	}
	if err := blobstore.CheckPages(offset, length, i.size); err != nil {
		return i, c.wrap(op, name, err)
	}
	return i, nil
}

// WritePages is one Put Page, repeated until answered: the same bytes at the same place under the same conditions.
func (c *ctr) WritePages(ctx context.Context, name string, offset int64, data []byte, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "write pages"
	none := blobstore.Properties{}
	if len(data) > blobstore.MaxPageWrite {
		return none, c.invalid(op, name, "%d bytes, at most %d", len(data), blobstore.MaxPageWrite)
	}
	i, err := c.inside(ctx, op, name, offset, int64(len(data)), cond)
	if err != nil {
		return none, err
	}
	src, b := bytesSource(data), c.client.NewPageBlobClient(name)
	var p blobstore.Properties
	lost, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true, bytes: src.size}, func(ctx context.Context) error {
		return c.s.upload(ctx, src, true, func(ctx context.Context, body io.ReadSeekCloser, sum blob.TransferValidationType) error {
			r, err := b.UploadPages(ctx, body, blob.HTTPRange{Offset: offset, Count: src.size}, &pageblob.UploadPagesOptions{
				TransactionalValidation: sum, AccessConditions: access(cond), SequenceNumberAccessConditions: sequence(cond),
			})
			if err == nil {
				p = c.written(name, i, r.ETag, r.LastModified, r.BlobSequenceNumber)
			}
			return err
		})
	})
	if err != nil {
		return c.resolvePages(ctx, op, name, cond, lost, err, func() (bool, error) {
			buf := make([]byte, len(data))
			err := c.ReadPages(ctx, name, "", offset, buf)
			return string(buf) == string(data), err
		})
	}
	return p, nil
}

// ClearPages is one Put Page with the action clear.
func (c *ctr) ClearPages(ctx context.Context, name string, offset, length int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "clear pages"
	i, err := c.inside(ctx, op, name, offset, length, cond)
	if err != nil {
		return blobstore.Properties{}, err
	}
	b := c.client.NewPageBlobClient(name)
	var p blobstore.Properties
	lost, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true}, func(ctx context.Context) error {
		r, err := b.ClearPages(ctx, blob.HTTPRange{Offset: offset, Count: length}, &pageblob.ClearPagesOptions{
			AccessConditions: access(cond), SequenceNumberAccessConditions: sequence(cond),
		})
		if err == nil {
			p = c.written(name, i, r.ETag, r.LastModified, r.BlobSequenceNumber)
		}
		return err
	})
	if err != nil {
		return c.resolvePages(ctx, op, name, cond, lost, err, func() (bool, error) {
			for _, err := range c.PageRanges(ctx, name, "", offset, length) {
				return false, err
			}
			return true, nil
		})
	}
	return p, nil
}

// resolvePages decides what became of a page write that was refused after a try was lost. Under IfMatch its own first try
// moved the ETag: then the pages tell. Other conditions that fail now are true refusals: whoever changed the number or took
// the lease did it after the write, which the caller must not rely on anyway.
func (c *ctr) resolvePages(ctx context.Context, op, name string, cond blobstore.Conditions, lost bool, err error, there func() (bool, error)) (blobstore.Properties, error) {
	none := blobstore.Properties{}
	c.forget(name, err)
	if !lost || cond.IfMatch == "" || !errors.Is(err, blobstore.ErrConditionFailed) {
		return none, err
	}
	st, herr := c.head(ctx, op, name, "", cond.Lease)
	if herr != nil || cond.IfSequence != nil && st.Sequence != *cond.IfSequence {
		return none, unknown(err)
	}
	if same, rerr := there(); rerr != nil || !same {
		return none, unknown(err)
	}
	return st.Properties, nil
}

// PageRanges pages through the service's list, joins neighbours and cuts at the ends of the range asked for.
func (c *ctr) PageRanges(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset, length int64) iter.Seq2[blobstore.PageRange, error] {
	const op = "page ranges"
	return func(yield func(blobstore.PageRange, error) bool) {
		fail := func(err error) { yield(blobstore.PageRange{}, err) }
		if err := c.begin(ctx, op, name); err != nil {
			fail(err)
			return
		}
		if err := c.checkSnapshot(op, name, snapshot); err != nil {
			fail(err)
			return
		}
		if offset < 0 || length <= 0 { // nothing to list; the SDK takes a count of 0 for all
			st, err := c.head(ctx, op, name, snapshot, "")
			if err == nil && !st.IsPages {
				err = c.wrap(op, name, errNoPages)
			}
			if err == nil {
				if err = blobstore.CheckRange(offset, length, st.Size); err != nil {
					err = c.wrap(op, name, err)
				}
			}
			if err != nil {
				fail(err)
			}
			return
		}
		c.pageRanges(ctx, name, snapshot, offset, length, yield)
	}
}

func (c *ctr) pageRanges(ctx context.Context, name string, snapshot blobstore.SnapshotID, offset, length int64, yield func(blobstore.PageRange, error) bool) {
	const op = "page ranges"
	o := &pageblob.GetPageRangesOptions{Range: blob.HTTPRange{Offset: offset, Count: length}, AccessConditions: access(blobstore.Conditions{})}
	if snapshot != "" {
		id := string(snapshot)
		o.Snapshot = &id
	}
	b := c.client.NewPageBlobClient(name)
	end, open := offset+length, blobstore.PageRange{}
	for more := true; more; more = value(o.Marker) != "" {
		var page pageblob.GetPageRangesResponse
		_, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true}, func(ctx context.Context) (err error) {
			page, err = b.NewGetPageRangesPager(o).NextPage(ctx) // one per try: a pager that failed once fails for ever
			return err
		})
		o.Marker = page.NextMarker
		if err == nil {
			if err = blobstore.CheckRange(offset, length, value(page.BlobContentLength)); err != nil {
				err = c.wrap(op, name, err)
			}
		}
		if err != nil {
			yield(blobstore.PageRange{}, err)
			return
		}
		for _, r := range page.PageRange {
			from, to := max(offset, value(r.Start)), min(end, value(r.End)+1)
			switch {
			case from >= to:
			case open.Length > 0 && from <= open.Offset+open.Length:
				open.Length = max(open.Length, to-open.Offset)
			default:
				if open.Length > 0 && !yield(open, nil) {
					return
				}
				open = blobstore.PageRange{Offset: from, Length: to - from}
			}
		}
	}
	if open.Length > 0 {
		yield(open, nil)
	}
}

// SetSequence sends "max" when the number is not below the last one known, so that a request that was thought lost and comes
// late cannot set it back, else "update". Under IfSequence, which the service does not have here, it is bound to the ETag.
func (c *ctr) SetSequence(ctx context.Context, name string, n int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "set sequence"
	none := blobstore.Properties{}
	if err := c.begin(ctx, op, name); err != nil {
		return none, err
	}
	if n < 0 || cond.CreateOnly {
		return none, c.invalid(op, name, "sequence number %d, create-only %t", n, cond.CreateOnly)
	}
	i, err := c.pageInfo(ctx, op, name)
	if err != nil {
		return none, err
	}
	var p blobstore.Properties
	err = c.bound(ctx, op, name, cond, func(cond blobstore.Conditions) (bool, error) {
		var lost bool
		p, lost, err = c.setSequence(ctx, op, name, n, i, cond)
		if lost && errors.Is(err, blobstore.ErrConditionFailed) && cond.Lease != "" {
			// Nobody else can have written while the lease is ours: the ETag was moved by our lost try if the number is there.
			if st, herr := c.head(ctx, op, name, "", cond.Lease); herr == nil && st.Sequence == n {
				p, err = st.Properties, nil
			}
		}
		return lost, err
	})
	if err != nil {
		c.forget(name, err)
		return none, err
	}
	return p, nil
}

func (c *ctr) setSequence(ctx context.Context, op, name string, n int64, i info, cond blobstore.Conditions) (p blobstore.Properties, lost bool, err error) {
	b := c.client.NewPageBlobClient(name)
	if now, ok := c.s.infos.get(c.key(name)); ok {
		i = now
	}
	action := pageblob.SequenceNumberActionTypeMax
	if n < i.sequence {
		action = pageblob.SequenceNumberActionTypeUpdate
	}
	for {
		was, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true}, func(ctx context.Context) error {
			r, err := b.UpdateSequenceNumber(ctx, &pageblob.UpdateSequenceNumberOptions{ActionType: &action, SequenceNumber: &n, AccessConditions: access(cond)})
			if err == nil {
				p = c.written(name, i, r.ETag, r.LastModified, r.BlobSequenceNumber)
			}
			return err
		})
		lost = lost || was
		if err != nil || p.Sequence == n || action == pageblob.SequenceNumberActionTypeUpdate {
			return p, lost, err
		}
		// It was higher than known: the caller wants it lower.
		action = pageblob.SequenceNumberActionTypeUpdate
		if cond.IfMatch != "" {
			cond.IfMatch = p.ETag
		}
	}
}

// SnapshotPages may leave a snapshot that nobody knows when an answer is lost.
func (c *ctr) SnapshotPages(ctx context.Context, name string, md map[string]string, cond blobstore.Conditions) (blobstore.SnapshotID, blobstore.Properties, error) {
	const op = "snapshot"
	none := blobstore.Properties{}
	if err := c.begin(ctx, op, name); err != nil {
		return "", none, err
	}
	if err := blobstore.CheckMetadata(md); err != nil {
		return "", none, c.wrap(op, name, err)
	}
	if cond.CreateOnly {
		return "", none, c.invalid(op, name, "create-only")
	}
	if _, err := c.pageInfo(ctx, op, name); err != nil {
		return "", none, err
	}
	o := &blob.CreateSnapshotOptions{}
	if md != nil {
		// No metadata at all would copy the blob's.
		o.Metadata = header(md, "snapshot")
	}
	b := c.client.NewBlobClient(name)
	var id blobstore.SnapshotID
	err := c.bound(ctx, op, name, cond, func(cond blobstore.Conditions) (bool, error) {
		o.AccessConditions = access(cond)
		lost, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true}, func(ctx context.Context) error {
			r, err := b.CreateSnapshot(ctx, o)
			id = blobstore.SnapshotID(value(r.Snapshot))
			return err
		})
		if lost && errors.Is(err, blobstore.ErrConditionFailed) {
			return false, err // a snapshot does not move the ETag: this is somebody else's doing
		}
		return lost, err
	})
	if err != nil {
		c.forget(name, err)
		return "", none, err
	}
	st, err := c.head(ctx, op, name, id, "")
	return id, st.Properties, err
}

// DeleteSnapshot removes one.
func (c *ctr) DeleteSnapshot(ctx context.Context, name string, snapshot blobstore.SnapshotID) error {
	const op = "delete snapshot"
	if err := c.begin(ctx, op, name); err != nil {
		return err
	}
	if snapshot == "" {
		return c.invalid(op, name, "no snapshot named")
	}
	b, err := c.version(op, name, snapshot)
	if err != nil {
		return err
	}
	lost, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, pages: true}, func(ctx context.Context) error {
		_, err := b.Delete(ctx, nil)
		return err
	})
	if lost && errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
		return nil
	}
	return err
}
