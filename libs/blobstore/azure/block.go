package azure

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/google/uuid"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

const (
	// maxSinglePut is the largest blob sent in one request. One request needs only the right to create; more, as for larger
	// ones, need the right to write.
	maxSinglePut = 256 << 20
	// stagedBlock is the size of the blocks of a larger one.
	stagedBlock = 64 << 20
)

var (
	errNoPages  = fmt.Errorf("%w: is no page blob", blobstore.ErrInvalid)
	errNoBlocks = fmt.Errorf("%w: is a page blob", blobstore.ErrInvalid)
)

// ctr is a blobstore.Container.
type ctr struct {
	s      *Store
	name   string
	client *container.Client
}

// Name is the container's.
func (c *ctr) Name() string { return c.name }

func (c *ctr) key(name string) string { return c.name + "/" + name }

func (c *ctr) wrap(op, name string, err error) error { return c.s.wrap(op, c.key(name), err) }

// begin checks what every call needs.
func (c *ctr) begin(ctx context.Context, op, name string) error {
	err := blobstore.CheckContainerName(c.name)
	if err == nil {
		err = blobstore.CheckBlobName(name)
	}
	if err == nil {
		err = c.s.ready(ctx)
	}
	if err != nil {
		return c.wrap(op, name, err)
	}
	return nil
}

// invalid is an ErrInvalid of this call.
func (c *ctr) invalid(op, name, format string, args ...any) error {
	return c.wrap(op, name, fmt.Errorf("%w: %s", blobstore.ErrInvalid, fmt.Sprintf(format, args...)))
}

// header is metadata as the SDK wants it, with the id of the call.
func header(own map[string]string, id string) map[string]*string {
	out := make(map[string]*string, len(own)+1)
	for k, v := range own {
		out[k] = &v
	}
	if id != "" {
		out[callKey] = &id
	}
	return out
}

// Put sends the body in one request, or in blocks when it is too large for that.
func (c *ctr) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	const op = "put"
	none := blobstore.Properties{}
	if err := c.begin(ctx, op, name); err != nil {
		return none, err
	}
	if cond.IfSequence != nil {
		return none, c.invalid(op, name, "a block blob has no sequence number")
	}
	src, err := newSource(body, size)
	if err != nil {
		return none, c.wrap(op, name, err)
	}
	id := uuid.NewString()
	c.s.infos.drop(c.key(name))
	if cond.Lease != "" { // the emulator takes a lease id where there is no blob
		if _, err := c.head(ctx, op, name, "", cond.Lease); errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
			return none, c.wrap(op, name, fmt.Errorf("%w: no blob", blobstore.ErrLeaseConflict))
		} else if err != nil {
			return none, err
		}
	}
	var p blobstore.Properties
	var lost bool
	if size <= c.s.single {
		p, lost, err = c.putOnce(ctx, op, name, src, id, cond)
	} else {
		p, lost, err = c.putBlocks(ctx, op, name, src, id, cond)
	}
	if err != nil {
		return c.resolvePut(ctx, op, name, id, cond, lost, err)
	}
	return p, nil
}

func (c *ctr) putOnce(ctx context.Context, op, name string, src *source, id string, cond blobstore.Conditions) (p blobstore.Properties, lost bool, err error) {
	b := c.client.NewBlockBlobClient(name)
	lost, err = c.s.call(ctx, call{op: op, name: c.key(name), blob: true, bytes: src.size}, func(ctx context.Context) error {
		return c.s.upload(ctx, src, false, func(ctx context.Context, body io.ReadSeekCloser, sum blob.TransferValidationType) error {
			r, err := b.Upload(ctx, body, &blockblob.UploadOptions{
				Metadata: header(nil, id), TransactionalValidation: sum, AccessConditions: access(cond),
			})
			if r.VersionID != nil {
				c.s.versions.Store(true)
			}
			p = blobstore.Properties{Name: name, Size: src.size, ETag: tag(r.ETag), LastModified: stamp(r.LastModified)}
			return err
		})
	})
	return p, lost, err
}

// putBlocks stages blocks under names of this call only, then makes the blob of them at once.
func (c *ctr) putBlocks(ctx context.Context, op, name string, src *source, id string, cond blobstore.Conditions) (p blobstore.Properties, lost bool, err error) {
	b := c.client.NewBlockBlobClient(name)
	var blocks []string
	for off := int64(0); off < src.size; off += stagedBlock {
		raw := uuid.MustParse(id)
		raw2 := binary.BigEndian.AppendUint64(raw[:], uint64(off))
		block := base64.StdEncoding.EncodeToString(raw2)
		blocks = append(blocks, block)
		n := min(stagedBlock, src.size-off)
		part := src.part(off, n)
		_, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true, bytes: n}, func(ctx context.Context) error {
			return c.s.upload(ctx, part, false, func(ctx context.Context, body io.ReadSeekCloser, sum blob.TransferValidationType) error {
				_, err := b.StageBlock(ctx, block, body, &blockblob.StageBlockOptions{
					TransactionalValidation: sum, LeaseAccessConditions: access(cond).LeaseAccessConditions,
				})
				return err
			})
		})
		if err != nil {
			return p, false, err
		}
	}
	lost, err = c.s.call(ctx, call{op: op, name: c.key(name), blob: true}, func(ctx context.Context) error {
		r, err := b.CommitBlockList(ctx, blocks, &blockblob.CommitBlockListOptions{Metadata: header(nil, id), AccessConditions: access(cond)})
		p = blobstore.Properties{Name: name, Size: src.size, ETag: tag(r.ETag), LastModified: stamp(r.LastModified)}
		return err
	})
	return p, lost, err
}

// resolvePut decides what became of a put that was refused: the refusal may be the trace of an earlier try whose answer was
// lost, and one who may only create is refused by a right, or by a write-once policy, where others are by the condition.
func (c *ctr) resolvePut(ctx context.Context, op, name, id string, cond blobstore.Conditions, lost bool, err error) (blobstore.Properties, error) {
	none := blobstore.Properties{}
	overwrite := cond.CreateOnly && (errors.Is(err, blobstore.ErrPermission) || errors.Is(err, blobstore.ErrWriteOnce))
	if !refused(err) || !lost && !overwrite {
		return none, err
	}
	st, herr := c.head(ctx, op, name, "", "")
	switch {
	case herr == nil && st.call == id:
		return st.Properties, nil
	case herr == nil && overwrite:
		return none, c.wrap(op, name, blobstore.ErrExists)
	case !lost, errors.Is(err, blobstore.ErrExists), errors.Is(err, blobstore.ErrLeaseConflict):
		return none, err
	case errors.Is(herr, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrConditionFailed):
		return none, err
	}
	// It may have been done, and then overwritten or deleted.
	return none, unknown(err)
}

// Stat asks for the properties.
func (c *ctr) Stat(ctx context.Context, name string, snapshot blobstore.SnapshotID) (blobstore.Properties, error) {
	const op = "stat"
	if err := c.begin(ctx, op, name); err != nil {
		return blobstore.Properties{}, err
	}
	if err := c.checkSnapshot(op, name, snapshot); err != nil {
		return blobstore.Properties{}, err
	}
	st, err := c.head(ctx, op, name, snapshot, "")
	return st.Properties, err
}

// Delete removes the blob with its snapshots. A condition on the sequence number is bound to the ETag that was read with it.
func (c *ctr) Delete(ctx context.Context, name string, cond blobstore.Conditions) error {
	const op = "delete"
	if err := c.begin(ctx, op, name); err != nil {
		return err
	}
	if cond.CreateOnly {
		return c.invalid(op, name, "create-only")
	}
	b := c.client.NewBlobClient(name)
	include := blob.DeleteSnapshotsOptionTypeInclude
	return c.bound(ctx, op, name, cond, func(cond blobstore.Conditions) (bool, error) {
		lost, err := c.s.call(ctx, call{op: op, name: c.key(name), blob: true}, func(ctx context.Context) error {
			_, err := b.Delete(ctx, &blob.DeleteOptions{DeleteSnapshots: &include, AccessConditions: access(cond)})
			return err
		})
		if errors.Is(err, blobstore.ErrConditionFailed) { // some say so of a blob that is not there
			if _, herr := c.head(ctx, op, name, "", ""); errors.Is(herr, blobstore.ErrNotFound) {
				err = herr
			}
		}
		if err == nil || lost && errors.Is(err, blobstore.ErrNotFound) && !errors.Is(err, blobstore.ErrNoContainer) {
			c.s.infos.drop(c.key(name))
			return lost, nil
		}
		return lost, err
	})
}

// maxContention bounds how often a call bound to an ETag is begun anew because somebody writes.
const maxContention = 100

// bound runs a call that the service cannot condition on the sequence number: the number is read, and the call bound to the
// ETag read with it. do tells whether a try was lost.
func (c *ctr) bound(ctx context.Context, op, name string, cond blobstore.Conditions, do func(cond blobstore.Conditions) (lost bool, err error)) error {
	if cond.IfSequence == nil {
		lost, err := do(cond)
		if lost && errors.Is(err, blobstore.ErrConditionFailed) {
			return unknown(err)
		}
		return err
	}
	for range maxContention {
		st, err := c.head(ctx, op, name, "", "")
		if err != nil {
			return err
		}
		if !st.IsPages || st.Sequence != *cond.IfSequence || cond.IfMatch != "" && st.ETag != cond.IfMatch {
			return c.wrap(op, name, blobstore.ErrConditionFailed)
		}
		now := blobstore.Conditions{IfMatch: st.ETag, Lease: cond.Lease}
		lost, err := do(now)
		switch {
		case err == nil || !errors.Is(err, blobstore.ErrConditionFailed):
			return err
		case lost:
			return unknown(err)
		}
	}
	return c.wrap(op, name, fmt.Errorf("written to all the time, %d attempts met another version", maxContention))
}
